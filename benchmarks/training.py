"""Small networks that experiments train: equal budgets, and scores that all share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_slotflow import SlotNPE, SlotPosterior
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from .common import TEST, simulate

__all__ = ["PARAMETERS", "History", "errors_of", "scores", "train"]

PARAMETERS = ("amplitude", "phase", "frequency")
History = list[dict[str, float]]


def train(
    problem: Sinusoids,
    builder: Callable[..., Any],
    num_simulations: int,
    seed: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> tuple[SlotPosterior, History]:
    """Train on fresh simulations, or take the training up.

    Args:
        problem: The problem.
        builder: Builder of the estimator.
        num_simulations: Simulations.
        seed: Seed of weights and simulations.
        checkpoint: File of the run's state; None keeps none.
        options: Of :meth:`~sbi_slotflow.SlotNPE.train_online`.

    Returns:
        The posterior and the history of validations.
    """
    trainer = SlotNPE(problem.prior, builder, show_progress_bars=False)
    usual = {"batch_size": 64, "num_validation": 256, "validate_every": 10**9}
    trainer.train_online(
        problem.simulator,
        num_simulations=num_simulations,
        seed=seed,
        checkpoint=checkpoint,
        **{**usual, **options},
    )
    return trainer.build_posterior(), trainer.history


@torch.no_grad()
def scores(
    posterior: SlotPosterior, problem: Sinusoids, num_signals: int, seed: int
) -> dict[str, np.ndarray]:
    """Score a posterior on fresh signals that are the same for all that are compared.

    Returns:
        ``accuracy`` of K in %, ``log_score`` of K (mean negative log probability of the
        true one, nats), ``error`` (3,): root mean square distances from the truth of
        draws given the true K, components in canonical order, by parameter, and
        ``confusion`` (true K, most probable K).
    """
    theta, x = simulate(problem, num_signals, TEST + seed)
    layout = problem.layout
    k = layout.cardinality(theta)
    probs = torch.cat(
        [torch.atleast_2d(posterior.cardinality(p).probs) for p in x.split(100)]
    )
    chosen = probs.argmax(-1)
    confusion = np.zeros((layout.max_cardinality + 1,) * 2)
    np.add.at(confusion, (k.numpy(), chosen.numpy()), 1)
    log_score = -probs.gather(-1, k.unsqueeze(-1)).clamp(min=1e-6).log().mean()
    squares = []
    for count in k.unique().tolist():
        if count:
            mine = k == count
            draws = posterior.sample_batched(
                (50,), x[mine], k=count, generator=generator_for(seed, count)
            )
            gap = errors_of(problem, draws, theta[mine], count)
            squares.append(gap.square().mean(0).flatten(0, 1))
    return {
        "accuracy": np.array(100 * float((chosen == k).double().mean())),
        "log_score": np.array(float(log_score)),
        "error": torch.cat(squares).mean(0).sqrt().numpy(),
        "confusion": confusion,
    }


def errors_of(problem: Sinusoids, draws: Tensor, theta: Tensor, k: int) -> Tensor:
    """Draws less truth ``(S, B, k, 3)``, phases on the circle."""
    drawn = problem.layout.unpack(draws).components[..., :k, :].double()
    gap = drawn - problem.layout.unpack(theta).components[:, :k].double()
    phase = torch.remainder(gap[..., 1] + math.pi, math.tau) - math.pi
    return torch.stack([gap[..., 0], phase, gap[..., 2]], -1)
