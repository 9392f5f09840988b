r"""Charts: bijections between a component's parameters and what the flow sees.

A chart maps a component theta in the prior's support to coordinates u in R^F and gives
:math:`\log |\det \partial u / \partial \theta|`, so that a density of u is a density of
theta. The true charts (F = D) map the whole support onto R^D: whatever the flow draws
lies inside the support, and under the prior each coordinate is standard normal where
its distribution function is known, and about so elsewhere
(:mod:`~sbi_slotflow.sets.marginals`). Arithmetic is float64 inside.

A circular parameter that has no cells to be unwrapped in is whitened like any other:
the density is right, and its seam lies in both tails.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..sets.layout import ThetaLayout
from ..sets.marginals import ExponentialScore, Marginal, Marginals
from ..sets.transforms import Affine, Columns, Compose, Polar, Shear, Transform
from .spec import build, register

__all__ = [
    "Chart",
    "DiscChart",
    "StepChart",
    "WhiteningChart",
    "chart_from_spec",
    "check_angle",
]

_TWO_PI = 2 * math.pi


class Chart(ABC):
    """A bijection theta -> u between components and flow coordinates.

    Args:
        marginals: Prior marginals of the D parameters.

    Attributes:
        kind: Name under which the chart is saved.
        is_density: False where the image is a lower-dimensional surface, so that a
            density of u is none of theta.
        shears: Circular parameters that turn with another one, each as a step
            ``Shear(column, by, rate, period)`` after which they do so no more.
        discs: Pairs of a parameter and an angle that are a point of a disc; see
            :class:`DiscChart`.
    """

    kind: ClassVar[str]
    is_density: ClassVar[bool] = True
    shears: Sequence[Shear] = ()
    discs: Sequence[tuple[int, int]] = ()

    def __init__(self, marginals: Sequence[Marginal]) -> None:
        self.marginals = Marginals.of(marginals)

    @property
    def num_features(self) -> int:
        """Number F of flow coordinates."""
        return len(self.marginals)

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`chart_from_spec` rebuilds the chart."""
        return {"kind": self.kind, **self.marginals.spec, **self._options()}

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
        return self.marginals.contains(components)

    def extra_moves(self, layout: ThetaLayout) -> list[Any]:
        """Moves between sets that these components allow; none by default."""
        return []

    def _options(self) -> dict[str, Any]:
        return {}


class StepChart(Chart):
    """A chart made of invertible steps.

    Args:
        marginals: Prior marginals of the D parameters.
        steps: The map, on vectors ``(..., D)``.
    """

    def __init__(self, marginals: Sequence[Marginal], steps: Transform) -> None:
        super().__init__(marginals)
        self.steps = steps

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; see :meth:`Chart.forward`."""
        u, log_det = self.steps.forward(components.double())
        return u.to(components.dtype), log_det.to(components.dtype)

    def inverse(self, u: Tensor) -> Tensor:
        """Map coordinates to components; see :meth:`Chart.inverse`."""
        return self.marginals.clamp(self.steps.inverse(u.double()).to(u.dtype))


@register("chart")
class WhiteningChart(StepChart):
    r"""Each parameter on its own, :math:`u_d = \Phi^{-1}(F_d(\theta_d))`.

    Parameters that depend on each other are decorrelated besides.

    Args:
        marginals: Prior marginals of the D parameters.
    """

    kind = "whitening"

    def __init__(self, marginals: Sequence[Marginal]) -> None:
        marginals = Marginals.of(marginals)
        super().__init__(marginals, marginals)


@register("chart")
class DiscChart(StepChart):
    r"""A parameter and an angle as a point of a disc, the rest whitened.

    An angle :math:`\omega` that means less the nearer a parameter e is to its lower
    bound (where an ellipse points, and how long it is) has no Gaussian posterior there,
    while the point

    .. math::
        \sqrt{-2 \log(1 - F_e(e))}\, (\cos\omega, \sin\omega)

    has nearly one; under the prior it is standard normal. A phase M that is known
    together with the angle only is replaced by :math:`M + \omega`.

    Args:
        marginals: Prior marginals of the D parameters.
        radius: Index of e.
        angle: Index of omega, whose prior must be uniform on [0, 2 pi).
        phase: Index of M, likewise; None for none.

    Raises:
        ValueError: If an angle is not uniform on a whole turn, or e has no lower bound.
    """

    kind = "disc"

    def __init__(
        self,
        marginals: Sequence[Marginal],
        radius: int,
        angle: int,
        phase: int | None = None,
    ) -> None:
        for index in (angle,) if phase is None else (angle, phase):
            check_angle(marginals[index])
        if not math.isfinite(marginals[radius].bounds[0]):
            raise ValueError(
                f"DiscChart needs a radius with a lower bound, got {marginals[radius]}."
            )
        self.radius, self.angle, self.phase = radius, angle, phase
        self.discs = ((radius, angle),)
        periods = list(Marginals(marginals).periods)
        scores = [marginal.score for marginal in marginals]
        scores[radius] = ExponentialScore(marginals[radius])
        scores[angle], periods[angle] = Affine(), _TWO_PI
        steps: list[Transform] = [Shear(angle, angle, 0.0, _TWO_PI)]
        if phase is not None:
            self.shears = (Shear(phase, angle, 1.0, _TWO_PI),)
            periods[phase] = _TWO_PI
        steps += [*self.shears, Columns(scores), Polar(radius, angle)]
        super().__init__(Marginals(marginals, periods), Compose(steps))

    def _options(self) -> dict[str, Any]:
        return {"radius": self.radius, "angle": self.angle, "phase": self.phase}


def chart_from_spec(spec: Mapping[str, Any]) -> Chart:
    """Rebuild a chart from :attr:`Chart.spec`.

    Raises:
        ValueError: If the kind is unknown.
    """
    if "charts" in spec:  # of several classes
        return build("chart", spec)
    known = {"marginals", "periods", "whitening"}
    options = {key: value for key, value in spec.items() if key not in known}
    return build("chart", {**options, "marginals": Marginals.from_spec(spec)})


def check_angle(marginal: Marginal) -> None:
    """Raise ValueError unless a marginal is uniform on a whole turn."""
    low, high = marginal.bounds
    if not marginal.is_uniform or abs(low) > 1e-6 or abs(high - _TWO_PI) > 1e-5:
        raise ValueError(
            "an angle must be uniform on [0, 2 pi), got "
            f"{marginal} on [{low:g}, {high:g}]."
        )
