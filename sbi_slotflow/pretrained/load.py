"""Weights that come with the package.

Each set is a safetensors file with, beside it, a model card.
"""

from importlib.resources import as_file, files

import torch

from ..calibration.misspecification import TrainingReference
from ..nn.estimator import SlotDensityEstimator
from ..posterior.network import SlotPosterior
from .cards import available_weights, check_name, model_card
from .recipes import RECIPES

__all__ = ["available_weights", "load_pretrained", "model_card"]


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
    check_name(name)
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
