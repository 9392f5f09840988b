r"""Quantities with which sbi's calibration tools judge trans-dimensional posteriors.

``sbi.diagnostics.run_sbc`` ranks one number of a draw at a time. The functions made
here reduce a theta row to a number that exists for every K, so that rows of different
dimension can be ranked together::

    run_sbc(thetas, xs, posterior, reduce_fns=reduce_fns(prior.layout))

``sbi.diagnostics.run_tarp`` needs a distance between draws; :func:`set_distance` is one
between sets, blind to labels and defined across cardinalities.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .layout import ThetaLayout
from .seeding import generator_for

__all__ = [
    "CountInBand",
    "JitteredCardinality",
    "Lowest",
    "SetDistance",
    "SharedParameter",
    "TotalPower",
    "reduce_fns",
    "set_distance",
]

ReduceFn = Callable[[Tensor, Tensor], Tensor]


class _Reduction:
    """Base of the reductions: a layout and a seeded source of tie-breaking jitter."""

    def __init__(self, layout: ThetaLayout, seed: int = 0) -> None:
        self.layout = layout
        self._generator = generator_for(seed)

    def _jitter(self, num: int) -> Tensor:
        """Uniform numbers in [0, 1), new ones at every call."""
        return torch.rand(num, generator=self._generator)

    def _parameter(self, theta: Tensor, index: int) -> tuple[Tensor, Tensor]:
        parts = self.layout.unpack(theta)
        return parts.components[..., index], parts.mask


class JitteredCardinality(_Reduction):
    """K plus a uniform number in [0, 1): where K's would tie, ranks are random.

    Args:
        layout: Layout of theta.
        seed: Seed of the jitter.
    """

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        return self.layout.cardinality(theta) + self._jitter(len(theta))


class TotalPower(_Reduction):
    r"""Sum of squares of one component parameter, :math:`\sum_k \theta_{k,d}^2`.

    Rows with K = 0 come below all others, in random order.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter, the amplitude say.
        seed: Seed of the order among empty rows.
    """

    def __init__(self, layout: ThetaLayout, parameter: str, seed: int = 0) -> None:
        super().__init__(layout, seed)
        self._index = _index_of(layout, parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        values, mask = self._parameter(theta, self._index)
        power = torch.where(mask, values.square(), 0.0).sum(-1)
        return torch.where(mask.any(-1), power, self._jitter(len(theta)) - 1.0)


class Lowest(_Reduction):
    """Smallest value of one component parameter.

    Rows with K = 0 come below all others, in random order.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter, the frequency say.
        seed: Seed of the order among empty rows.
    """

    def __init__(self, layout: ThetaLayout, parameter: str, seed: int = 0) -> None:
        super().__init__(layout, seed)
        self._index = _index_of(layout, parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        values, mask = self._parameter(theta, self._index)
        least = torch.where(mask, values, torch.inf).amin(-1)
        below = -1e30 * (1.0 + self._jitter(len(theta)))
        return torch.where(mask.any(-1), least, below)


class CountInBand(_Reduction):
    """Number of components with a parameter in [low, high), jittered like K.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter, the frequency say.
        low: Lower end of the band.
        high: Upper end of the band.
        seed: Seed of the jitter.
    """

    def __init__(
        self,
        layout: ThetaLayout,
        parameter: str,
        low: float,
        high: float,
        seed: int = 0,
    ) -> None:
        super().__init__(layout, seed)
        self._index = _index_of(layout, parameter)
        self.low, self.high = low, high

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        values, mask = self._parameter(theta, self._index)
        inside = mask & (values >= self.low) & (values < self.high)
        return inside.sum(-1) + self._jitter(len(theta))


class SharedParameter(_Reduction):
    """One shared parameter.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter.
    """

    def __init__(self, layout: ThetaLayout, parameter: str) -> None:
        super().__init__(layout)
        self._index = layout.shared_names.index(parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        return self.layout.unpack(theta).shared[..., self._index]


def reduce_fns(
    layout: ThetaLayout,
    power: str | None = None,
    band: tuple[float, float] | None = None,
) -> list[ReduceFn]:
    """Make a list of reductions for ``run_sbc``.

    Args:
        layout: Layout of theta.
        power: Parameter whose total power is ranked; the first one if None.
        band: Band of the ``order_by`` parameter in which components are counted; none
            if None.

    Returns:
        Jittered K, total power, lowest ``order_by`` parameter, number in the band, and
        each shared parameter, in this order.
    """
    order = layout.component_names[layout.order_by]
    functions: list[ReduceFn] = [
        JitteredCardinality(layout),
        TotalPower(layout, power or layout.component_names[0]),
        Lowest(layout, order),
    ]
    if band is not None:
        functions.append(CountInBand(layout, order, *band))
    functions += [SharedParameter(layout, name) for name in layout.shared_names]
    return functions


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
        shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
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
    return SetDistance(
        layout,
        active.std(0).clamp(min=1e-12),
        shared.std(0).clamp(min=1e-12),
        cutoff,
        jitter=1e-5,
        generator=generator_for(seed),
    )


def _index_of(layout: ThetaLayout, parameter: str) -> int:
    if parameter not in layout.component_names:
        raise ValueError(
            f"parameter must be one of {list(layout.component_names)}, got "
            f"{parameter!r}."
        )
    return layout.component_names.index(parameter)


def _assignment_costs(cost: Tensor) -> Tensor:
    """Least total cost of each square cost matrix ``(N, K, K)``."""
    values = cost.double().cpu().numpy()
    best = np.empty(len(values))
    for i, matrix in enumerate(values):
        rows, columns = linear_sum_assignment(matrix)
        best[i] = matrix[rows, columns].sum()
    return torch.from_numpy(best)
