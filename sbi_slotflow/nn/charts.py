r"""Charts: bijections between a component's parameters and what the flow sees.

A chart maps a component theta in the prior's support to coordinates u in R^F and gives
:math:`\log |\det \partial u / \partial \theta|`, so that a density of u is a density of
theta. The true charts (F = D) map the whole support onto R^D: whatever the flow draws
lies inside the support, and under the prior each coordinate is standard normal.
Arithmetic is float64 inside.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sets.layout import ThetaLayout
from ..sets.marginals import Marginal, clamp_to_support
from .registry import build, register

__all__ = ["Chart", "WhiteningChart", "chart_from_spec", "check_phase"]

_TWO_PI = 2 * math.pi


class Chart(ABC):
    """A bijection theta -> u between components and flow coordinates.

    Args:
        marginals: Prior marginals of the D parameters.

    Attributes:
        kind: Name under which the chart is saved.
        is_density: False where the image is a lower-dimensional surface, so that a
            density of u is none of theta.
        phase: Index of a parameter that is an angle, None if there is none.
        frequency: Index of the parameter with which the phase turns, if any.
        reference_time: Time to which the phase is referred.
    """

    kind: ClassVar[str]
    is_density: ClassVar[bool] = True
    phase: Any = None
    frequency: int | None = None
    reference_time: float = 0.0

    def __init__(self, marginals: Sequence[Marginal]) -> None:
        self.marginals = tuple(marginals)

    @property
    def num_features(self) -> int:
        """Number F of flow coordinates."""
        return len(self.marginals)

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`chart_from_spec` rebuilds the chart."""
        return {
            "kind": self.kind,
            "marginals": [asdict(m) for m in self.marginals],
            **self._options(),
        }

    @abstractmethod
    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates.

        Args:
            components: Shape ``(..., D)``, inside the support.

        Returns:
            Coordinates ``(..., F)`` and log-Jacobians ``(...)`` in the dtype of
            ``components``; a chart that is no density has a log-Jacobian of zero.
        """

    @abstractmethod
    def inverse(self, u: Tensor) -> Tensor:
        """Map coordinates ``(..., F)`` to components ``(..., D)`` in the support."""

    def some_point(self, like: Tensor) -> Tensor:
        """A component in the middle of the support, shape ``(D,)``."""
        return self.inverse(like.new_full((self.num_features,), 0.1))

    def contains(self, components: Tensor) -> Tensor:
        """Tell which components ``(..., D)`` lie within the bounds, shape ``(...)``."""
        low = components.new_tensor([m.bounds[0] for m in self.marginals])
        high = components.new_tensor([m.bounds[1] for m in self.marginals])
        return ((components >= low) & (components <= high)).all(-1)

    def extra_moves(self, layout: ThetaLayout) -> list[Any]:
        """Moves between sets that these components allow; none by default."""
        return []

    def _options(self) -> dict[str, Any]:
        return {}


@register("chart")
class WhiteningChart(Chart):
    r"""Each parameter on its own, :math:`u_d = \Phi^{-1}(F_d(\theta_d))`."""

    kind = "whitening"

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; see :meth:`Chart.forward`."""
        values = components.double().unbind(-1)
        pairs = [m.to_normal(v) for m, v in zip(self.marginals, values, strict=True)]
        u = torch.stack([p[0] for p in pairs], dim=-1)
        log_det = torch.stack([p[1] for p in pairs], dim=-1).sum(-1)
        return u.to(components.dtype), log_det.to(components.dtype)

    def inverse(self, u: Tensor) -> Tensor:
        """Map coordinates to components; see :meth:`Chart.inverse`."""
        columns = u.double().unbind(-1)
        values = [
            m.from_normal(c) for m, c in zip(self.marginals, columns, strict=True)
        ]
        return clamp_to_support(torch.stack(values, -1).to(u.dtype), self.marginals)


def chart_from_spec(spec: dict[str, Any]) -> Chart:
    """Rebuild a chart from :attr:`Chart.spec`.

    Raises:
        ValueError: If the kind is unknown.
    """
    marginals = [Marginal(**m) for m in spec["marginals"]]
    return build("chart", {**spec, "marginals": marginals})


def check_phase(marginal: Marginal) -> None:
    """Raise ValueError unless a marginal is uniform on a whole turn."""
    low, high = marginal.bounds
    if marginal.family != "uniform" or abs(low) > 1e-6 or abs(high - _TWO_PI) > 1e-5:
        raise ValueError(
            "the phase must be uniform on [0, 2 pi), got "
            f"{marginal.family}({marginal.a:g}, {marginal.b:g})."
        )
