"""How calibrated a posterior is: p(K | x), and credible intervals by parameter and K.

Shared by the scripts that measure trained networks. Coverage is measured in parts, each
with a seed of its own, whose ranks are kept on disk: a run may be stopped and taken up
again, and made longer later.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbi_slotflow import SlotPosterior
from sbi_slotflow.problems import Problem
from sbi_slotflow.seeding import generator_for

from .common import TEST, Numbers, progress, simulate, spread

LEVELS = np.linspace(0.1, 0.95, 18)
_PART = 100
_DRAWS = 199


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
    accuracy = float(right.mean())
    return {
        "accuracy": accuracy,
        "95 % interval": _wilson(accuracy, num_signals),
        "mean negative log score of the true K": spread(score.tolist()),
        "expected calibration error": _calibration_error(probs, k),
        "the same of draws from p(K | x) itself": _calibration_error(
            probs, from_itself.squeeze(-1)
        ),
        "n": num_signals,
    }


def coverage_rows(
    problem: Problem,
    posterior: SlotPosterior,
    num_components: int,
    seed: int,
    folder: Path,
) -> Numbers:
    """Bias of the share of truths in central intervals, over levels, by K.

    Beside it what ranks of a calibrated posterior would give.

    Args:
        problem: The problem.
        posterior: The posterior, to be given the true K.
        num_components: Components of each K, rounded up to whole parts.
        seed: Seed of the signals and of the draws.
        folder: Where ranks are kept.
    """
    names = problem.layout.component_names
    folder.mkdir(parents=True, exist_ok=True)
    numbers: Numbers = {}
    for k in range(1, problem.layout.max_cardinality + 1):
        num_parts = math.ceil(num_components / k / _PART)
        found = []
        for part in range(num_parts):
            path = folder / f"k{k}-seed{seed}-part{part}.safetensors"
            if not path.exists():
                ranks = _ranks(problem, posterior, k, seed, part)
                aside = path.with_suffix(".tmp")
                save_file({"ranks": ranks}, aside)
                aside.replace(path)
                progress(f"K = {k}: part {part + 1} of {num_parts}")
            found.append(load_file(path)["ranks"])
        ranks = torch.cat(found)
        for d, name in enumerate(names):
            numbers[f"K = {k}, {name}"] = _row(ranks[..., d], generator_for(seed, k))
        biases = {name: numbers[f"K = {k}, {name}"]["mean bias"] for name in names}
        progress(f"K = {k}: {biases}")
    return numbers


def _ranks(
    problem: Problem, posterior: SlotPosterior, k: int, seed: int, part: int
) -> Tensor:
    """Ranks ``(signals, k, D)`` in [0, 1] of the truth among draws given the true K."""
    layout, periods = problem.layout, problem.layout.periods
    weights = torch.zeros(layout.max_cardinality + 1)
    weights[k] = 1.0
    of_k = replace(problem, prior=problem.prior.with_cardinality(weights))
    theta, x = simulate(of_k, _PART, TEST + 10_000 * seed + 100 * part + k)
    draws = posterior.sample_batched(
        (_DRAWS,), x, k=k, generator=generator_for(seed, k, part)
    )
    truth = layout.unpack(theta).components[..., :k, :].double()
    drawn = layout.unpack(draws).components[..., :k, :].double()
    columns = []
    for d, name in enumerate(layout.component_names):
        mine, true = drawn[..., d], truth[..., d]
        if name in periods:
            # The truth among the draws: they are alike if the posterior is right.
            both = _unwrapped(torch.cat([mine, true.unsqueeze(0)]), periods[name])
            mine, true = both[:-1], both[-1]
        columns.append((mine < true).double().mean(0))
    return torch.stack(columns, -1)


def _row(ranks: Tensor, generator: torch.Generator) -> Numbers:
    """Bias of ranks ``(signals, k)``; signals are independent, components are not."""
    bias = _bias(ranks.flatten())
    uniform = torch.randint(
        0, _DRAWS + 1, (200, ranks.numel()), generator=generator
    ).double()
    expected = [np.abs(_bias(row / _DRAWS)).mean() for row in uniform]
    levels = torch.from_numpy(LEVELS)
    each = (_depth(ranks).unsqueeze(-1) < levels).double() - levels
    signed = each.mean((-2, -1))
    return {
        "mean bias": float(np.abs(bias).mean()),
        "largest bias": float(np.abs(bias).max()),
        "mean bias of uniform ranks": float(np.mean(expected)),
        "95 % quantile of that": float(np.quantile(expected, 0.95)),
        "signed mean bias": float(signed.mean()),
        "its standard error": float(signed.std() / math.sqrt(len(signed))),
        "components": ranks.numel(),
    }


def _bias(rank: Tensor) -> np.ndarray:
    """Bias of the coverage at each of the levels."""
    depth = _depth(rank)
    share = (depth < torch.from_numpy(LEVELS).unsqueeze(-1)).double().mean(-1)
    return share.numpy() - LEVELS


def _depth(rank: Tensor) -> Tensor:
    """The central interval that a rank is at the end of."""
    return 2 * (rank - 0.5).abs()


def _unwrapped(angle: Tensor, period: float) -> Tensor:
    """Angles (first axis), cut opposite to their circular mean."""
    turns = angle * (2 * math.pi / period)
    middle = torch.atan2(turns.sin().mean(0), turns.cos().mean(0)) * period / math.tau
    return middle + (angle - middle + 0.5 * period) % period - 0.5 * period


def _calibration_error(probs: Tensor, k: Tensor, num_bins: int = 15) -> float:
    """Mean gap between p(K | x) and frequency, over 15 bins of all its entries."""
    hits = torch.nn.functional.one_hot(k, probs.shape[-1]).double().flatten()
    stated = probs.double().flatten()
    bins = (stated * num_bins).long().clamp(max=num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64)
    gap.index_add_(0, bins, stated - hits)
    return float(gap.abs().sum() / len(k))


def _wilson(share: float, num: int) -> list[float]:
    z = 1.96
    middle = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = (
        z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + (z / num) ** 2 / 4)
    )
    return [middle - half, middle + half]
