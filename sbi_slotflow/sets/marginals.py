r"""The map of each parameter to a standard normal variable, built from its prior.

.. math::
    u = \Phi^{-1}(F(\theta)), \qquad
    \log \left| \frac{\mathrm{d} u}{\mathrm{d} \theta} \right|
    = \log p(\theta) - \log \varphi(u)

with F the distribution function of the parameter: uniform, log-uniform, normal and
half-normal ones as formulas (:class:`ClosedMarginal`); other univariate ones by their
``cdf`` and ``icdf`` (:class:`ScoredMarginal`); elsewhere a logarithm or a logit takes
the support to the real line, and a shift and a scale, from 10,000 draws of a fixed
seed, make it about standard (:class:`FittedMarginal`). Whatever u is, theta lies inside
the prior's support. Parameters that depend on each other are then decorrelated by a
triangular matrix from the same draws (:class:`Marginals`).

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

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
from .laws import (
    bounds_of,
    column_log_density,
    describe_distribution,
    distribution_from,
    flattened,
)
from .transforms import (
    Affine,
    Columns,
    Compose,
    Logarithm,
    Logit,
    LowerTriangular,
    StraightTails,
    Table,
    Transform,
    log_normal,
)

__all__ = [
    "ClosedMarginal",
    "ExponentialScore",
    "FittedMarginal",
    "Marginal",
    "Marginals",
    "NormalScore",
    "Place",
    "ScoredMarginal",
    "TabulatedMarginal",
    "ends_of",
    "fitted_marginal",
    "in_double",
    "line_of",
    "marginal_from_spec",
    "marginals_of",
]

# Fractions this close to 0 or 1 lie beyond 8 standard deviations.
_EDGE = 1e-15
_LEAST_SURVIVAL = 1e-16
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
    """One parameter's prior marginal; ``str`` gives its name in messages.

    A class of its own needs the step to a standard normal variable; the rest follows.

    Attributes:
        bounds: Ends of the support.
        ends: Least and largest number in single precision that has a density.
    """

    bounds: tuple[float, float]
    ends: tuple[float, float]

    @cached_property
    @abstractmethod
    def score(self) -> Transform:
        """The step to a standard normal variable."""

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Description from which :func:`marginal_from_spec` rebuilds the marginal."""

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function F, within [0, 1] for values inside the support."""
        return torch.special.ndtr(self.score.forward(value)[0])

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self.score.inverse(torch.special.ndtri(fraction.clamp(_EDGE, 1 - _EDGE)))

    def log_density(self, value: Tensor) -> Tensor:
        """Log derivative of :meth:`fraction`, for values inside the support."""
        u, log_det = self.score.forward(value)
        return log_normal(u) + log_det

    def inside(self, dtype: torch.dtype) -> tuple[float, float]:
        """Least and largest number of a precision that surely has a density.

        Torch compares values with bounds after maps of its own, which round; the
        numbers may lie a few roundings off the bounds.
        """
        return self.ends

    @cached_property
    def core(self) -> tuple[float, float]:
        """Interval on which the log density and its slope are finite.

        All but 0.2 % of the prior: densities may vanish or diverge at a bound.
        """
        low, high = self.quantile(torch.tensor([1e-3, 1 - 1e-3]).double()).tolist()
        return low, high

    @cached_property
    def natural_scale(self) -> tuple[float, float, float]:
        """Middle, half width and reach of a natural coordinate of likelihoods.

        A bounded parameter covers [-1, 1] in it, one with a single bound does so with
        four deviations, and any other has unit width. The reach is the largest absolute
        value at which a fit may end.
        """
        low, high = self.bounds
        shares = torch.tensor([*_SHARES, _SHARES[2] - _SHARES[0]]).double()
        below, middle, above, inner = self.quantile(shares).tolist()
        is_open = not math.isfinite(low), not math.isfinite(high)
        if all(is_open):
            half = 0.5 * (above - below)
        else:
            if is_open[1]:
                high = low + _REACH * (inner - low)
            elif is_open[0]:
                outer = float(self.quantile(1 - shares[-1]))
                low = high - _REACH * (high - outer)
            middle, half = 0.5 * (low + high), 0.5 * (high - low)
        far = self.score.inverse(torch.tensor([-_FARTHEST, _FARTHEST]).double())
        ends = ((far - middle) / half).abs().tolist()
        reach = max(
            [_BEYOND, *(end for end, far in zip(ends, is_open, strict=True) if far)]
        )
        return middle, half, min(reach, _MOST_REACH)

    @property
    def is_uniform(self) -> bool:
        """Whether the density is the same all over a bounded interval."""
        return str(self) == "uniform"

    @property
    def is_log_uniform(self) -> bool:
        """Whether the logarithm is uniform."""
        return str(self) == "log_uniform"


class _Formulas(NamedTuple):
    """Of a family with two numbers a and b."""

    bounds: Callable[[float, float], tuple[float, float]]
    fraction: Callable[[Tensor, float, float], Tensor]
    quantile: Callable[[Tensor, float, float], Tensor]
    log_density: Callable[[Tensor, float, float], Tensor]


_FORMULAS = {
    "uniform": _Formulas(
        bounds=lambda a, b: (a, b),
        fraction=lambda x, a, b: ((x - a) / (b - a)).clamp(0.0, 1.0),
        quantile=lambda p, a, b: a + p * (b - a),
        log_density=lambda x, a, b: torch.full_like(x, -math.log(b - a)),
    ),
    "log_uniform": _Formulas(
        bounds=lambda a, b: (a, b),
        fraction=lambda x, a, b: (
            (x.log() - math.log(a)) / (math.log(b) - math.log(a))
        ).clamp(0.0, 1.0),
        quantile=lambda p, a, b: a * torch.exp(p * math.log(b / a)),
        log_density=lambda x, a, b: -x.log() - math.log(math.log(b / a)),
    ),
    "normal": _Formulas(
        bounds=lambda a, b: (-math.inf, math.inf),
        fraction=lambda x, a, b: torch.special.ndtr((x - a) / b),
        quantile=lambda p, a, b: a + b * torch.special.ndtri(p),
        log_density=lambda x, a, b: log_normal((x - a) / b) - math.log(b),
    ),
    "half_normal": _Formulas(
        bounds=lambda a, b: (a, math.inf),
        fraction=lambda x, a, b: torch.special.erf((x - a) / (math.sqrt(2) * b)),
        quantile=lambda p, a, b: (
            a + math.sqrt(2) * b * torch.special.erfinv(p.clamp(max=1 - _EDGE))
        ),
        log_density=lambda x, a, b: log_normal((x - a) / b) + math.log(2 / b),
    ),
}


@dataclass(frozen=True)
class ClosedMarginal(Marginal):
    """A family with closed formulas.

    ``"uniform"`` between a and b; ``"log_uniform"``, with a logarithm uniform between
    those of a and b; ``"normal"`` of mean a and deviation b; ``"half_normal"``, a plus
    the absolute value of a normal variable of deviation b.
    """

    family: str
    a: float
    b: float

    def __str__(self) -> str:
        return self.family

    @property
    def bounds(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Lower and upper end of the support."""
        return _FORMULAS[self.family].bounds(self.a, self.b)

    @cached_property
    def core(self) -> tuple[float, float]:
        """All of the support."""
        return self.bounds

    @cached_property
    def natural_scale(self) -> tuple[float, float, float]:
        """See :attr:`Marginal.natural_scale`."""
        if self.family == "normal":
            return self.a, self.b, _FARTHEST
        high = self.a + _REACH * self.b if self.family == "half_normal" else self.b
        return 0.5 * (self.a + high), 0.5 * (high - self.a), _BEYOND

    @cached_property
    def score(self) -> Transform:
        """A shift and a scale of a normal one, Phi^-1(F) of others."""
        normal = self.family == "normal"
        return Affine(self.a, self.b) if normal else NormalScore(self)

    @property
    def spec(self) -> dict[str, Any]:
        """See :attr:`Marginal.spec`."""
        return {"family": self.family, "a": self.a, "b": self.b}

    def fraction(self, value: Tensor) -> Tensor:
        """See :meth:`Marginal.fraction`."""
        return _FORMULAS[self.family].fraction(value, self.a, self.b)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`; goes on beyond finite bounds."""
        return _FORMULAS[self.family].quantile(fraction, self.a, self.b)

    def log_density(self, value: Tensor) -> Tensor:
        """See :meth:`Marginal.log_density`."""
        return _FORMULAS[self.family].log_density(value, self.a, self.b)

    def inside(self, dtype: torch.dtype) -> tuple[float, float]:
        """See :meth:`Marginal.inside`; torch's density is zero at an upper bound."""
        low, high = torch.tensor(self.bounds, dtype=dtype)
        up = torch.nextafter(low, high)
        high = torch.nextafter(high, low) if high.isfinite() else high
        if self.is_log_uniform:  # logarithms round on their own scale
            nudge = 2 * torch.finfo(dtype).eps
            low = low * (1 + nudge * low.log().abs().clamp(min=1.0))
            high = high * (1 - nudge * high.log().abs().clamp(min=1.0))
        elif low.double() < self.bounds[0]:
            low = up
        return float(low), float(high)


@dataclass(frozen=True, eq=False)
class ScoredMarginal(Marginal):
    """Parameter ``index`` of a batch of univariate laws, by ``cdf`` and ``icdf``.

    Beyond five deviations, where F has lost its digits, the map to a normal variable
    goes on along the logarithm (or logit) of the distance from the bounds.
    """

    bounds: tuple[float, float]
    ends: tuple[float, float]
    distribution: Distribution
    index: int

    def __str__(self) -> str:
        return type(self.distribution).__name__

    @property
    def spec(self) -> dict[str, Any]:
        """See :attr:`Marginal.spec`; a class of the user's own stands as it is."""
        law = self.distribution
        with suppress(ValueError):
            law = describe_distribution(law)
        spec = {"index": self.index, "ends": list(self.ends)}
        return {"family": "scored", "distribution": law, **spec}

    @cached_property
    def score(self) -> Transform:
        """Phi^-1(F), with straight tails."""
        ends = -_FARTHEST_SCORE, _FARTHEST_SCORE
        return StraightTails(NormalScore(self), line_of(*self.bounds), ends)

    def fraction(self, value: Tensor) -> Tensor:
        """See :meth:`Marginal.fraction`."""
        return self._of_column(self.distribution.cdf, value)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        return self._of_column(self.distribution.icdf, fraction.clamp(_EDGE, 1 - _EDGE))

    def log_density(self, value: Tensor) -> Tensor:
        """See :meth:`Marginal.log_density`."""
        return self._of_column(self.distribution.log_prob, value)

    def _of_column(self, function: Any, value: Tensor) -> Tensor:
        # The distribution's parameters stay on the CPU, wherever the values are.
        size = self.distribution.batch_shape.numel()
        found = function(value.cpu().reshape(-1, 1).expand(-1, size))
        return found[:, self.index].reshape(value.shape).to(value.device)


@dataclass(frozen=True)
class FittedMarginal(Marginal):
    """A logarithm or a logit, then a shift by ``location`` and a ``scale``.

    ``name`` is that of the distribution's class.
    """

    bounds: tuple[float, float]
    ends: tuple[float, float]
    name: str
    location: float
    scale: float

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> dict[str, Any]:
        """See :attr:`Marginal.spec`."""
        # JSON has no infinity.
        low, high = (end if math.isfinite(end) else None for end in self.bounds)
        spec = {"family": "fitted", "name": self.name, "low": low, "high": high}
        fit = {"location": self.location, "scale": self.scale, "ends": list(self.ends)}
        return {**spec, **fit}

    @cached_property
    def score(self) -> Transform:
        """The map to the line, and to a standard variable."""
        return Compose([line_of(*self.bounds), Affine(self.location, self.scale)])


@dataclass(frozen=True)
class TabulatedMarginal(Marginal):
    """A logarithm or a logit, then a table of normal scores.

    ``knots`` are values on the line, their normal scores, and the log of the slope
    there; ``name`` says what was tabulated.
    """

    bounds: tuple[float, float]
    ends: tuple[float, float]
    name: str
    knots: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> dict[str, Any]:
        """See :attr:`Marginal.spec`."""
        low, high = (end if math.isfinite(end) else None for end in self.bounds)
        spec = {"family": "tabulated", "name": self.name, "low": low, "high": high}
        return {**spec, "ends": list(self.ends), "knots": [list(k) for k in self.knots]}

    @cached_property
    def score(self) -> Transform:
        """The map to the line, and the table."""
        return Compose([line_of(*self.bounds), Table(self.knots)])


@dataclass(frozen=True)
class NormalScore(Transform):
    r"""y = :math:`\Phi^{-1}(F(x))`, standard normal where x has the law F."""

    law: Marginal

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = torch.special.ndtri(self.law.fraction(x).clamp(_EDGE, 1 - _EDGE))
        return y, self.law.log_density(x) - log_normal(y)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self.law.quantile(torch.special.ndtr(y))


@dataclass(frozen=True)
class ExponentialScore(Transform):
    """y = -log(1 - F(x)), a unit exponential variable where x has the law F."""

    law: Marginal

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = -(1 - self.law.fraction(x)).clamp(min=_LEAST_SURVIVAL).log()
        return y, self.law.log_density(x) + y

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        return self.law.quantile(-torch.expm1(-y))


@dataclass(frozen=True)
class Place(Transform):
    """y = length F(x), uniform on [0, length] where x has the law F.

    The inverse goes on beyond the ends if the law has a closed form and a bound, so
    that a fit may end there; other laws stay inside their support.
    """

    law: Marginal
    length: float = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Transform.forward`."""
        y = self.length * self.law.fraction(x)
        return y, self.law.log_density(x) + math.log(self.length)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""
        fraction, law = y / self.length, self.law
        if not (isinstance(law, ClosedMarginal) and math.isfinite(law.bounds[0])):
            fraction = fraction.clamp(_INSIDE, 1 - _INSIDE)
        return law.quantile(fraction)


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
        widths = [m.bounds[1] - m.bounds[0] for m in self._marginals]
        self.periods = tuple(
            period if math.isclose(width, period, rel_tol=1e-6) else math.inf
            for width, period in zip(widths, whole, strict=True)
        )
        self.whitening = whitening
        columns = Columns([m.score for m in self._marginals])
        self._steps = Compose([columns, *([whitening] if whitening else [])])
        self._inside: dict[torch.dtype, Tensor] = {}

    @staticmethod
    def of(marginals: Sequence[Marginal]) -> "Marginals":
        """These marginals, as they are if they know of each other."""
        known = isinstance(marginals, Marginals)
        return marginals if known else Marginals(marginals)

    def __getitem__(self, index: int) -> Marginal:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One marginal."""
        return self._marginals[index]

    def __len__(self) -> int:
        """Number D of parameters."""
        return len(self._marginals)

    def __eq__(self, other: object) -> bool:
        """Whether they describe the same map, as far as a file could tell."""
        if not isinstance(other, Marginals):
            return False
        return self is other or self.spec == other.spec

    __hash__ = object.__hash__

    @property
    def extreme(self) -> bool:
        """Whether the square of a scale leaves the range of single precision."""
        normal = [m for m in self if str(m) in ("normal", "half_normal")]
        scales = [m.b for m in normal if isinstance(m, ClosedMarginal)]
        return any(not 1e-17 < scale < 1e17 for scale in scales)

    @property
    def closed(self) -> bool:
        """Whether all have a closed form."""
        return all(isinstance(m, ClosedMarginal) for m in self._marginals)

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the marginals.

        All of it is plain JSON, but for distributions of the user's own.
        """
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
            parts = [torch.tensor(p, dtype=torch.float64) for p in spec["whitening"]]
            whitening = LowerTriangular(*parts)
        marginals = [marginal_from_spec(part) for part in spec["marginals"]]
        return cls(marginals, periods, whitening)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map parameters ``(..., D)`` in the support to u ``(..., D)``."""
        return self._steps.forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Map u back to parameters; rounding may put them on a bound."""
        return self._steps.inverse(y)

    def clamp(self, values: Tensor) -> Tensor:
        """Pull values ``(..., D)`` on or past a bound to where there is a density."""
        dtype = values.dtype
        if dtype not in self._inside:
            ends = [m.inside(dtype) for m in self]
            self._inside[dtype] = torch.tensor(ends, dtype=dtype).reshape(-1, 2)
        low, high = self._inside[dtype].to(values.device).unbind(-1)
        return torch.maximum(torch.minimum(values, high), low)

    def contains(self, values: Tensor) -> Tensor:
        """Tell which vectors ``(..., D)`` lie within the bounds, shape ``(...)``."""
        low, high = values.new_tensor([m.bounds for m in self._marginals]).unbind(-1)
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
    location = torch.zeros(len(marginals), dtype=torch.float64)
    factor, start = torch.eye(len(marginals), dtype=torch.float64), 0
    for part, step in found:
        own = slice(start, start + len(part))
        start += len(part)
        if step is not None:
            location[own], factor[own, own] = step.location, step.factor
    return Marginals(marginals, periods, LowerTriangular(location, factor))


def marginal_from_spec(spec: Mapping[str, Any]) -> Marginal:
    """Rebuild a marginal from :attr:`Marginal.spec`.

    Raises:
        ValueError: If the family or the distribution is unknown.
    """
    family = spec.get("family")
    if family in _FORMULAS:
        return ClosedMarginal(family, spec["a"], spec["b"])
    if family in ("fitted", "tabulated"):
        low = -math.inf if spec["low"] is None else spec["low"]
        high = math.inf if spec["high"] is None else spec["high"]
        if family == "tabulated":
            knots = tuple(map(tuple, spec["knots"]))
            ends = tuple(spec["ends"])
            return TabulatedMarginal((low, high), ends, spec["name"], knots)
        fit = spec["name"], spec["location"], spec["scale"]
        return FittedMarginal((low, high), tuple(spec["ends"]), *fit)
    if family == "scored":
        distribution, index = distribution_from(spec["distribution"]), spec["index"]
        low, high = (float(end[index]) for end in bounds_of(distribution))
        return ScoredMarginal((low, high), tuple(spec["ends"]), distribution, index)
    families = (*_FORMULAS, "fitted", "scored", "tabulated")
    raise ValueError(f"family must be one of {families}, got {family!r}.")


def in_double(batch: Distribution) -> Distribution:
    """The same distribution in double precision, if torch's own classes make it up."""
    try:
        return distribution_from(describe_distribution(batch))
    except ValueError:
        return batch


def _part(
    distribution: Distribution,
) -> tuple[Sequence[Marginal], LowerTriangular | None]:
    """Marginals of a distribution, and what decorrelates them."""
    low, high = bounds_of(distribution)
    batch = flattened(distribution)
    closed = None if batch is None else _closed(batch)
    if closed is not None:
        return closed, None
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    columns = list(zip(bounds, ends_of(batch, low, high), strict=True))
    if batch is not None:
        law = in_double(batch)
        # A class of the user's own stays as it is, wherever the prior is moved to.
        law = deepcopy(law) if law is batch else law
        if _has_scores(law, len(low)):
            return [ScoredMarginal(*c, law, d) for d, c in enumerate(columns)], None
    name = type(distribution if batch is None else batch).__name__
    with torch.no_grad(), forked_rng(generator_for(0)):
        draws = distribution.sample(torch.Size((_NUM_DRAWS,)))
    draws = draws.double().reshape(_NUM_DRAWS, len(low)).cpu()
    pairs = zip(columns, draws.unbind(-1), strict=True)
    fitted = [fitted_marginal(name, *column, values) for column, values in pairs]
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


def _closed(batch: Distribution) -> list[ClosedMarginal] | None:
    """Marginals of families with a closed form; None for another."""
    if isinstance(batch, Uniform):
        return _pairs("uniform", batch.low, batch.high)
    if type(batch) is Normal:
        return _pairs("normal", batch.loc, batch.scale)
    if isinstance(batch, HalfNormal):
        return _pairs("half_normal", torch.zeros(()), batch.scale)
    if type(batch) is not TransformedDistribution or len(batch.transforms) != 1:
        return None
    base, transform = _closed(batch.base_dist), batch.transforms[0]
    if base is None:
        return None
    if isinstance(transform, ExpTransform) and isinstance(batch.base_dist, Uniform):
        return [ClosedMarginal("log_uniform", *map(math.exp, m.bounds)) for m in base]
    if not isinstance(transform, AffineTransform):
        return None
    shift, factor = (
        torch.as_tensor(part).double().expand(len(base)).tolist()
        for part in (transform.loc, transform.scale)
    )
    # The others change their family, as a half-normal one that is mirrored does.
    if not all(
        m.family == "normal" or (m.family == "half_normal" and by > 0)
        for m, by in zip(base, factor, strict=True)
    ):
        return None
    return [
        ClosedMarginal(m.family, plus + by * m.a, abs(by) * m.b)
        for m, plus, by in zip(base, shift, factor, strict=True)
    ]


def _pairs(family: str, a: Tensor, b: Tensor) -> list[ClosedMarginal]:
    a, b = torch.broadcast_tensors(a, b)
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return [ClosedMarginal(family, low, high) for low, high in pairs]


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


def ends_of(
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


def fitted_marginal(
    name: str, bounds: tuple[float, float], ends: tuple[float, float], draws: Tensor
) -> FittedMarginal:
    """Shift and scale of draws on the line."""
    line, _ = line_of(*bounds).forward(draws)
    shares = torch.tensor(_SHARES).double()
    below, middle, above = line.quantile(shares).tolist()
    scale = 0.5 * (above - below)
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(middle)):
        raise ValueError(
            f"{name} has no width in single precision: the middle two thirds of its "
            f"draws lie between {draws.quantile(shares[0]):g} and "
            f"{draws.quantile(shares[2]):g} of [{bounds[0]:g}, {bounds[1]:g}]. Give it "
            "in other units, or with less extreme parameters."
        )
    return FittedMarginal(bounds, ends, name, middle, scale)


def line_of(low: float, high: float) -> Transform:
    """The step from an interval to the real line."""
    if math.isfinite(low) and math.isfinite(high):
        return Logit(low, high)
    if math.isfinite(low):
        return Logarithm(low)
    return Logarithm(high, upper=True) if math.isfinite(high) else Affine()
