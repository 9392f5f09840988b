"""What every rival does, so that all are judged by the same code."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from sbi.inference import NPE
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor, nn

from sbi_slotflow.nn.encoders import encode
from sbi_slotflow.problems import Problem
from sbi_slotflow.seeding import forked_rng, generator_for
from sbi_slotflow.sets.layout import ThetaLayout

__all__ = ["Answer", "Embedding", "Rival", "Training", "counted", "train"]


@dataclass(frozen=True)
class Answer:
    """A rival's posterior of one observation.

    Attributes:
        probs: p(K | x), shape ``(Kmax + 1,)``.
        rows: Equally weighted draws in canonical order, shape ``(S, E)``; None for a
            rival that only estimates.
    """

    probs: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class Training:
    """What rivals that train are given.

    Attributes:
        theta: Rows, shape ``(N, E)``.
        x: Their observations, shape ``(N, T)``.
        epochs: Passes over them, at most.
        seed: Seed of initial weights and batches.
    """

    theta: Tensor
    x: Tensor
    epochs: int
    seed: int


class Rival(ABC):
    """A method that infers K and the components.

    Attributes:
        trains: Whether it learns from simulations; else :meth:`fit` only stores the
            problem.
        samples_anew: Whether every observation costs a long run of a sampler.
    """

    trains: ClassVar[bool] = False
    samples_anew: ClassVar[bool] = False
    problem: Any

    def fit(self, problem: Problem, training: Training | None) -> None:
        """Take the problem, and learn, if the rival learns."""
        self.problem = problem
        if self.trains:
            assert training is not None
            with forked_rng(generator_for(training.seed)):
                self._learn(training)

    def _learn(self, training: Training) -> None:
        """Train; the global generator is seeded."""
        raise NotImplementedError

    @abstractmethod
    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Answer for one observation.

        Args:
            x: The observation, shape ``(T,)``.
            num: Number of draws.
            seed: Seed.
            truth: The true row, for the one rival that starts there.
        """

    def probs(self, x: Tensor) -> Tensor | None:
        """p(K | x) of many observations ``(B, T)``, if that is cheap."""
        return None

    def log_prob_given_k(self, theta: Tensor, x: Tensor) -> Tensor | None:
        """Log densities ``(B,)`` of sets given their K, if the rival has them."""
        return None

    @property
    def network(self) -> nn.Module | None:
        """What was trained, to count its parameters."""
        return None


class Embedding(nn.Module):
    """The problem's own encoder as a vector, as an sbi embedding net.

    Args:
        problem: The problem.
        x: Observations that give shift and scale, shape ``(N, T)``.
        width: Width of the encoder's embeddings.
    """

    def __init__(self, problem: Problem, x: Tensor, width: int = 64) -> None:
        super().__init__()
        self.encoder = problem.build_encoder(hidden_features=width)
        self.register_buffer("shift", x.mean())
        self.register_buffer("scale", x.std())
        with torch.no_grad():
            self.num_features = self(x[:2]).shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Embed x ``(..., T)``; sbi hands observations on with axes of its own."""
        scaled = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        encoding = encode(self.encoder, scaled.flatten(0, -2))
        embedded = torch.cat([encoding.context, encoding.cardinality], -1)
        return embedded.unflatten(0, x.shape[:-1])


_Estimator = TypeVar("_Estimator", bound=ConditionalDensityEstimator)


def train(
    estimator: _Estimator,
    targets: Tensor,
    x: Tensor,
    epochs: int,
    trainer: type[NPE] = NPE,
) -> _Estimator:
    """Train an estimator with sbi's own loop, in its usual settings."""
    inference = trainer(
        density_estimator=lambda *batch: estimator,  # pyright: ignore
        show_progress_bars=False,
    )
    inference.append_simulations(targets, x)
    inference.train(max_num_epochs=epochs, stop_after_epochs=epochs)
    return estimator.eval()


def counted(layout: ThetaLayout, rows: Tensor) -> Tensor:
    """p(K) of draws ``(S, E)``, shape ``(Kmax + 1,)``."""
    k = layout.cardinality(rows)
    return k.bincount(minlength=layout.max_cardinality + 1).double() / len(rows)
