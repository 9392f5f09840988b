r"""Splits of one component and merges of two that keep moments.

A component weighs w, is somewhere (m) and, in a mixture, has a standard deviation s
there. Two are merged into the one with the same total weight, mean and variance
(Richardson & Green 1997):

.. math::
    w = w_1 + w_2, \quad w\, m = w_1 m_1 + w_2 m_2, \quad
    w\, (m^2 + s^2) = w_1 (m_1^2 + s_1^2) + w_2 (m_2^2 + s_2^2)

A split draws u, e, a in (0, 1), of densities q, and undoes that:

.. math::
    w_1 = u w, \quad w_2 = (1 - u) w, \qquad
    m_1 = m - e s \sqrt{\tfrac{1 - u}{u}}, \quad
    m_2 = m + e s \sqrt{\tfrac{u}{1 - u}}, \qquad
    s_1^2 = \frac{a (1 - e^2) s^2}{u}, \quad
    s_2^2 = \frac{(1 - a)(1 - e^2) s^2}{1 - u}

    |J| = w\, \frac{s_1 s_2}{2 a (1 - a)(1 - e^2) \sqrt{u (1 - u)}}

Weights of a mixture may be without a unit, as only their ratios are seen in the data:
the sum that is kept is of the same unit. Where components have a place and no width, as
signals that add up, weight and mean are kept, and the distance d = m_2 - m_1 is drawn:
m_1 = m - (1 - u) d, m_2 = m + u d, with a Jacobian of 1 besides that of the weights, w.
Other parameters, in the coordinates z in which the prior is normal, become z - b and
z + b with b normal, and the mean of both, with a Jacobian of 2.

The pair that is merged stands side by side in canonical order, each of the K - 1 pairs
as likely as another; a split that puts another component between the two is refused.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn.charts import WhiteningChart
from ..nn.spec import register
from ..sets.layout import ThetaLayout
from ..sets.marginals import Marginal

__all__ = ["MomentChart", "MomentSplit"]

# Spread of b, and scale of the distance d in half widths of the place's prior.
_SPREAD, _NEAR = 0.5, 0.05


@register("chart")
class MomentChart(WhiteningChart):
    """Each parameter on its own, of components that can be split by their moments.

    Args:
        marginals: Prior marginals of the D parameters.
        weight: Index of the weight, which is positive.
        places: Indices of the place, one for each dimension.
        scales: Indices of the standard deviations, one for each place; none where
            components have no width, or one that is no moment of theirs.

    Raises:
        ValueError: If an index is out of range or used twice, or a weight or a scale
            may be negative.
    """

    kind = "moments"

    def __init__(
        self,
        marginals: Sequence[Marginal],
        weight: int,
        places: Sequence[int],
        scales: Sequence[int] = (),
    ) -> None:
        super().__init__(marginals)
        self.weight, self.places, self.scales = weight, tuple(places), tuple(scales)
        used = [weight, *self.places, *self.scales]
        if len(set(used)) < len(used) or not set(used) <= set(range(len(marginals))):
            raise ValueError(
                f"weight, places and scales must be different parameters of the "
                f"{len(marginals)}, got {weight}, {list(places)} and {list(scales)}."
            )
        if not self.places or len(self.scales) not in (0, len(self.places)):
            raise ValueError(
                "places must be one parameter at least, scales none or as many, got "
                f"{list(places)} and {list(scales)}."
            )
        for index in (weight, *self.scales):
            if not marginals[index].bounds[0] >= 0:
                raise ValueError(
                    "weight and scales must be parameters that are positive, got one "
                    f"from {marginals[index].bounds[0]:g}."
                )

    def extra_moves(self, layout: ThetaLayout) -> list[Any]:
        """Splits and merges, where a place orders the components."""
        suits = layout.max_cardinality > 1 and layout.order_by in self.places
        # Three in a sweep: they are what changes K most often.
        return 3 * [MomentSplit(layout, self)] if suits else []

    def _options(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "places": list(self.places),
            "scales": list(self.scales),
        }


class MomentSplit:
    """Splits one component or merges two neighbours, see the module.

    Raises:
        ValueError: If no place orders the components.
    """

    name = "split or merge by moments"

    def __init__(self, layout: ThetaLayout, chart: MomentChart) -> None:
        if layout.order_by not in chart.places:
            raise ValueError(
                "components must be in the order of a place to be split, one of "
                f"{chart.places}, got order_by = {layout.order_by}."
            )
        self.layout, self.chart = layout, chart
        used = {chart.weight, *chart.places, *chart.scales}
        self.others = [i for i in range(layout.num_component_params) if i not in used]
        # The place that orders comes first: its distance is positive.
        pairs = list(zip(chart.places, chart.scales or chart.places, strict=True))
        self.pairs = sorted(pairs, key=lambda pair: pair[0] != layout.order_by)

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """As every ``Move``: new rows, and the log ratio of proposals."""
        coin = torch.rand(len(theta), generator=generator) < 0.5
        new, log_ratio = theta.clone(), theta.new_zeros(len(theta)).double()
        for rows, move in ((coin, self._split), (~coin, self._merge)):
            new[rows], log_ratio[rows] = move(theta[rows], generator)
        return new, log_ratio

    def divide(
        self, whole: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split components ``(N, D)``.

        Returns:
            Both parts, and the log of the Jacobian over the density of what was drawn.
        """
        chart, num = self.chart, len(whole)
        first, second = whole.clone(), whole.clone()
        u, value = _beta(num, generator)
        w = whole[:, chart.weight]
        first[:, chart.weight], second[:, chart.weight] = u * w, (1 - u) * w
        value = value + w.log()
        for i, (place, scale) in enumerate(self.pairs):
            m = whole[:, place]
            sign = torch.ones_like(u)
            if i:  # the sign of another coordinate's distance is drawn
                value = value + math.log(2)
                sign = torch.rand(num, generator=generator).sub(0.5).sign().to(u)
            if chart.scales:
                s = whole[:, scale]
                e, log_e = _beta(num, generator)
                a = torch.rand(num, dtype=torch.float64, generator=generator)
                a = a.clamp(1e-12, 1 - 1e-12)
                distance = sign * e * s / (u * (1 - u)).sqrt()
                rest = (1 - e.square()).sqrt() * s
                first[:, scale] = (a / u).sqrt() * rest
                second[:, scale] = ((1 - a) / (1 - u)).sqrt() * rest
                value = (
                    value + log_e + self._log_jacobian(u, e, a, first, second, scale)
                )
            else:
                near = self._near(place)
                angle = torch.rand(num, dtype=torch.float64, generator=generator)
                size = near * (0.5 * math.pi * angle.clamp(1e-12, 1 - 1e-12)).tan()
                distance = sign * size
                value = value - self._log_cauchy(size, near)
            first[:, place] = m - (1 - u) * distance
            second[:, place] = m + u * distance
        for i in self.others:
            z, log_dz = self.chart.marginals[i].score.forward(whole[:, i])
            b = _SPREAD * torch.randn(num, dtype=torch.float64, generator=generator)
            value = value + log_dz + math.log(2) - self._log_normal(b)
            for part, sign in ((first, -1.0), (second, 1.0)):
                part[:, i] = self.chart.marginals[i].score.inverse(z + sign * b)
                value = value - self.chart.marginals[i].score.forward(part[:, i])[1]
        return first, second, value

    def unite(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Merge components ``(N, D)``.

        Returns:
            The whole, and what :meth:`divide` would return for that split.
        """
        chart, whole = self.chart, first.clone()
        w = first[:, chart.weight] + second[:, chart.weight]
        u = first[:, chart.weight] / w
        whole[:, chart.weight] = w
        value = w.log() - _log_beta(u)
        for i, (place, scale) in enumerate(self.pairs):
            distance = second[:, place] - first[:, place]
            whole[:, place] = first[:, place] + (1 - u) * distance
            if i:
                value = value + math.log(2)
            if chart.scales:
                inner = u * first[:, scale].square()
                outer = (1 - u) * second[:, scale].square()
                between = u * (1 - u) * distance.square()
                variance = inner + outer + between
                whole[:, scale] = variance.sqrt()
                e, a = (between / variance).sqrt(), inner / (inner + outer)
                value = value - _log_beta(e)
                value = value + self._log_jacobian(u, e, a, first, second, scale)
            else:
                value = value - self._log_cauchy(distance.abs(), self._near(place))
        for i in self.others:
            (z1, log_1), (z2, log_2) = (
                self.chart.marginals[i].score.forward(part[:, i])
                for part in (first, second)
            )
            whole[:, i] = self.chart.marginals[i].score.inverse(0.5 * (z1 + z2))
            log_dz = self.chart.marginals[i].score.forward(whole[:, i])[1]
            value = value + log_dz + math.log(2) - log_1 - log_2
            value = value - self._log_normal(0.5 * (z2 - z1))
        return whole, value

    def _split(
        self, theta: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout
        parts = layout.unpack(theta.double())
        k = parts.cardinality
        possible = (k >= 1) & (k < layout.max_cardinality)
        chosen = torch.rand(len(theta), generator=generator) * k
        chosen = chosen.long().clamp(max=layout.max_cardinality - 2)
        row, place = torch.arange(len(theta)), torch.arange(layout.max_cardinality)
        safe = self._safe(parts.components[row, chosen], possible)
        first, second, value = self.divide(safe, generator)
        source = place - (place > chosen.unsqueeze(-1)).long()
        source = source.unsqueeze(-1).expand_as(parts.components)
        components = parts.components.gather(1, source)
        components[row, chosen], components[row, chosen + 1] = first, second
        k_new = torch.where(possible, k + 1, k)
        rows = layout.pack(k_new, components, parts.shared)
        # Nothing may stand between the two: a merge takes neighbours.
        possible &= (layout.canonical(rows) == rows).all(-1)
        return (
            torch.where(possible.unsqueeze(-1), rows.to(theta), theta),
            torch.where(possible, value, -math.inf),
        )

    def _merge(
        self, theta: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout
        parts = layout.unpack(theta.double())
        k = parts.cardinality
        possible = k >= 2
        left = torch.rand(len(theta), generator=generator) * (k - 1).clamp(min=0)
        left = left.long().clamp(max=layout.max_cardinality - 2)
        row, place = torch.arange(len(theta)), torch.arange(layout.max_cardinality)
        pair = [parts.components[row, left + i] for i in (0, 1)]
        safe = [self._safe(part, possible) for part in pair]
        whole, value = self.unite(*safe)
        source = place + (place > left.unsqueeze(-1)).long()
        source = source.clamp(max=layout.max_cardinality - 1)
        source = source.unsqueeze(-1).expand_as(parts.components)
        components = parts.components.gather(1, source)
        components[row, left] = whole
        rows = layout.pack(torch.where(possible, k - 1, k), components, parts.shared)
        return (
            torch.where(possible.unsqueeze(-1), rows.to(theta), theta),
            torch.where(possible, -value, -math.inf),
        )

    def _safe(self, components: Tensor, possible: Tensor) -> Tensor:
        """Components, a point of the support where there is nothing to move."""
        middle = self.chart.marginals.middle(components)
        return torch.where(possible.unsqueeze(-1), components, middle)

    def _near(self, place: int) -> float:
        return _NEAR * self.chart.marginals[place].natural_scale[1]

    @staticmethod
    def _log_jacobian(
        u: Tensor, e: Tensor, a: Tensor, first: Tensor, second: Tensor, scale: int
    ) -> Tensor:
        """Of one place and scale, less the weight's."""
        size = first[:, scale].log() + second[:, scale].log()
        below = math.log(2) + a.log() + (-a).log1p() + (-e.square()).log1p()
        return size - below - 0.5 * (u.log() + (-u).log1p())

    @staticmethod
    def _log_cauchy(distance: Tensor, near: float) -> Tensor:
        return math.log(2 / (math.pi * near)) - (distance / near).square().log1p()

    @staticmethod
    def _log_normal(b: Tensor) -> Tensor:
        z = b / _SPREAD
        return -0.5 * z.square() - math.log(_SPREAD * math.sqrt(2 * math.pi))


def _beta(num: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draws of Beta(2, 2), the median of three uniforms, and -log density."""
    three = torch.rand(num, 3, dtype=torch.float64, generator=generator)
    u = three.median(-1).values.clamp(1e-12, 1 - 1e-12)
    return u, -_log_beta(u)


def _log_beta(u: Tensor) -> Tensor:
    return math.log(6) + u.log() + (-u).log1p()
