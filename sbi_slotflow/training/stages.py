"""Training in stages: the cells first, then the densities within them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..nn.builder import slot_nn
from ..nn.estimator import SlotDensityEstimator
from ..problems import Problem
from .online import OnlineSettings, OnlineTraining

__all__ = ["Part", "Stage", "StageBuilder", "train_stages"]


_LOCAL = (
    "component_head.trunk.",
    "component_head.gaussian.",
    "component_head.local.",
    "net.to_context.",
    "shared_head.",
)
Part = Literal["all", "cells", "local"]


@dataclass(frozen=True)
class Stage:
    """One run of training, from the weights of the stage before.

    Attributes:
        num_simulations: Simulations to train on.
        learning_rate: Peak learning rate, which falls to zero over the stage.
        cardinality_weight: Weight of the cardinality in the loss.
        part: ``"cells"``: the encoder, the cardinality and the components' cells, which
            needs no fits; ``"local"``: the densities in the cells and of the shared
            parameters, with the rest kept from the stage before; ``"all"``.
    """

    num_simulations: int
    learning_rate: float = 1e-3
    cardinality_weight: float = 1.0
    part: Part = "all"


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
        stages: The stages, at least one.
        stem: Path of the runs' states without ``-1.safetensors``, ``-2.safetensors``.
        device: Device to train on.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] | None = None
    estimator = None
    for i, stage in enumerate(stages):
        loss = (stage.cardinality_weight, 1.0, 1.0)
        network = slot_nn(problem, loss_weights=loss, **builder)
        build = StageBuilder(network, weights, stage.part)
        settings = OnlineSettings(
            stage.num_simulations,
            learning_rate=stage.learning_rate,
            num_validation=1_024,
            validate_every=100,
            seed=i,
            part="cells" if stage.part == "cells" else "all",
        )
        given = (build, problem.prior, problem.simulator, settings)
        state = stem.with_name(f"{stem.name}-{i + 1}.safetensors")
        estimator = OnlineTraining(*given, device=device, checkpoint=state).run()
        weights = estimator.state_dict()
    if estimator is None:
        raise ValueError("stages must hold at least one stage, got none.")
    return estimator


@dataclass(frozen=True)
class StageBuilder:
    """Builds the estimator of a stage, with the weights of the one before, if any."""

    build: slot_nn
    weights: dict[str, Tensor] | None
    part: Part

    def __call__(self, theta: Tensor, x: Tensor) -> SlotDensityEstimator:
        """Build the estimator; see :class:`~sbi_slotflow.slot_nn`."""
        estimator = self.build(theta, x)
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
