"""How the shipped weights are made: ``python -m sbi_slotflow.pretraining NAME``.

Each set of weights follows from its recipe and seed. A run keeps its state in
``checkpoints/`` and may be stopped and taken up again at any moment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..calibration import TrainingReference
from ..nn.builder import slot_nn
from ..nn.estimator import SlotDensityEstimator
from ..problems import Problem, Sinusoids, sinusoids
from ..seeding import generator_for
from ..training import SlotNPE

__all__ = [
    "RECIPES",
    "PretrainingRecipe",
    "Stage",
    "StageBuilder",
    "pretrain",
    "train_stages",
    "training_reference",
]

# Signals that describe a problem's training data, and the stream of their seed.
_REFERENCE_SIGNALS, _REFERENCE = 4_000, 3


_LOCAL = tuple(
    f"{name}."
    for name in (
        "component_head.trunk",
        "component_head.gaussian",
        "component_head.local",
        "net.to_context",
        "shared_head",
    )
)


Part = Literal["all", "anchors", "local"]


@dataclass(frozen=True)
class Stage:
    """One run of training, from the weights of the stage before.

    Attributes:
        num_simulations: Simulations to train on.
        learning_rate: Peak learning rate, which falls to zero over the stage.
        cardinality_weight: Weight of the cardinality in the loss.
        part: ``"anchors"``: the encoder, the cardinality and the anchors, which needs
            no fits; ``"local"``: the densities in the anchors' cells and of the shared
            parameters, with the rest kept from the stage before; ``"all"``.
    """

    num_simulations: int
    learning_rate: float = 1e-3
    cardinality_weight: float = 1.0
    part: Part = "all"


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
            Stage(128_000, 1e-3, 3.0, part="anchors"),
            Stage(51_200, 1e-3, 3.0, part="local"),
        ),
    ),
    "sinusoids-paper": PretrainingRecipe(
        "paper",
        # The fitted Gaussians leave a flow nothing to learn.
        {"refine_slots": 3, "flow_layers": 0},
        (
            Stage(256_000, 1e-3, 3.0, part="anchors"),
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
            Stage(384_000, 1e-3, 3.0, part="anchors"),
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


def train_stages(
    problem: Problem,
    builder: Mapping[str, Any],
    stages: Sequence[Stage],
    stem: Path,
    device: str = "cpu",
) -> SlotDensityEstimator:
    """Train in stages, each of which starts from the weights of the one before.

    Args:
        problem: The problem.
        builder: Fields of :class:`~sbi_slotflow.nn.builder.slot_nn`.
        stages: The stages.
        stem: Path of the runs' states without ``-1.safetensors``, ``-2.safetensors``.
        device: Device to train on.

    Raises:
        ValueError: If there are no stages.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] | None = None
    estimator = None
    for i, stage in enumerate(stages):
        build = StageBuilder(
            slot_nn(
                problem, loss_weights=(stage.cardinality_weight, 1.0, 1.0), **builder
            ),
            weights,
            stage.part,
        )
        estimator = SlotNPE(problem.prior, build, device=device).train_online(
            problem.simulator,
            num_simulations=stage.num_simulations,
            learning_rate=stage.learning_rate,
            num_validation=1_024,
            validate_every=100,
            seed=i,
            checkpoint=stem.with_name(f"{stem.name}-{i + 1}.safetensors"),
        )
        weights = estimator.state_dict()
    if estimator is None:
        raise ValueError("stages must hold at least one stage, got none.")
    return estimator


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


@dataclass(frozen=True)
class StageBuilder:
    """Builds an estimator for a stage of training, with the weights of the one before.

    Attributes:
        build: Builder of the estimator.
        weights: Weights of the stage before; None for the first.
        part: What is trained, see :class:`Stage`.
    """

    build: slot_nn
    weights: dict[str, Tensor] | None
    part: Part

    def __call__(self, theta: Tensor, x: Tensor) -> SlotDensityEstimator:
        """Build the estimator; see :class:`~sbi_slotflow.slot_nn`."""
        estimator = self.build(theta, x)
        estimator.anchors_only = self.part == "anchors"
        kept = self.weights or {}
        if self.part == "local":
            kept = {n: w for n, w in kept.items() if not n.startswith(_LOCAL)}
        if self.part != "all":
            local = self.part == "local"
            for name, parameter in estimator.named_parameters():
                parameter.requires_grad_(name.startswith(_LOCAL) == local)
        if kept:
            estimator.load_state_dict(kept, strict=self.part != "local")
        return estimator
