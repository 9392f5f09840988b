"""The model cards of the shipped weights: ``python -m benchmarks.model_cards``.

Parts, each a function: ``cardinality`` (accuracy, scores and calibration of p(K | x)),
``widths`` (posterior deviations over exact ones, ``paper``), ``paper`` and ``crowded``
(against the collapsed sampler, amortized and refined). ``cards`` writes the cards from
what was kept with ``--keep``.
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

from sbi_slotflow import SlotPosterior, metrics, rjmcmc
from sbi_slotflow.pretrained import RECIPES
from sbi_slotflow.problems import Problem, Sinusoids
from sbi_slotflow.seeding import generator_for

from .common import PERIODS, TEST, Numbers, one, progress, ready, run_parts, simulate
from .intervals import share_interval, spread
from .store import RESULTS

# By weights, or by the collapsed sampler from the posterior's draws.
Method = Literal["importance", "collapsed"]
WEIGHTS = Path(__file__).parents[1] / "sbi_slotflow" / "weights"


def cardinality(num_signals: int, seed: int) -> Numbers:
    """p(K | x) on fresh signals of each preset."""
    return {
        name: cardinality_rows(*ready(name), num_signals, seed)
        for name in ("tiny", "paper", "crowded")
    }


def cardinality_rows(
    problem: Problem, posterior: SlotPosterior, num_signals: int, seed: int
) -> Numbers:
    """Accuracy, score and calibration of p(K | x) on fresh signals of the prior."""
    theta, x = simulate(problem, num_signals, TEST + seed)
    probs = torch.cat([posterior.cardinality(part).probs for part in x.split(200)])
    k = problem.layout.cardinality(theta)
    right = (probs.argmax(-1) == k).double()
    from_itself = torch.multinomial(probs, 1, generator=generator_for(seed))
    score = -probs.gather(-1, k.unsqueeze(-1)).squeeze(-1).double().log()
    return {
        "accuracy": float(right.mean()),
        "95 % interval": list(share_interval(int(right.sum()), num_signals)),
        "mean negative log score of the true K": spread(score.tolist()),
        "expected calibration error": _calibration_error(probs, k),
        "the same of draws from p(K | x) itself": _calibration_error(
            probs, from_itself.squeeze(-1)
        ),
        "n": num_signals,
    }


def _calibration_error(probs: Tensor, k: Tensor, num_bins: int = 15) -> float:
    """Mean gap between p(K | x) and frequency, over 15 bins of all its entries."""
    hits = torch.nn.functional.one_hot(k, probs.shape[-1]).double().flatten()
    stated = probs.double().flatten()
    bins = (stated * num_bins).long().clamp(max=num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64)
    gap.index_add_(0, bins, stated - hits)
    return float(gap.abs().sum() / len(k))


def widths(num_signals: int, seed: int) -> Numbers:
    """Posterior deviations given the true K over exact ones, ``paper``."""
    return widths_rows(*ready("paper"), num_signals, seed)


def widths_rows(
    problem: Sinusoids, posterior: SlotPosterior, num_signals: int, seed: int
) -> Numbers:
    """Posterior deviations given the true K over exact ones."""
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


def paper(num_signals: int, seed: int) -> Numbers:
    """The weights against the collapsed sampler, ``paper``."""
    return _against_exact("paper", "importance", num_signals, seed)


def crowded(num_signals: int, seed: int) -> Numbers:
    """The weights against the collapsed sampler, ``crowded``."""
    return _against_exact("crowded", "collapsed", num_signals, seed)


def _against_exact(preset: str, method: Method, num_signals: int, seed: int) -> Numbers:
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
    method: Method,
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
    if method == "importance":
        refined = one(
            posterior.refine(
                problem.log_likelihood,
                x,
                10_000,
                defensive=0.0,
                generator=generator_for(*seeds, 1),
            )
        )
    else:
        refined = rjmcmc.collapsed(problem, x, seed=3 * seeds[1] + 2, start=posterior)
    seconds = time.thread_time() - started
    reference, second = (
        rjmcmc.collapsed(problem, x, seed=seed, num_draws=5_000, thin=80)
        for seed in (3 * seeds[1], 3 * seeds[1] + 1)
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
        path.stem: json.loads(path.read_text())
        for path in (RESULTS / "model_cards").glob("*.json")
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
                "command": "python -m benchmarks.model_cards",
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
    "paper": (paper, 50),
    "crowded": (crowded, 50),
    "cards": (cards, 1),
}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
