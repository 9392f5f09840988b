"""Weights that come with the package: how they are made, and loaded.

Each set is a safetensors file with, beside it, a model card. It follows from its recipe
and seed by ``python -m sbi_slotflow.pretrained NAME``; a run keeps its state in
``checkpoints/`` and may be stopped and taken up again at any moment.
"""

import argparse
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch

from .calibration.misspecification import TrainingReference
from .nn.estimator import SlotDensityEstimator
from .posterior.network import SlotPosterior
from .problems import Sinusoids, sinusoids
from .seeding import generator_for
from .storage import check_tensors_replaceable
from .training.stages import Stage, train_stages

__all__ = [
    "RECIPES",
    "PretrainingRecipe",
    "available_weights",
    "load_pretrained",
    "model_card",
    "pretrain",
    "training_reference",
    "weights_file",
]

# Signals that describe a problem's training data, and the stream of their seed.
_REFERENCE_SIGNALS, _REFERENCE = 4_000, 3
_WEIGHTS = files("sbi_slotflow") / "weights"


@dataclass(frozen=True)
class PretrainingRecipe:
    """How a set of weights is made.

    Attributes:
        preset: Preset of the sinusoid problem.
        builder: Options of :class:`~sbi_slotflow.slot_nn`.
        stages: Runs of training, one after the other.
    """

    preset: Literal["tiny", "paper", "crowded"]
    builder: dict[str, Any]
    stages: tuple[Stage, ...]

    @property
    def problem(self) -> Sinusoids:
        """The problem that the weights are for."""
        return sinusoids(self.preset)


RECIPES: dict[str, PretrainingRecipe] = {
    "sinusoids-tiny": PretrainingRecipe(
        "tiny",
        {"refine_slots": 3},
        (
            Stage(128_000, 1e-3, 3.0, part="cells"),
            Stage(51_200, 1e-3, 3.0, part="local"),
        ),
    ),
    "sinusoids-paper": PretrainingRecipe(
        "paper",
        # The fitted Gaussians leave a flow nothing to learn.
        {"refine_slots": 3, "flow_layers": 0},
        (
            Stage(256_000, 1e-3, 3.0, part="cells"),
            Stage(32_000, 1e-3, 3.0, part="local"),
        ),
    ),
    "sinusoids-crowded": PretrainingRecipe(
        "crowded",
        {
            "refine_slots": 4,
            "slots": "anchored",
            "encoder_options": {"pursuit": True},
            # A flow of all signals' fits has the tails of those that failed.
            "flow_layers": 0,
        },
        (
            Stage(384_000, 1e-3, 3.0, part="cells"),
            Stage(32_000, 1e-3, 3.0, part="local"),
        ),
    ),
}
"""Recipes by name."""


def pretrain(
    name: str, checkpoints: Path = Path("checkpoints"), device: str = "cpu"
) -> SlotDensityEstimator:
    """Train a set of weights, or take up its training."""
    if name not in RECIPES:
        raise ValueError(f"name must be one of {sorted(RECIPES)}, got {name!r}.")
    recipe = RECIPES[name]
    return train_stages(
        recipe.problem, recipe.builder, recipe.stages, checkpoints / name, device
    )


def training_reference(name: str) -> TrainingReference:
    """Describe the training data of a set of weights.

    With it, the posterior warns of observations that are unlike them.
    """
    problem = RECIPES[name].problem
    theta = problem.prior.sample((_REFERENCE_SIGNALS,), generator_for(0, _REFERENCE, 0))
    x = problem.simulator(theta, generator_for(0, _REFERENCE, 1))
    lengths = [stream.num_samples for stream in problem.streams]
    return TrainingReference.fit(x, streams=lengths)


def available_weights() -> tuple[str, ...]:
    """Names of the sets of weights in this installation."""
    names = {entry.name for entry in _WEIGHTS.iterdir()}
    cards = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return tuple(sorted(name for name in cards if f"{name}.safetensors" in names))


def weights_file(
    name: str, suffix: str = "safetensors"
) -> AbstractContextManager[Path]:
    """Give the path of a shipped file while its context lasts."""
    names = available_weights()
    if name not in names:
        raise ValueError(f"name must be one of {list(names)}, got {name!r}.")
    return as_file(_WEIGHTS / f"{name}.{suffix}")


def model_card(name: str) -> dict[str, Any]:
    """Return how a set of weights was trained and what was measured of it.

    Args:
        name: See :func:`load_pretrained`.
    """
    with weights_file(name, "json") as path:
        return json.loads(path.read_text())


def load_pretrained(
    name: str, device: str | torch.device | None = None
) -> SlotPosterior:
    """Load a posterior that is ready to use; :func:`model_card` tells of it.

    Args:
        name: ``"sinusoids-tiny"``, ``"sinusoids-paper"`` or ``"sinusoids-crowded"``,
            for the problem of that preset, ``problems.sinusoids("tiny")`` say.
        device: Device of the posterior; the CPU if None.

    Raises:
        ValueError: If there are no such weights.
    """
    with weights_file(name) as path:
        estimator = SlotDensityEstimator.load(path)
    if device is not None:
        estimator = estimator.to(device)
    problem = RECIPES[name].problem
    posterior = SlotPosterior(
        estimator, problem.prior, problem.simulator, device=device
    )
    if (_WEIGHTS / f"{name}.reference.safetensors").is_file():  # not every set has one
        with weights_file(name, "reference.safetensors") as path:
            posterior.set_training_reference(TrainingReference.load(path))
    posterior.model_card = model_card(name)
    return posterior


def _main() -> None:
    """Train a set of weights and write it, and what its training data look like."""
    parser = argparse.ArgumentParser(description=_main.__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/weights"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--reference-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    weights = args.out / f"{args.name}.safetensors"
    reference = args.out / f"{args.name}.reference.safetensors"
    # Before the training: it takes hours.
    for path, made in ((weights, SlotDensityEstimator), (reference, TrainingReference)):
        check_tensors_replaceable(path, f"sbi_slotflow.{made.__name__}")
    if not args.reference_only:
        pretrain(args.name, device=args.device).save(weights)
    training_reference(args.name).save(reference)
    for path in (weights, reference)[args.reference_only :]:
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    _main()
