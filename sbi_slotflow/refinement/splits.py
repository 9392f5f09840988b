r"""Splits of one oscillation into two, and merges of neighbours.

With phases referred to the middle of the record an oscillation is a phasor
:math:`z = A e^{i\psi}` at a frequency f. Two that are closer than a resolution element
look like one, of

.. math::
    z = z_1 + z_2, \qquad
    f = f_2 + \operatorname{Re}(z_1 / z)\,(f_1 - f_2)

to first order in time. A split draws z_1 from the prior of a component and the gap
f_1 - f_2 from a log-uniform law of either sign, and solves for the rest; a merge takes
two neighbours in frequency. In (z, f) the Jacobian is one. The ratio of a split, for
densities of sets, is

.. math::
    \frac{\pi(\theta')}{\pi(\theta)}\, \frac{A}{A_1 A_2}\,
    \frac{1}{2\, g(z_1)\, h(f_1 - f_2)}

where one half remains of the K components that could split, and of the K pairs of
neighbours in either order that could merge.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import ThetaLayout
from ..nn.charts import Chart, PolarChart

__all__ = ["SplitMove"]

# Least and largest gap in units of the resolution, 1 / (2 reference_time).
_GAPS = 0.02, 2.0


class _Phasors(NamedTuple):
    """Components as phasors ``(N,)`` at frequencies ``(N,)``."""

    z: Tensor
    frequency: Tensor


class SplitMove:
    """Splits one oscillation or merges two, see the module.

    Args:
        layout: Layout of theta, whose components are (amplitude, phase, frequency) in
            any order, ordered by frequency.
        chart: Their chart.

    Raises:
        ValueError: If the components are something else; see :meth:`suits`.
    """

    name = "split or merge of neighbours"

    def __init__(self, layout: ThetaLayout, chart: PolarChart) -> None:
        if not self.suits(layout, chart):
            raise ValueError(
                "components must be an amplitude, a phase and the frequency that "
                f"orders them, got {layout} and {chart.kind!r} chart."
            )
        assert chart.frequency is not None
        self.layout, self.chart = layout, chart
        self.columns = chart.amplitude, chart.phase, chart.frequency
        self.log_range = math.log(_GAPS[1] / _GAPS[0])

    @staticmethod
    def suits(layout: ThetaLayout, chart: Chart) -> bool:
        """Whether components are oscillations at one frequency, ordered by it."""
        return (
            isinstance(chart, PolarChart)
            and chart.frequency == layout.order_by
            and layout.num_component_params == 3
            and chart.reference_time > 0
        )

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~sbi_slotflow.refinement.moves.Move`."""
        coin = torch.rand(len(theta), generator=generator) < 0.5
        new, log_ratio = theta.clone(), theta.new_zeros(len(theta)).double()
        for rows, move in ((coin, self._split), (~coin, self._merge)):
            new[rows], log_ratio[rows] = move(theta[rows], generator)
        return new, log_ratio

    def _split(
        self, theta: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        layout, num = self.layout, len(theta)
        parts = layout.unpack(theta.double())
        k = parts.cardinality
        possible = (k >= 1) & (k < layout.max_cardinality)
        uniform = torch.rand(num, 5, dtype=torch.float64, generator=generator)
        chosen = (uniform[:, 0] * k).long().clamp(max=layout.max_cardinality - 1)
        row = torch.arange(num)
        whole = self._phasors(parts.components[row, chosen])
        amplitude = self.chart.marginals[self.columns[0]].quantile(uniform[:, 1])
        first = torch.polar(amplitude, math.tau * uniform[:, 2])
        size = _GAPS[0] * (self.log_range * uniform[:, 3]).exp()
        sign = torch.where(uniform[:, 4] < 0.5, 1.0, -1.0)
        gap = sign * size / (2 * self.chart.reference_time)
        safe = torch.where(possible, whole.z, torch.ones_like(whole.z))
        frequency = whole.frequency - gap * (first / safe).real
        pair = (
            _Phasors(first, frequency + gap),
            _Phasors(whole.z - first, frequency),
        )
        components = parts.components.clone()
        last = k.clamp(max=layout.max_cardinality - 1)
        for place, part in zip((last, chosen), pair, strict=True):
            fresh = self._components(part)
            components[row, place] = torch.where(
                possible.unsqueeze(-1), fresh, components[row, place]
            )
        k_new = torch.where(possible, k + 1, k)
        rows = layout.canonical(layout.pack(k_new, components, parts.shared))
        log_ratio = self._log_ratio(safe, *pair)
        # A merge takes neighbours only.
        place = layout.unpack(rows).components[..., self.columns[2]]
        low, high = (
            op(pair[0].frequency, pair[1].frequency)
            for op in (torch.minimum, torch.maximum)
        )
        between = (place > low.unsqueeze(-1)) & (place < high.unsqueeze(-1))
        between &= torch.arange(layout.max_cardinality) < k_new.unsqueeze(-1)
        possible &= self._inside(pair) & ~between.any(-1)
        return rows.to(theta), torch.where(possible, log_ratio, -math.inf)

    def _merge(
        self, theta: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        layout, num = self.layout, len(theta)
        parts = layout.unpack(theta.double())
        k = parts.cardinality
        possible = k >= 2
        uniform = torch.rand(num, 2, dtype=torch.float64, generator=generator)
        left = (uniform[:, 0] * (k - 1).clamp(min=1)).long()
        left = left.clamp(max=layout.max_cardinality - 2)
        swap = uniform[:, 1] < 0.5
        row = torch.arange(num)
        ends = [self._phasors(parts.components[row, left + i]) for i in (0, 1)]
        pair = tuple(
            _Phasors(*(torch.where(swap, a, b) for a, b in zip(*order, strict=True)))
            for order in (ends, ends[::-1])
        )
        z = pair[0].z + pair[1].z
        z = torch.where(possible & (z.abs() > 0), z, torch.ones_like(z))
        gap = pair[0].frequency - pair[1].frequency
        whole = _Phasors(z, pair[1].frequency + gap * (pair[0].z / z).real)
        components = parts.components.clone()
        components[row, left] = torch.where(
            possible.unsqueeze(-1), self._components(whole), components[row, left]
        )
        # The last component takes the place of the other, as order does not matter.
        last = (k - 1).clamp(min=0)
        components[row, left + 1] = torch.where(
            possible.unsqueeze(-1), components[row, last], components[row, left + 1]
        )
        k_new = torch.where(possible, k - 1, k)
        rows = layout.canonical(layout.pack(k_new, components, parts.shared))
        log_ratio = -self._log_ratio(z, *pair)
        size = gap.abs() * 2 * self.chart.reference_time
        possible &= (size >= _GAPS[0]) & (size <= _GAPS[1]) & self._inside((whole,))
        return rows.to(theta), torch.where(possible, log_ratio, -math.inf)

    def _log_ratio(self, z: Tensor, first: _Phasors, second: _Phasors) -> Tensor:
        """Log ratio of the proposals of a split, without the target."""
        # g is a density of the plane, p(A) / (2 pi A).
        log_p = self.chart.marginals[self.columns[0]].log_density(first.z.abs())
        gap = (first.frequency - second.frequency).abs()
        log_h = -(2 * self.log_range * gap).log()
        areas = z.abs().log() - second.z.abs().log()
        return areas + math.log(math.tau) - log_p - log_h - math.log(2)

    def _phasors(self, components: Tensor) -> _Phasors:
        amplitude, phase, frequency = (components[..., d] for d in self.columns)
        psi = phase + math.tau * self.chart.reference_time * frequency
        return _Phasors(torch.polar(amplitude, psi), frequency)

    def _components(self, phasors: _Phasors) -> Tensor:
        turn = math.tau * self.chart.reference_time * phasors.frequency
        phase = torch.remainder(phasors.z.angle() - turn, math.tau)
        values = dict(
            zip(
                self.columns,
                (phasors.z.abs(), phase, phasors.frequency),
                strict=True,
            )
        )
        return torch.stack([values[d] for d in range(3)], -1)

    def _inside(self, phasors: tuple[_Phasors, ...]) -> Tensor:
        """Whether components lie in the prior's support."""
        inside = [self.chart.contains(self._components(p)) for p in phasors]
        return torch.stack(inside).all(0)
