"""How good and how fast the exact answers are: ``python -m benchmarks.exact_answers``.

Parts, each a function: ``floor`` (two runs of the collapsed sampler on ``crowded``
signals), ``evidence`` (collapsed against fixed-K evidences on ambiguous signals),
``laplace`` (the refined Laplace proposal against the collapsed sampler on ``paper``
signals), ``eryn`` (Eryn against the collapsed sampler) and ``speed`` (seconds per
effective draw of every method on one signal). Each prints a table and, with ``--out``,
writes its numbers as JSON.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sbi_slotflow import PosteriorDraws, VariableKPrior, metrics, problems, rjmcmc
from sbi_slotflow.posterior import refine
from sbi_slotflow.posterior.component_proposals import PriorComponents
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from .common import (
    PERIODS,
    Numbers,
    chains_size,
    ensemble_size,
    given_k,
    one,
    progress,
    run_parts,
    simulate,
    spread,
)
from .samplers_by_k import nested, tempered


def floor(num_signals: int, seed: int) -> Numbers:
    """Total variation of p(K | x) between two runs on ``crowded`` signals."""
    problem = problems.sinusoids("crowded")
    _, x = simulate(problem, num_signals, seed)
    distances, seconds = [], []
    for i in range(num_signals):
        probs = []
        for run in range(2):
            started = time.monotonic()
            draws = rjmcmc.collapsed(
                problem, x[i], seed=2 * i + run, num_draws=5_000, thin=80
            )
            seconds.append(time.monotonic() - started)
            probs.append(draws.cardinality().probs)
        distances.append(float(metrics.total_variation(*probs)))
        progress(f"signal {i + 1}: {distances[-1]:.3f}, {seconds[-1]:.0f} s")
    return {
        "total variation between two runs": spread(distances),
        "seconds a run": spread(seconds),
    }


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


def eryn(num_signals: int, seed: int) -> Numbers:
    """Eryn, from the truth, against the collapsed sampler: ``paper``, K = 3."""
    problem = problems.sinusoids("paper")
    theta, x = simulate(given_k(problem, 3), num_signals, seed)
    numbers: Numbers = {}
    for i in range(num_signals):
        sampler = rjmcmc.eryn_sampler(
            problem, x[i], start="truth", theta=theta[i], seed=i
        )
        started = time.monotonic()
        draws = sampler.run(2_000, burn_in=500, thin=5)
        seconds = time.monotonic() - started
        reference, second = (
            rjmcmc.collapsed(problem, x[i], seed=2 * i + run, thin=30)
            for run in range(2)
        )
        found = metrics.compare(
            draws.rows,
            reference.rows,
            second.rows,
            layout=problem.layout,
            periods=PERIODS,
        )
        progress(f"signal {i + 1}, {seconds:.0f} s\n{found}")
        assert found.floor is not None
        numbers[f"signal {i + 1}"] = {
            "effective draws, worst parameter": _efficiency(
                Timed(draws, "ensemble"), seconds, problem
            )["effective"],
            "total variation": found.total_variation,
            "mean W2": found.mean_w2,
            "floor": found.floor.mean_w2,
            "sd ratios": spread([p.std_ratio for p in found.parameters]),
        }
    return numbers


def speed(num_signals: int, seed: int) -> Numbers:
    """Seconds per effective draw of each method, ``paper``, K = 3."""
    problem = problems.sinusoids("paper")
    theta, x = simulate(given_k(problem, 3), num_signals, seed)
    rows: dict[str, list[Numbers]] = {}
    for i in range(num_signals):
        for name, method in _methods(problem, theta[i], x[i], i).items():
            started = time.monotonic()
            try:
                timed = method()
            except ImportError as error:
                progress(f"{name}: skipped, {error}")
                continue
            seconds = time.monotonic() - started
            rows.setdefault(name, []).append(_efficiency(timed, seconds, problem))
            progress(f"signal {i + 1}, {name}: {rows[name][-1]}")
    baseline = rows["Eryn from the prior"]
    return {
        name: {
            "seconds": spread([r["seconds"] for r in found]),
            "share of draws with K = 3": spread([r["right K"] for r in found]),
            "seconds per effective draw, worst parameter": spread(
                [r["seconds per draw"] for r in found]
            ),
            "over Eryn from the prior": spread(
                [
                    r["seconds per draw"] / b["seconds per draw"]
                    for r, b in zip(found, baseline, strict=True)
                ]
            ),
        }
        for name, found in rows.items()
    }


@dataclass(frozen=True)
class Timed:
    """Draws and of what kind they are.

    Tempering swaps permute Eryn's walkers, so that a walker is no chain: only the
    ensemble's mean has an autocorrelation.
    """

    draws: PosteriorDraws
    kind: Literal["weighted", "chains", "ensemble"]


def _methods(
    problem: Sinusoids, theta: Tensor, x: Tensor, seed: int
) -> dict[str, Callable[[], Timed]]:
    def eryn_from(start: Any, steps: int, **options: Any) -> Timed:
        sampler = rjmcmc.eryn_sampler(problem, x, start=start, seed=seed, **options)
        return Timed(sampler.run(steps, burn_in=steps // 2, thin=5), "ensemble")

    def eryn_with_move() -> Timed:
        from sbi_slotflow.rjmcmc.eryn_moves import SlotFlowMove, leaf_limits

        proposal = rjmcmc.laplace_proposal(problem, x)
        components = _Pool(problem, proposal.sample((2_000,), k=3))
        move = SlotFlowMove(components, *leaf_limits(problem.prior))
        sampler = rjmcmc.eryn_sampler(problem, x, seed=seed, moves=[move])
        return Timed(sampler.run(500, burn_in=250, thin=5), "ensemble")

    def refined(method: Any, num: int) -> Timed:
        proposal = rjmcmc.laplace_proposal(problem, x)
        result = refine(
            proposal,
            proposal.log_likelihood,
            x,
            num,
            method=method,
            generator=generator_for(seed),
        )
        return Timed(one(result), "weighted")

    def evidences() -> Timed:
        found = {}
        for k in range(1, 6):
            # Components that the data do not want come out below the least amplitude.
            with suppress(ValueError):
                found[k] = rjmcmc.fixed_k(problem, x, k, seed=seed)
        return Timed(found[3], "weighted")

    def smc_by_k() -> Timed:
        results = [tempered(problem, x, k, 1_000, seed) for k in range(1, 5)]
        return Timed(results[2], "weighted")

    return {
        "Eryn from the prior": lambda: eryn_from("prior", 1_000),
        "Eryn from the truth": lambda: eryn_from("truth", 500, theta=theta),
        "Eryn with SlotFlowMove": eryn_with_move,
        "collapsed": lambda: Timed(rjmcmc.collapsed(problem, x, seed=seed), "chains"),
        "fixed-K evidences, K = 1..5": evidences,
        "refine, importance": lambda: refined("importance", 10_000),
        "refine, smc": lambda: refined("smc", 1_000),
        "nested sampling for each K = 1..4": lambda: _nested(problem, x, seed),
        "SMC for each K = 1..4, from the prior": smc_by_k,
    }


def _efficiency(timed: Timed, seconds: float, problem: Sinusoids) -> Numbers:
    """Effective draws of the worst of A, phi, f of three components and sigma."""
    draws, layout = timed.draws, problem.layout
    k = layout.cardinality(draws.theta)
    right = float((k == 3).double().flatten() @ draws.weights)
    if timed.kind == "weighted":
        effective = draws.ess * right
    elif right < 0.5:
        effective = 0.0  # it has not arrived
    else:
        # Draws of another K would mix components up: the nearest K = 3 stands in.
        parts = layout.unpack(draws.theta)
        series = torch.cat([parts.shared, parts.components[..., :3, :].flatten(-2)], -1)
        size = ensemble_size if timed.kind == "ensemble" else chains_size
        effective = min(size(column.numpy()) for column in series.unbind(-1))
    return {
        "seconds": seconds,
        "right K": right,
        "effective": effective,
        # Less than one effective draw counts as one: a bound in the method's favour.
        "seconds per draw": seconds / max(effective, 1.0),
    }


def _nested(problem: Sinusoids, x: Tensor, seed: int) -> Timed:
    """Nested sampling (dynesty) at each K; draws are those of K = 3."""
    found = [nested(problem, x, k, 250, seed, maxcall=150_000) for k in range(1, 5)]
    rows, weights = found[2].rows.unsqueeze(0), found[2].weights.log().unsqueeze(0)
    return Timed(PosteriorDraws(problem.layout, rows, x, weights), "weighted")


class _Pool:
    """Gaussians around pooled components, 10 % prior: slots made by hand."""

    def __init__(self, problem: Sinusoids, rows: Tensor) -> None:
        self.chart = problem.build_chart()
        self.prior = PriorComponents(problem.prior.component)
        parts = problem.layout.unpack(rows)
        u, _ = self.chart.forward(parts.components[:, :3].double())
        self.mean, self.scale = u.mean(0), 2 * u.std(0)

    def sample_component(self, n: int, generator: torch.Generator) -> Tensor:
        slot = torch.randint(len(self.mean), (n,), generator=generator)
        noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        near = self.chart.inverse(self.mean[slot] + self.scale[slot] * noise)
        far = self.prior.sample_component(n, generator).double()
        from_prior = torch.rand(n, 1, generator=generator) < 0.1
        return torch.where(from_prior, far, near)

    def log_prob_component(self, components: Tensor) -> Tensor:
        u, log_det = self.chart.forward(components.double())
        z = (u.unsqueeze(-2) - self.mean) / self.scale
        each = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        each = each - self.scale.log().sum(-1)
        near = each.logsumexp(-1) - math.log(len(self.mean)) + log_det
        far = self.prior.log_prob_component(components.float()).double()
        return torch.logaddexp(near + math.log(0.9), far + math.log(0.1))


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


PARTS: dict[str, tuple[Callable[[int, int], Numbers], int]] = {
    "floor": (floor, 50),
    "evidence": (evidence, 5),
    "laplace": (laplace, 50),
    "eryn": (eryn, 1),
    "speed": (speed, 1),
}


if __name__ == "__main__":
    run_parts(PARTS, "exact", __doc__)
