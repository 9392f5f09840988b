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
# # Do I believe it?
#
# **You will learn** how to test a posterior over sets on simulated truths, what the
# verdicts mean, what four kinds of wrong posterior look like, and how to hand the ranks
# to ArviZ.
#
# A network answers any question, right or wrong. Simulation tells which: draw theta
# from the prior and x from the simulator; then theta is one more draw from the exact
# posterior of x. If it can be told from the draws of your posterior, yours is wrong.

# %%
import os

import arviz_base
import arviz_plots

from sbi_slotflow import calibration, load_pretrained, problems

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_PAIRS = 62 if FAST else 150

problem = problems.sinusoids("tiny")
posterior = load_pretrained("sinusoids-tiny")

# %% [markdown]
# ## All checks at once

# %%
report = calibration.report(posterior, problem, n=NUM_PAIRS, seed=0)
print(report)

# %% [markdown]
# Nine checks, nine passed. The rate in brackets is how often a check would fail an
# exact posterior; together they do so in 5 % of the cases at most. A pass means that
# 150 signals found nothing, not that there is nothing: use 1,000 or more for a result
# that you publish.
#
# `report.to_html("calibration.html")` writes one page with all figures. Two of them:

# %%
report.checks["coverage"].plot()

# %% [markdown]
# How often intervals hold the truth, less how often they should. Lines near zero are
# good; the shaded bands are what chance does. Sigma's line strays farthest, by no more
# than 150 signals may: `05_noise_and_prior` finds its intervals within a hundredth of
# what they should be.

# %%
report.checks["cardinality"].plot()

# %% [markdown]
# `tiny` is easy: the most probable K is right for 98.7 %, and nearly all probabilities
# are close to zero or one. The points between, and the line's zigzag, stem from one or
# two signals each; the bars say how far such points may stray.
#
# ## A posterior that is wrong on purpose
#
# `calibration.faults` wraps a posterior and spoils it. `narrowed` shrinks all standard
# deviations to 70 %, the commonest fault of a network that was trained for too long on
# too few simulations.

# %%
narrow = calibration.faults.narrowed(posterior, factor=0.7)
pairs = {"as it is": calibration.draw(posterior, problem, n=NUM_PAIRS, seed=0)}
pairs["narrowed"] = calibration.draw(narrow, problem, n=NUM_PAIRS, seed=0)
coverage = calibration.coverage(pairs["narrowed"])
print(coverage)
coverage.plot()

# %% [markdown]
# All lines sag below zero: the intervals are too narrow, for every parameter and every
# K. In numbers:

# %%
for name in ("sigma", "frequency"):
    curve = coverage.parameters[name]
    print(f"{name}: 90 % intervals hold {curve.coverage[17]:.0%} of the truths")

# %% [markdown]
# ## Other faults, other checks
#
# No check sees everything. `shifted` moves the posterior by half a standard deviation,
# `oversharp` squares p(K | x), `independent` forgets that components depend on each
# other. Each row is a posterior, each column a check.

# %%
makers = {
    "shifted": calibration.faults.shifted,
    "oversharp": calibration.faults.oversharp,
    "independent": calibration.faults.independent,
}
for name, spoil in makers.items():
    pairs[name] = calibration.draw(spoil(posterior), problem, n=NUM_PAIRS, seed=0)
print(f"{'':12s}{'components':>12s}{'coverage':>12s}{'cardinality':>12s}{'tarp':>12s}")
for name, draws in pairs.items():
    checks = [
        calibration.sbc_components(draws),
        calibration.coverage(draws),
        calibration.cardinality_reliability(draws),
        calibration.tarp(draws, problem.prior),
    ]
    words = ["passed" if check.passed else "FAILED" for check in checks]
    print(f"{name:12s}" + "".join(f"{word:>12s}" for word in words))

# %% [markdown]
# - `narrowed` and `shifted` are seen by the ranks of components and by coverage. TARP
#   sees only the first, with this number of signals.
# - `oversharp` touches p(K | x) alone, and only the check of K sees it.
# - `independent` passes everything. The components of `tiny` keep a distance of 0.1 Hz
#   and are all but independent anyway: there was nothing to spoil. A fault that makes
#   no difference cannot be found.

# %%
calibration.cardinality_reliability(pairs["oversharp"]).plot()

# %% [markdown]
# The picture is nearly the same as before; the verdict differs. Two of 150 signals have
# a wrong most probable K. Before, their true K had enough probability for that to
# happen; squared, it has not. A few confident errors are what such a fault looks like
# when K is easy.
#
# ## The same in ArviZ
#
# The ranks are numbers between 0 and 1, uniform if the posterior is right. ArviZ draws
# such numbers with `plot_ecdf_pit`; the line should stay in the grey band.

# %%
ranks = {
    name: calibration.sbc_components(pairs[name]).ranks["frequency"]
    for name in ("as it is", "narrowed", "shifted")
}
tree = arviz_base.from_dict({"prior_sbc": ranks}, sample_dims=["sample"])
arviz_plots.plot_ecdf_pit(tree, group="prior_sbc", sample_dims=["sample"]).show()

# %% [markdown]
# As it is, the line stays inside. Narrowed, it rises too far at the left and falls
# towards the right: too many truths are in the tails. Shifted, it leaves on one side.
#
# ## What this does not tell
#
# These checks average over the prior. A posterior can be right on average and wrong for
# the one x that you care about. For that x there are `local_c2st` (in the report, for
# `report(..., x=x)`), the exact posterior by `refine` (`03_exact_answers`), and the
# warning that x is unlike the training data (`05_noise_and_prior`). And nothing here
# says whether the simulator is right about the world (`04_real_data`).
#
# ## What to read next
#
# - `03_exact_answers`: from "right on average" to exact, for one observation.
# - `05_noise_and_prior`: sigma, other priors, and data from elsewhere.
