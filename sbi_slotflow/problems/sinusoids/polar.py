"""Amplitude and phase of an oscillation as a point in the plane."""

import math
from collections.abc import Sequence
from typing import Any

from ...nn.charts import StepChart, check_angle
from ...nn.registry import register
from ...sets.layout import ThetaLayout
from ...sets.marginals import ExponentialScore, Marginal, Marginals
from ...sets.transforms import (
    Affine,
    Columns,
    Compose,
    Polar,
    Shear,
)

__all__ = ["PolarChart"]


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
        from .splits import SplitMove

        # Three in a sweep: they are what changes K most often.
        return 3 * [SplitMove(layout, self)] if SplitMove.suits(layout, self) else []

    def _options(self) -> dict[str, Any]:
        return {
            "amplitude": self.amplitude,
            "phase": self.phase,
            "frequency": self.frequency,
            "reference_time": self.reference_time,
        }
