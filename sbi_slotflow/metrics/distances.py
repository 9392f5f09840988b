r"""Distances between two p(K | x), and between the distributions of two sets of draws.

The second argument is always the reference: its moments set the units. Draws of a real
vector have shape ``(S, C)``; the two sets may differ in size.
"""

import math

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import PredefinedSplit, cross_val_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import draw_seed
from ..sets.checks import as_probabilities, check_finite

__all__ = [
    "FEWEST_DRAWS",
    "c2st",
    "correlation_error",
    "jensen_shannon",
    "sliced_wasserstein2",
    "total_variation",
    "wasserstein2",
    "whiten",
]

FEWEST_DRAWS = 50
"""Fewest draws of either kind that a classifier is trained on."""

_FOLDS = 5
# Below this eigenvalue of the correlation matrix a direction does not vary.
_SMALLEST_EIGENVALUE = 1e-10


def total_variation(
    probs: Tensor | Categorical, reference: Tensor | Categorical
) -> Tensor:
    r"""Total variation distance, :math:`\frac12 \sum_K |p(K) - q(K)|`, in [0, 1].

    Args:
        probs: Probabilities p, shape ``(..., Kmax + 1)``, or a categorical.
        reference: Probabilities q, likewise.
    """
    p, q = _probabilities(probs, reference)
    return 0.5 * (p - q).abs().sum(-1)


def jensen_shannon(
    probs: Tensor | Categorical, reference: Tensor | Categorical
) -> Tensor:
    r"""Jensen-Shannon divergence in nats, in [0, log 2].

    .. math::
        \tfrac12 D(p \| m) + \tfrac12 D(q \| m), \qquad m = \tfrac12 (p + q)

    Args:
        probs: Probabilities p, shape ``(..., Kmax + 1)``, or a categorical.
        reference: Probabilities q, likewise.
    """
    p, q = _probabilities(probs, reference)
    entropy = torch.special.entr
    gain = entropy(0.5 * (p + q)) - 0.5 * (entropy(p) + entropy(q))
    return gain.sum(-1).clamp(0.0, math.log(2))


def wasserstein2(draws: Tensor, reference: Tensor) -> Tensor:
    r"""Wasserstein-2 distance of each one-dimensional marginal, exact for the draws.

    .. math::
        W_2^2 = \int_0^1 \big(F_1^{-1}(u) - F_2^{-1}(u)\big)^2 du

    with the quantile functions of the draws, which are steps. Between normals it is
    :math:`\sqrt{(\mu_1 - \mu_2)^2 + (\sigma_1 - \sigma_2)^2}`.

    Args:
        draws: Draws, shape ``(S, ...)``.
        reference: Draws of the reference, shape ``(M, ...)``.
    """
    draws, reference = _checked(draws, reference)
    num, other = len(draws), len(reference)
    # Edges of the steps, in units of 1 / (num * other).
    edges = torch.cat([torch.arange(num + 1) * other, torch.arange(other + 1) * num])
    edges = edges.unique()
    widths = edges.diff().double() / (num * other)
    left = edges[:-1]
    a, b = draws.sort(0).values, reference.sort(0).values
    gaps = a[left // other] - b[left // num]
    return torch.tensordot(widths, gaps.square(), dims=1).sqrt()


def sliced_wasserstein2(
    draws: Tensor,
    reference: Tensor,
    *,
    num_directions: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    r"""Sliced Wasserstein-2 distance of whitened vectors.

    .. math::
        SW_2^2 = \mathbb{E}_v\, W_2^2(v^T z_1, v^T z_2),
        \qquad v \text{ uniform on the sphere},

    z whitened as in :func:`whiten`, so the unit is a standard deviation of the
    reference. A shift by the vector m (whitened) gives :math:`|m| / \sqrt{C}`.

    Args:
        draws: Draws, shape ``(S, C)``.
        reference: Draws of the reference, shape ``(M, C)``.
        num_directions: Number of directions v.
        generator: Source of the directions.
    """
    draws, reference = whiten(draws, reference)
    directions = torch.randn(
        draws.shape[-1], num_directions, dtype=draws.dtype, generator=generator
    )
    directions = directions / directions.norm(dim=0)
    distances = wasserstein2(draws @ directions, reference @ directions)
    return float(distances.square().mean().sqrt())


def c2st(
    draws: Tensor,
    reference: Tensor,
    *,
    max_draws: int = 5_000,
    generator: torch.Generator | None = None,
) -> float:
    """Accuracy of a classifier that tells draws from the reference's draws.

    Classifier two-sample test (Lopez-Paz and Oquab 2017): 0.5 where the two cannot be
    told apart, 1 where they never overlap. Gradient-boosted trees see vectors whitened
    as in :func:`whiten`, and are scored on rows they were not trained on. Equal rows,
    which resampling makes, stay in one fold. Runs on one thread.

    Args:
        draws: Draws, shape ``(S, C)``.
        reference: Draws of the reference, shape ``(M, C)``.
        max_draws: Most draws of either kind that are used, chosen at random.
        generator: Source of the choice of draws, of the folds and of the classifier's
            own seed.
    """
    draws, reference = whiten(draws, reference)
    num = min(len(draws), len(reference), max_draws)
    if num < FEWEST_DRAWS:
        raise ValueError(
            f"draws, reference and max_draws must be at least {FEWEST_DRAWS}, got "
            f"{len(draws)}, {len(reference)} and {max_draws}."
        )
    chosen = [
        x[torch.randperm(len(x), generator=generator)[:num]] for x in (draws, reference)
    ]
    vectors = torch.cat(chosen)
    distinct, row = vectors.unique(dim=0, return_inverse=True)
    fold = torch.randperm(len(distinct), generator=generator)[row] % _FOLDS
    classifier = HistGradientBoostingClassifier(
        max_iter=200,
        early_stopping=True,  # pyright: ignore[reportArgumentType]
        n_iter_no_change=20,
        random_state=draw_seed(generator) % 2**32,
    )
    with threadpool_limits(limits=1):
        kinds, folds = np.repeat([0, 1], num), PredefinedSplit(fold.numpy())
        scores = cross_val_score(classifier, vectors.numpy(), kinds, cv=folds)
    return float(scores.mean())


def correlation_error(draws: Tensor, reference: Tensor) -> float:
    r"""Mean absolute difference of the correlations between different components.

    .. math::
        \operatorname{mean}_{j \ne k,\, a,\, b}
        \big|\rho_1(\theta_{j,a}, \theta_{k,b}) - \rho_2(\theta_{j,a}, \theta_{k,b})
        \big|

    A parameter that does not vary counts as uncorrelated.

    Args:
        draws: Components with consistent labels, shape ``(S, K, D)``, K >= 2.
        reference: Components of the reference, shape ``(M, K, D)``.
    """
    draws, reference = _checked(draws, reference)
    if draws.ndim != 3 or draws.shape[1] < 2:
        raise ValueError(
            "draws must have shape (S, K, D) with at least 2 components, got "
            f"{tuple(draws.shape)}."
        )
    _, num, size = draws.shape
    component = torch.arange(num).repeat_interleave(size)
    between = component.unsqueeze(0) != component.unsqueeze(1)
    difference = _correlation(draws.flatten(1)) - _correlation(reference.flatten(1))
    return float(difference[between].abs().mean())


def whiten(draws: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    r"""Give the reference zero mean and unit covariance; map the draws likewise.

    .. math:: z = R^{-1/2} \operatorname{diag}(s)^{-1} (\theta - m)

    with mean m, standard deviations s and correlation matrix R of the reference. The
    symmetric root keeps each axis as close as can be to its parameter.

    Args:
        draws: Draws, shape ``(S, C)``.
        reference: Draws of the reference, shape ``(M, C)``.
    """
    draws, reference = _checked(draws, reference)
    if draws.ndim != 2:
        raise ValueError(f"draws must have shape (S, C), got {tuple(draws.shape)}.")
    values, vectors = torch.linalg.eigh(_correlation(reference))
    if values.min() < _SMALLEST_EIGENVALUE:
        raise ValueError(
            f"reference must vary in each of its {draws.shape[-1]} directions, got "
            f"{len(reference)} draws whose correlation matrix has the eigenvalue "
            f"{values.min().item():.1e}."
        )
    root = vectors / values.sqrt() @ vectors.T
    mean, std = reference.mean(0), reference.std(0)
    return (draws - mean) / std @ root, (reference - mean) / std @ root


def _correlation(vectors: Tensor) -> Tensor:
    """Correlation matrix of ``(S, C)``; rows and columns of constants are zero."""
    centred = vectors - vectors.mean(0)
    norm = centred.norm(dim=0)
    scaled = centred / torch.where(norm > 0, norm, 1.0)
    return scaled.T @ scaled


def _checked(draws: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU."""
    for name, x in (("draws", draws), ("reference", reference)):
        if x.ndim < 1 or len(x) < 2:
            raise ValueError(
                f"{name} must hold at least 2 draws, got shape {tuple(x.shape)}."
            )
        check_finite(x, name)
    if draws.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"draws must have shape (S, *{tuple(reference.shape[1:])}) as reference "
            f"has, got {tuple(draws.shape)}."
        )
    return draws.detach().double().cpu(), reference.detach().double().cpu()


def _probabilities(
    probs: Tensor | Categorical, reference: Tensor | Categorical
) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU, summing to one."""
    p, q = as_probabilities(probs, "probs"), as_probabilities(reference, "reference")
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"probs must have {q.shape[-1]} entries as reference has, got "
            f"{p.shape[-1]}."
        )
    return p, q
