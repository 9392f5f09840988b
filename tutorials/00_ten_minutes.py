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
# # Ten minutes with sbi_slotflow
#
# **You will learn** how to load a trained posterior, ask it how many components are in
# a signal, turn its draws into a list of sources, and see what it thinks the noise-free
# signal was. Nothing is trained here: the weights come with the package.
#
# The question is always the same. Some data are a sum of K components, each with
# parameters of its own, plus noise. K is unknown. Wanted: p(K, Θ | x), the probability
# of every number of components together with their parameters.

# %%
import os

from sbi_slotflow import load_pretrained, plots, problems
from sbi_slotflow.seeding import generator_for

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_DRAWS = 500 if FAST else 4_000

# %% [markdown]
# ## A signal
#
# A *problem* holds a prior and a simulator that belong together. `crowded` has up to
# ten sinusoids between 2.5 and 3 Hz in white noise. Amplitudes reach from 0.05 to 1.5,
# frequencies may lie as close as they like, and the noise level sigma is unknown too.
# We draw one signal with five components.

# %%
problem = problems.sinusoids("crowded")
five = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # weights of K = 0..10
theta = problem.prior.with_cardinality(five).sample((1,), generator_for(28, 0))
x = problem.simulator(theta, generator_for(28, 1))[0]
x.shape

# %% [markdown]
# The data are two records, one after the other: 300 s at 10 Hz and 10 s at 512 Hz.
# A draw of the parameters is a flat row, `[K, sigma, (A, phi, f)_1, (A, phi, f)_2,
# ...]`, padded with zeros after the K-th component and ascending in f. `problem.layout`
# takes it apart:

# %%
truth = problem.layout.unpack(theta[0])
print("K     =", int(truth.cardinality))
print("sigma =", round(float(truth.shared), 3))
print("amplitude, phase, frequency:")
print(truth.components[truth.mask])

# %% [markdown]
# ## How many?

# %%
posterior = load_pretrained("sinusoids-crowded").set_default_x(x)
cardinality = posterior.cardinality()
print({k: round(p, 3) for k, p in enumerate(cardinality.probs.tolist()) if p > 1e-3})
plots.plot_cardinality(cardinality, true_cardinality=5)

# %% [markdown]
# Four components are the most probable number, five (the truth) come second, and three
# to six hold 94 % of the probability. A single number would hide that: two of the five
# components are nearly lost in the noise. `03_exact_answers` compares this with the
# exact posterior of the same signal.
#
# ## Which ones?
#
# Draws from the posterior are rows as above, each with a K of its own.

# %%
samples = posterior.sample((NUM_DRAWS,), generator=generator_for(1))
print(samples.shape, problem.layout.cardinality(samples).bincount())
plots.plot_spectrum(problem, samples, x, theta)

# %% [markdown]
# The lower panel has the spectrum of the long record, draws of (frequency, amplitude)
# and the truth as crosses; the upper panel says how many components are expected where.
#
# - Three strong components are certain.
# - The one of amplitude 0.12 near 2.80 Hz is there in seven of ten draws.
# - The weakest, 0.06 at 2.77 Hz in the foot of a strong one, is not found.
# - Near 2.99 Hz the noise has made a bump. The posterior calls it a component with
#   probability 0.4. It is wrong this time, and says that it may well be.

# %% [markdown]
# ## A list of sources
#
# `catalogue` matches the components of all draws and turns them into sources, each with
# the probability that it exists, and what is known of it if it does.

# %%
catalogue = posterior.catalogue(samples=samples)
columns = ["existence", "frequency", "frequency_low", "frequency_high", "amplitude"]
unlisted = catalogue.attrs["expected_unlisted"]
print(f"components expected outside of the list: {unlisted:.2f}")
catalogue.to_dataframe()[columns].round(4)

# %% [markdown]
# Intervals hold 90 %. The true frequencies of the three certain sources (2.6882,
# 2.7534, 2.8847) lie inside, and so does that of source 4 (2.7976), which may not be
# there at all as far as the posterior knows. Sources 1 and 5 have intervals that span
# a good part of the band: faint components that may be anywhere, of which the one that
# was missed could be one.
#
# ## The signal without its noise

# %%
plots.plot_reconstruction(problem, samples, x, theta)

# %% [markdown]
# Each panel shows the first 200 samples of a record. The band (90 %) is narrow because
# thousands of samples stand behind it; doubts about faint components hardly widen it.
#
# ## Keep it
#
# `to_datatree` puts draws, predictive draws, the prior and the model card into one tree
# that ArviZ reads and that NetCDF and Zarr store.

# %%
tree = posterior.to_datatree(samples=samples[:1_000])
tree.to_netcdf("posterior.nc", engine="h5netcdf")
list(tree.children)

# %% [markdown]
# To analyse a signal of your own with these weights, it has to be sampled like this one
# and fit the prior of the problem: `x = torch.from_numpy(numpy.load("signal.npy"))`.
# If it is unlike the training data, `sample` warns.
#
# ## What to read next
#
# - `01_your_own_simulator`: train on a simulator that you write.
# - `02_do_i_believe_it`: is this posterior calibrated?
# - `03_exact_answers`: this signal again, with the exact posterior beside it.
