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
# # Exact answers
#
# **You will learn** how to turn the network's posterior into the exact one where you
# have a likelihood, how to tell whether that worked, how to get the evidence, and how
# trained slots speed up reversible-jump MCMC in Eryn.

# %%
import os
import time
import warnings

from sbi_slotflow import load_pretrained, metrics, plots, problems, rjmcmc
from sbi_slotflow.posterior import UnreliableWeights
from sbi_slotflow.seeding import generator_for

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_DRAWS, NUM_MOVES, NUM_STEPS = (100, 200, 5) if FAST else (1_000, 4_000, 100)
BURN_IN = 1_000 if FAST else 40_000

# %% [markdown]
# ## The signal of the first tutorial
#
# Five sinusoids, two of them nearly lost in the noise. The network thought that four
# are the most probable number.

# %%
problem = problems.sinusoids("crowded")
five = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
theta = problem.prior.with_cardinality(five).sample((1,), generator_for(28, 0))
x = problem.simulator(theta, generator_for(28, 1))[0]
posterior = load_pretrained("sinusoids-crowded").set_default_x(x)

# %% [markdown]
# ## Weights
#
# `refine` draws from the network and weights each draw by prior times likelihood over
# the network's density. With these weights the draws follow the exact posterior, if the
# network covers it. k-hat, the tail of the weights, tells: believe it below 0.7.

# %%
warnings.simplefilter("ignore", UnreliableWeights)  # we look at k-hat ourselves
refined = posterior.refine(
    problem.log_likelihood, num_samples=NUM_DRAWS, generator=generator_for(1)
)
print(f"{refined.ess:.0f} of {NUM_DRAWS:,} draws are effective")
print(f"k-hat = {refined.pareto_k:.2f}, to be believed: {refined.is_reliable}")
print(f"log evidence = {refined.log_evidence:.2f} +- {refined.log_evidence_error:.2f}")

# %% [markdown]
# Sixty of a thousand draws count, and k-hat says that their weights cannot be relied
# on: a few draws carry most, as where the network draws too seldom. And k-hat judges by
# the draws that there are: of a peak that the network never draws from it cannot know.
# (For well separated components the same call has an efficiency near one, see the model
# card of `sinusoids-paper`.)
#
# ## Chains
#
# More draws help. So does `method="smc"`, which moves the draws of any problem that has
# a likelihood. But here there is something better: given frequencies and noise level
# the model is linear in what is left, amplitudes and phases, and those can be
# integrated out. `rjmcmc.collapsed` is a reversible-jump sampler that does, compiled by
# numba. `start=posterior` lets its chains begin at draws of the network. Without, they
# begin at fits to the data and share nothing with the network: the reference that
# everything here is judged by. Two runs of different seeds tell how far it is uncertain
# itself.

# %%
started = time.monotonic()
moved, reference, second = (
    rjmcmc.collapsed(
        problem, x, start=start, seed=seed, num_draws=NUM_MOVES, burn_in=BURN_IN
    )
    for seed, start in enumerate([posterior, None, None])
)
print(f"{time.monotonic() - started:.0f} s for three runs of 4 chains")
for name, one in {
    "network": posterior.cardinality(),
    "weighted": refined.cardinality(),
    "from the network": moved.cardinality(),
    "reference": reference.cardinality(),
    "second run": second.cardinality(),
}.items():
    print(f"{name:16s}", one.probs[3:9].numpy().round(3), "K = 3..8")

# %%
plots.plot_cardinality(
    posterior.cardinality(),
    5,
    reference=reference.cardinality(),
    labels=("network", "exact"),
)

# %% [markdown]
# The exact posterior prefers five components (0.35) to four (0.25); the network had it
# the other way round, weights put it right. The network's distance from the reference
# (total variation) is 0.19, well above its average over random signals: this is one of
# its harder ones. That of the weighted draws is 0.12: sixty draws say no more, and
# seven components are lacking, as the additional ones may hide under the strong ones,
# in the same cell, where the network draws too seldom. The chains that began at the
# network's draws are as near to the reference (0.03) as its second run is (0.05).
#
# ## How far apart are they?
#
# `metrics.compare` measures the distance of two posteriors, beside the distance between
# two runs of the reference (the floor, which nothing can beat). Here for the draws with
# four components.

# %%
samples = posterior.sample((4 * NUM_DRAWS,), generator=generator_for(2))
print(
    metrics.compare(
        samples, reference.rows, second.rows, layout=problem.layout, k=4
    ).table()
)

# %% [markdown]
# `value` is the network, `floor` the second run of the reference; `sd` is the
# reference's standard deviation. C2ST is 0.55, as between the two runs: a classifier
# tells the network's draws from exact ones no better than exact ones from each other.
# Nine of thirteen marginals are within 0.35 standard deviations of the exact ones; the
# amplitude of the first component is the worst, at 0.7. (The third component is the
# doubtful one, which is spread out in both.)
#
# ## Evidence
#
# The mean weight estimates the evidence p(x), by which this model could be compared
# with others; `refined.log_evidence` was printed above. To compare numbers of
# components within the model, p(K | x) over the prior of K is enough. Here the prior is
# uniform, so the Bayes factor of five components against four is the ratio of two
# numbers from the table: 0.35 / 0.25 = 1.4 for the reference, 0.34 / 0.26 = 1.3 for its
# second run, and 0.28 / 0.44 = 0.6 for the network. They do not even agree on the sign,
# but none of these is evidence worth the name, for which people want a factor of 10 or
# more. If the data do not decide between four and five, do not decide for them: keep
# p(K | x).
#
# ## Slots in Eryn
#
# Eryn is a reversible-jump sampler for any likelihood. Its births are drawn from the
# prior and mostly land where there is nothing. `SlotFlowMove` draws them from trained
# slots instead, mixed with the prior, and corrects for it: the target stays exact. We
# take a small problem, `tiny`, start ten walkers at draws from the prior, and see how
# many have found both components: their log likelihood is within 10 of the truth's.

# %%
small = problems.sinusoids("tiny")
trained = load_pretrained("sinusoids-tiny")
theta = small.prior.with_cardinality([0, 0, 1, 0]).sample((1,), generator_for(4, 0))
x_small = small.simulator(theta, generator_for(4, 1))[0]
slots = rjmcmc.SlotFlowMove.from_posterior(trained, x_small, update_share=0.0)
good_enough = small.log_likelihood(theta, x_small) - 10
for name, moves in {"from the prior": None, "from the slots": [slots]}.items():
    sampler = rjmcmc.eryn_sampler(
        small, x_small, moves=moves, num_walkers=10, num_temperatures=4, seed=1
    )
    draws = sampler.run(NUM_STEPS)  # walkers start at draws from the prior
    arrived = (
        (small.log_likelihood(draws.theta, x_small) > good_enough).double().mean(0)
    )
    steps = [NUM_STEPS // 10, NUM_STEPS // 4, NUM_STEPS // 2, NUM_STEPS - 1]
    shares = ", ".join(f"{arrived[i]:.0%} after {i + 1}" for i in steps)
    print(f"births {name}: walkers that fit, {shares} steps")

# %% [markdown]
# With births from the slots nine of ten walkers have found both components after 26
# steps, and all after 51; with births from the prior, none has after 100. Both chains
# have the same target and would agree in the end.
#
# ## What to read next
#
# - `04_real_data`: the reference sampler on a variable star.
# - `02_do_i_believe_it`: checks that need no likelihood.
