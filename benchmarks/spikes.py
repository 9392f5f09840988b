"""How calibrated slots in time are: ``python -m benchmarks.spikes``.

``calibration`` trains a small network on ``problems.spikes()``, in two stages as the
shipped weights are made, and measures on fresh traces how calibrated p(K | x) and the
credible intervals are. Training keeps its state in ``checkpoints/``, the ranks of the
coverage are kept in parts with a seed each: both may be stopped and taken up again, and
the coverage made longer later.
"""

import math
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from sbi_slotflow import SlotPosterior
from sbi_slotflow.problems import Problem, spikes
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.training.stages import Stage, train_stages

from .common import TEST, Numbers, given_k, progress, run_parts, simulate
from .model_cards import cardinality_rows
from .store import Cache

_CHECKPOINTS = Path("checkpoints")
_STAGES = (
    Stage(64_000, 1e-3, 3.0, part="cells"),
    Stage(24_000, 1e-3, 3.0, part="local"),
)
LEVELS = np.linspace(0.1, 0.95, 18)
_PART = 100
_DRAWS = 199


def calibration(num_components: int, seed: int) -> Numbers:
    """p(K | x) and credible intervals of time, width and amplitude by K, ``spikes``."""
    problem, posterior = spikes(), _trained()
    simulations = [stage.num_simulations for stage in _STAGES]
    return {
        "simulations of the two stages": simulations,
        "K": cardinality_rows(problem, posterior, 10 * num_components, seed),
        "credible intervals given K": coverage_rows(
            problem, posterior, num_components, seed
        ),
    }


def _trained() -> SlotPosterior:
    """The posterior of the last stage, trained as far as it is not yet."""
    problem = spikes()
    estimator = train_stages(
        problem, {"refine_slots": 3}, _STAGES, _CHECKPOINTS / "spikes"
    )
    return SlotPosterior(estimator.eval(), problem.prior)


def coverage_rows(
    problem: Problem,
    posterior: SlotPosterior,
    num_components: int,
    seed: int,
) -> Numbers:
    """Bias of the share of truths in central intervals, over levels, by K.

    Beside it what ranks of a calibrated posterior would give.

    Args:
        problem: The problem.
        posterior: The posterior, to be given the true K.
        num_components: Components of each K, rounded up to whole parts.
        seed: Seed of the signals and of the draws.
    """
    names = problem.layout.component_names
    cache = Cache("spikes", "full", seed)
    numbers: Numbers = {}
    for k in range(1, problem.layout.max_cardinality + 1):
        num_parts = math.ceil(num_components / k / _PART)
        found = [
            cache.get(
                f"k{k}-{part}",
                lambda k=k, part=part: _ranks(problem, posterior, k, seed, part),
            )
            for part in tqdm(range(num_parts), desc=f"K = {k}", leave=False)
        ]
        ranks = torch.cat([torch.from_numpy(part["rank"].values) for part in found])
        for d, name in enumerate(names):
            numbers[f"K = {k}, {name}"] = _row(ranks[..., d], generator_for(seed, k))
        biases = {name: numbers[f"K = {k}, {name}"]["mean bias"] for name in names}
        progress(f"K = {k}: {biases}")
    return numbers


def _ranks(
    problem: Problem, posterior: SlotPosterior, k: int, seed: int, part: int
) -> xr.Dataset:
    """Ranks ``(signals, k, D)`` in [0, 1] of the truth among draws given the true K."""
    layout = problem.layout
    seeds = TEST + 10_000 * seed + 100 * part + k
    theta, x = simulate(given_k(problem, k), _PART, seeds)
    draws = posterior.sample_batched(
        (_DRAWS,), x, k=k, generator=generator_for(seed, k, part)
    )
    truth = layout.unpack(theta).components[..., :k, :]
    drawn = layout.unpack(draws).components[..., :k, :]
    rank = (drawn < truth).double().mean(0).numpy()
    return xr.Dataset({"rank": (("signal", "component", "parameter"), rank)})


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


PARTS = {"calibration": (calibration, 1_000)}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
