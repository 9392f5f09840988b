"""How good the exact answers are: ``python -m benchmarks.exact_answers``.

Parts, each a function: ``evidence`` (the collapsed sampler against fixed-K evidences on
ambiguous signals) and ``laplace`` (the refined Laplace proposal against the collapsed
sampler on ``paper`` signals). The experiments ``rjmcmc``, ``rivals`` and ``cost`` have
the samplers' distances from one another and what they cost.
"""

import math
import time
from dataclasses import replace

import numpy as np
import torch

from sbi_slotflow import VariableKPrior, metrics, problems, rjmcmc
from sbi_slotflow.posterior import refine
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from .common import PERIODS, Numbers, one, progress, run_parts, simulate
from .intervals import spread


def evidence(num_signals: int, seed: int) -> Numbers:
    """p(K | x) of the collapsed sampler against that of fixed-K evidences."""
    problem = ambiguous_problem()
    _, x = simulate(problem, num_signals, seed)
    distances, floors, errors, effective = [], [], [], []
    log_prior = problem.prior.log_cardinality_probs.double()
    for i in range(num_signals):
        runs = [
            rjmcmc.collapsed(problem, x[i], seed=2 * i + run, num_draws=20_000)
            for run in range(2)
        ]
        given_k = [
            rjmcmc.fixed_k(problem, x[i], k, seed=i)
            for k in range(problem.prior.max_cardinality + 1)
        ]
        log_joint = log_prior + torch.tensor([g.log_evidence for g in given_k])
        probs = log_joint.softmax(-1)
        first, second = (run.cardinality().probs for run in runs)
        distances.append(float(metrics.total_variation(probs, 0.5 * (first + second))))
        floors.append(float(metrics.total_variation(first, second)))
        errors.append(max(g.log_evidence_error for g in given_k))
        effective.append(min(g.efficiency for g in given_k))
        progress(f"signal {i + 1}: exact {probs.numpy().round(3)}, {distances[-1]:.4f}")
    return {
        "total variation, collapsed - evidences": spread(distances),
        "total variation between two collapsed runs": spread(floors),
        "largest error of a log evidence": spread(errors),
        "least ESS/N": spread(effective),
    }


def laplace(num_signals: int, seed: int) -> Numbers:
    """The refined Laplace proposal against the collapsed sampler, ``paper``."""
    problem = problems.sinusoids("paper")
    _, x = simulate(problem, num_signals, seed)
    variation, efficiency, k_hat, seconds = [], [], [], []
    ratios: dict[str, list[float]] = {}
    for i in range(num_signals):
        started = time.monotonic()
        proposal = rjmcmc.laplace_proposal(problem, x[i])
        refined = one(
            refine(
                proposal,
                proposal.log_likelihood,
                x[i],
                20_000,
                defensive=0.0,
                generator=generator_for(seed, 2, i),
            )
        )
        seconds.append(time.monotonic() - started)
        reference, second = (
            rjmcmc.collapsed(problem, x[i], seed=2 * i + run, thin=30)
            for run in range(2)
        )
        found = metrics.compare(
            *(
                draws.sample((10_000,), generator=generator_for(seed, 3, i))
                for draws in (refined, reference, second)
            ),
            layout=problem.layout,
            periods=PERIODS,
        )
        assert found.floor is not None
        variation.append(found.total_variation)
        efficiency.append(refined.efficiency)
        k_hat.append(refined.pareto_k)
        # The floor of one pair of runs is noisy: ratios of means over components.
        for name in ("sigma", *problem.component_names):
            mine, theirs = (
                np.mean([p.w2 for p in c.parameters if p.name.startswith(name)])
                for c in (found, found.floor)
            )
            ratios.setdefault(name, []).append(float(mine / theirs))
        progress(
            f"signal {i + 1}: K = {found.k}, ESS/N {efficiency[-1]:.2f}, "
            f"W2 / floor { ({n: round(r[-1], 2) for n, r in ratios.items()}) }"
        )
    return {
        "total variation of p(K | x)": spread(variation),
        "ESS/N": spread(efficiency),
        "k-hat": spread(k_hat),
        "seconds, proposal and 20,000 draws": spread(seconds),
        **{f"W2 / floor, {name}": spread(r) for name, r in ratios.items()},
    }


def ambiguous_problem() -> Sinusoids:
    """``tiny`` with amplitudes near the noise, so that K is uncertain."""
    problem = problems.sinusoids("tiny")
    prior = problem.prior
    component = torch.distributions.Independent(
        torch.distributions.Uniform(
            torch.tensor([0.1, 0.0, 0.5]), torch.tensor([0.6, 2 * math.pi, 2.0])
        ),
        1,
    )
    quiet = VariableKPrior(
        component,
        prior.cardinality_probs,
        shared=torch.distributions.Independent(
            torch.distributions.Uniform(torch.tensor([0.7]), torch.tensor([1.0])), 1
        ),
        min_separation=prior.min_separation,
        order_by=2,
        component_names=prior.layout.component_names,
        shared_names=prior.layout.shared_names,
    )
    return replace(problem, prior=quiet)


PARTS = {"evidence": (evidence, 5), "laplace": (laplace, 50)}


if __name__ == "__main__":
    run_parts(PARTS, __doc__)
