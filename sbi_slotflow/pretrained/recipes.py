"""How the shipped weights are made: ``python -m sbi_slotflow.pretrained NAME``.

Each set of weights follows from its recipe and seed. A run keeps its state in
``checkpoints/`` and may be stopped and taken up again at any moment.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..calibration import TrainingReference
from ..nn.estimator import SlotDensityEstimator
from ..problems import Sinusoids, sinusoids
from ..seeding import generator_for
from ..training.stages import Stage, train_stages

__all__ = [
    "RECIPES",
    "PretrainingRecipe",
    "pretrain",
    "training_reference",
]

# Signals that describe a problem's training data, and the stream of their seed.
_REFERENCE_SIGNALS, _REFERENCE = 4_000, 3


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
    name: str,
    checkpoints: Path = Path("checkpoints"),
    device: str = "cpu",
) -> SlotDensityEstimator:
    """Train a set of weights, or take up its training.

    Args:
        name: Name of a recipe.
        checkpoints: Folder of the runs' states.
        device: Device to train on.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {sorted(RECIPES)}, got {name!r}.")
    recipe = RECIPES[name]
    return train_stages(
        recipe.problem, recipe.builder, recipe.stages, checkpoints / name, device
    )


def training_reference(name: str) -> TrainingReference:
    """Describe the training data of a set of weights.

    With it, the posterior warns of observations that are unlike them.

    Args:
        name: Name of a recipe.
    """
    problem = RECIPES[name].problem
    theta = problem.prior.sample((_REFERENCE_SIGNALS,), generator_for(0, _REFERENCE, 0))
    x = problem.simulator(theta, generator_for(0, _REFERENCE, 1))
    return TrainingReference.fit(x)
