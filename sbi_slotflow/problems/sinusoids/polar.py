r"""Oscillations: amplitude and phase as a point in the plane; splits and merges.

With phases referred to the middle of a record of length T an oscillation is a phasor
:math:`z = A e^{i\psi}` at a frequency f. Two that are closer than a resolution element
look like one. With :math:`r = z_1 / (z_1 + z_2)` that is

.. math::
    f = f_2 + (f_1 - f_2) \operatorname{Re} r, \qquad
    z = \sum_i z_i\, s_i, \quad
    s_i = \frac{\sin \pi T (f_i - f)}{\pi T (f_i - f)}

A split draws :math:`r z` from the prior of a component and the gap f_1 - f_2 from a
log-uniform law of either sign, and solves for the rest; a merge takes two neighbours in
frequency, with a probability m that falls as the square of their gap. The Jacobian from
(r z, z) to (z_1, z_2) is :math:`|D|^{-4}` with :math:`D = r s_1 + (1 - r) s_2`, that of
the frequencies one. The ratio of a split of one of K, for densities of sets, is

.. math::
    \frac{\pi(\theta')}{\pi(\theta)}\, \frac{A}{A_1 A_2}\,
    \frac{K\, m(\theta')}{2\, |D|^4\, g(r z)\, h(f_1 - f_2)}

with one half for the order of the two that are merged.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...nn.charts import StepChart, check_angle
from ...nn.spec import register
from ...sets.layout import ThetaLayout
from ...sets.marginals import ExponentialScore, Marginal, Marginals
from ...sets.transforms import (
    Affine,
    Columns,
    Compose,
    Polar,
    Shear,
)

__all__ = ["PolarChart", "SplitMove"]


_TWO_PI = 2 * math.pi


@register("chart")
class PolarChart(StepChart):
    r"""Amplitude and phase as a point in the plane, the rest whitened.

    .. math::
        r = \sqrt{-2 \log(1 - F_A(A))}, \quad
        (u_A, u_\phi) = r\,(\cos\psi, \sin\psi), \quad
        \psi = \phi + 2\pi f t_0

    With A drawn from its prior and phi uniform this is the Box-Muller transform: u is
    standard normal, the phase has no seam, and the amplitude's bounds lie at r = 0 and
    r = infinity. Referring the phase to a time t_0 inside the record takes out most of
    its correlation with frequency; the shear has unit Jacobian. So
    :math:`\log|\det| = \log p_A(A) + r^2/2 + \ldots` (the rest as in
    :class:`WhiteningChart`).

    Args:
        marginals: Prior marginals of the D parameters.
        amplitude: Index of the amplitude.
        phase: Index of the phase, whose prior must be uniform on [0, 2 pi).
        frequency: Index of the frequency, or None if there is none.
        reference_time: Time t_0 to which the phase is referred, in seconds.

    Raises:
        ValueError: If the phase's marginal is not uniform on a whole turn, or the
            amplitude's is unbounded.
    """

    kind = "polar"

    def __init__(
        self,
        marginals: Sequence[Marginal],
        amplitude: int = 0,
        phase: int = 1,
        frequency: int | None = None,
        reference_time: float = 0.0,
    ) -> None:
        check_angle(marginals[phase])
        low, _ = marginals[amplitude].bounds
        if not math.isfinite(low):
            raise ValueError(
                "PolarChart needs an amplitude with a bounded prior, got "
                f"{marginals[amplitude]}."
            )
        self.amplitude, self.phase, self.frequency = amplitude, phase, frequency
        self.reference_time = reference_time
        periods = list(Marginals(marginals).periods)
        periods[phase] = _TWO_PI
        scores = [marginal.score for marginal in marginals]
        scores[amplitude] = ExponentialScore(marginals[amplitude])
        scores[phase] = Affine()
        # Without a frequency the phase is only brought back to its turn.
        by, rate = (0, 0.0) if frequency is None else (frequency, reference_time)
        shear = Shear(phase, by, _TWO_PI * rate, _TWO_PI)
        self.shears = (shear,)
        steps = [shear, Columns(scores), Polar(amplitude, phase)]
        super().__init__(Marginals(marginals, periods), Compose(steps))

    def extra_moves(self, layout: ThetaLayout) -> list[Any]:
        """Splits of one oscillation and merges of two, where they are ordered so."""
        # Three in a sweep: they are what changes K most often.
        return 3 * [SplitMove(layout, self)] if SplitMove.suits(layout, self) else []

    def _options(self) -> dict[str, Any]:
        return {
            "amplitude": self.amplitude,
            "phase": self.phase,
            "frequency": self.frequency,
            "reference_time": self.reference_time,
        }


# Least and largest gap in units of the resolution, 1 / (2 reference_time).
_GAPS = 0.001, 2.0


class _Phasors(NamedTuple):
    """Components as phasors ``(N,)`` at frequencies ``(N,)``."""

    z: Tensor
    frequency: Tensor


class SplitMove:
    """Splits one oscillation or merges two, see the module.

    Raises:
        ValueError: If the components are something else; see :meth:`suits`.
    """

    name = "split or merge of neighbours"

    def __init__(self, layout: ThetaLayout, chart: PolarChart) -> None:
        if not self.suits(layout, chart):
            raise ValueError(
                "components must be an amplitude, a phase and the frequency that "
                f"orders them, two at least, got {layout} and {chart.kind!r} chart."
            )
        assert chart.frequency is not None
        self.layout, self.chart = layout, chart
        self.columns = chart.amplitude, chart.phase, chart.frequency
        self.duration = 2 * chart.reference_time
        self.log_range = math.log(_GAPS[1] / _GAPS[0])

    @staticmethod
    def suits(layout: ThetaLayout, chart: PolarChart) -> bool:
        """Whether components are oscillations, ordered by frequency, two or more."""
        return (
            layout.max_cardinality > 1
            and chart.frequency == layout.order_by
            and layout.num_component_params == 3
            and chart.reference_time > 0
        )

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """As every ``Move``: new rows, and the log ratio of proposals."""
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
        drawn = torch.polar(amplitude, math.tau * uniform[:, 2])
        size = _GAPS[0] * (self.log_range * uniform[:, 3]).exp()
        sign = torch.where(uniform[:, 4] < 0.5, 1.0, -1.0)
        gap = sign * size / self.duration
        whole = whole._replace(z=torch.where(possible, whole.z, 1.0))
        pair = self._parts(whole, drawn, gap)
        components = parts.components.clone()
        last = k.clamp(max=layout.max_cardinality - 1)
        for place, part in zip((last, chosen), pair, strict=True):
            components[row, place] = self._components(part)
        components = torch.where(possible[:, None, None], components, parts.components)
        k_new = torch.where(possible, k + 1, k)
        rows = layout.canonical(layout.pack(k_new, components, parts.shared))
        low = torch.minimum(pair[0].frequency, pair[1].frequency)
        place = layout.unpack(rows).components[..., self.columns[2]]
        left = (place < low.unsqueeze(-1)) & layout.mask(k_new)
        left = left.sum(-1).clamp(max=layout.max_cardinality - 2)
        gaps = self._gaps(rows)
        # A merge takes neighbours only.
        error = (gaps[row, left] - gap.abs()).abs()
        alone = error <= 1e-9 * gap.abs() + 1e-15 * low.abs()
        possible &= self._inside(pair) & alone
        log_choice = _log_choice(gaps)[row, left] + k.clamp(min=1).double().log()
        log_ratio = self._log_ratio(whole.z, *pair) + log_choice
        return rows.to(theta), torch.where(possible, log_ratio, -math.inf)

    def _merge(
        self, theta: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        layout, num = self.layout, len(theta)
        parts = layout.unpack(theta.double())
        k = parts.cardinality
        possible = k >= 2
        log_choice = _log_choice(self._gaps(theta))
        chances = torch.where(possible.unsqueeze(-1), log_choice.exp(), 1.0)
        left = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        swap = torch.rand(num, generator=generator) < 0.5
        row = torch.arange(num)
        ends = [self._phasors(parts.components[row, left + i]) for i in (0, 1)]
        pair = tuple(
            _Phasors(*(torch.where(swap, a, b) for a, b in zip(*order, strict=True)))
            for order in (ends, ends[::-1])
        )
        total = pair[0].z + pair[1].z
        total = torch.where(possible & (total.abs() > 0), total, 1.0)
        gap = pair[0].frequency - pair[1].frequency
        ratio = pair[0].z / total
        whole = _Phasors(
            total * self._response(ratio, gap), pair[1].frequency + gap * ratio.real
        )
        components = parts.components.clone()
        components[row, left] = self._components(whole)
        # The last component takes the place of the other, as order does not matter.
        components[row, left + 1] = components[row, (k - 1).clamp(min=0)]
        components = torch.where(possible[:, None, None], components, parts.components)
        k_new = torch.where(possible, k - 1, k)
        rows = layout.canonical(layout.pack(k_new, components, parts.shared))
        log_ways = log_choice[row, left] + k_new.clamp(min=1).double().log()
        log_ratio = -self._log_ratio(whole.z, *pair) - log_ways
        size = gap.abs() * self.duration
        possible &= (size >= _GAPS[0]) & (size <= _GAPS[1]) & self._inside((whole,))
        low, high = self.chart.marginals[self.columns[0]].bounds
        drawn = (ratio * whole.z).abs()
        possible &= (drawn >= low) & (drawn <= high)  # else no split leads back
        return rows.to(theta), torch.where(possible, log_ratio, -math.inf)

    def _log_ratio(self, z: Tensor, first: _Phasors, second: _Phasors) -> Tensor:
        """Log ratio of a split's proposals, without the target, K and m."""
        gap = first.frequency - second.frequency
        ratio = first.z / (first.z + second.z)
        response = self._response(ratio, gap).abs().log()
        # g is a density of the plane, p(A) / (2 pi A).
        drawn = (ratio * z).abs()
        log_g = self.chart.marginals[self.columns[0]].log_density(drawn)
        log_g = log_g - math.log(math.tau) - drawn.log()
        log_h = -(2 * self.log_range * gap.abs()).log()
        areas = z.abs().log() - first.z.abs().log() - second.z.abs().log()
        return areas - 4 * response - log_g - log_h - math.log(2)

    def _parts(
        self, whole: _Phasors, drawn: Tensor, gap: Tensor
    ) -> tuple[_Phasors, _Phasors]:
        """The two of a whole, given r z and their gap."""
        ratio = drawn / whole.z
        total = whole.z / self._response(ratio, gap)
        frequency = whole.frequency - gap * ratio.real
        first = _Phasors(ratio * total, frequency + gap)
        return first, _Phasors(total - first.z, frequency)

    def _response(self, ratio: Tensor, gap: Tensor) -> Tensor:
        """D, by which the whole is weaker than the sum."""
        first = torch.sinc((1 - ratio.real) * gap * self.duration)
        second = torch.sinc(ratio.real * gap * self.duration)
        return ratio * first + (1 - ratio) * second

    def _gaps(self, theta: Tensor) -> Tensor:
        """Gaps between neighbours ``(N, Kmax - 1)``, infinite where there are none."""
        parts = self.layout.unpack(theta.double())
        place = parts.components[..., self.columns[2]]
        gaps = place[:, 1:] - place[:, :-1]
        return torch.where(parts.mask[:, 1:], gaps, math.inf)

    def _phasors(self, components: Tensor) -> _Phasors:
        amplitude, phase, frequency = (components[..., d] for d in self.columns)
        psi = phase + math.tau * self.chart.reference_time * frequency
        return _Phasors(torch.polar(amplitude, psi), frequency)

    def _components(self, phasors: _Phasors) -> Tensor:
        turn = math.tau * self.chart.reference_time * phasors.frequency
        phase = torch.remainder(phasors.z.angle() - turn, math.tau)
        values = phasors.z.abs(), phase, phasors.frequency
        return torch.stack([values[self.columns.index(d)] for d in range(3)], -1)

    def _inside(self, phasors: tuple[_Phasors, ...]) -> Tensor:
        """Whether components lie in the prior's support."""
        inside = [self.chart.contains(self._components(p)) for p in phasors]
        return torch.stack(inside).all(0)


def _log_choice(gaps: Tensor) -> Tensor:
    """Log probabilities with which a merge takes one of the gaps."""
    least = torch.finfo(gaps.dtype).tiny  # of two at one place, in any unit
    return (-2 * gaps.clamp(min=least).log()).log_softmax(-1)
