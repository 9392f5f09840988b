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

from ..marginals import Marginal, clamp_to_support

__all__ = ["Chart", "CircleChart", "PolarChart", "WhiteningChart", "chart_from_spec"]

_TWO_PI = 2 * math.pi


class Chart(ABC):
    """A bijection theta -> u between components and flow coordinates.

    Args:
        marginals: Prior marginals of the D parameters.

    Attributes:
        kind: Name under which the chart is saved.
        is_density: False where the image is a lower-dimensional surface, so that a
            density of u is none of theta.
    """

    kind: ClassVar[str]
    is_density: ClassVar[bool] = True

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

    def _options(self) -> dict[str, Any]:
        return {}


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

    def __init__(
        self,
        marginals: Sequence[Marginal],
        amplitude: int = 0,
        phase: int = 1,
        frequency: int | None = None,
        reference_time: float = 0.0,
    ) -> None:
        super().__init__(marginals)
        _check_phase(self.marginals[phase])
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
        _check_phase(self.marginals[1])
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
        return clamp_to_support(values, self.marginals)

    def _options(self) -> dict[str, Any]:
        return {
            "phase_weight": self.phase_weight,
            "frequency_weight": self.frequency_weight,
        }


_CHARTS = {chart.kind: chart for chart in (WhiteningChart, PolarChart, CircleChart)}


def chart_from_spec(spec: dict[str, Any]) -> Chart:
    """Rebuild a chart from :attr:`Chart.spec`.

    Raises:
        ValueError: If the kind is unknown.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in _CHARTS:
        raise ValueError(f"chart kind must be one of {sorted(_CHARTS)}, got {kind!r}.")
    marginals = [Marginal(**m) for m in options.pop("marginals")]
    return _CHARTS[kind](marginals, **options)


def _check_phase(marginal: Marginal) -> None:
    low, high = marginal.bounds
    if marginal.family != "uniform" or abs(low) > 1e-6 or abs(high - _TWO_PI) > 1e-5:
        raise ValueError(
            "the phase must be uniform on [0, 2 pi), got "
            f"{marginal.family}({marginal.a:g}, {marginal.b:g})."
        )
