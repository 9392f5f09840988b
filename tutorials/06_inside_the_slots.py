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
# # Inside the slots
#
# **You will learn** which component each slot draws, how stable that is, what the
# slots' contexts know, and which parts of the network earn their keep.
#
# A slot is the output position that holds one component. Components have no names, so
# training must decide which slot answers for which component; how that settles is what
# one looks at here.

# %%
import os

from benchmarks import slots  # in the repository: run from its root
from sbi_slotflow import SlotNPE, load_pretrained, problems, slot_nn
from sbi_slotflow.seeding import generator_for

FAST = "SLOTFLOW_TUTORIALS_FAST" in os.environ  # set by our tests, never by you
NUM_SIGNALS, NUM_SIMULATIONS = (20, 128) if FAST else (150, 3_840)

# %% [markdown]
# ## Who draws what
#
# 150 signals of the `paper` problem with five components each. One draw of each is
# matched with the truth.

# %%
problem = problems.sinusoids("paper")
posterior = load_pretrained("sinusoids-paper")
five = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
theta = problem.prior.with_cardinality(five).sample((NUM_SIGNALS,), generator_for(0))
x = problem.simulator(theta, generator_for(1))
matches = slots.match_slots(posterior, theta, x, generator_for(2))
slots.plot_slot_specialisation(matches, unit="Hz")

# %% [markdown]
# The slots stand in ascending order of frequency, and their ranges overlap, as the
# ranges of the smallest, the second smallest and so on of five random numbers do. Here
# that is so by construction: joint anchored slots draw one component after the other,
# upwards. The slots of the paper had to find such a division of labour themselves.

# %%
shares = slots.slot_stability(posterior, theta[0], x[0], generator=generator_for(3))
slots.plot_slot_stability(shares)

# %% [markdown]
# One hundred draws for the first of these signals. Slot k always draws the k-th
# component: the consistency, the probability that two draws of a slot are of the same
# component, is one.
#
# ## What a slot knows
#
# Before it draws, a slot has a context. Here it is the token of its cell, which has
# seen the whole signal; where a flow learns what the fits leave, the neighbours'
# tokens, K and the fit come with it. Two dimensions of it (t-SNE), coloured by the true
# parameters:

# %%
slots.plot_slot_contexts(matches)

# %% [markdown]
# The eye finds no order of amplitude, phase or frequency here: a token need not say
# where it is, as its cell does that. And t-SNE shows what varies most; a context may
# know more than two dimensions tell.
#
# ## What earns its keep: a small ablation
#
# Three networks for the `tiny` problem, the same 3,840 simulations for each. `global`
# slots read one pooled vector (the paper), `attention` slots look among the encoder's
# tokens, `anchored` slots stand at a cell of the frequency axis. This is far too little
# training for any of them; the question is who learns fastest.

# %%
tiny = problems.sinusoids("tiny")
variants = {
    "global": {"slots": "global"},
    "attention": {"slots": "attention"},
    "anchored": {"slots": "anchored", "refine_slots": 0},
    "anchored, refined": {"slots": "anchored", "refine_slots": 2},
}
print(f"{'':18s}  log density of the truth   right K")
for name, options in variants.items():
    trainer = SlotNPE(tiny.prior, slot_nn(tiny, **options), show_progress_bars=False)
    trainer.train_online(
        tiny.simulator,
        num_simulations=NUM_SIMULATIONS,
        batch_size=64,
        num_validation=256,
        validate_every=20,
    )
    last = trainer.history[-1]
    right = last["val_correct"]
    print(f"{name:18s}  {-last['val_loss']:24.2f}   {right:7.1%}")

# %% [markdown]
# Anchored slots learn much faster: after 60 steps they get K right in nine of ten
# signals, and each signal's parameters are 7 nats more probable. Gauss-Newton steps
# inside the network add another 10: they find the peak, so that the flow has to learn
# only what is not Gaussian about it. Attention and global slots do not differ at this
# budget. (For these two the number is a lower bound, of the best assignment of slots to
# components.)
#
# One seed each, so a difference of a few tenths means nothing. The ablations of the
# paper (domains, phase and frequency weights, depth of the flow) are fields of the same
# builder: `slot_nn.paper(problem, flow_layers=4)`.
#
# ## What to read next
#
# - `07_spikes`: anchored slots in time.
# - `01_your_own_simulator`: anchored slots for a signal of yours.
