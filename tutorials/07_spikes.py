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
# # Spikes: another problem from end to end
#
# **You will learn** how to train slots that are anchored in time, how far a short
# training on one CPU core gets you, and how to mend the rest.
#
# The trace holds K pulses, each with a time, a width and an amplitude, in white noise
# of unknown level: photons on a detector, neurons near an electrode. Pulses may overlap
# and the weakest drown, so that K is uncertain for good reasons.

# %%
import os

import torch

from sbi_slotflow import SlotNPE, calibration, plots, problems, rjmcmc, slot_nn
from sbi_slotflow.seeding import generator_for

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_SIMULATIONS, NUM_PAIRS = (320, 20) if FAST else (6_400, 100)
NUM_DRAWS, BURN_IN = (5, 5) if FAST else (500, 2_000)

problem = problems.spikes(max_cardinality=4)
problem.layout.names[:8]

# %% [markdown]
# ## Train
#
# A pulse sits somewhere in time, and `problems.spikes` says so: its time axis is cut
# into 64 cells, the encoder keeps one token for each, and every slot is anchored at a
# cell. Nothing is pooled away, so a pulse's time can be read to a fraction of a cell.
# `refine_slots=2` adds two Gauss-Newton steps inside the network, from the cell to
# the best fit.
#
# `train_online` simulates a new batch for every step. Its state is kept in a file: a
# run that was stopped goes on from there, and ends as if it never had been.

# %%
build = slot_nn(problem, refine_slots=2, weighed_sets=8 if FAST else 512)
trainer = SlotNPE(problem.prior, build)
trainer.train_online(
    problem.simulator,
    num_simulations=NUM_SIMULATIONS,
    batch_size=64,
    num_validation=256,
    validate_every=20,
    checkpoint="spikes.safetensors",
)
plots.plot_training(trainer.history)

# %% [markdown]
# 100 steps of 64 simulations. K comes out right for 82 % of the validation signals. The
# noise level hardly improves: it is read from what the Gauss-Newton fit leaves, which
# is good from the start. The training values are means over 20 steps, hence their
# jumps.
#
# ## A trace with three pulses, two of which overlap

# %%
posterior = trainer.build_posterior()
truth = problem.layout.pack(
    torch.tensor(3),
    torch.tensor(
        [[0.30, 0.015, 1.5], [0.345, 0.012, 1.0], [0.7, 0.02, 0.6], [0, 0, 0]]
    ),
    torch.tensor([0.3]),
)
x = problem.simulator(truth, generator_for(1))
samples = posterior.sample((2_000,), x, generator=generator_for(2))
plots.plot_reconstruction(problem, samples, x, truth, max_points=512)

# %%
print("p(K | x), K = 0..4:", posterior.cardinality(x).probs.numpy().round(2))
plots.plot_cardinality(posterior.cardinality(x), true_cardinality=3)

# %% [markdown]
# Three is the most probable number. The network gives 0.25 to two: the pair could be
# one pulse. Here are the sources, and the posterior given three:

# %%
columns = ["existence", "time", "time_low", "time_high", "width", "amplitude"]
posterior.catalogue(samples=samples).to_dataframe()[columns].round(3)

# %%
three = posterior.sample((2_000,), x, k=3, generator=generator_for(3))
plots.plot_corner(three, problem.layout, 3, truth, names=["time", "amplitude"])

# %% [markdown]
# All true times lie inside their intervals, and the pair is told apart. (The amplitude
# of the third pulse leans on 0.5, the least that the prior allows.)
#
# ## Is it any good?
#
# Two independent answers. First, on simulated truths (see `02_do_i_believe_it`):

# %%
draws = calibration.draw(posterior, problem, n=NUM_PAIRS, seed=1)
for check in (calibration.cardinality_reliability(draws), calibration.coverage(draws)):
    print(check)
print(
    "most probable K is the true one:",
    calibration.cardinality_reliability(draws).accuracy,
)

# %% [markdown]
# Both pass. With 100 signals that excludes gross faults only, see
# `02_do_i_believe_it` for a sharper test.
#
# Second, against the exact posterior of this very trace. The likelihood is known, so
# the draws can be weighted to follow the exact posterior (see `03_exact_answers`):

# %%
refined = posterior.refine(problem.log_likelihood, x, 4_000, generator=generator_for(3))
print(f"effective draws {refined.ess:.0f} of 4,000, k-hat {refined.pareto_k:.2f}")
print("p(K | x), K = 0..4:", refined.cardinality().probs.numpy().round(2))

# %% [markdown]
# Believe weights if k-hat is below 0.7. Here it is not: k-hat is the largest of all K,
# and of one of them the network draws what matters too seldom. But given its time and
# width a pulse is linear in its amplitude, `problems.spikes` says so, and there is an
# exact sampler for that. Its chains begin at draws of the network:

# %%
exact = rjmcmc.collapsed(
    problem, x, start=posterior, num_draws=NUM_DRAWS, burn_in=BURN_IN
)
print(f"R-hat {exact.diagnostics.worst_rhat:.3f}, converged: {exact.converged}")
print("p(K | x), K = 0..4:", exact.cardinality().probs.numpy().round(2))
plots.plot_cardinality(
    posterior.cardinality(x),
    3,
    reference=exact.cardinality(),
    labels=("network", "exact"),
)

# %% [markdown]
# The exact posterior is sure of at least three (0.90 for three, 0.10 for four). So the
# 0.25 on two was the network's lack of training, not a doubt that the data leave. The
# weights had mended most of it, and gave four half of its due, as k-hat had warned.
#
# ## What helps
#
# - More simulations. This run had 6,400; ten times as many are within reach of one
#   core, and a GPU (`SlotNPE(..., device="cuda")`) does more.
# - `refine`, wherever there is a likelihood, and `rjmcmc.collapsed`, wherever
#   components are linear in some of their parameters.
#
# ## What to read next
#
# - `01_your_own_simulator`: the same for a signal that you write yourself.
# - `06_inside_the_slots`: what the slots look for.
