r"""The map of each parameter to a standard normal variable, built from its prior.

.. math::
    u = \Phi^{-1}(F(\theta)), \qquad
    \log \left| \frac{\mathrm{d} u}{\mathrm{d} \theta} \right|
    = \log p(\theta) - \log \varphi(u)

with F the distribution function of the parameter. Whatever u is, theta lies inside the
prior's support. A prior gives each of its parameters a :class:`Marginal`:

- uniform, log-uniform, normal and half-normal ones in closed form;
- :class:`ScoredMarginal` of those of torch that have ``cdf`` and ``icdf``;
- :class:`FittedMarginal` elsewhere: a logarithm or a logit takes the support to the
  real line, and a shift and a scale, from 10,000 draws of a fixed seed, make it about
  standard. Its F is the law of which that makes a normal variable.

Parameters that depend on each other get a marginal each, and are then decorrelated by
a triangular matrix from the same draws (:class:`Marginals`).

Example:
    >>> from torch.distributions import Exponential
    >>> (marginal,) = marginals_of(Exponential(torch.ones(1)))
    >>> marginal.bounds
    (0.0, inf)
    >>> round(float(marginal.quantile(torch.tensor(0.5))), 4)
    0.6931
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, overload

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    ExpTransform,
    HalfNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)

from ..seeding import forked_rng, generator_for
from .described import describe_distribution, distribution_from
from .support import bounds_of, column_log_density, flattened
from .transforms import (
    Affine,
    Columns,
    Compose,
    Identity,
    Logarithm,
    Logit,
    LowerTriangular,
    NormalScore,
    StraightTails,
    Transform,
    log_normal,
)

__all__ = [
    "FittedMarginal",
    "HalfNormalMarginal",
    "LogUniformMarginal",
    "Marginal",
    "Marginals",
    "NormalMarginal",
    "ScoredMarginal",
    "UniformMarginal",
    "in_double",
    "marginal_from_spec",
    "marginals_of",
]

_EDGE = 1e-15
_NUM_DRAWS = 10_000
# Shares of a normal variable below -1, 0 and 1.
_SHARES = (0.15865525393145707, 0.5, 0.8413447460685429)
# Normal scores beyond which an F in double precision has too few digits left.
_FARTHEST_SCORE = 5.0
# Standard deviations within which a fit looks for an unbounded parameter, and those
# that the natural coordinate of one with a single bound covers.
_FARTHEST, _REACH = 6.0, 4.0
# How far beyond [-1, 1] a fit looks for a bounded one, and for one with heavy tails.
_BEYOND, _MOST_REACH = 1.1, 1e5
# Fraction of an unbounded prior outside which positions are not followed.
_INSIDE = 1e-9
# Share of independent variance below which parameters lie on a surface.
_LEAST_VARIANCE = 1e-10


class Marginal(ABC):
    """One parameter's prior marginal, and its map to a standard normal variable.

    Attributes:
        family: Name for messages: ``"uniform"``, or of the distribution's class.
        is_uniform: Whether the density is the same all over a bounded interval.
    """

    family: str
    is_uniform: ClassVar[bool] = False

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the support."""

    @abstractmethod
    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function F, within [0, 1] for values inside the support."""

    @abstractmethod
    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""

    @abstractmethod
    def log_density(self, value: Tensor) -> Tensor:
        """Log derivative of :meth:`fraction`, for values inside the support."""

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`marginal_from_spec` rebuilds the marginal."""

    @cached_property
    def score(self) -> Transform:
        """The step to a standard normal variable."""
        return NormalScore(self)

    def to_normal(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Map a parameter to a standard normal variable.

        Args:
            value: Parameter values (float64), any shape.

        Returns:
            ``u`` and ``log |du/dvalue|``, both of the shape of ``value``.
        """
        return self.score.forward(value)

    def from_normal(self, u: Tensor) -> Tensor:
        """Inverse of the map of :meth:`to_normal`."""
        return self.score.inverse(u)

    def continued_quantile(self, fraction: Tensor) -> Tensor:
        """The quantile, of the nearest fraction that has one.

        A uniform marginal goes on beyond its bounds instead, so that a fit may end
        there.
        """
        return self.quantile(fraction.clamp(_INSIDE, 1 - _INSIDE))

    @cached_property
    def natural_scale(self) -> tuple[float, float]:
        """Middle and half width of a coordinate in which a likelihood is natural.

        A bounded parameter covers [-1, 1] in it, one with a single bound does so with
        four deviations, and any other has unit width.
        """
        low, high = self.bounds
        shares = torch.tensor([*_SHARES, _SHARES[2] - _SHARES[0]]).double()
        below, middle, above, inner = self.quantile(shares).tolist()
        if not math.isfinite(low) and not math.isfinite(high):
            return middle, 0.5 * (above - below)
        if not math.isfinite(high):
            high = low + _REACH * (inner - low)
        elif not math.isfinite(low):
            outer = float(self.quantile(1 - shares[-1]))
            low = high - _REACH * (high - outer)
        return 0.5 * (low + high), 0.5 * (high - low)

    @cached_property
    def reach(self) -> float:
        """Largest absolute natural coordinate at which a fit may end."""
        middle, half = self.natural_scale
        score = torch.tensor([-_FARTHEST, _FARTHEST]).double()
        ends = (self.from_normal(score) - middle) / half
        open_ends = [not math.isfinite(bound) for bound in self.bounds]
        far = [
            abs(end)
            for end, is_open in zip(ends.tolist(), open_ends, strict=True)
            if is_open
        ]
        return min(max([_BEYOND, *far]), _MOST_REACH)

    @cached_property
    def core(self) -> tuple[float, float]:
        """Interval on which the log density and its slope are finite.

        All but 0.2 % of the prior, as densities may vanish or diverge at a bound.
        """
        low, high = self.quantile(torch.tensor([1e-3, 1 - 1e-3]).double()).tolist()
        return low, high

    @abstractmethod
    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Least and largest number of a precision that surely has a density.

        Torch compares values with bounds after maps of its own, which round; the
        numbers may lie a few roundings off the bounds.
        """


@dataclass(frozen=True)
class _ClosedMarginal(Marginal):
    """A family with two numbers.

    Attributes:
        a: Lower bound, or mean of a normal.
        b: Upper bound, or standard deviation.
    """

    a: float
    b: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the support."""
        return self.a, self.b

    @property
    def core(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All of the support."""
        return self.bounds

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`marginal_from_spec` rebuilds the marginal."""
        return {"family": self.family, **asdict(self)}


@dataclass(frozen=True)
class UniformMarginal(_ClosedMarginal):
    """Uniform between a and b."""

    family: ClassVar[str] = "uniform"  # pyright: ignore
    is_uniform: ClassVar[bool] = True

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        return ((value - self.a) / (self.b - self.a)).clamp(0.0, 1.0)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self.a + fraction * (self.b - self.a)

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        return torch.full_like(value, -math.log(self.b - self.a))

    def continued_quantile(self, fraction: Tensor) -> Tensor:
        """The quantile, beyond the bounds too."""
        return self.quantile(fraction)

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :meth:`Marginal.inside`; torch's density is zero at b."""
        low, high = (torch.tensor(end, dtype=dtype) for end in self.bounds)
        up = torch.nextafter(low, torch.full_like(low, math.inf))
        down = torch.nextafter(high, torch.full_like(high, -math.inf))
        return up if low.double() < self.a else low, down


@dataclass(frozen=True)
class LogUniformMarginal(_ClosedMarginal):
    """With a logarithm that is uniform between log a and log b."""

    family: ClassVar[str] = "log_uniform"  # pyright: ignore

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        low, high = math.log(self.a), math.log(self.b)
        return ((value.log() - low) / (high - low)).clamp(0.0, 1.0)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self.a * torch.exp(fraction * math.log(self.b / self.a))

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        return -value.log() - math.log(math.log(self.b / self.a))

    def continued_quantile(self, fraction: Tensor) -> Tensor:
        """The quantile, beyond the bounds too."""
        return self.quantile(fraction)

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :meth:`Marginal.inside`; logarithms round on their own scale."""
        low, high = (torch.tensor(end, dtype=dtype) for end in self.bounds)
        high = torch.nextafter(high, torch.full_like(high, -math.inf))
        nudge = 2 * torch.finfo(dtype).eps
        low = low * (1 + nudge * low.log().abs().clamp(min=1.0))
        return low, high * (1 - nudge * high.log().abs().clamp(min=1.0))


@dataclass(frozen=True)
class NormalMarginal(_ClosedMarginal):
    """Normal with mean a and standard deviation b."""

    family: ClassVar[str] = "normal"  # pyright: ignore

    @property
    def bounds(self) -> tuple[float, float]:
        """None."""
        return -math.inf, math.inf

    @cached_property
    def score(self) -> Transform:
        """A shift and a scale."""
        return Affine(self.a, self.b)

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        return torch.special.ndtr((value - self.a) / self.b)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self.a + self.b * torch.special.ndtri(fraction)

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        return log_normal((value - self.a) / self.b) - math.log(self.b)

    @cached_property
    def natural_scale(self) -> tuple[float, float]:
        """Mean and deviation."""
        return self.a, self.b

    @cached_property
    def reach(self) -> float:
        """Deviations within which a fit looks."""
        return _FARTHEST

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All numbers."""
        return _tensors(self.bounds, dtype)


@dataclass(frozen=True)
class HalfNormalMarginal(_ClosedMarginal):
    """a plus the absolute value of a normal variable of standard deviation b."""

    family: ClassVar[str] = "half_normal"  # pyright: ignore

    @property
    def bounds(self) -> tuple[float, float]:
        """A and infinity."""
        return self.a, math.inf

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        return torch.special.erf((value - self.a) / (math.sqrt(2) * self.b))

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        inside = fraction.clamp(max=1 - _EDGE)
        return self.a + math.sqrt(2) * self.b * torch.special.erfinv(inside)

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        return log_normal((value - self.a) / self.b) + math.log(2 / self.b)

    def continued_quantile(self, fraction: Tensor) -> Tensor:
        """The quantile, beyond the bound too."""
        return self.quantile(fraction)

    @cached_property
    def natural_scale(self) -> tuple[float, float]:
        """Middle and half of four deviations."""
        high = self.a + _REACH * self.b
        return 0.5 * (self.a + high), 0.5 * (high - self.a)

    @cached_property
    def reach(self) -> float:
        """A little beyond four deviations."""
        return _BEYOND

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :meth:`Marginal.inside`; a itself has a density."""
        low = torch.tensor(self.a, dtype=dtype)
        up = torch.nextafter(low, torch.full_like(low, math.inf))
        most = torch.tensor(math.inf, dtype=dtype)
        return up if low.double() < self.a else low, most


@dataclass(frozen=True, eq=False)
class ScoredMarginal(Marginal):
    """Parameter d of a batch of D univariate distributions, by ``cdf`` and ``icdf``.

    Beyond five deviations, where F has lost its digits, the map to a normal variable
    goes on along the logarithm (or logit) of the distance from the bounds.

    Attributes:
        distribution: The batch.
        index: d.
        interval: Ends of the support.
        ends: Least and largest number that has a density after rounding.
    """

    distribution: Distribution
    index: int
    interval: tuple[float, float]
    ends: tuple[float, float]

    @property
    def family(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the distribution's class."""
        return type(self.distribution).__name__

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the support."""
        return self.interval

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`marginal_from_spec` rebuilds the marginal."""
        described = describe_distribution(self.distribution)
        spec = {"index": self.index, "ends": list(self.ends)}
        return {"family": "scored", "distribution": described, **spec}

    @cached_property
    def score(self) -> Transform:
        """Phi^-1(F), with straight tails."""
        outer = _to_line(*self.bounds)
        ends = -_FARTHEST_SCORE, _FARTHEST_SCORE
        return StraightTails(NormalScore(self), outer, ends)

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        return self._of_column(self.distribution.cdf, value)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self._of_column(self.distribution.icdf, fraction.clamp(_EDGE, 1 - _EDGE))

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        return self._of_column(self.distribution.log_prob, value)

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :meth:`Marginal.inside`."""
        return _tensors(self.ends, dtype)

    def _of_column(self, function: Any, value: Tensor) -> Tensor:
        # The distribution's parameters stay on the CPU, wherever the values are.
        size = self.distribution.batch_shape.numel()
        found = function(value.cpu().reshape(-1, 1).expand(-1, size))
        return found[:, self.index].reshape(value.shape).to(value.device)


@dataclass(frozen=True)
class FittedMarginal(Marginal):
    """A logarithm or a logit, a shift and a scale.

    Attributes:
        family: Name of the distribution's class.
        low: Lower end of the support.
        high: Upper end.
        location: Shift on the line that the support is mapped to.
        scale: Scale there.
        ends: Least and largest number that has a density after rounding.
    """

    family: str
    low: float
    high: float
    location: float
    scale: float
    ends: tuple[float, float]

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the support."""
        return self.low, self.high

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`marginal_from_spec` rebuilds the marginal."""
        # JSON has no infinity.
        bounds = {
            key: end if math.isfinite(end) else None
            for key, end in (("low", self.low), ("high", self.high))
        }
        spec = {**asdict(self), **bounds, "ends": list(self.ends)}
        return {**spec, "family": "fitted", "name": self.family}

    @cached_property
    def score(self) -> Transform:
        """The map to the line, and to a standard variable."""
        line = _to_line(self.low, self.high)
        return Compose([line, Affine(self.location, self.scale)])

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function; see :meth:`Marginal.fraction`."""
        return torch.special.ndtr(self.score.forward(value)[0])

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self.score.inverse(torch.special.ndtri(fraction.clamp(_EDGE, 1 - _EDGE)))

    def log_density(self, value: Tensor) -> Tensor:
        """Log density; see :meth:`Marginal.log_density`."""
        u, log_det = self.score.forward(value)
        return log_normal(u) + log_det

    def inside(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :meth:`Marginal.inside`."""
        return _tensors(self.ends, dtype)


_CLOSED = {
    kind.family: kind
    for kind in (
        UniformMarginal,
        LogUniformMarginal,
        NormalMarginal,
        HalfNormalMarginal,
    )
}


class Marginals(Sequence[Marginal], Transform):
    r"""The marginals of D parameters, and the map of all to standard variables.

    .. math:: u = C^{-1} (u' - m), \qquad u'_d = \Phi^{-1}(F_d(\theta_d))

    C and m decorrelate parameters that depend on each other; without them u is u'.

    Args:
        marginals: The marginals.
        periods: D periods, infinite where a parameter is not circular or its prior does
            not cover the whole circle.
        whitening: The step from u' to u; None for none.
    """

    def __init__(
        self,
        marginals: Sequence[Marginal],
        periods: Sequence[float] | None = None,
        whitening: LowerTriangular | None = None,
    ) -> None:
        self._marginals = tuple(marginals)
        if isinstance(marginals, Marginals):
            periods = marginals.periods if periods is None else periods
            whitening = marginals.whitening
        whole = periods or len(self._marginals) * [math.inf]
        pairs = zip(self._marginals, whole, strict=True)
        self.periods = tuple(p if _covers(m, p) else math.inf for m, p in pairs)
        self.whitening = whitening
        columns = Columns([m.score for m in self._marginals])
        self._steps = Compose([columns, *([whitening] if whitening else [])])
        self._inside = {
            dtype: _ends(self._marginals, dtype)
            for dtype in (torch.float32, torch.float64)
        }

    @overload
    def __getitem__(self, index: int) -> Marginal: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Marginal, ...]: ...

    def __getitem__(self, index: int | slice) -> Marginal | tuple[Marginal, ...]:
        """One marginal, or some."""
        return self._marginals[index]

    def __len__(self) -> int:
        """Number D of parameters."""
        return len(self._marginals)

    def __eq__(self, other: object) -> bool:
        """Whether they describe the same map, as far as a file could tell."""
        return isinstance(other, Marginals) and self.spec == other.spec

    __hash__ = object.__hash__

    @property
    def closed(self) -> bool:
        """Whether all have a closed form."""
        return all(isinstance(m, _ClosedMarginal) for m in self._marginals)

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the marginals."""
        spec: dict[str, Any] = {"marginals": [m.spec for m in self._marginals]}
        if any(map(math.isfinite, self.periods)):
            finite = [p if math.isfinite(p) else None for p in self.periods]
            spec["periods"] = finite
        if self.whitening is not None:
            step = self.whitening
            spec["whitening"] = [step.location.tolist(), step.factor.tolist()]
        return spec

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Marginals":
        """Rebuild marginals from :attr:`spec`, whatever else it holds."""
        periods = [math.inf if p is None else p for p in spec.get("periods", [])]
        whitening = None
        if "whitening" in spec:
            location, factor = (
                torch.tensor(part, dtype=torch.float64) for part in spec["whitening"]
            )
            whitening = LowerTriangular(location, factor)
        marginals = [marginal_from_spec(part) for part in spec["marginals"]]
        return cls(marginals, periods, whitening)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map parameters ``(..., D)`` in the support to u ``(..., D)``."""
        return self._steps.forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Map u back to parameters; rounding may put them on a bound."""
        return self._steps.inverse(y)

    def clamp(self, values: Tensor) -> Tensor:
        """Pull values on or past a bound back to where the prior has a density.

        Args:
            values: Parameters, shape ``(..., D)``.

        Returns:
            Tensor of the same shape and dtype.
        """
        known = self._inside.get(values.dtype)
        low, high = known or _ends(self._marginals, values.dtype)
        low, high = low.to(values.device), high.to(values.device)
        return torch.maximum(torch.minimum(values, high), low)

    def contains(self, values: Tensor) -> Tensor:
        """Tell which vectors ``(..., D)`` lie within the bounds, shape ``(...)``."""
        low, high = (
            values.new_tensor(ends)
            for ends in zip(*(m.bounds for m in self._marginals), strict=True)
        )
        return ((values >= low) & (values <= high)).all(-1)

    def middle(self, like: Tensor) -> Tensor:
        """Medians ``(D,)``, inside the support."""
        half = torch.tensor(0.5, dtype=torch.float64)
        return self.clamp(torch.stack([m.quantile(half) for m in self]).to(like))


def marginals_of(
    distribution: Distribution, periods: Sequence[float] | None = None
) -> Marginals:
    """Build the map of a distribution's parameters.

    Args:
        distribution: Distribution over D parameters: of torch, of sbi, or a class of
            the user's own with a ``support``.
        periods: D periods, infinite where a parameter is not circular.

    Returns:
        D marginals.

    Raises:
        ValueError: If the support is not a product of intervals (a simplex, integers,
            intervals with gaps), or parameters depend on each other so strongly that
            they lie on a surface.
    """
    parts = [distribution]
    if isinstance(distribution, MultipleIndependent):
        parts = list(distribution.dists)
    found = [_part(part) for part in parts]
    marginals = [m for part, _ in found for m in part]
    if all(step is None for _, step in found):
        return Marginals(marginals, periods)
    steps = [
        step or LowerTriangular(torch.zeros(len(part)), torch.eye(len(part)))
        for part, step in found
    ]
    whitening = LowerTriangular(
        torch.cat([step.location.double() for step in steps]),
        torch.block_diag(*(step.factor.double() for step in steps)),
    )
    return Marginals(marginals, periods, whitening)


def marginal_from_spec(spec: Mapping[str, Any]) -> Marginal:
    """Rebuild a marginal from :attr:`Marginal.spec`.

    Raises:
        ValueError: If the family or the distribution is unknown.
    """
    family = spec.get("family")
    if family in _CLOSED:
        return _CLOSED[family](spec["a"], spec["b"])
    if family == "fitted":
        low, high = spec["low"], spec["high"]
        return FittedMarginal(
            spec["name"],
            -math.inf if low is None else low,
            math.inf if high is None else high,
            spec["location"],
            spec["scale"],
            tuple(spec["ends"]),
        )
    if family == "scored":
        distribution, index = distribution_from(spec["distribution"]), spec["index"]
        low, high = (float(end[index]) for end in bounds_of(distribution))
        return ScoredMarginal(distribution, index, (low, high), tuple(spec["ends"]))
    families = (*_CLOSED, "fitted", "scored")
    raise ValueError(f"family must be one of {families}, got {family!r}.")


def _part(
    distribution: Distribution,
) -> tuple[Sequence[Marginal], LowerTriangular | None]:
    """Marginals of a distribution, and what decorrelates them."""
    low, high = bounds_of(distribution)
    batch = flattened(distribution)
    if batch is not None:
        closed = _closed(batch)
        if closed is not None:
            return closed, None
        double = in_double(batch)
        # A file must be able to describe the map, which a user's own class it cannot.
        if double is not batch and _has_scores(double, len(low)):
            columns = zip(
                low.tolist(), high.tolist(), _ends_of(batch, low, high), strict=True
            )
            scored = [
                ScoredMarginal(double, d, (least, most), ends)
                for d, (least, most, ends) in enumerate(columns)
            ]
            return scored, None
    draws = _draws(distribution, len(low))
    name = type(distribution if batch is None else batch).__name__
    columns = zip(
        draws.unbind(-1),
        low.tolist(),
        high.tolist(),
        _ends_of(batch, low, high),
        strict=True,
    )
    fitted = [_fitted(name, *column) for column in columns]
    if batch is not None or len(low) == 1:
        return fitted, None
    u, _ = Columns([m.score for m in fitted]).forward(draws)
    covariance = u.T.cov()
    deviation = covariance.diagonal().sqrt()
    correlation = covariance / deviation / deviation.unsqueeze(-1)
    if torch.linalg.eigvalsh(correlation)[0] < _LEAST_VARIANCE:
        raise ValueError(
            f"the parameters of {name} lie on a surface, where there is no density of "
            f"all {len(low)}. Leave out those that the others determine."
        )
    return fitted, LowerTriangular(u.mean(0), torch.linalg.cholesky(covariance))


def _closed(batch: Distribution) -> list[Marginal] | None:
    """Marginals of families with a closed form; None for another."""
    if isinstance(batch, Uniform):
        return _pairs(UniformMarginal, batch.low, batch.high)
    if type(batch) is Normal:
        return _pairs(NormalMarginal, batch.loc, batch.scale)
    if isinstance(batch, HalfNormal):
        return _pairs(HalfNormalMarginal, torch.zeros(()), batch.scale)
    if type(batch) is not TransformedDistribution or len(batch.transforms) != 1:
        return None
    base, transform = _closed(batch.base_dist), batch.transforms[0]
    if base is None:
        return None
    if isinstance(transform, ExpTransform) and isinstance(batch.base_dist, Uniform):
        return [LogUniformMarginal(*map(math.exp, m.bounds)) for m in base]
    return _moved(base, transform) if isinstance(transform, AffineTransform) else None


def _moved(
    marginals: Sequence[Marginal], transform: AffineTransform
) -> list[Marginal] | None:
    """Marginals after a shift and a scale; None where the family changes."""
    loc, scale = (
        torch.as_tensor(part).double().expand(len(marginals)).tolist()
        for part in (transform.loc, transform.scale)
    )
    moved: list[Marginal] = []
    for marginal, shift, factor in zip(marginals, loc, scale, strict=True):
        if isinstance(marginal, NormalMarginal):
            centre = shift + factor * marginal.a
            moved.append(NormalMarginal(centre, abs(factor) * marginal.b))
        elif isinstance(marginal, HalfNormalMarginal) and factor > 0:
            low = shift + factor * marginal.a
            moved.append(HalfNormalMarginal(low, factor * marginal.b))
        else:
            return None
    return moved


def _pairs(kind: type[_ClosedMarginal], a: Tensor, b: Tensor) -> list[Marginal]:
    a, b = torch.broadcast_tensors(a, b)
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return [kind(low, high) for low, high in pairs]


def _has_scores(batch: Distribution, num: int) -> bool:
    """Whether ``cdf`` and ``icdf`` are there and undo each other."""
    share = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]).double()
    share = share.unsqueeze(-1).expand(-1, num)
    try:
        value = batch.icdf(share)
        again = batch.cdf(value)
    # Torch's generalised Pareto law mixes precisions.
    except (NotImplementedError, RuntimeError):
        return False
    return bool((again - share).abs().max() < 1e-4 and (value.diff(dim=0) > 0).all())


def in_double(batch: Distribution) -> Distribution:
    """The same distribution in double precision, if torch's own classes make it up."""
    try:
        return distribution_from(describe_distribution(batch))
    except ValueError:
        return batch


def _ends_of(
    batch: Distribution | None, low: Tensor, high: Tensor
) -> list[tuple[float, float]]:
    """Least and largest number in single precision that has a density.

    Looked for in steps away from the bounds, as torch's densities round on scales of
    their own; where there is only a joint density, a few roundings off the bounds.
    """
    info = torch.finfo(torch.float32)
    sides = []
    for bound, sign in ((low, 1.0), (high, -1.0)):
        end = bound.unsqueeze(-1)
        scale = 4 * info.eps * end.abs() * end.abs().log().abs().clamp(min=1.0)
        steps = torch.arange(60).double()
        away = torch.where(end == 0, info.tiny * 16**steps, scale * 2**steps)
        far = -sign * info.max / 16**steps
        tried = torch.where(end.isfinite(), end + sign * away, far).float().double()
        first = torch.zeros(len(bound), dtype=torch.int64)
        if batch is not None:
            log_p = column_log_density(batch, tried.T).T
            first = log_p.float().isfinite().int().argmax(-1)
        sides.append(tried.gather(-1, first.unsqueeze(-1)).squeeze(-1).tolist())
    return list(zip(*sides, strict=True))


def _fitted(
    name: str, draws: Tensor, low: float, high: float, ends: tuple[float, float]
) -> FittedMarginal:
    """Shift and scale of draws on the line."""
    line, _ = _to_line(low, high).forward(draws)
    shares = torch.tensor(_SHARES).double()
    below, middle, above = line.quantile(shares).tolist()
    scale = 0.5 * (above - below)
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(middle)):
        raise ValueError(
            f"{name} has no width in single precision: the middle two thirds of its "
            f"draws lie between {draws.quantile(shares[0]):g} and "
            f"{draws.quantile(shares[2]):g} of [{low:g}, {high:g}]. Give it in other "
            "units, or with less extreme parameters."
        )
    return FittedMarginal(name, low, high, middle, scale, ends)


def _draws(distribution: Distribution, num: int) -> Tensor:
    with torch.no_grad(), forked_rng(generator_for(0)):
        draws = distribution.sample(torch.Size((_NUM_DRAWS,)))
    return draws.double().reshape(_NUM_DRAWS, num).cpu()


def _to_line(low: float, high: float) -> Transform:
    """The step from an interval to the real line."""
    if math.isfinite(low) and math.isfinite(high):
        return Logit(low, high)
    if math.isfinite(low):
        return Logarithm(low)
    return Logarithm(high, upper=True) if math.isfinite(high) else Identity()


def _covers(marginal: Marginal, period: float) -> bool:
    """Whether a marginal's support is a whole circle."""
    low, high = marginal.bounds
    return math.isfinite(period) and math.isclose(high - low, period, rel_tol=1e-6)


def _tensors(ends: tuple[float, float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = (torch.tensor(end, dtype=dtype) for end in ends)
    return low, high


def _ends(marginals: Sequence[Marginal], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if not marginals:
        return torch.zeros(2, 0, dtype=dtype).unbind()
    pairs = [m.inside(dtype) for m in marginals]
    return tuple(torch.stack(ends) for ends in zip(*pairs, strict=True))
