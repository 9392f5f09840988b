"""Amplitude and phase of an oscillation as a point in the plane."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nn.charts import Chart, check_phase
from ...nn.registry import register
from ...sets.layout import ThetaLayout
from ...sets.marginals import Marginal, clamp_to_support

__all__ = ["PolarChart"]


_TWO_PI = 2 * math.pi


@register("chart")
class PolarChart(Chart):
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
    phase: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        marginals: Sequence[Marginal],
        amplitude: int = 0,
        phase: int = 1,
        frequency: int | None = None,
        reference_time: float = 0.0,
    ) -> None:
        super().__init__(marginals)
        check_phase(self.marginals[phase])
        if self.marginals[amplitude].family == "normal":
            raise ValueError("PolarChart needs an amplitude with a bounded prior.")
        self.amplitude, self.phase, self.frequency = amplitude, phase, frequency
        self.reference_time = reference_time
        self._others = [
            d for d in range(len(self.marginals)) if d not in (amplitude, phase)
        ]

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; see :meth:`Chart.forward`."""
        values = list(components.double().unbind(-1))
        marginal = self.marginals[self.amplitude]
        survival = 1 - marginal.fraction(values[self.amplitude])
        half_r2 = -survival.clamp(min=1e-16).log()
        r = (2 * half_r2).sqrt()
        psi = values[self.phase] + self._shear(values)
        log_det = marginal.log_density(values[self.amplitude]) + half_r2
        u = list(values)
        u[self.amplitude], u[self.phase] = r * psi.cos(), r * psi.sin()
        for d in self._others:
            u[d], term = self.marginals[d].to_normal(values[d])
            log_det = log_det + term
        return torch.stack(u, -1).to(components.dtype), log_det.to(components.dtype)

    def inverse(self, u: Tensor) -> Tensor:
        """Map coordinates to components; see :meth:`Chart.inverse`."""
        values = list(u.double().unbind(-1))
        x, y = values[self.amplitude], values[self.phase]
        for d in self._others:
            values[d] = self.marginals[d].from_normal(values[d])
        fraction = -torch.expm1(-0.5 * (x.square() + y.square()))
        values[self.amplitude] = self.marginals[self.amplitude].quantile(fraction)
        values[self.phase] = (torch.atan2(y, x) - self._shear(values)) % _TWO_PI
        return clamp_to_support(torch.stack(values, -1).to(u.dtype), self.marginals)

    def extra_moves(self, layout: ThetaLayout) -> list[Any]:
        """Splits of one oscillation and merges of two, where they are ordered so."""
        from .splits import SplitMove

        # Three in a sweep: they are what changes K most often.
        return 3 * [SplitMove(layout, self)] if SplitMove.suits(layout, self) else []

    def _shear(self, values: list[Tensor]) -> Tensor | float:
        if self.frequency is None:
            return 0.0
        return _TWO_PI * self.reference_time * values[self.frequency]

    def _options(self) -> dict[str, Any]:
        return {
            "amplitude": self.amplitude,
            "phase": self.phase,
            "frequency": self.frequency,
            "reference_time": self.reference_time,
        }
