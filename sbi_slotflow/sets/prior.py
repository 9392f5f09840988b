r"""Prior over sets of components of unknown size.

.. math::
    \log p(K, \Theta, s) = \log p(K) + \log p(s) + \log K!
        + \sum_{k=1}^{K} \log p(\theta_k) - \log Z_K

is the density of the *set*, with respect to Lebesgue measure on the canonical region
(components ascending in the ``order_by`` parameter). It is the same for every
relabelling of a row and integrates to 1 over the canonical region. ``Z_K`` is the
probability that K independent components keep the least separation; it is 1 without
one.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from sbi.utils.torchutils import move_all_tensor_to_device, set_validate_args
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints

from ..seeding import forked_rng, generator_for
from .checks import warn_without_slots
from .layout import ThetaLayout, ThetaParts
from .marginals import Marginal, clamp_to_support, marginals_of
from .separation import log_separation_constant, sample_separated, smallest_gap

__all__ = ["VariableKPrior", "cardinality_weights"]

_NUM_MOMENT_SAMPLES = 20_000


class VariableKPrior(Distribution):
    r"""Prior p(K) p(s) prod p(theta_k) over theta rows.

    Args:
        component: Distribution of one component, event shape ``(D,)`` (sbi's
            ``BoxUniform`` and ``MultipleIndependent`` included).
        cardinality: Weights of K = 0..Kmax (normalised here), or a ``Categorical``.
        shared: Distribution of the shared parameters, event shape ``(S,)``.
        min_separation: Least distance between two components in the ``order_by``
            parameter, whose marginal must be uniform and independent of the others;
            around the circle, if the parameter has a period.
        order_by: Index of the parameter that defines the canonical order.
        component_names: Names of the D parameters; ``theta_1..theta_D`` if omitted.
        shared_names: Names of the S shared parameters.
        periods: Periods of circular parameters by name, for summaries and figures.
        validate_args: As in torch; sbi switches it off.

    Raises:
        TypeError: If ``component`` or ``shared`` is not a torch distribution.
        ValueError: If an event is not one-dimensional, a weight is negative, NaN or
            all are zero, ``order_by`` is out of range, a period is not positive or of
            no parameter, or the separation is impossible.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    has_rsample = False

    def __init__(
        self,
        component: Distribution,
        cardinality: Sequence[float] | Tensor | Categorical,
        *,
        shared: Distribution | None = None,
        min_separation: float | None = None,
        order_by: int = 0,
        component_names: Sequence[str] | None = None,
        shared_names: Sequence[str] | None = None,
        periods: Mapping[str, float] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.component = _one_dimensional(component, "component")
        self.shared = None if shared is None else _one_dimensional(shared, "shared")
        weights = cardinality_weights(cardinality)
        num_params = _num_parameters(self.component)
        num_shared = 0 if self.shared is None else _num_parameters(self.shared)
        self.layout = ThetaLayout(
            max_cardinality=len(weights) - 1,
            component_names=_names(component_names, "theta", num_params),
            shared_names=_names(shared_names, "shared", num_shared),
            order_by=order_by,
            periods=dict(periods or {}),
        )
        self.cardinality_probs = weights
        self.component_marginals = marginals_of(self.component)
        self.shared_marginals: tuple[Marginal, ...] = (
            () if self.shared is None else marginals_of(self.shared)
        )
        self.min_separation = self._checked_separation(min_separation)
        super().__init__(
            batch_shape=torch.Size(),
            event_shape=torch.Size((self.layout.size,)),
            validate_args=False if validate_args is None else validate_args,
        )

    @property
    def max_cardinality(self) -> int:
        """Largest cardinality Kmax."""
        return self.layout.max_cardinality

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rows with a possible K, components and separation, in any order."""
        return _SetSupport(self)

    @property
    def mean(self) -> Tensor:
        """Mean of a canonical row, shape ``(E,)``, padding counted as zero.

        K's entry is exact, the others are averages over 20,000 draws of a fixed seed.
        """
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        """Variance of a canonical row, shape ``(E,)``; see :attr:`mean`."""
        return self._moments[1]

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of a canonical row; 1 where an entry never varies.

        sbi divides by it to standardise rows.
        """
        return torch.where(self.variance > 0, self.variance.sqrt(), 1.0)

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw theta rows in canonical order.

        Args:
            sample_shape: Shape of the draws.
            generator: Source of randomness; torch's global generator if None.

        Returns:
            Float32 rows of shape ``(*sample_shape, *batch_shape, E)``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        with torch.no_grad(), forked_rng(generator):
            rows = self._draw(shape.numel())
        return rows.reshape(*shape, self.layout.size)

    def log_prob(self, value: Tensor) -> Tensor:
        """Evaluate the log density of the set.

        Args:
            value: Theta rows of shape ``(..., E)``, components in any order.

        Returns:
            Log densities of shape ``(...)``, -inf outside the support.

        Raises:
            ValueError: If the last axis is not E long.
        """
        parts = self.layout.unpack(value)
        k = parts.cardinality.clamp(0, self.max_cardinality)
        log_p = self.log_cardinality_probs.to(value)[k] + torch.lgamma(k.to(value) + 1)
        log_p = log_p + self._component_log_prob(parts).sum(-1)
        if self.shared is not None:
            log_p = log_p + _flat_log_prob(self.shared, parts.shared)
        if self.min_separation is not None:
            log_p = log_p - self._log_separation(k).to(log_p)
        inside = self.support.check(value)
        return torch.where(inside, log_p, log_p.new_full((), -torch.inf))

    @property
    def log_cardinality_probs(self) -> Tensor:
        """Log p(K), shape ``(Kmax + 1,)``."""
        return self.cardinality_probs.log()

    def with_cardinality(
        self, cardinality: Sequence[float] | Tensor | Categorical
    ) -> "VariableKPrior":
        """Return the same prior with other weights for K = 0..Kmax.

        Raises:
            ValueError: If the weights are not Kmax + 1 valid numbers.
        """
        weights = cardinality_weights(cardinality)
        if len(weights) != self.max_cardinality + 1:
            raise ValueError(
                f"cardinality must hold {self.max_cardinality + 1} weights "
                f"(K = 0..{self.max_cardinality}), got {len(weights)}."
            )
        return VariableKPrior(
            self.component,
            weights.to(self.cardinality_probs.device),
            shared=self.shared,
            min_separation=self.min_separation,
            order_by=self.layout.order_by,
            component_names=self.layout.component_names,
            shared_names=self.layout.shared_names,
            periods=self.layout.periods,
        )

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "VariableKPrior":
        """Return the prior with another batch shape (independent copies)."""
        new = cast(
            VariableKPrior, self._get_checked_instance(VariableKPrior, _instance)
        )
        for key, value in self.__dict__.items():
            if key not in ("_batch_shape", "_event_shape", "_validate_args"):
                new.__dict__[key] = value
        Distribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def to(self, device: str | torch.device) -> "VariableKPrior":
        """Move the prior to a device, in place, and return it."""
        self.cardinality_probs = self.cardinality_probs.to(device)
        for distribution in (self.component, self.shared):
            if distribution is not None:
                move_all_tensor_to_device(distribution, device)
        self.__dict__.pop("_moments", None)
        return self

    def separated(self, theta: Tensor) -> Tensor:
        """Tell which rows keep the least separation.

        A gap may fall short of it by the rounding of two float32 numbers.

        Args:
            theta: Rows of shape ``(..., E)``, in any order.

        Returns:
            Boolean tensor of shape ``(...)``.
        """
        if self.min_separation is None:
            return torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
        parts = self.layout.unpack(theta)
        low, high = self._order_marginal.bounds
        slack = 2 * torch.finfo(torch.float32).eps * max(abs(low), abs(high))
        values = parts.components[..., self.layout.order_by]
        gap = smallest_gap(values, parts.mask, self._order_period)
        return gap >= self.min_separation - slack

    @property
    def _order_marginal(self) -> Marginal:
        return self.component_marginals[self.layout.order_by]

    @property
    def _order_period(self) -> float | None:
        """Period of the order_by parameter, None if it is not circular."""
        period = self.layout.component_periods[self.layout.order_by]
        return period if math.isfinite(period) else None

    def _draw(self, num: int) -> Tensor:
        layout, probs = self.layout, self.cardinality_probs
        if num == 0:
            return probs.new_zeros(0, layout.size)
        k = torch.multinomial(probs, num, replacement=True)
        draws = self.component.sample(torch.Size((num * layout.max_cardinality,)))
        components = draws.reshape(num, layout.max_cardinality, -1).float()
        if self.min_separation is not None:
            components[..., layout.order_by] = sample_separated(
                k,
                layout.max_cardinality,
                self._order_marginal.bounds,
                self.min_separation,
                circular=self._order_period is not None,
            ).float()
        components = clamp_to_support(components, self.component_marginals)
        shared = None
        if self.shared is not None:
            shared = self.shared.sample(torch.Size((num,))).reshape(num, -1).float()
            shared = clamp_to_support(shared, self.shared_marginals)
        return layout.canonical(layout.pack(k, components, shared))

    def _component_log_prob(self, parts: ThetaParts) -> Tensor:
        """Log density of every component ``(..., Kmax)``, zero where there is none."""
        # Padding becomes a point of the support, so that its gradient is no NaN.
        inside = [m.quantile(torch.tensor(0.5)) for m in self.component_marginals]
        filled = torch.where(
            parts.mask.unsqueeze(-1),
            parts.components,
            torch.stack(inside).to(parts.components),
        )
        each = _flat_log_prob(self.component, filled)
        return torch.where(parts.mask, each, each.new_zeros(()))

    def _log_separation(self, k: Tensor) -> Tensor:
        assert self.min_separation is not None
        low, high = self._order_marginal.bounds
        return log_separation_constant(
            k, self.min_separation, high - low, self._order_period is not None
        )

    def _checked_separation(self, separation: float | None) -> float | None:
        if separation is None or separation == 0:
            return None
        if not separation > 0:
            raise ValueError(f"min_separation must be positive, got {separation}.")
        marginal = self._order_marginal
        name = self.layout.component_names[self.layout.order_by]
        if marginal.family != "uniform" or not marginal.exact:
            raise ValueError(
                "min_separation needs a uniform, independent marginal of the order_by "
                f"parameter {name!r} (its normalising constant has a closed form only "
                f"there), got {marginal.family}."
            )
        most = int(self.cardinality_probs.nonzero().max())
        width = marginal.bounds[1] - marginal.bounds[0]
        period = self._order_period
        if period is not None and not math.isclose(period, width, rel_tol=1e-6):
            raise ValueError(
                f"min_separation around a circle needs a marginal of {name!r} that "
                f"covers its period of {period:g}, got a width of {width:g}."
            )
        gaps = most - 1 if period is None else most
        if gaps * separation >= width:
            raise ValueError(
                f"min_separation={separation} is impossible: {most} components need "
                f"{gaps * separation:g} of the {width:g} wide range of {name!r}."
            )
        return float(separation)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        device = self.cardinality_probs.device
        draws = self._seeded_draws()
        mean, variance = draws.mean(0), draws.var(0)
        k = torch.arange(self.max_cardinality + 1, device=device).to(mean)
        mean[0] = (self.cardinality_probs * k).sum()
        variance[0] = (self.cardinality_probs * (k - mean[0]).square()).sum()
        return mean, variance

    def _seeded_draws(self) -> Tensor:
        with torch.no_grad(), forked_rng(generator_for(0)):
            return self._draw(_NUM_MOMENT_SAMPLES)


class _SetSupport(constraints.Constraint):
    """Rows that a :class:`VariableKPrior` can produce, up to their order."""

    is_discrete = True
    event_dim = 1

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior = prior

    def check(self, value: Tensor) -> Tensor:
        """Return a boolean for every row, shape ``value.shape[:-1]``."""
        warn_without_slots(value)
        prior = self.prior
        parts = prior.layout.unpack(value)
        k = parts.cardinality.clamp(0, prior.max_cardinality)
        inside = prior.layout.is_well_formed(value)
        inside &= (prior.cardinality_probs.to(value.device) > 0)[k]
        inside &= torch.isfinite(prior._component_log_prob(parts)).all(-1)
        if prior.shared is not None:
            inside &= torch.isfinite(_flat_log_prob(prior.shared, parts.shared))
        return inside & prior.separated(value)


def cardinality_weights(
    cardinality: Sequence[float] | Tensor | Categorical,
) -> Tensor:
    """Normalise weights of K = 0..Kmax.

    Args:
        cardinality: Weights or a ``Categorical`` over 0..Kmax.

    Returns:
        Float32 probabilities, shape ``(Kmax + 1,)``.

    Raises:
        ValueError: If the weights are not a vector of at least two non-negative finite
            numbers with a positive sum.
    """
    if isinstance(cardinality, Categorical):
        cardinality = cardinality.probs
    weights = torch.as_tensor(cardinality, dtype=torch.float64)
    if weights.ndim != 1 or len(weights) < 2:
        raise ValueError(
            "cardinality must be a vector of weights for K = 0..Kmax with Kmax >= 1, "
            f"got shape {tuple(weights.shape)}."
        )
    if not torch.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(
            "cardinality weights must be finite, non-negative and not all zero, got "
            f"{weights.tolist()}."
        )
    return (weights / weights.sum()).float()


def _one_dimensional(distribution: Distribution, name: str) -> Distribution:
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"{name} must be a torch Distribution, got {type(distribution).__name__}."
        )
    distribution = deepcopy(distribution)
    set_validate_args(distribution, False)
    with forked_rng(generator_for(0)):
        shape = distribution.sample(torch.Size((2,))).shape
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have a one-dimensional event (a vector of parameters), got "
            f"samples of shape {tuple(shape[1:])}."
        )
    return distribution


def _num_parameters(distribution: Distribution) -> int:
    with forked_rng(generator_for(0)):
        return distribution.sample().numel()


def _names(names: Sequence[str] | None, stem: str, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"{stem}_{i}" for i in range(1, count + 1))
    if len(names) != count:
        raise ValueError(f"{stem} has {count} parameter(s), got names {list(names)}.")
    return tuple(names)


def _flat_log_prob(distribution: Distribution, values: Tensor) -> Tensor:
    """Evaluate a distribution over vectors on values of any batch shape."""
    flat = values.reshape(-1, values.shape[-1])
    if not len(flat):
        return values.new_zeros(values.shape[:-1])
    log_p = distribution.log_prob(flat)
    # MultipleIndependent and un-wrapped univariate distributions differ in shape.
    log_p = log_p.sum(-1) if log_p.ndim > 1 else log_p
    return log_p.reshape(values.shape[:-1])
