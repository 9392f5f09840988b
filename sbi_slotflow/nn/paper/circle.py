"""The paper's coordinates of a component, on a circle."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...sets.marginals import Marginal
from ..charts import Chart, check_angle
from ..spec import register

__all__ = ["CircleChart"]


_TWO_PI = 2 * math.pi


@register("chart")
class CircleChart(Chart):
    r"""The paper's coordinates on a circle.

    .. math::
        u = [A,\; w_\phi \cos\phi,\; w_\phi \sin\phi,\; w_f (f - f_0)]

    This is eq. 22 of the paper, with f_0 the middle of the band. A three-parameter
    component lies on a surface in R^4, so the flow's likelihood is unbounded above and
    is no density of (A, phi, f): :attr:`is_density` is False.

    Args:
        marginals: Prior marginals of amplitude, phase and frequency, in this order.
        phase_weight: Weight w_phi.
        frequency_weight: Weight w_f.

    Raises:
        ValueError: If there are not three parameters or the second is no phase.
    """

    kind = "circle"
    is_density = False

    def __init__(
        self,
        marginals: Sequence[Marginal],
        phase_weight: float = 2.0,
        frequency_weight: float = 3.0,
    ) -> None:
        super().__init__(marginals)
        if len(self.marginals) != 3:
            raise ValueError(
                "CircleChart needs the three parameters (amplitude, phase, frequency), "
                f"got {len(self.marginals)}."
            )
        check_angle(self.marginals[1])
        self.phase_weight, self.frequency_weight = phase_weight, frequency_weight
        low, high = self.marginals[2].bounds
        self.centre = 0.5 * (low + high)

    @property
    def num_features(self) -> int:
        """Four coordinates."""
        return 4

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; the log-Jacobian is reported as zero."""
        amplitude, phase, frequency = components.unbind(-1)
        u = torch.stack(
            [
                amplitude,
                self.phase_weight * phase.cos(),
                self.phase_weight * phase.sin(),
                self.frequency_weight * (frequency - self.centre),
            ],
            dim=-1,
        )
        return u, torch.zeros_like(amplitude)

    def inverse(self, u: Tensor) -> Tensor:
        """Project onto the surface: the radius of the phase's point is dropped."""
        amplitude, x, y, frequency = u.unbind(-1)
        frequency = frequency / self.frequency_weight + self.centre
        phase = torch.atan2(y, x) % _TWO_PI
        values = torch.stack([amplitude, phase, frequency], -1)
        return self.marginals.clamp(values)

    def _options(self) -> dict[str, Any]:
        return {
            "phase_weight": self.phase_weight,
            "frequency_weight": self.frequency_weight,
        }
