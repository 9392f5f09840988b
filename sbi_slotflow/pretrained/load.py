"""Weights that come with the package.

Each set is a safetensors file with, beside it, a model card: how it was trained and
what was measured of it.
"""

import json
from importlib.resources import as_file, files
from typing import Any

import torch

from ..calibration.misspecification import TrainingReference
from ..nn.estimator import SlotDensityEstimator
from ..posterior.network import SlotPosterior
from .recipes import RECIPES

__all__ = ["available_weights", "load_pretrained", "model_card"]


def available_weights() -> tuple[str, ...]:
    """Names of the sets of weights in this installation."""
    folder = files("sbi_slotflow") / "weights"
    names = {entry.name for entry in folder.iterdir()}
    cards = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return tuple(sorted(name for name in cards if f"{name}.safetensors" in names))


def model_card(name: str) -> dict[str, Any]:
    """Return how a set of weights was trained and what was measured of it.

    Args:
        name: See :func:`~sbi_slotflow.load_pretrained`.

    Raises:
        ValueError: If there are no such weights.
    """
    _check_name(name)
    card = files("sbi_slotflow") / "weights" / f"{name}.json"
    return json.loads(card.read_text())


def load_pretrained(
    name: str, device: str | torch.device | None = None
) -> SlotPosterior:
    """Load a posterior that is ready to use.

    Args:
        name: ``"sinusoids-tiny"``, ``"sinusoids-paper"`` or ``"sinusoids-crowded"``,
            for the problem of that preset, ``problems.sinusoids("tiny")`` say.
        device: Device of the posterior; the CPU if None.

    Returns:
        The posterior; :func:`model_card` says how it was trained and how good it is.

    Raises:
        ValueError: If there are no such weights.
    """
    _check_name(name)
    with as_file(files("sbi_slotflow") / "weights" / f"{name}.safetensors") as path:
        estimator = SlotDensityEstimator.load(path)
    problem = RECIPES[name].problem
    if device is not None:
        estimator = estimator.to(device)
    posterior = SlotPosterior(
        estimator, problem.prior, simulator=problem.simulator, device=device
    )
    reference = files("sbi_slotflow") / "weights" / f"{name}.reference.safetensors"
    if reference.is_file():  # not every set of weights has one
        with as_file(reference) as path:
            posterior.set_training_reference(TrainingReference.load(path))
    posterior.model_card = model_card(name)
    return posterior


def _check_name(name: str) -> None:
    """Raise ValueError unless there are weights of this name."""
    names = available_weights()
    if name not in names:
        raise ValueError(f"name must be one of {list(names)}, got {name!r}.")
