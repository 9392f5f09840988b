"""Distances between two distributions over the cardinality, p(K | x)."""

import math

import torch
from torch import Tensor
from torch.distributions import Categorical

__all__ = ["jensen_shannon", "total_variation"]


def total_variation(
    probs: Tensor | Categorical, reference: Tensor | Categorical
) -> Tensor:
    r"""Total variation distance, :math:`\frac12 \sum_K |p(K) - q(K)|`, in [0, 1].

    Args:
        probs: Probabilities p, shape ``(..., Kmax + 1)``, or a categorical.
        reference: Probabilities q, likewise.

    Returns:
        Float64 tensor of shape ``(...)``.

    Raises:
        ValueError: If the lengths differ, or an argument is no probability vector.
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

    Returns:
        Float64 tensor of shape ``(...)``.

    Raises:
        ValueError: If the lengths differ, or an argument is no probability vector.
    """
    p, q = _probabilities(probs, reference)
    entropy = torch.special.entr
    gain = entropy(0.5 * (p + q)) - 0.5 * (entropy(p) + entropy(q))
    return gain.sum(-1).clamp(0.0, math.log(2))


def _probabilities(
    probs: Tensor | Categorical, reference: Tensor | Categorical
) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU, summing to one."""
    found = []
    for name, given in (("probs", probs), ("reference", reference)):
        p = given if isinstance(given, Tensor) else given.probs
        p = p.detach().double().cpu()
        total = p.sum(-1, keepdim=True)
        # Written so that NaN fails too.
        if not ((p >= 0).all() and ((total - 1).abs() < 1e-4).all()):
            raise ValueError(
                f"{name} must be non-negative and sum to 1, got {p.tolist()}."
            )
        found.append(p / total)
    p, q = found
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"probs must have {q.shape[-1]} entries as reference has, got "
            f"{p.shape[-1]}."
        )
    return p, q
