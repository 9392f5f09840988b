"""What the benchmark scripts share."""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from sbi_slotflow import (
    SlotNPE,
    SlotPosterior,
    calibration,
    load_pretrained,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.posterior.draws import ChainDraws
from sbi_slotflow.posterior.refine import RefinedPosterior
from sbi_slotflow.pretrained import RECIPES
from sbi_slotflow.problems import Problem, Sinusoids
from sbi_slotflow.seeding import generator_for

from .experiment import Claim
from .intervals import median_interval
from .store import RESULTS, Cache, plain, write_json

Numbers = dict[str, Any]
_Problem = TypeVar("_Problem", bound=Problem)
PERIODS = {"phase": 2 * math.pi}
# Stream of the seed for signals that no training has seen.
TEST = 1_000_003


def ready(preset: str) -> tuple[Sinusoids, SlotPosterior]:
    """A preset and its shipped weights."""
    posterior = load_pretrained(f"sinusoids-{preset}")
    return RECIPES[f"sinusoids-{preset}"].problem, posterior


def trained(
    problem: Problem,
    cache: Cache,
    name: str,
    num_simulations: int,
    seed: int,
    *,
    num_validation: int = 2_000,
    **options: Any,
) -> tuple[SlotPosterior, float]:
    """Train a network as a user would, and count the CPU seconds of it.

    A checkpoint that is finished takes no time: keep the first run's seconds.
    """
    begun = time.process_time()
    trainer = SlotNPE(problem.prior, slot_nn(problem), show_progress_bars=False)
    trainer.train_online(
        problem.simulator,
        num_simulations=num_simulations,
        num_validation=min(num_validation, num_simulations),
        seed=seed,
        checkpoint=cache.path(name, ".safetensors"),
        **options,
    )
    posterior = trainer.build_posterior()
    return posterior, time.process_time() - begun


def unseen(
    problem: Problem, num: int, seed: int, *stream: int
) -> tuple[Tensor, Tensor]:
    """Parameters and signals that no training has seen."""
    theta = problem.prior.sample((num,), generator_for(seed, TEST, *stream, 0))
    return theta, problem.simulator(theta, generator_for(seed, TEST, *stream, 1))


def by_seed(dataset: xr.Dataset, name: str) -> str:
    """The means of each seed, for a claim's note."""
    values = dataset[name]
    if values.sizes.get("seed", 1) == 1:
        return ""
    means = values.mean([dim for dim in values.dims if dim != "seed"]).values
    return f"By seed: {', '.join(f'{mean:.3g}' for mean in means)}. "


def quietly_refined(
    posterior: SlotPosterior,
    problem: Problem,
    x: Tensor,
    num: int,
    generator: torch.Generator,
    **options: Any,
) -> RefinedPosterior:
    """Refine one observation; whether it is reliable is recorded, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return one(
            posterior.refine(
                problem.log_likelihood, x, num, generator=generator, **options
            )
        )


def sampled_exactly(
    posterior: SlotPosterior, problem: Problem, x: Tensor, seed: int, **options: Any
) -> tuple[ChainDraws, float]:
    """Draws of the collapsed sampler that begins at the network's, and CPU seconds.

    Whether chains have converged is recorded, and no warning.
    """
    generator, begun = torch.Generator().manual_seed(seed), time.process_time()
    rows = posterior.sample((48,), x=x, generator=generator, show_progress_bars=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = rjmcmc.collapsed(problem, x, start=rows, seed=seed, **options)
    return draws, time.process_time() - begun


def evidences_by_importance(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, K) of each K by importance sampling, and where it is reliable.

    Where it is not, it is too small.
    """
    values, reliable = [], []
    for k in range(problem.prior.max_cardinality + 1):
        try:
            result = rjmcmc.fixed_k(problem, x, k)
        except ValueError:  # no draw has a positive weight
            values.append(-math.inf)
            reliable.append(False)
        else:
            values.append(result.log_evidence)
            reliable.append(result.is_reliable)
    log_p = problem.prior.log_cardinality_probs.double()
    return torch.tensor(values, dtype=torch.float64) + log_p, torch.tensor(reliable)


def width_claims(
    dataset: xr.Dataset,
    target: Callable[[str], str | None] = lambda name: None,
    prefix: str = "",
) -> list[Claim]:
    """Medians of half widths over the bound, of each parameter that has some."""
    found = []
    for name in map(str, dataset.parameter.values):
        widths = dataset["width"].sel(parameter=name).values.ravel()
        widths = widths[np.isfinite(widths)]
        if len(widths):
            found.append(
                Claim(
                    f"{prefix}half width of {name} over the Cramer-Rao bound, median",
                    float(np.median(widths)),
                    median_interval(widths),
                    target=target(name),
                    note=f"Of {len(widths)} signals.",
                )
            )
    return found


def reported(
    posterior: SlotPosterior, problem: Problem, num: int, seed: int
) -> xr.Dataset:
    """What `calibration.report` finds with ``num`` pairs; nothing if that is 0."""
    if not num:
        return xr.Dataset()
    begun = time.process_time()
    found = calibration.report(posterior, problem, num, seed=seed, show_progress=False)
    seconds = time.process_time() - begun
    progress(f"{found}\n{seconds:.0f} s")
    p_values = {name: check.p_value for name, check in found.checks.items()}
    curves = found.checks["coverage"].numbers
    ninety = {name: curve["coverage"][0.9] for name, curve in curves.items()}
    return xr.Dataset(
        {
            "p_value": ("check", list(p_values.values())),
            "ninety": ("covered", list(ninety.values())),
            "report_seconds": seconds,
        },
        {"check": list(p_values), "covered": list(ninety)},
    )


def report_claims(dataset: xr.Dataset, prefix: str = "") -> list[Claim]:
    """What `calibration.report` found, for each seed."""
    if "p_value" not in dataset:
        return []
    per_seed = dataset["p_value"].transpose("check", ...).values
    failed, worst = [], []
    names = [str(name) for name in dataset.check.values]
    for values in per_seed.reshape(len(names), -1).T:
        made = {n: v for n, v in zip(names, values, strict=True) if np.isfinite(v)}
        if not made:
            continue
        rate = 0.05 / len(made)
        failed += [name for name, value in made.items() if value <= rate]
        least = min(made, key=lambda name: made[name])
        worst.append(f"{made[least]:.2g}, of {least} (one fails at {rate:.2g})")
    if not worst:
        return []
    ninety = dataset["ninety"].transpose("covered", ...).values
    ninety = np.nanmean(ninety.reshape(len(ninety), -1), -1)
    inside = ", ".join(
        f"{name} {share:.2f}"
        for name, share in zip(dataset.covered.values, ninety, strict=True)
    )
    return [
        Claim(
            f"{prefix}checks of calibration.report that fail",
            len(failed),
            target="<= 0",
            note=f"{', '.join(failed)}{'. ' * bool(failed)}Least p: "
            f"{'; '.join(worst)}. Inside of 90 % intervals: {inside}.",
        ),
        Claim(
            f"{prefix}CPU seconds of calibration.report",
            round(float(dataset["report_seconds"].mean())),
        ),
    ]


def simulate(problem: Problem, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw parameters and signals from the prior."""
    theta = problem.prior.sample((num,), generator_for(seed, 0))
    return theta, problem.simulator(theta, generator_for(seed, 1))


def given_k(problem: _Problem, k: int) -> _Problem:
    """The problem with all its prior at one cardinality."""
    weights = torch.zeros(problem.prior.max_cardinality + 1)
    weights[k] = 1.0
    return replace(problem, prior=problem.prior.with_cardinality(weights))


def one(result: RefinedPosterior | list[RefinedPosterior]) -> RefinedPosterior:
    """The result for a single observation."""
    assert isinstance(result, RefinedPosterior)
    return result


def progress(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def run_parts(
    parts: Mapping[str, tuple[Callable[[int, int], Numbers], int]],
    description: str | None,
) -> None:
    """Run the parts that the command line asks for.

    Args:
        parts: Functions of (number of signals, seed), with the usual number.
        description: What ``--help`` says.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[])
    parser.add_argument("--signals", type=int, help="signals a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="in benchmarks/results")
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
        if args.keep:
            script = Path(sys.argv[0]).stem
            write_json(plain(numbers), RESULTS / script / f"{name}.json")
