"""How good the shipped weights are: ``python -m benchmarks.anchored_slots``.

Parts, each a function: ``cardinality`` (accuracy, scores and calibration of p(K | x)),
``widths`` (posterior deviations over exact ones, ``paper``), ``amortized``
(the same of slots without Gauss-Newton), ``coverage`` and ``coverage_crowded`` (of
credible intervals; resumable), ``paper`` and ``crowded`` (against the collapsed
sampler, amortized and refined), ``close`` (correlations of close components), ``smc``
(refinement by SMC).
``cards`` writes the model cards from the numbers that were kept with
``--out benchmarks/results``.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sbi_slotflow import SlotNPE, SlotPosterior, metrics, rjmcmc, slot_nn
from sbi_slotflow.nn.estimator import SlotDensityEstimator
from sbi_slotflow.pretrained.recipes import RECIPES
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.circular import circular_mean
from sbi_slotflow.sets.layout import ThetaLayout
from sbi_slotflow.training.stages import StageBuilder

from .calibration_rows import cardinality_rows, coverage_rows
from .common import (
    PERIODS,
    TEST,
    Numbers,
    one,
    progress,
    ready,
    run_parts,
    simulate,
    spread,
)

RESULTS = Path(__file__).parent / "results"
_CHECKPOINTS = Path("checkpoints")
# Share of draws with one more component, where the posterior is refined.
_DEFENSIVE = {"importance": 0.0, "smc": 0.1}
_AMORTIZED_SIMULATIONS = 192_000
WEIGHTS = Path(__file__).parents[1] / "sbi_slotflow" / "weights"


def cardinality(num_signals: int, seed: int) -> Numbers:
    """p(K | x) on fresh signals of each preset."""
    return {
        name: cardinality_rows(*ready(name), num_signals, seed)
        for name in ("tiny", "paper", "crowded")
    }


def widths(num_signals: int, seed: int) -> Numbers:
    """Posterior deviations given the true K over exact ones, ``paper``."""
    return _widths(*ready("paper"), num_signals, seed)


def amortized(num_signals: int, seed: int) -> Numbers:
    """As ``widths``, of slots without Gauss-Newton (trained here, resumable).

    Everything is trained, from the shipped encoder, cardinality and anchors.
    """
    problem, shipped = ready("paper")
    weights = shipped.posterior_estimator.state_dict()
    start = StageBuilder(slot_nn(problem), weights, part="local")

    def build(theta: Tensor, x: Tensor) -> SlotDensityEstimator:
        return start(theta, x).requires_grad_()

    trainer = SlotNPE(problem.prior, build)
    trainer.train_online(
        problem.simulator,
        num_simulations=_AMORTIZED_SIMULATIONS,
        learning_rate=1e-3,
        seed=2,
        checkpoint=_CHECKPOINTS / "sinusoids-paper-amortized.safetensors",
    )
    return _widths(problem, trainer.build_posterior(), num_signals, seed)


def _widths(
    problem: Sinusoids, posterior: SlotPosterior, num_signals: int, seed: int
) -> Numbers:
    theta, x = simulate(problem, num_signals, TEST + seed)
    ratios: dict[str, list[float]] = {}
    for i in range(num_signals):
        k = int(problem.layout.cardinality(theta[i]))
        exact = rjmcmc.fixed_k(problem, x[i], k, seed=i)
        if not exact.is_reliable:
            progress(f"signal {i + 1}: the reference is not reliable, left out")
            continue
        found = metrics.compare(
            posterior.sample((4_000,), x[i], k=k, generator=generator_for(seed, i)),
            exact.sample((4_000,), generator=generator_for(seed, i)),
            layout=problem.layout,
            k=k,
            periods=PERIODS,
        )
        for parameter in found.parameters:
            name = parameter.name.rsplit("_", 1)[0]
            ratios.setdefault(name, []).append(parameter.std_ratio)
    return {f"deviation over exact, {n}": _quantiles(r) for n, r in ratios.items()}


def coverage(num_signals: int, seed: int) -> Numbers:
    """Coverage of credible intervals given the true K, ``paper``."""
    return _coverage("paper", 5 * num_signals, seed)


def coverage_crowded(num_signals: int, seed: int) -> Numbers:
    """Coverage of credible intervals given the true K, ``crowded``."""
    # Anchors of weak components are many, each of which is fitted.
    return _coverage("crowded", 2 * num_signals, seed)


def _coverage(preset: str, num_components: int, seed: int) -> Numbers:
    problem, posterior = ready(preset)
    folder = _CHECKPOINTS / f"coverage-{preset}"
    return {preset: coverage_rows(problem, posterior, num_components, seed, folder)}


def paper(num_signals: int, seed: int) -> Numbers:
    """The weights against the collapsed sampler, ``paper``."""
    return _against_exact("paper", "importance", num_signals, seed)


def crowded(num_signals: int, seed: int) -> Numbers:
    """The weights against the collapsed sampler, ``crowded``."""
    return _against_exact("crowded", "smc", num_signals, seed)


def close(num_signals: int, seed: int) -> Numbers:
    """Correlations of two components closer than a resolution element, ``crowded``."""
    problem, posterior = ready("crowded")
    layout = problem.layout
    generator = generator_for(TEST, seed, 2)
    shape = (num_signals, 2)
    components = torch.zeros(num_signals, layout.max_cardinality, 3)
    components[:, :2, 0] = 0.5 + torch.rand(shape, generator=generator)
    components[:, :2, 1] = math.tau * torch.rand(shape, generator=generator)
    gap = 0.3 + 0.7 * torch.rand(num_signals, generator=generator)
    low, high = problem.prior.component_marginals[2].bounds
    first = low + (high - low - 1 / 300) * torch.rand(num_signals, generator=generator)
    components[:, :2, 2] = torch.stack([first, first + gap / 300], -1)
    k = torch.full((num_signals,), 2)
    theta = layout.pack(k, components, torch.full((num_signals, 1), 0.5))
    x = problem.simulator(theta, generator)
    kept: dict[str, list[float]] = {}
    for i in range(num_signals):
        runs = [
            rjmcmc.collapsed(problem, x[i], seed=2 * i + run, num_draws=5_000, thin=80)
            for run in range(2)
        ]
        if float(runs[0].cardinality().probs[2]) < 0.3:
            progress(f"signal {i + 1}: two components are not told apart, left out")
            continue
        draws = posterior.sample((10_000,), x[i], k=2, generator=generator_for(seed, i))
        found = metrics.compare(
            draws, *runs, layout=layout, k=2, periods=PERIODS, seed=seed
        )
        assert found.floor is not None
        for name, result in (("amortized", found), ("floor", found.floor)):
            assert result.correlation_error is not None
            kept.setdefault(name, []).append(result.correlation_error)
        exact, again = (run.rows[layout.cardinality(run.rows) == 2] for run in runs)
        for name, rows in (("amortized", draws), ("floor", again)):
            # Of ranks: a few draws in a wrong cell do not decide them.
            pair = _ranks(layout, rows, exact), _ranks(layout, exact, exact)
            error = metrics.correlation_error(*pair)
            kept.setdefault(f"{name}, of ranks", []).append(error)
        progress(f"signal {i + 1}: { {n: round(v[-1], 3) for n, v in kept.items()} }")
    return {name: spread(values) for name, values in kept.items()}


def _ranks(layout: ThetaLayout, rows: Tensor, reference: Tensor) -> Tensor:
    """Ranks of both components' parameters ``(S, 2, 3)``, phases about the exact."""
    values, others = (
        layout.unpack(part).components[:, :2].double() for part in (rows, reference)
    )
    middle = circular_mean(others[..., 1], [math.tau, math.tau])
    phase = torch.remainder(values[..., 1] - middle + math.pi, math.tau)
    values = torch.stack([values[..., 0], phase, values[..., 2]], -1)
    return values.argsort(0).argsort(0).double()


def smc(num_signals: int, seed: int) -> Numbers:
    """Refinement by sequential Monte Carlo, ``crowded``."""
    problem, posterior = ready("crowded")
    _, x = simulate(problem, num_signals, TEST + seed)
    kept: dict[str, list[float]] = {}
    for i in range(num_signals):
        exact = rjmcmc.collapsed(problem, x[i], seed=i, num_draws=5_000, thin=80)
        started = time.perf_counter()
        refined = one(
            posterior.refine(
                problem.log_likelihood,
                x[i],
                10_000,
                method="smc",
                generator=generator_for(seed, i),
            )
        )
        kept.setdefault("seconds", []).append(time.perf_counter() - started)
        distance = metrics.total_variation(
            refined.cardinality().probs, exact.cardinality().probs
        )
        kept.setdefault("TV", []).append(distance.item())
        progress(f"signal {i + 1}: { {n: round(v[-1], 3) for n, v in kept.items()} }")
    return {name: spread(values) for name, values in kept.items()}


def _against_exact(
    preset: str, method: Literal["importance", "smc"], num_signals: int, seed: int
) -> Numbers:
    problem, posterior = ready(preset)
    theta, x = simulate(problem, num_signals, TEST + seed)
    kept: dict[str, list[float]] = {}
    for i in range(num_signals):
        true = int(problem.layout.cardinality(theta[i]))
        found = against_exact(problem, posterior, method, x[i], true, (seed, i))
        for name, value in found.items():
            kept.setdefault(name, []).append(value)
        progress(
            f"signal {i + 1}, K = {true}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        )
    return {name: spread(values) for name, values in kept.items()}


def against_exact(
    problem: Sinusoids,
    posterior: SlotPosterior,
    method: Literal["importance", "smc"],
    x: Tensor,
    true: int,
    seeds: tuple[int, int],
) -> dict[str, float]:
    """Compare the posterior of one signal, and refined, with the collapsed sampler.

    Args:
        problem: The problem.
        posterior: The posterior.
        method: How to refine.
        x: The signal.
        true: Its cardinality.
        seeds: Seed of the comparison, number of the signal.
    """
    weighted = one(
        posterior.refine(
            problem.log_likelihood,
            x,
            10_000,
            defensive=0.0,
            generator=generator_for(*seeds),
        )
    )
    started = time.thread_time()
    refined = one(
        posterior.refine(
            problem.log_likelihood,
            x,
            10_000,
            method=method,
            defensive=_DEFENSIVE[method],
            generator=generator_for(*seeds, 1),
        )
    )
    seconds = time.thread_time() - started
    reference, second = (
        rjmcmc.collapsed(problem, x, seed=2 * seeds[1] + run, num_draws=5_000, thin=80)
        for run in range(2)
    )
    exact, again = (run.cardinality().probs for run in (reference, second))
    amortized = posterior.cardinality(x).probs.double()
    others = {
        "amortized": amortized,
        "refined": refined.cardinality().probs,
        "weighted": weighted.cardinality().probs,
        "floor": again,
    }
    scores = {"exact": 0.5 * (exact + again), "amortized": amortized}
    found = {
        f"refine by {method}, seconds of the thread": seconds,
        **{
            f"TV, {name}": metrics.total_variation(probs, exact).item()
            for name, probs in others.items()
        },
        **{
            f"score, {name}": -math.log(max(float(probs[true]), 1e-4))
            for name, probs in scores.items()
        },
        "ESS/N": float(weighted.efficiency),
        "k-hat": float(weighted.pareto_k),
    }
    k = int(exact.argmax())
    if k:
        draws = posterior.sample((10_000,), x, k=k, generator=generator_for(k))
        both = {"amortized": draws, "refined": refined}
        found |= _distances(problem, both, reference, second, k)
    return found


def _distances(problem, draws, reference, second, k) -> dict[str, float]:
    """Distances of draws given K from the reference's, by label."""
    kept: dict[str, float] = {}
    for label, mine in draws.items():
        try:
            found = metrics.compare(
                mine, reference, second, layout=problem.layout, k=k, periods=PERIODS
            )
        except ValueError as error:  # too few draws of this K
            progress(f"{label} left out: {error}")
            continue
        assert found.floor is not None
        for name in problem.component_names:
            w2, floor = (
                np.array([p.w2 for p in c.parameters if p.name.startswith(name)])
                for c in (found, found.floor)
            )
            kept[f"W2, {label}, {name}"] = float(w2.mean())
            kept[f"W2 / floor, {label}, {name}"] = float(w2.mean() / floor.mean())
            # One component of many that may rarely be elsewhere decides the mean.
            kept[f"W2, {label}, {name}, median component"] = float(np.median(w2))
        results = {label: found}
        if label == "amortized":
            results["floor"] = found.floor
        for name, result in results.items():
            kept[f"C2ST, {name}"] = result.c2st
            if result.correlation_error is not None:
                kept[f"correlation error, {name}"] = result.correlation_error
    return kept


def _quantiles(values: list[float]) -> Numbers:
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"median": median, "5 %": low, "95 %": high, "components": len(values)}


def cards(num_signals: int, seed: int) -> Numbers:
    """Write the model cards from the results that were kept."""
    kept = {
        path.stem.removeprefix("anchored_"): json.loads(path.read_text())
        for path in RESULTS.glob("anchored_*.json")
    }
    for name, recipe in RECIPES.items():
        weights = WEIGHTS / f"{name}.safetensors"
        card = {
            "name": name,
            "problem": f'problems.sinusoids("{recipe.preset}")',
            "training": {
                "command": f"make pretrained NAME={name}",
                "seed of the first stage": 0,
                **asdict(recipe),
            },
            "megabytes": round(weights.stat().st_size / 1e6, 2),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "measured": {
                "command": "python -m benchmarks.anchored_slots",
                "K accuracy": kept["cardinality"][recipe.preset],
            },
        }
        if recipe.preset in kept:
            card["measured"]["against the collapsed sampler"] = kept[recipe.preset]
        if recipe.preset == "paper" and "widths" in kept:
            card["measured"]["widths"] = kept["widths"]
        text = json.dumps(card, indent=2) + "\n"
        (WEIGHTS / f"{name}.json").write_text(text)
        progress(f"wrote the card of {name}")
    return {}


PARTS = {
    "cardinality": (cardinality, 10_000),
    "widths": (widths, 200),
    "amortized": (amortized, 200),
    "coverage": (coverage, 1_000),
    "coverage_crowded": (coverage_crowded, 1_000),
    "paper": (paper, 50),
    "crowded": (crowded, 50),
    "close": (close, 20),
    "smc": (smc, 5),
    "cards": (cards, 1),
}

if __name__ == "__main__":
    run_parts(PARTS, "anchored", __doc__)
