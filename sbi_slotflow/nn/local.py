r"""A component in its cell: local coordinates, and a density of them.

.. math::
    w = \left( y - a - \tfrac12,\; \psi - \psi_0,\; v \ldots \right)

y is the position on the location axis (:mod:`.cells`) and a the cell (on a grid, the
column and the row, and those of the cell's middle); psi are the P circular parameters
as angles, each unwrapped about a centre :math:`\psi_0`, so that a
seam lies nowhere in particular; v are the other parameters in natural units
(``natural_scale`` of a :class:`~sbi_slotflow.sets.marginals.Marginal`). An angle that
turns with the location or another angle is sheared as the chart says, and a pair that
is a point of a disc is among v with two coordinates that are standard normal under the
prior (:class:`.charts.DiscChart`). All are coordinates in which a likelihood is nearly
Gaussian. Arithmetic is float64.

The density starts from a Gaussian that is given from outside, :math:`w = m + C z` with
C lower triangular. Its tails are made heavy by a function g that is the identity up to
2.5 deviations and logarithmic beyond, and each coordinate, given those before, is cut
off at its ends,

.. math::
    \zeta_d = \Phi^{-1}\left(
        \frac{\Phi(g(z_d)) - \Phi(\alpha_d)}{\Phi(\beta_d) - \Phi(\alpha_d)}
        \right),
    \qquad [\alpha_d, \beta_d] = g((\text{ends} - m_d) / C_{dd})

so that a component near the end of its cell, two in one cell, or an amplitude at its
bound need nothing special, and no draw leaves the prior's support. A flow over zeta
then learns what is not Gaussian.
"""

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from ..sets.circular import wrapped
from ..sets.marginals import ExponentialScore, Place
from ..sets.transforms import (
    Affine,
    Bend,
    Columns,
    Compose,
    Cut,
    Permutation,
    Polar,
    Shear,
    Transform,
    solve_lower,
)
from .cells import CellAxis
from .charts import Chart
from .flows import ConditionalFlow, RowContext

__all__ = ["LocalDensity", "LocalGaussian", "LocalTransform"]

_TWO_PI = 2 * math.pi
# Cells within which a fit looks for a component: its own, and what lies about it.
_FARTHEST_CELL = 1.6
# Stands for infinity, which has no gradient.
_OPEN = 1e6
# Largest coordinate of a point of a disc that a fit may end at.
_FARTHEST_POINT = 5.0
# Least distance from the middle of a disc, where angles have no derivative, at which a
# signal is linearised.
_NEAREST_POINT = 1e-2
# A Gaussian this many deviations off the interval is moved that near, so that what is
# left of it is not steeper than the flow can mend.
_FARTHEST = 3.0
# Draws keep that far from the ends: rounded to float32 they must not be in another
# cell, nor at the other end of the phases.
_SLACK = 2e-4
# Deviations beyond which tails are those of a log-normal: a mode that was fitted too
# narrow, or at the wrong place, costs the logarithm of the distance, not its square.
_BEND = Bend(2.5)
_LEAST_WIDTH = 1e-9
_LEAST_SCALE = 1e-6


class LocalTransform:
    """Local coordinates (offset, P angles, others) of components.

    A parameter is circular if the layout gives it a period that its prior covers. A
    circular location keeps its seam, at the ends of the axis.

    Args:
        chart: The problem's chart, which knows marginals and periods.
        axis: The location axis.

    Attributes:
        num_circular: Number P of circular parameters, which come after the offset.
    """

    def __init__(self, chart: Chart, axis: CellAxis) -> None:
        self.axis, self.marginals = axis, chart.marginals
        places, num = axis.parameters, len(chart.marginals)
        self._in_discs = {d for pair in chart.discs for d in pair}
        angles = [
            d
            for d, period in enumerate(chart.marginals.periods)
            if math.isfinite(period) and d not in places
        ]
        circular = [d for d in angles if d not in self._in_discs]
        self.num_places, self.num_circular = len(places), len(circular)
        order = [*places, *circular]
        order += [d for d in range(num) if d not in order]
        self._parameters = order[len(places) :]
        shears: list[Transform] = []
        # What another angle turns with is brought to its turn first.
        for d in sorted(angles, key=lambda d: d in circular):
            period, (low, _) = chart.marginals.periods[d], self.marginals[d].bounds
            turning = [s for s in chart.shears if s.column == d]
            turning = [s for s in turning if s.by in (places[0], *self._in_discs)]
            pairs = [(s.by, s.rate) for s in turning] or [(places[0], 0.0)]
            shears += [Shear(d, by, rate, period, low) for by, rate in pairs]
        self._scales = [self._scale(d) for d in self._parameters]
        columns: list[Transform] = [Affine(mid, half) for mid, half, _ in self._scales]
        for radius, angle in chart.discs:
            columns[self._parameters.index(radius)] = ExponentialScore(
                self.marginals[radius]
            )
            columns[self._parameters.index(angle)] = Affine()
        sized = zip(places, axis.lengths, strict=True)
        position = [Place(self.marginals[d], length) for d, length in sized]
        self._discs = [tuple(order.index(d) for d in pair) for pair in chart.discs]
        points = [Polar(*pair) for pair in self._discs]
        self._steps = Compose(
            [*shears, Permutation(order), Columns([*position, *columns]), *points]
        )

    @property
    def num_features(self) -> int:
        """Number D of coordinates."""
        return len(self.marginals)

    def coordinates(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates: locations in cells, angles in [0, 2 pi), rest.

        Args:
            components: Inside the support, shape ``(..., D)``.

        Returns:
            Coordinates ``(..., D)`` and log-Jacobians ``(...)``, float64.
        """
        return self._steps.forward(components.double())

    def components(self, coordinates: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`; values may leave the support."""
        return self._steps.inverse(coordinates)

    def off_centre(self, coordinates: Tensor) -> Tensor:
        """Coordinates whose points of discs are not in the middle, slopes as before."""
        if not self._discs:
            return coordinates
        columns = list(coordinates.unbind(-1))
        for pair in self._discs:
            a, b = (columns[i].detach() for i in pair)
            size = torch.hypot(a, b)
            lacking = (_NEAREST_POINT - size).clamp(min=0.0)
            cosine = torch.where(size > 0, a / size.clamp(min=1e-300), 1.0)
            sine = torch.where(size > 0, b / size.clamp(min=1e-300), 0.0)
            for i, share in zip(pair, (cosine, sine), strict=True):
                columns[i] = columns[i] + lacking * share
        return torch.stack(columns, -1)

    def position(self, coordinates: Tensor) -> Tensor:
        """Positions ``(...)`` on the axis of :meth:`coordinates`."""
        return self.axis.position(coordinates[..., : self.num_places])

    def absolute(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Coordinates with locations and whole angles, of those relative to cells.

        Args:
            w: Coordinates relative to cells and centres, shape ``(..., D)``.
            anchors: Cells, shape ``(...)``.
            centre: Angles that angles are counted from, shape ``(..., P)``.
        """
        return self._shifted(w, self.axis.middles(anchors), centre)

    def relative(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Inverse of :meth:`absolute`; angles in [-pi, pi)."""
        w = self._shifted(w, -self.axis.middles(anchors), -centre)
        place, angles, others = self._parted(w)
        return torch.cat([place, wrapped(angles), others], -1)

    def without_angles(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates with angles of zero, and the angles ``(..., P)``."""
        place, angles, others = self._parted(w)
        return torch.cat([place, torch.zeros_like(angles), others], -1), angles

    def _parted(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, num = self.num_places, self.num_circular
        place, angles, others = w.split([first, num, w.shape[-1] - first - num], -1)
        return place, angles, others

    def _shifted(self, w: Tensor, offset: Tensor, angle: Tensor) -> Tensor:
        place, angles, others = self._parted(w)
        return torch.cat([place + offset, angles + angle, others], -1)

    def log_prior(
        self, w: Tensor, centre: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log prior densities ``(...)`` of local coordinates, and their gradients.

        But for a constant; positions and most angles are uniform. Values beyond a
        marginal's ``core`` count as at its end.

        Args:
            w: Coordinates, shape ``(..., D)``.
            centre: Angles that angles are counted from, shape ``(..., P)``.
            cells: Cells, shape ``(...)``; they matter where they say the class.
        """
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            values = 0.0 * w[..., 0]  # has a gradient, whatever the marginals
            nowhere = torch.zeros_like(w[..., : self.num_places])
            whole = self._shifted(w, nowhere, centre)
            for i, d in enumerate(self._parameters):
                (middle, half, _), marginal = self._scales[i], self.marginals[d]
                coordinate = whole[..., self.num_places + i]
                if d in self._in_discs:
                    values = values - 0.5 * coordinate.square()
                    continue
                if i < self.num_circular:
                    if marginal.is_uniform:
                        continue
                    coordinate = coordinate % _TWO_PI
                value = (middle + half * coordinate).clamp(*marginal.core)
                values = values + marginal.log_density(value)
            (slope,) = torch.autograd.grad(values.sum(), w)
        return values.detach(), slope

    @cached_property
    def log_constant(self) -> float:
        """What the log prior density of one component is above :meth:`log_prior`."""
        middle = torch.tensor(0.4, dtype=torch.float64)
        one = torch.stack([m.quantile(middle) for m in self.marginals]).double()
        prior = sum(m.log_density(v) for m, v in zip(self.marginals, one, strict=True))
        coordinates, log_det = self.coordinates(one[None])
        centre = torch.zeros(1, self.num_circular, dtype=torch.float64)
        known, _ = self.log_prior(coordinates, centre, torch.zeros(1).long())
        return float(prior - log_det[0] - known[0])

    def log_weight(self, cells: Tensor, mask: Tensor) -> Tensor:
        """What the prior of S sets knows beside :meth:`log_prior`, ``(S,)``.

        But for a constant of each component and of K: of one class, nothing.
        """
        return torch.zeros(len(cells), dtype=torch.float64, device=cells.device)

    def num_coordinates(self, cells: Tensor, mask: Tensor) -> Tensor:
        """How many coordinates the components of S sets have together, ``(S,)``."""
        return self.num_features * mask.sum(-1)

    def interval(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest locations ``(..., P)`` of cells from start to end."""
        spans = self.axis.spans(cells, starts, ends)
        named = zip(self.axis.parameters, spans, strict=True)
        sides = [
            [self.marginals[d].quantile(share) for share in span] for d, span in named
        ]
        low, high = (torch.stack(each, -1) for each in zip(*sides, strict=True))
        return low, high

    def ends(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates ``(..., D)`` in cells ``(...)``.

        Those of the offset are left open.
        """
        pairs = [(-torch.inf, torch.inf), (-0.5, 0.5)][: self.num_places]
        pairs += self.num_circular * [(-math.pi, math.pi)]
        for d in self._parameters[self.num_circular :]:
            finite = [math.isfinite(bound) for bound in self.marginals[d].bounds]
            finite = [False, False] if d in self._in_discs else finite
            pairs.append((-1.0 if finite[0] else -_OPEN, 1.0 if finite[1] else _OPEN))
        sides = torch.tensor(pairs, dtype=torch.float64, device=cells.device)
        low, high = sides.expand(*cells.shape, -1, -1).unbind(-1)
        return low, high

    def farthest(self, cells: Tensor) -> Tensor:
        """Largest absolute coordinates ``(..., D)`` that a fit may end at."""
        most = self.num_places * [_FARTHEST_CELL]
        most += [
            _FARTHEST_POINT if d in self._in_discs else reach
            for d, (*_, reach) in zip(self._parameters, self._scales, strict=True)
        ]
        far = torch.tensor(most, dtype=torch.float64, device=cells.device)
        return far.expand(*cells.shape, -1)

    def _scale(self, d: int) -> tuple[float, float, float]:
        """Shift, scale and largest coordinate: of an angle's turn, or natural ones."""
        marginal, period = self.marginals[d], self.marginals.periods[d]
        if math.isfinite(period):
            return marginal.bounds[0], period / _TWO_PI, math.pi
        return marginal.natural_scale


class LocalDensity(nn.Module):
    """A truncated Gaussian and a flow.

    Args:
        features: Number D of coordinates, offsets first.
        context_features: Length of a context.
        own_features: Length of what each row sees besides.
        options: Further options of the :class:`ConditionalFlow`.
    """

    def __init__(
        self, features: int, context_features: int, own_features: int, **options: object
    ) -> None:
        super().__init__()
        self.flow = ConditionalFlow(
            features,
            context_features,
            own_features=own_features,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def log_prob(
        self,
        w: Tensor,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
        cells: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the log density of N rows.

        Args:
            w: Coordinates between the ends, shape ``(N, D)``, float64.
            mean: Means, shape ``(N, D)``.
            factor: Lower triangular factors C, shape ``(N, D, D)``.
            ends: Least and largest coordinates, each of shape ``(N, D)``.
            context: Contexts of the rows.
            cells: Cells of the rows; they matter where they say the class.

        Returns:
            Float32 log densities ``(N,)``.
        """
        z = solve_lower(factor, w - mean)
        scale = factor.diagonal(dim1=-2, dim2=-1)
        # Each coordinate's mean given those before it.
        centre = w - scale * z
        shift, alpha, beta = _interval(centre, scale, ends)
        y, log_slope = _BEND.forward(z)
        zeta, log_det = Cut(alpha, beta).forward(y + shift)
        log_det = (log_det + log_slope - scale.log()).sum(-1)
        return self.flow.log_prob(zeta.float(), context) + log_det.float()

    @torch.no_grad()
    def sample(
        self,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
        cells: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw coordinates ``(N, D)`` and the z ``(N, D)`` behind them."""
        zeta = self.flow.sample(context, generator).double()
        z, w = torch.zeros_like(zeta), mean.clone()
        low, high = ends
        for d in range(zeta.shape[-1]):
            scale = factor[:, d, d]
            w[:, d] += (factor[:, d, :d] * z[:, :d]).sum(-1)
            limits = low[:, d], high[:, d]
            shift, alpha, beta = _interval(w[:, d], scale, limits)
            z[:, d] = _BEND.inverse(Cut(alpha, beta).inverse(zeta[:, d]) - shift)
            w[:, d] += scale * z[:, d]
        slack = (0.25 * (high - low)).clamp(0.0, _SLACK)
        return torch.maximum(torch.minimum(w, high - slack), low + slack), z


class LocalGaussian(nn.Module):
    r"""The Gaussian of a component, predicted from its context.

    .. math::
        m = \mu(c) + B(c)\,p, \qquad C = \mathrm{diag}(e^{s(c)})\, L(c)

    p are the local coordinates of the component before, zero if it is far. The centres
    about which angles are unwrapped are predicted as directions.

    Args:
        features: Number D of coordinates.
        context_features: Length of a context.
        num_circular: Number P of coordinates, after the first, that are angles.
        hidden_features: Width of the network.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        num_circular: int,
        hidden_features: int = 128,
    ) -> None:
        super().__init__()
        self.features, self.num_circular = features, num_circular
        below = features * (features - 1) // 2
        self._sizes = [features, features, below, features * features]
        self._sizes.append(2 * max(1, num_circular))
        last = nn.Linear(hidden_features, sum(self._sizes))
        nn.init.normal_(last.weight, std=1e-2)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(context_features, hidden_features), nn.GELU(), last
        )
        self.register_buffer("below", torch.tril_indices(features, features, -1))

    def forward(self, context: RowContext) -> tuple[Tensor, Tensor]:
        """Return means ``(N, D)`` and factors ``(N, D, D)``, float64."""
        raw = self.network(context.values).double()[context.which]
        shift, log_scale, lower, mixing, _ = raw.split(self._sizes, -1)
        if context.own is not None:
            mixing = mixing.unflatten(-1, (self.features, -1))
            own = context.own.double().unsqueeze(-1)
            shift = shift + (mixing @ own).squeeze(-1)
        factor = torch.eye(self.features).to(raw).repeat(len(raw), 1, 1)
        rows, columns = self.get_buffer("below")
        factor[:, rows, columns] = lower
        scale = (10 * torch.tanh(log_scale / 10)).exp() + _LEAST_SCALE
        return shift, factor * scale.unsqueeze(-1)

    def centre(self, contexts: Tensor) -> Tensor:
        """Centres of the angles, shape ``(n, P)``, of contexts ``(n, C)``."""
        direction = self.network(contexts)[:, -self._sizes[-1] :].double()
        x, y = direction.unflatten(-1, (-1, 2))[:, : self.num_circular].unbind(-1)
        return torch.atan2(y, x + 1e-9)


def _interval(
    mean: Tensor, scale: Tensor, ends: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift that brings the Gaussian near the interval, and the interval's ends."""
    low, high = ends
    high = torch.maximum(high, low + _LEAST_WIDTH)
    alpha, _ = _BEND.forward((low - mean) / scale)
    beta, _ = _BEND.forward((high - mean) / scale)
    shift = (_FARTHEST - alpha).clamp(max=0.0) + (-_FARTHEST - beta).clamp(min=0.0)
    return shift, alpha + shift, beta + shift
