"""Writes down what the package computes, so that later versions can be held to it.

``python tests/contract/freeze.py --write`` computes every quantity and writes it to
``reference.safetensors``, with the commit and the versions of the libraries in
``reference.json``; ``--write GROUP ...`` does so for some groups, whose results are
meant to change, and names their commit under ``anew``. ``--check`` computes them again
and says of each whether it is the same bit for bit; ``contract_test.py`` compares them
within tolerances instead.

Signals, theta rows and bounds are kept in the reference too. What depends on them is
computed from those that were kept: a change of the simulator is seen in ``x`` alone.
Only the public interface is used.
"""

# ruff: noqa: T201

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sbi_slotflow
from sbi_slotflow import (
    SlotNPE,
    SlotPosterior,
    build_catalogue,
    load_pretrained,
    problems,
    rjmcmc,
    slot_nn,
)

Values = dict[str, Tensor]

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PACKAGE = Path(sbi_slotflow.__file__).resolve().parent
TENSORS, DESCRIPTION = FOLDER / "reference.safetensors", FOLDER / "reference.json"

# Components of the signals of each preset.
SIGNALS = {"tiny": (1, 2, 3), "paper": (3, 10), "crowded": (3, 8)}
# Rows whose density is evaluated: posterior draws, draws given another K, prior draws.
NUM_ROWS, NUM_OTHER_K, NUM_PRIOR = 25, 12, 12
NUM_SAMPLES, NUM_MOMENTS, NUM_REFINED = 200, 4_000, 2_000
# The means and deviations are those of values cut off at these quantiles: a mode that
# one draw in a thousand visits would decide them otherwise.
CUT = (0.005, 0.995)

# Options of the networks that are trained, by the names that they have today.
SMALL = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_layers": 2,
    "flow_hidden_features": 16,
}
NETWORKS: dict[str, tuple[Callable[[], problems.Problem], dict[str, Any]]] = {
    "linear_gaussian": (problems.linear_gaussian, {"matching": "permanent"}),
    "cells": (problems.sinusoids, {"refine_slots": 0}),
    "independent": (problems.sinusoids, {"coupling": "factorised"}),
    "gauss_newton": (problems.sinusoids, {"refine_slots": 3}),
    "spikes": (problems.spikes, {"refine_slots": 2}),
}
LOSSES = [f"{part}_{name}" for part in ("train", "val") for name in (
    "cardinality", "flow", "shared"
)] + ["val_loss"]  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    """Return a generator of this seed."""
    return torch.Generator().manual_seed(seed)


def estimate(value: Tensor, error: Tensor) -> Tensor:
    """Put numbers and their Monte Carlo errors into one tensor ``(2, ...)``."""
    return torch.stack([value.double(), error.double()])


def frequencies(probs: Tensor, num: float) -> Tensor:
    """Return shares of K among ``num`` draws, with errors that are never zero."""
    probs = probs.double()
    return estimate(probs, (probs * (1 - probs) / num + num**-2).sqrt())


def features(rows: Tensor) -> Tensor:
    """Map sinusoids of one K to sigma and A, cos(phi), sin(phi), f of each."""
    k = int(rows[0, 0])
    parts = rows[:, 2 : 2 + 3 * k].double().unflatten(-1, (k, 3))
    amplitude, phase, frequency = parts.unbind(-1)
    return torch.cat(
        [rows[:, 1:2].double(), amplitude, phase.cos(), phase.sin(), frequency], dim=-1
    )


def moments(rows: Tensor, bounds: Tensor, num: float) -> Tensor:
    """Return means and deviations ``(2, 2 F)`` of features cut off at their bounds.

    ``num`` is the number of independent draws that the rows are worth.
    """
    values = features(rows).clamp(*bounds)
    mean, std = values.mean(0), values.std(0)
    fourth = (values - mean).pow(4).mean(0)
    of_std = (fourth - std.pow(4)).clamp(min=0).sqrt() / (2 * std)
    errors = torch.cat([std, of_std]) / math.sqrt(num)
    return estimate(torch.cat([mean, std]), errors)


def signals(preset: str, given: Values) -> Values:
    """Draw the signals of a preset; prior and likelihood at seeded rows."""
    problem = problems.sinusoids(preset)  # pyright: ignore[reportArgumentType]
    prior = problem.prior.sample((500,), generator=seeded(1))
    counts = prior[:, 0].tolist()
    theta = torch.stack([prior[counts.index(k)] for k in SIGNALS[preset]])
    found = {"theta": theta, "prior_samples": prior[:50]}
    found["x"] = problem.simulator(given.get("theta", theta), seeded(2))
    rows = given.get("prior_samples", prior[:50])
    x = given.get("x", found["x"])[0]
    found["prior_log_prob"] = problem.prior.log_prob(rows)
    found["log_likelihood"] = problem.log_likelihood(rows, x)
    # From 100 rows on it is read from tables.
    found["log_likelihood_of_many"] = problem.log_likelihood(rows.repeat(2, 1), x)
    return found


def network(preset: str, given: Values) -> Values:
    """Evaluate shipped weights on the signals of their preset."""
    posterior = load_pretrained(f"sinusoids-{preset}")
    x = given["x"]
    found: Values = {
        "cardinality_of_batch": posterior.cardinality(x).probs,
        "samples_of_batch": posterior.sample_batched((50,), x, generator=seeded(3)),
    }
    for i in range(len(x)):
        kept = {n[2:]: v for n, v in given.items() if n.startswith(f"{i}/")}
        one = of_signal(posterior, preset, x[i], given["theta"][i], kept)
        found |= {f"{i}/{name}": value for name, value in one.items()}
    return found


def of_signal(
    posterior: SlotPosterior, preset: str, x: Tensor, theta: Tensor, given: Values
) -> Values:
    """Evaluate shipped weights on one signal, with components ``theta``."""
    problem = problems.sinusoids(preset)  # pyright: ignore[reportArgumentType]
    found = {"cardinality": posterior.cardinality(x).probs}
    mode = int(found["cardinality"].argmax())
    samples = posterior.sample((NUM_SAMPLES,), x, generator=seeded(4))
    found["samples"] = samples

    other_k = mode + 1 if mode < problem.prior.max_cardinality else mode - 1
    rows = {
        "rows_drawn": torch.cat([theta.unsqueeze(0), samples[:NUM_ROWS]]),
        "rows_of_other_k": posterior.sample(
            (NUM_OTHER_K,), x, k=other_k, generator=seeded(5)
        ),
        "rows_of_prior": problem.prior.sample((NUM_PRIOR,), generator=seeded(6)),
    }
    for name, drawn in rows.items():
        found[name] = drawn
        at = given.get(name, drawn)
        ending = name.removeprefix("rows_")
        found[f"density_{ending}"] = posterior.log_prob(at, x, norm_posterior=False)
        found[f"log_prob_{ending}"] = posterior.log_prob(at, x)

    many = posterior.sample((NUM_MOMENTS,), x, generator=seeded(7))
    counts = torch.bincount(many[:, 0].long(), minlength=len(found["cardinality"]))
    found["frequencies"] = frequencies(counts / NUM_MOMENTS, NUM_MOMENTS)
    many = posterior.sample((NUM_MOMENTS,), x, k=mode, generator=seeded(8))
    levels = torch.tensor(CUT, dtype=torch.float64)
    found["bounds"] = features(many).quantile(levels, dim=0)
    bounds = given.get("bounds", found["bounds"])
    found["moments"] = moments(many, bounds, NUM_MOMENTS)

    listed = build_catalogue(given.get("samples", samples), problem.layout)
    for column in ("existence", *problem.component_names):
        found[f"catalogue_{column}"] = torch.from_numpy(listed[column].to_numpy())

    if preset != "crowded":
        refined = posterior.refine(
            problem.log_likelihood, x, NUM_REFINED, generator=seeded(9)
        )
        assert not isinstance(refined, list)
        probs = refined.cardinality().probs
        exact = refined.sample((NUM_REFINED,), k=mode, generator=seeded(10))
        # Resampling adds the noise of a second draw at most.
        worth = 0.5 * refined.ess * float(probs[mode])
        evidence = [refined.log_evidence, refined.log_evidence_error]
        found |= {
            "refined_cardinality": frequencies(probs, refined.ess),
            "refined_log_evidence": torch.tensor(evidence, dtype=torch.float64),
            "refined_ess": torch.tensor(refined.ess),
            "refined_pareto_k": torch.tensor(refined.pareto_k),
            "refined_moments": moments(exact, bounds, worth),
        }
    return found


def given_cardinality(given: Values) -> Values:
    """Weigh draws of the exact posterior given K."""
    k = SIGNALS["tiny"][1]
    exact = rjmcmc.fixed_k(
        problems.sinusoids("tiny"), given["x"][1], k, num_samples=NUM_REFINED
    )
    evidence = [exact.log_evidence, exact.log_evidence_error]
    return {"log_evidence_given_k": torch.tensor(evidence, dtype=torch.float64)}


def closed_form(given: Values) -> Values:
    """Evaluate the posterior of the linear-Gaussian problem."""
    problem = problems.linear_gaussian()
    theta = problem.prior.sample((4,), generator=seeded(1))
    found: Values = {"theta": theta, "x": problem.simulator(theta, seeded(2))}
    x = given.get("x", found["x"])
    posterior = problem.exact_posterior()
    found["cardinality_of_batch"] = posterior.cardinality(x).probs
    found["samples_of_batch"] = posterior.sample_batched((50,), x, generator=seeded(3))
    found["cardinality"] = posterior.cardinality(x[0]).probs
    found["samples"] = posterior.sample((100,), x[0], generator=seeded(4))
    # Rows of every K: draws hold few components, where log K! is zero.
    found["prior_samples"] = problem.prior.sample((50,), generator=seeded(5))
    rows = given.get("prior_samples", found["prior_samples"])
    found["log_prob"] = posterior.log_prob(rows, x[0])
    found["log_evidence"] = posterior.log_evidence(x)
    return found


def spikes(given: Values) -> Values:
    """Evaluate prior, simulator and likelihood of the spike problem."""
    problem = problems.spikes()
    theta = problem.prior.sample((20,), generator=seeded(1))
    rows = given.get("theta", theta)
    x: Tensor = problem.simulator(rows, seeded(2))
    return {
        "theta": theta,
        "x": x[:1],
        "prior_log_prob": problem.prior.log_prob(rows),
        "log_likelihood": problem.log_likelihood(rows, given.get("x", x)[0]),
    }


def training(name: str) -> Values:
    """Train a tiny network for four steps and ask it about a signal."""
    make, options = NETWORKS[name]
    problem = make()
    trainer = SlotNPE(
        problem.prior, slot_nn(problem, **SMALL, **options), show_progress_bars=False
    )
    trainer.train_online(
        problem.simulator,
        num_simulations=4 * 32,
        batch_size=32,
        num_validation=64,
        validate_every=2,
        seed=1,
    )
    history = [[entry[loss] for loss in LOSSES] for entry in trainer.history]
    posterior = trainer.build_posterior()
    theta = problem.prior.sample((20,), generator=seeded(1))
    x = problem.simulator(theta, seeded(2))[0]
    return {
        "losses": torch.tensor(history, dtype=torch.float64),
        "cardinality": posterior.cardinality(x).probs,
        "log_prob": posterior.log_prob(theta, x, norm_posterior=False),
    }


def paper_preset() -> Values:
    """Build the network of the paper from a seed and ask it about the signals."""
    problem = problems.sinusoids("paper")
    theta = problem.prior.sample((4,), generator=seeded(1))
    x = problem.simulator(theta, seeded(2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        estimator = slot_nn.paper(problem)(theta, x)
    posterior = SlotPosterior(estimator, problem.prior)
    parameters = [p.detach().double() for p in estimator.parameters()]
    return {
        "cardinality": posterior.cardinality(x).probs,
        "samples": posterior.sample((5,), x[0], k=2, generator=seeded(3)),
        "num_parameters": torch.tensor(sum(p.numel() for p in parameters)),
        "squared_weights": torch.stack([p.square().sum() for p in parameters]).sum(),
    }


GROUPS: dict[str, Callable[[Values], Values]] = {
    **{
        preset: lambda given, preset=preset: signals(preset, given)
        for preset in SIGNALS
    },
    **{
        f"weights-{preset}": lambda given, preset=preset: network(preset, given)
        for preset in SIGNALS
    },
    "fixed_k": given_cardinality,
    "closed_form": closed_form,
    "spikes": spikes,
    **{
        f"training-{name}": lambda given, name=name: training(name) for name in NETWORKS
    },
    "paper_preset": lambda given: paper_preset(),
}
"""Groups of quantities; a function maps what is kept of them to what is computed."""

# Groups that need the signals of another.
BORROWS = {
    **{f"weights-{preset}": preset for preset in SIGNALS},
    "fixed_k": "tiny",
}


def part(values: Values, group: str) -> Values:
    """Return the quantities of one group, without its name."""
    stem = f"{group}."
    return {n.removeprefix(stem): v for n, v in values.items() if n.startswith(stem)}


def compute(group: str, reference: Values) -> Values:
    """Compute a group's quantities from what the reference keeps of it."""
    given = part(reference, group)
    if group in BORROWS:
        lender = part(reference, BORROWS[group])
        given |= {name: lender[name] for name in ("theta", "x")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signals unlike the rest, of few draws
        return GROUPS[group](given)


def load() -> Values:
    """Read the reference."""
    return load_file(TENSORS)


def write(groups: list[str]) -> None:
    """Compute some groups anew, or everything, and write the reference.

    Raises:
        RuntimeError: If the package is not the one beside this file, or was changed
            since its last commit: the reference would name a commit that it is not of.
    """
    if PACKAGE.parent != ROOT:
        raise RuntimeError(f"sbi_slotflow must be imported from {ROOT}, got {PACKAGE}.")
    if changed := _git("status", "--porcelain", "--", "sbi_slotflow"):
        raise RuntimeError(f"sbi_slotflow must have no changes, got\n{changed}")
    commit = _git("log", "-1", "--format=%H", "--", "sbi_slotflow")
    values: Values = load() if groups else {}
    for group in groups or GROUPS:
        values = {n: v for n, v in values.items() if not n.startswith(f"{group}.")}
        found = compute(group, values)
        values |= {f"{group}.{n}": v.detach().contiguous() for n, v in found.items()}
        print(f"{group}: {len(found)} quantities")
    if groups:
        description = json.loads(DESCRIPTION.read_text())
        description.setdefault("anew", {}).update(dict.fromkeys(groups, commit))
        save_file(values, TENSORS)
        DESCRIPTION.write_text(json.dumps(description, indent=2) + "\n")
        return
    packages = ("torch", "numpy", "scipy", "sbi", "nflows", "safetensors")
    description = {
        "commit": commit,
        "python": ".".join(map(str, sys.version_info[:3])),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in packages},
    }
    save_file(values, TENSORS)
    DESCRIPTION.write_text(json.dumps(description, indent=2) + "\n")


def check() -> int:
    """Print which quantities are the same bit for bit; return how many are not."""
    print(f"package: {PACKAGE}")
    reference, different = load(), 0
    for group in GROUPS:
        expected, found = part(reference, group), compute(group, reference)
        for name in sorted(expected.keys() | found.keys()):
            verdict = _verdict(expected.get(name), found.get(name))
            different += verdict != "same"
            print(f"{verdict:<28} {group}.{name}")
    print(f"{different} quantities differ")
    return different


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def _verdict(expected: Tensor | None, found: Tensor | None) -> str:
    if expected is None or found is None:
        return "not in the reference" if expected is None else "no longer computed"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{tuple(found.shape)} for {tuple(expected.shape)}"
    if torch.equal(expected.nan_to_num(7.7), found.nan_to_num(7.7)):
        return "same"
    changed = expected != found
    gap = (expected.double() - found.double()).abs()[changed].max()
    return f"{int(changed.sum())}/{changed.numel()} by {gap:.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--write", nargs="*", choices=GROUPS, help="write the reference anew"
    )
    mode.add_argument("--check", action="store_true", help="compare bit for bit")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write(arguments.write)
    else:
        sys.exit(check() > 0)
