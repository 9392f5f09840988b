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
# # Noise and prior
#
# **You will learn** how the noise level is inferred, how to change the prior of K after
# training, and what happens when x is unlike anything the network has seen.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch

from sbi_slotflow import calibration, load_pretrained, plots, problems
from sbi_slotflow.seeding import generator_for

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_SIGNALS, NUM_DRAWS = (5, 100) if FAST else (60, 500)

# %% [markdown]
# ## The noise level is a parameter
#
# In the sinusoid problems sigma is shared by all components, unknown, and part of
# theta: its column comes right after K. The network infers it with the rest. Here for
# signals of the `tiny` problem with sigma between 0.1 and 1.

# %%
tiny = problems.sinusoids("tiny")
posterior = load_pretrained("sinusoids-tiny")
theta = tiny.prior.sample((NUM_SIGNALS,), generator_for(0))
x = tiny.simulator(theta, generator_for(1))
samples = posterior.sample_batched((NUM_DRAWS,), x, generator=generator_for(2))
sigma = tiny.layout.unpack(samples).shared[..., 0]
low, middle, high = sigma.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
true = theta[:, 1]

figure, axes = plt.subplots(figsize=(4.5, 3.5), layout="constrained")
axes.errorbar(true, middle, (middle - low, high - middle), fmt=".", lw=0.8)
axes.plot([0, 1.05], [0, 1.05], color="grey", lw=0.8)
axes.set(xlabel="true sigma", ylabel="posterior of sigma, 90 %")
inside = ((low < true) & (true < high)).double().mean()
print(f"{inside:.0%} of the true values are inside their 90 % intervals")

# %% [markdown]
# 90 % inside is what was asked for; with 60 signals anything from 82 to 98 % would be
# no surprise. The intervals grow with sigma, as they should: what T samples can tell
# about a noise level is a share of it, about 1 / sqrt(2 T) if the signal is known.

# %%
relative = (sigma.std(0) / true).mean()
print(f"posterior width over sigma: {relative:.4f}")
print(f"1 / sqrt(2 T), the bound for {tiny.num_data} samples: {(2 * 300) ** -0.5:.4f}")

# %% [markdown]
# The network's intervals are 1 % wider than the bound, which unknown components explain
# (each uses up three of 300 samples).
#
# ## Another prior of K
#
# A network is trained under one prior of K; you may believe in another. Weights that
# fall with K, say: half as probable for each further component. No retraining is
# needed: `with_cardinality_prior` multiplies p(K | x) by the new prior over the old.

# %%
crowded = problems.sinusoids("crowded")
trained = load_pretrained("sinusoids-crowded")
five = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
theta = crowded.prior.with_cardinality(five).sample((1,), generator_for(28, 0))
x = crowded.simulator(theta, generator_for(28, 1))[0]
sparing = trained.with_cardinality_prior([0.5**k for k in range(11)])
plots.plot_cardinality(
    sparing.cardinality(x),
    5,
    reference=trained.cardinality(x),
    labels=("half as probable each", "uniform"),
)

# %% [markdown]
# Four components gain, five lose. The data have not changed; where they leave K open,
# the prior matters. For a signal with strong components only, both bars would be the
# same.
#
# A weight of zero excludes a cardinality, and the result is a posterior like any other:
# `sample`, `log_prob`, `catalogue` and `refine` all use the new prior.

# %%
for name, one in {"uniform": trained, "half as probable each": sparing}.items():
    table = one.catalogue(x, num_samples=2 * NUM_DRAWS, generator=generator_for(3))
    print(name)
    print(table.to_dataframe()[["existence", "frequency", "amplitude"]].round(3))

# %% [markdown]
# The three certain sources do not care about the prior. The doubtful ones near 2.80 and
# 2.99 Hz lose a fifth and two fifths of their probability. (The other rows are faint
# components that may be anywhere in the band.)
#
# ## Data from elsewhere
#
# A network answers for every x, also where it never learnt to. The shipped weights come
# with a summary of their training data, and `sample` warns of an x that is unlike them.
# Five changes of the signal above:

# %%
noise = torch.randn(crowded.num_data, generator=generator_for(4))
time_axis = torch.cat([grid.times for grid in crowded.grids]).float()
changed = {
    "as it is": x,
    "ten times as loud": 10 * x,
    "a constant added": x + 1.0,
    "a tone at 1 Hz added": x + torch.cos(2 * torch.pi * time_axis),
    "one sample spoilt": torch.where(torch.arange(len(x)) == 1_000, 30.0, x),
    "a gap of 30 s": torch.where((time_axis > 100) & (time_axis < 130), 0.0, x),
}
reference = trained.training_reference
for name, one in changed.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.sample((1,), one)
    k = trained.cardinality(one).probs.argmax()
    p = float(reference.p_values(one)[0])
    said = "warned" if caught else "silent"
    print(f"{name:22s} p = {p:.4f}  {said}   most probable K = {int(k)}")

# %% [markdown]
# Four changes are noticed, with the least p-value that 2,000 reference signals allow.
# Of the ten times louder signal the network would have said K = 10, and a constant
# would have cost it a component.
#
# The gap is not, and it matters: the most probable K goes from four to six. The p-value
# of 0.04 is small, but one in 25 signals of the prior has one as small; to warn below
# 0.001 only is what keeps false alarms rare. Such a warning is a smoke detector. No
# smoke is no proof: if your data have gaps, train on data with gaps.

# %%
reference.check(torch.stack(list(changed.values()))).plot()

# %% [markdown]
# Grey: how far training data are from each other. The lines are the six signals; the
# four that were warned of are far to the right.
#
# For weights that you train yourself, make a reference from training data:

# %%
theta = tiny.prior.sample((2_000,), generator_for(5))
own = calibration.TrainingReference.fit(tiny.simulator(theta, generator_for(6)))
posterior.set_training_reference(own)
print(
    "p-values of new signals:", own.p_values(tiny.simulator(theta[:5])).numpy().round(2)
)

# %% [markdown]
# ## What to read next
#
# - `04_real_data`: data for which the noise model is wrong.
# - `03_exact_answers`: what sigma and K are exactly.
