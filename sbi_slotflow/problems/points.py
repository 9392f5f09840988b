r"""Sets of points as data: x is n independent draws of a law that theta describes.

.. math::
    x_i \sim p(x | K, \Theta, s), \quad i = 1 \ldots n, \qquad
    \log p(x | \Theta, s) = \sum_i \log p(x_i | K, \Theta, s)

x has shape ``(B, n, d + 1)``: d coordinates and a 1 for each point, rows of zeros for
those that are missing (:mod:`~sbi_slotflow.sets.points`). Their order says nothing.

In a mixture, components weigh :math:`\pi_k`, and the weights add up to one. Here each
component has a weight of its own, of any size, and the shares are

.. math::
    \pi_k = \frac{w_k}{w_1 + \ldots + w_K}, \qquad
    w_k \sim \mathrm{Gamma}(\alpha, 1) \;\Rightarrow\;
    \pi \sim \mathrm{Dirichlet}(\alpha, \ldots, \alpha)

So components are independent under the prior, as everywhere, and none is special, as
the last would be whose share the others leave. The price is one number that the data do
not see: the sum of the weights, which is Gamma(K alpha, 1) whatever x is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from ..nn.charts import Chart
from ..nn.point_encoder import PointEncoder
from ..seeding import forked_rng, generator_for
from ..sets.checks import Numbers, as_count
from ..sets.layout import ThetaParts
from ..sets.points import filled_points, packed_points
from ..sets.prior import VariableKPrior
from .base import Problem
from .moments import MomentChart

__all__ = ["Mixture", "Points", "PointsSimulator"]

# Theta rows of a likelihood that are evaluated at a time, and sets of points that tell
# where points lie.
_ROWS, _TYPICAL = 2_048, 512


@dataclass(frozen=True)
class Mixture:
    r"""The law :math:`\sum_k \pi_k\, p(x | \theta_k)` of one point.

    Attributes:
        component: Maps components ``(..., D)`` to a distribution of batch shape
            ``(...)`` over points, of event shape ``()`` or ``(d,)``.
        weight: Index of the component's weight w_k.
    """

    component: Callable[[Tensor], Distribution]
    weight: int

    def __call__(self, parts: ThetaParts) -> Distribution:
        """Return the law given theta rows taken apart, of their batch shape."""
        log_w = parts.components[..., self.weight].log()
        log_w = torch.where(parts.mask, log_w, -torch.inf)
        shares = Categorical(logits=log_w, validate_args=False)
        each = self.component(parts.components)
        return MixtureSameFamily(shares, each, validate_args=False)


class PointsSimulator:
    """Simulator of sets of points.

    Args:
        law: Maps theta rows taken apart (:class:`~.layout.ThetaParts`, batch shape
            ``(N,)``; components that are not there are filled by some that could be) to
            the distribution of one point: batch shape ``(N,)``, event shape ``()`` on a
            line, else ``(d,)``. A :class:`Mixture`, for one.
        prior: The prior; it gives the layout of theta.
        num_points: Points n of a set, at most.
        fewest: Points at least; sets of all sizes from there on are equally likely. All
            if None.

    Raises:
        TypeError, ValueError: If an argument is of another kind or out of range, or the
            law is no distribution of such a shape.

    Example:
        >>> from torch.distributions import Independent, Normal, Uniform
        >>> box = Uniform(torch.tensor([-5.0, 0.1]), torch.tensor([5.0, 1.0]))
        >>> prior = VariableKPrior(Independent(box, 1), [0.0, 1.0, 1.0])
        >>> simulator = PointsSimulator(
        ...     Mixture(lambda c: Normal(c[..., 0], 1.0), weight=1), prior, 20, fewest=5
        ... )
        >>> simulator(prior.sample((3,))).shape
        torch.Size([3, 20, 2])
    """

    def __init__(
        self,
        law: Callable[[ThetaParts], Distribution],
        prior: VariableKPrior,
        num_points: int,
        fewest: int | None = None,
    ) -> None:
        if not callable(law):
            raise TypeError(f"law must be a function, got {type(law).__name__}.")
        if not isinstance(prior, VariableKPrior):
            raise TypeError(
                f"prior must be a VariableKPrior, got {type(prior).__name__}."
            )
        self.law, self.layout = law, prior.layout
        self.num_points = as_count(num_points, "num_points")
        self.fewest = self.num_points if fewest is None else as_count(fewest, "fewest")
        if self.fewest > self.num_points:
            raise ValueError(
                f"fewest must be at most num_points = {num_points}, got {fewest}."
            )
        self._middle = prior.component_marginals.middle(torch.zeros(()).double())
        self._given(prior.sample((2,), generator_for(0)).double())  # checks the law

    @cached_property
    def dimension(self) -> int:
        """Coordinates d of a point."""
        rows = torch.zeros(1, self.layout.size, dtype=torch.float64)
        parts = self.layout.unpack(rows)
        one = parts._replace(
            components=self._middle.expand_as(parts.components),
            mask=torch.ones_like(parts.mask),
        )
        return self.law(one).event_shape.numel()

    def __call__(
        self, theta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Simulate sets of points ``(..., n, d + 1)`` of theta rows ``(..., E)``."""
        self.layout.validate(theta)
        rows = theta.reshape(-1, self.layout.size)
        num = self.num_points
        with forked_rng(generator), torch.no_grad():
            points = self._given(rows).sample(torch.Size((num,)))
            sizes = torch.randint(self.fewest, num + 1, (len(rows), 1))
        points = points.reshape(num, len(rows), -1).transpose(0, 1)
        there = (torch.arange(num) < sizes).to(points)
        x = torch.cat([points, points.new_ones(*points.shape[:2], 1)], -1)
        x = x * there.unsqueeze(-1)
        return x.reshape(*theta.shape[:-1], *x.shape[1:]).to(theta)

    def log_likelihood(self, theta: Tensor, x: Numbers) -> Tensor:
        """Evaluate log p(x | theta) exactly, float64.

        Args:
            theta: Rows of shape ``(..., E)``.
            x: Sets ``(..., n, d + 1)`` of any n, whose batch shape broadcasts with
                theta's.

        Raises:
            TypeError, ValueError: If theta or x is malformed.
        """
        self.layout.validate(theta)
        x = filled_points(x).double()
        if x.shape[-1] != self.dimension + 1:
            raise ValueError(
                f"x must have {self.dimension + 1} entries for each point, got "
                f"{x.shape[-1]}."
            )
        shape = torch.broadcast_shapes(theta.shape[:-1], x.shape[:-2])
        rows = theta.double().expand(*shape, -1).reshape(-1, self.layout.size)
        x = x.expand(*shape, -1, -1).reshape(-1, *x.shape[-2:])
        values = [
            self._log_density(*part)
            for part in zip(rows.split(_ROWS), x.split(_ROWS), strict=True)
        ]
        return torch.cat(values).reshape(shape) if values else rows.new_zeros(shape)

    def _log_density(self, rows: Tensor, x: Tensor) -> Tensor:
        law = self._given(rows)
        points, there = x[..., :-1].transpose(0, 1), x[..., -1] > 0
        if not law.event_shape:
            points = points.squeeze(-1)
        each = law.log_prob(points).transpose(0, 1)
        return torch.where(there, each, 0.0).sum(-1)

    def _given(self, rows: Tensor) -> Distribution:
        """The law of one point given rows ``(N, E)``."""
        parts = self.layout.unpack(rows)
        active = parts.mask.unsqueeze(-1)
        filled = torch.where(active, parts.components, self._middle.to(rows))
        law: Any = self.law(parts._replace(components=filled))
        if not isinstance(law, Distribution):
            raise TypeError(
                f"law must return a torch Distribution, got {type(law).__name__}."
            )
        if law.batch_shape != rows.shape[:1] or len(law.event_shape) > 1:
            raise ValueError(
                f"law must return a distribution of batch shape ({len(rows)},) over "
                f"points, of event shape () or (d,), got {tuple(law.batch_shape)} and "
                f"{tuple(law.event_shape)}."
            )
        return law


@dataclass(frozen=True)
class Points(Problem):
    """A problem whose data are sets of points.

    A network reads the points in whatever order they come, and draws the components one
    after the other in canonical order, each given those before it.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: A :class:`PointsSimulator`.
        weight: Name of the weight of a component; with it and ``places``, ``refine``
            splits components and merges them so that moments are kept
            (:mod:`.moments`).
        places: Names of a component's mean, one for each coordinate.
        scales: Names of its standard deviations, as many as places, or none.

    Raises:
        TypeError, ValueError: If an argument is of another kind, or a name unknown.
    """

    weight: str | None = None
    places: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.simulator, PointsSimulator):
            raise TypeError(
                "simulator must be a PointsSimulator, got "
                f"{type(self.simulator).__name__}."
            )
        if (self.weight is None) != (not self.places) or (
            self.scales and not self.places
        ):
            raise ValueError(
                "weight and places go together, and scales with both: got weight = "
                f"{self.weight!r}, places = {self.places}, scales = {self.scales}."
            )
        self.build_chart()  # checks the names

    @property
    def event_shape(self) -> torch.Size:
        """Shape ``(n, d + 1)`` of one set of points."""
        return torch.Size((self.simulator.num_points, self.simulator.dimension + 1))

    def pack(self, *points: Numbers) -> Tensor:
        """Pack sets of points, ``(n,)`` or ``(n, d)`` each, as x ``(B, n, d + 1)``."""
        return packed_points(points, self.simulator.num_points)

    def build_encoder(self, **options: Any) -> PointEncoder:
        """Return a :class:`PointEncoder`, with its class's options."""
        x = self.simulator(
            self.prior.sample((_TYPICAL,), generator_for(0)), generator_for(0)
        )
        points = x[x[..., -1] > 0][:, :-1].double()
        # Quantiles: laws may have heavy tails.
        shares = torch.tensor([0.16, 0.5, 0.84]).double()
        low, middle, high = points[: 10**6].quantile(shares, dim=0)
        scale = torch.where(high > low, 0.5 * (high - low), 1.0)
        num, entries = self.event_shape
        ends = middle.tolist(), scale.tolist()
        return PointEncoder(num, entries, *ends, **options)

    def build_chart(self) -> Chart:
        """Return the transform of a component, which offers splits and merges."""
        if self.weight is None:
            return super().build_chart()
        names, asked = (
            self.component_names,
            (self.weight, *self.places, *self.scales),
        )
        if unknown := [name for name in asked if name not in names]:
            raise ValueError(
                f"weight, places and scales must name parameters of {names}, got "
                f"{unknown}."
            )
        weight, *others = (names.index(name) for name in asked)
        num = len(self.places)
        return MomentChart(
            self.prior.component_marginals, weight, others[:num], others[num:]
        )
