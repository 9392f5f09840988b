"""What the benchmark scripts share."""

import argparse
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from torch import Tensor

from sbi_slotflow import SlotPosterior, load_pretrained
from sbi_slotflow.posterior.refine import RefinedPosterior
from sbi_slotflow.pretrained.recipes import RECIPES
from sbi_slotflow.problems import Problem, Sinusoids
from sbi_slotflow.seeding import generator_for

Numbers = dict[str, Any]
PERIODS = {"phase": 2 * math.pi}
# Stream of the seed for signals that no training has seen.
TEST = 1_000_003


def ready(preset: str) -> tuple[Sinusoids, SlotPosterior]:
    """A preset and its shipped weights."""
    posterior = load_pretrained(f"sinusoids-{preset}")
    return RECIPES[f"sinusoids-{preset}"].problem, posterior


def simulate(problem: Problem, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw parameters and signals from the prior."""
    theta = problem.prior.sample((num,), generator_for(seed, 0))
    return theta, problem.simulator(theta, generator_for(seed, 1))


def given_k(problem: Sinusoids, k: int) -> Sinusoids:
    """The problem with all its prior at one cardinality."""
    weights = torch.zeros(problem.prior.max_cardinality + 1)
    weights[k] = 1.0
    return replace(problem, prior=problem.prior.with_cardinality(weights))


def one(result: RefinedPosterior | list[RefinedPosterior]) -> RefinedPosterior:
    """The result for a single observation."""
    assert isinstance(result, RefinedPosterior)
    return result


def spread(values: list[float]) -> Numbers:
    """Mean with its standard error, median and extremes."""
    array = np.array(values)
    several = len(array) > 1
    return {
        "mean": float(array.mean()),
        "error": array.std(ddof=1) / math.sqrt(len(array)) if several else None,
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "n": len(array),
    }


def chains_size(values: np.ndarray) -> float:
    """Effective size of (chains, draws)."""
    size: Any = array_stats.ess(values)
    return float(size)


def ensemble_size(values: np.ndarray) -> float:
    """Effective size of (walkers, draws): variance over that of the grand mean."""
    mean = values.mean(0)
    return chains_size(mean[None]) * float(values.var() / max(mean.var(), 1e-300))


def progress(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def run_parts(
    parts: Mapping[str, tuple[Callable[[int, int], Numbers], int]],
    prefix: str,
    description: str | None,
) -> None:
    """Run the parts that the command line asks for.

    Args:
        parts: Functions of (number of signals, seed), with the usual number.
        prefix: Start of the names of their JSON files.
        description: What ``--help`` says.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[])
    parser.add_argument("--signals", type=int, help="signals a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for JSON files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    for name in args.parts or parts:
        part, usual = parts[name]
        progress(f"\n== {name}: {(part.__doc__ or '').splitlines()[0]}")
        numbers = part(args.signals or usual, args.seed)
        if not numbers:
            continue
        progress(json.dumps(numbers, indent=2))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{prefix}_{name}.json"
            path.write_text(json.dumps(numbers, indent=2) + "\n")
