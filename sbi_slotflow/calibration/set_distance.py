r"""A distance between sets of different size, for TARP.

``sbi.diagnostics.run_tarp`` needs a distance between draws; :func:`set_distance` is one
between sets, blind to labels and defined across cardinalities.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..seeding import generator_for
from ..sets.layout import ThetaLayout

__all__ = ["SetDistance", "set_distance"]


@dataclass(frozen=True)
class SetDistance:
    r"""Distance between sets of different size (OSPA, Schuhmacher et al. 2008).

    .. math::
        d(X, Y)^2 = \frac{1}{n} \left[ \min_\pi \sum_{i \le m} \min(c,
            \|x_i - y_{\pi(i)}\|)^2 + c^2 (n - m) \right] + \|s_X - s_Y\|^2,
        \quad m \le n \text{ the two cardinalities}

    Parameters are divided by ``scale`` first. It is a metric on sets; labels and the
    padding of the rows do not matter.

    Attributes:
        layout: Layout of theta.
        scale: Scale of each component parameter, shape ``(D,)``.
        shared_scale: Scale of each shared parameter, shape ``(S,)``.
        cutoff: Penalty c of a missing component, in units of the scales.
        jitter: Uniform noise up to this is added, to break ties. Sets of one size all
            have the same distance to an empty set, and TARP counts ties as misses.
        generator: Source of the jitter.
    """

    layout: ThetaLayout
    scale: Tensor
    shared_scale: Tensor
    cutoff: float = 2.0
    jitter: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: generator_for(0))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances of rows.

        Args:
            a: Rows ``(..., E)``.
            b: Rows ``(..., E)`` of a batch shape that broadcasts with ``a``'s.

        Returns:
            Distances of the broadcast batch shape.

        Raises:
            ValueError: If ``b`` holds a fractional K: sbi's ``run_tarp`` rescales
                theta unless ``z_score_theta=False``. The references ``a`` may hold
                one (sbi draws them uniformly); it is rounded.
        """
        if (b[..., 0] != b[..., 0].round()).any():
            raise ValueError(
                "theta holds a fractional cardinality; call run_tarp with "
                "z_score_theta=False, the distance has scales of its own."
            )
        shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        size = self.layout.size
        first = self.layout.unpack(a.expand(*shape, size).reshape(-1, size))
        second = self.layout.unpack(b.expand(*shape, size).reshape(-1, size))
        gaps = (first.components.unsqueeze(-2) - second.components.unsqueeze(-3)).div(
            self.scale.to(a)
        )
        cost = gaps.square().sum(-1).clamp(max=self.cutoff**2)
        # One missing component costs c^2, two missing ones nothing.
        one, both = first.mask.unsqueeze(-1), second.mask.unsqueeze(-2)
        cost = torch.where(one & both, cost, self.cutoff**2)
        cost = torch.where(one | both, cost, 0.0)
        best = _assignment_costs(cost)
        larger = torch.maximum(first.cardinality, second.cardinality).clamp(min=1)
        shared = (first.shared - second.shared) / self.shared_scale.to(a)
        squared = best.to(a) / larger + shared.square().sum(-1)
        noise = torch.rand(shape, generator=self.generator).to(a)
        return squared.sqrt().reshape(shape) + self.jitter * noise


def set_distance(
    layout: ThetaLayout, theta: Tensor, cutoff: float = 2.0, seed: int = 0
) -> SetDistance:
    """Make a set distance for ``run_tarp(..., distance=..., z_score_theta=False)``.

    Args:
        layout: Layout of theta.
        theta: Rows (of the prior, say) whose active entries' standard deviations become
            the scales.
        cutoff: Penalty of a missing component, in standard deviations.
        seed: Seed of the tie-breaking jitter, which is at most 1e-5.

    Raises:
        ValueError: If theta is malformed or holds fewer than two components.
    """
    layout.validate(theta)
    parts = layout.unpack(theta)
    active = parts.components[parts.mask]
    if len(active) < 2:
        raise ValueError("theta must hold at least two components to give a scale.")
    shared = parts.shared.flatten(0, -2)
    shared_scale = shared.std(0) if layout.num_shared else shared.new_zeros(0)
    return SetDistance(
        layout,
        active.std(0).clamp(min=1e-12),
        shared_scale.clamp(min=1e-12),
        cutoff,
        jitter=1e-5,
        generator=generator_for(seed),
    )


def _assignment_costs(cost: Tensor) -> Tensor:
    """Least total cost of each square cost matrix ``(N, K, K)``."""
    values = cost.double().cpu().numpy()
    best = np.empty(len(values))
    for i, matrix in enumerate(values):
        rows, columns = linear_sum_assignment(matrix)
        best[i] = matrix[rows, columns].sum()
    return torch.from_numpy(best)
