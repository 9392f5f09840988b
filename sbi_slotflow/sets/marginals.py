r"""What is known of each parameter's prior marginal: its family and two numbers.

A marginal is one of

- ``uniform(a, b)``,
- ``log_uniform(a, b)``: the logarithm is uniform between ``log a`` and ``log b``,
- ``normal(a, b)``: mean ``a``, standard deviation ``b``,
- ``half_normal(a, b)``: ``a`` plus the absolute value of a normal variable of mean
  zero and standard deviation ``b``.

It maps a parameter to a standard normal variable and back, :math:`u = \Phi^{-1}(F(t))`
with F the marginal's distribution function. Charts use that map to whiten components,
and it keeps samples inside the prior's support.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    ExpTransform,
    HalfNormal,
    Independent,
    Normal,
    TransformedDistribution,
    Uniform,
)

__all__ = ["Marginal", "clamp_to_support", "marginals_of"]

_FAMILIES = ("uniform", "log_uniform", "normal", "half_normal")
# Fractions this close to 0 or 1 lie beyond 8 standard deviations.
_EDGE = 1e-15


@dataclass(frozen=True)
class Marginal:
    """One parameter's prior marginal.

    Attributes:
        family: ``"uniform"``, ``"log_uniform"``, ``"normal"`` or ``"half_normal"``.
        a: Lower bound, or mean of a normal.
        b: Upper bound, or standard deviation.
        exact: False where the marginal is a normal fitted to samples of a
            distribution whose family is not known here.
    """

    family: str
    a: float
    b: float
    exact: bool = True

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise ValueError(f"family must be one of {_FAMILIES}, got {self.family!r}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the support."""
        if self.family == "normal":
            return -math.inf, math.inf
        return self.a, math.inf if self.family == "half_normal" else self.b

    def fraction(self, value: Tensor) -> Tensor:
        """Distribution function F, within [0, 1] for values inside the support."""
        if self.family == "uniform":
            return ((value - self.a) / (self.b - self.a)).clamp(0.0, 1.0)
        if self.family == "log_uniform":
            low, high = math.log(self.a), math.log(self.b)
            return ((value.log() - low) / (high - low)).clamp(0.0, 1.0)
        if self.family == "half_normal":
            return torch.special.erf((value - self.a) / (math.sqrt(2) * self.b))
        return torch.special.ndtr((value - self.a) / self.b)

    def quantile(self, fraction: Tensor) -> Tensor:
        """Inverse of :meth:`fraction`."""
        if self.family == "uniform":
            return self.a + fraction * (self.b - self.a)
        if self.family == "log_uniform":
            return self.a * torch.exp(fraction * math.log(self.b / self.a))
        if self.family == "half_normal":
            inside = fraction.clamp(max=1 - _EDGE)
            return self.a + math.sqrt(2) * self.b * torch.special.erfinv(inside)
        return self.a + self.b * torch.special.ndtri(fraction)

    def log_density(self, value: Tensor) -> Tensor:
        """Log density of the marginal, for values inside the support."""
        if self.family == "uniform":
            return torch.full_like(value, -math.log(self.b - self.a))
        if self.family == "log_uniform":
            return -value.log() - math.log(math.log(self.b / self.a))
        if self.family == "half_normal":
            z = (value - self.a) / self.b
            return _log_normal(z) + math.log(2 / self.b)
        return _log_normal((value - self.a) / self.b) - math.log(self.b)

    def to_normal(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Map a parameter to a standard normal variable.

        Args:
            value: Parameter values (float64), any shape.

        Returns:
            ``u`` and ``log |du/dvalue|``, both of the shape of ``value``.
        """
        if self.family == "normal":
            u = (value - self.a) / self.b
            return u, torch.full_like(u, -math.log(self.b))
        u = torch.special.ndtri(self.fraction(value).clamp(_EDGE, 1 - _EDGE))
        return u, self.log_density(value) - _log_normal(u)

    def from_normal(self, u: Tensor) -> Tensor:
        """Inverse of the map of :meth:`to_normal`."""
        if self.family == "normal":
            return self.a + self.b * u
        return self.quantile(torch.special.ndtr(u))


def marginals_of(distribution: Distribution) -> tuple[Marginal, ...]:
    """List the marginals of a distribution with a one-dimensional event.

    Known are sbi's ``BoxUniform`` and ``MultipleIndependent``, and torch's uniform,
    normal, half-normal, log-uniform (``TransformedDistribution`` of a uniform by exp)
    and shifted half-normal (likewise, by an affine map of slope 1), alone or in
    ``Independent``. Any other distribution gives normals fitted to 10,000 samples
    (from a fixed seed), marked ``exact=False``.

    Args:
        distribution: Distribution over D parameters.

    Returns:
        D marginals.
    """
    found = _known(distribution)
    if found is not None:
        return tuple(found)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = distribution.sample(torch.Size((10_000,))).double()
    draws = draws.reshape(10_000, -1)
    return tuple(
        Marginal("normal", float(m), max(float(s), 1e-12), exact=False)
        for m, s in zip(draws.mean(0), draws.std(0), strict=True)
    )


def _known(distribution: Distribution) -> list[Marginal] | None:
    if isinstance(distribution, MultipleIndependent):
        parts = [marginals_of(part) for part in distribution.dists]
        return [marginal for part in parts for marginal in part]
    if isinstance(distribution, Independent):
        return _known(distribution.base_dist)
    if isinstance(distribution, Uniform):
        return _pairs("uniform", distribution.low, distribution.high)
    if isinstance(distribution, Normal):
        return _pairs("normal", distribution.loc, distribution.scale)
    if isinstance(distribution, HalfNormal):
        return _pairs("half_normal", torch.zeros(()), distribution.scale)
    shift = _shift(distribution)
    if shift is not None and isinstance(distribution, TransformedDistribution):
        base = _known(distribution.base_dist)
        if base is not None and all(m.family == "half_normal" for m in base):
            return [Marginal("half_normal", m.a + shift, m.b) for m in base]
    if (
        isinstance(distribution, TransformedDistribution)
        and len(distribution.transforms) == 1
        and isinstance(distribution.transforms[0], ExpTransform)
    ):
        logarithm = _known(distribution.base_dist)
        if logarithm is not None and all(m.family == "uniform" for m in logarithm):
            return [
                Marginal("log_uniform", math.exp(m.a), math.exp(m.b)) for m in logarithm
            ]
    return None


def _shift(distribution: Distribution) -> float | None:
    """What a distribution adds to another's draws; None if that is not all it does."""
    if not isinstance(distribution, TransformedDistribution):
        return None
    transforms = distribution.transforms
    if len(transforms) != 1 or not isinstance(transforms[0], AffineTransform):
        return None
    loc, scale = (torch.as_tensor(v) for v in (transforms[0].loc, transforms[0].scale))
    single = loc.numel() == 1 and bool((scale == 1).all())
    return float(loc) if single else None


def _pairs(family: str, a: Tensor, b: Tensor) -> list[Marginal]:
    a, b = torch.broadcast_tensors(a, b)
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return [Marginal(family, low, high) for low, high in pairs]


def clamp_to_support(values: Tensor, marginals: Sequence[Marginal]) -> Tensor:
    """Pull values that rounding put on or past a bound back inside the support.

    Torch's uniform density is zero at its upper bound, so the largest value returned
    lies one float below it.

    Args:
        values: Parameters, shape ``(..., D)``.
        marginals: D marginals.

    Returns:
        Tensor of the same shape and dtype.
    """
    low = values.new_tensor([m.bounds[0] for m in marginals])
    high = values.new_tensor([m.bounds[1] for m in marginals])
    inside = torch.nextafter(high, torch.full_like(high, -math.inf))
    high = torch.where(torch.isfinite(high), inside, high)
    # A log-uniform density compares logarithms, which round on their own scale.
    log_uniform = torch.tensor(
        [m.family == "log_uniform" for m in marginals], device=values.device
    )
    nudge = 2 * torch.finfo(values.dtype).eps
    above = low * (1 + nudge * low.log().abs().clamp(min=1.0))
    below = high * (1 - nudge * high.log().abs().clamp(min=1.0))
    low = torch.where(log_uniform, above, low)
    high = torch.where(log_uniform, below, high)
    return torch.maximum(torch.minimum(values, high), low)


def _log_normal(u: Tensor) -> Tensor:
    return -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
