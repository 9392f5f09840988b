r"""Estimators of line spectra, and the three numbers that they are judged by.

All distances are around the circle of frequencies, in units of the sampling rate:

- count error: whether the number of lines is wrong,
- false negatives: share of a signal's lines with no estimate within 0.01,
- Chamfer distance: :math:`\sum_j \min_k |f_j - \hat f_k| +
  \sum_k \min_j |f_j - \hat f_k|`.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sbi_slotflow import SlotPosterior
from sbi_slotflow.nn.gauss_newton import fit_mode
from sbi_slotflow.problems import LineSpectrum
from sbi_slotflow.problems.sinusoids.pursuit import SinePursuit
from sbi_slotflow.seeding import generator_for

from .subspace import Subspace

__all__ = ["chamfer", "false_negatives", "pursuit_bic", "slots", "subspace"]

THRESHOLD = 0.01
_WINDOW = 25
_DRAWS, _STEPS = 16, 10


def slots(
    problem: LineSpectrum,
    posterior: SlotPosterior,
    x: Tensor,
    k: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The most probable K, then the densest of 16 draws, refined by least squares.

    Args:
        problem: The problem.
        posterior: Its posterior.
        x: Observations, shape ``(B, T)``.
        k: Numbers of lines ``(B,)``, if they are given.
        seed: Seed of the draws.

    Returns:
        Numbers of lines ``(B,)`` and frequencies ``(B, Kmax)``, padded with NaN.
    """
    if k is None:
        logits = posterior.posterior_estimator.log_prob_cardinality(x)
        k = logits.detach().argmax(-1)
    components = x.new_zeros(len(x), problem.layout.max_cardinality, 3).double()
    for size in k.unique().tolist():
        chosen = (k == size).nonzero().squeeze(-1)
        generator = generator_for(seed, size)
        draws = posterior.sample_batched((_DRAWS,), x[chosen], size, generator)
        density = problem.log_likelihood(draws, x[chosen])
        density = density + problem.prior.log_prob(draws)
        best = draws[density.argmax(0), torch.arange(len(chosen))]
        components[chosen] = problem.layout.unpack(best).components.double()
    mask = problem.layout.mask(k)
    # Steps of several amplitudes, turns and a few cells are free.
    scale = torch.tensor([5.0, 5.0, 0.05]).double()
    peak = fit_mode(
        problem.build_fit().given(x),
        lambda w, index: components[index] + scale * w,
        torch.arange(len(x)),
        torch.zeros_like(components),
        mask,
        _STEPS,
        (torch.full((3,), -2.0), torch.full((3,), 2.0)),
    )
    frequency = (components + scale * peak.mode)[..., 2]
    return k, torch.where(mask, frequency, math.nan)


def pursuit_bic(
    problem: LineSpectrum, x: Tensor, k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Matching pursuit with Gauss-Newton; K by BIC with three parameters a line."""
    most = problem.layout.max_cardinality
    fit, band = problem.build_fit(), problem.prior.component_marginals[2].bounds

    def search(x: Tensor, most: int):
        return SinePursuit(fit, band, most, least_gain=-math.inf, num_steps=3)(x)

    if k is None:
        penalty = 1.5 * math.log(x.shape[-1])
        worth = (search(x, most).gain - penalty).cumsum(-1)
        k = worth.argmax(-1) + 1
    frequency = torch.full((len(x), most), math.nan).double()
    for size in k.unique().tolist():
        chosen = k == size
        frequency[chosen, :size] = search(x[chosen], size).frequency
    return k, frequency


def subspace(
    x: Tensor,
    most: int,
    rule: Literal["mdl", "aic", "sorte"],
    k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ESPRIT, with K by a criterion unless it is given."""
    num = x.shape[-1] // 2
    records = torch.complex(*x.double().split(num, -1)).numpy()
    counts = torch.zeros(len(x), dtype=torch.int64)
    frequency = torch.full((len(x), most), math.nan).double()
    for i, record in enumerate(records):
        found = Subspace(record, _WINDOW)
        rules: dict[str, Callable[[int], int]] = {
            "mdl": found.mdl,
            "aic": found.aic,
            "sorte": found.sorte,
        }
        counts[i] = rules[rule](most) if k is None else int(k[i])
        size = int(counts[i])
        if size:
            frequency[i, :size] = torch.from_numpy(found.esprit(size))
    return counts, frequency


def false_negatives(truth: Tensor, estimate: Tensor) -> np.ndarray:
    """Share of each signal's lines that are missed; NaN pads both ``(B, Kmax)``."""
    nearest = _distances(truth, estimate).amin(-1)
    there = ~truth.isnan()
    missed = (nearest > THRESHOLD) & there
    return (missed.sum(-1) / there.sum(-1)).numpy()


def chamfer(truth: Tensor, estimate: Tensor) -> np.ndarray:
    """Chamfer distance of each signal; half a turn for lines without a partner."""
    distances = _distances(truth, estimate).clamp(max=0.5)
    there, found = ~truth.isnan(), ~estimate.isnan()
    total = torch.where(there, distances.amin(-1), 0.0).sum(-1)
    total = total + torch.where(found, distances.amin(-2), 0.0).sum(-1)
    return total.numpy()


def _distances(truth: Tensor, estimate: Tensor) -> Tensor:
    """Distances ``(B, K, K')``, infinite from and to padding."""
    gap = truth.double().unsqueeze(-1) - estimate.double().unsqueeze(-2)
    return (gap - gap.round()).abs().nan_to_num(nan=math.inf)
