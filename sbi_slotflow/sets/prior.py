r"""Prior over sets of components of unknown size.

.. math::
    \log p(K, \Theta, s) = \log p(K) + \log p(s) + \log K!
        + \sum_{k=1}^{K} \log p(\theta_k) - \log Z_K

is the density of the *set*, with respect to Lebesgue measure on the canonical region
(components ascending in the ``order_by`` parameter). It is the same for every
relabelling of a row and integrates to 1 over the canonical region. ``Z_K`` is the
probability that K independent components keep the least separation; it is 1 without
one. Where components come from a population whose parameters are shared,
:math:`p(\theta_k)` is :math:`p(\theta_k | s)` (:mod:`.population`).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy, deepcopy
from functools import cached_property
from operator import index
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from sbi.utils.torchutils import move_all_tensor_to_device, set_validate_args
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints

from ..seeding import forked_rng, generator_for
from .checks import Numbers, as_floats, as_shape, warn_without_slots
from .laws import log_density
from .layout import ThetaLayout, ThetaParts
from .marginals import Marginal, Marginals, in_double, marginals_of
from .population import Component, Population
from .separation import log_separation_constant, sample_separated, smallest_gap

__all__ = ["VariableKPrior", "cardinality_weights"]

# Draws of a new prior that an old one must allow.
_NUM_CHECKED = 4_000
_NUM_MOMENT_SAMPLES = 20_000


class VariableKPrior(Distribution):
    r"""Prior p(K) p(s) prod p(theta_k) over theta rows.

    Args:
        component: Distribution of one component, event shape ``(D,)`` (sbi's
            ``BoxUniform`` and ``MultipleIndependent`` included). Or a function of the
            shared parameters ``(B, S)`` that returns the distribution of a component
            given each row of them: one of batch shape ``(B,)`` and event shape
            ``(D,)``, or a list of D univariate ones of batch shape ``(B,)`` or ``()``.
            Components are then drawn from a population, p(theta_k | s).
        cardinality: Weights of K = 0..Kmax (normalised here), or a distribution over
            0..Kmax such as a ``Categorical``.
        shared: Distribution of the shared parameters, event shape ``(S,)``.
        min_separation: Least distance between two components in the ``order_by``
            parameter, whose marginal must be uniform and independent of the others;
            around the circle, if the parameter has a period.
        order_by: Name or index of the parameter that defines the canonical order.
        component_names: Names of the D parameters; ``theta_1..theta_D`` if omitted.
        shared_names: Names of the S shared parameters.
        periods: Periods of circular parameters by name.
        validate_args: As in torch; sbi switches it off.

    Attributes:
        component: Distribution of one component. Of a population it is the marginal,
            whatever the shared parameters are.
        population: The density of components given shared parameters, a
            :class:`.population.Population`; None where they are independent of them.

    Raises:
        TypeError: If ``component`` or ``shared`` is not a torch distribution, or
            ``component`` no function that returns one.
        ValueError: If an event is not one-dimensional or has a support that is no
            product of intervals, a weight is negative, NaN or all are zero, names
            collide, ``order_by`` is out of range, a period is not positive or of no
            parameter, the separation is impossible, or ``component`` is a function and
            ``shared`` is missing.

    Example:
        Times are uniform; fluxes have a mean and a width that all share:

        >>> from torch.distributions import Independent, Normal, Uniform
        >>> def component(shared):
        ...     mean, width = shared.unbind(-1)
        ...     return [Uniform(0.0, 10.0), Normal(mean, width)]
        >>> low, high = torch.tensor([0.0, 0.1]), torch.tensor([3.0, 0.5])
        >>> prior = VariableKPrior(
        ...     component, [1, 1, 1], shared=Independent(Uniform(low, high), 1),
        ...     component_names=("time", "flux"), shared_names=("mean", "width"))
        >>> prior.layout.names[:4]
        ['K', 'mean', 'width', 'time_1']
        >>> prior.log_prob(prior.sample((5,))).shape
        torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    has_rsample = False

    def __init__(
        self,
        component: Distribution | Component | Population,
        cardinality: Sequence[float] | Tensor | Distribution,
        *,
        shared: Distribution | None = None,
        min_separation: float | None = None,
        order_by: int | str = 0,
        component_names: Sequence[str] | None = None,
        shared_names: Sequence[str] | None = None,
        periods: Mapping[str, float] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.shared, num_shared = None, 0
        if shared is not None:
            self.shared, num_shared = _one_dimensional(shared, "shared")
        self.population = self._population(component)
        if self.population is None:
            self.component, num_params = _one_dimensional(component, "component")
        else:
            self.component = self.population.marginal
            num_params = self.population.num_params
        weights = cardinality_weights(cardinality)
        names = _names(component_names, "theta", num_params)
        if isinstance(order_by, str):
            if order_by not in names:
                raise ValueError(
                    "order_by must be the index or the name of a component's "
                    f"parameter, one of {names}, got {order_by!r}."
                )
            order_by = names.index(order_by)
        self.layout = ThetaLayout(
            max_cardinality=len(weights) - 1,
            component_names=names,
            shared_names=_names(shared_names, "shared", num_shared),
            order_by=index(order_by),
            periods=dict(periods or {}),
        )
        self.cardinality_probs = weights
        self._component_law = None
        turns = self.layout.component_periods
        if self.population is None:
            self.component_marginals = marginals_of(self.component, turns)
            self._component_law = _law(self.component, self.component_marginals)
        else:
            marginals = self.population.marginals
            whitening = marginals.whitening
            self.component_marginals = Marginals(list(marginals), turns, whitening)
        self.shared_marginals, self._shared_law = Marginals(()), None
        if self.shared is not None:
            turns = self.layout.shared_periods
            self.shared_marginals = marginals_of(self.shared, turns)
            self._shared_law = _law(self.shared, self.shared_marginals)
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
        return self._moments[0].float()

    @property
    def variance(self) -> Tensor:
        """Variance of a canonical row, float64, shape ``(E,)``; see :attr:`mean`."""
        return self._moments[1]

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of a canonical row; 1 where an entry never varies.

        sbi divides by it to standardise rows.
        """
        return torch.where(self.variance > 0, self.variance.sqrt(), 1.0).float()

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
        shape = self._extended_shape(as_shape(sample_shape))[:-1]
        with torch.no_grad(), forked_rng(generator):
            rows = self._draw(shape.numel())
        return rows.reshape(*shape, self.layout.size)

    def log_prob(self, value: Numbers) -> Tensor:
        """Evaluate the log density of the set.

        Args:
            value: Theta rows of shape ``(..., E)``, components in any order.

        Returns:
            Log densities of shape ``(...)``, -inf outside the support.

        Raises:
            TypeError: If the rows are no real numbers.
            ValueError: If the last axis is not E long.
        """
        value = as_floats(value, "theta")
        parts = self.layout.unpack(value)
        k = parts.cardinality.clamp(0, self.max_cardinality)
        log_p = self.log_cardinality_probs.to(value)[k] + torch.lgamma(k.to(value) + 1)
        densities = self._log_densities(parts)
        log_p = log_p + densities[0].sum(-1) + densities[1]
        if self.min_separation is not None:
            low, high = self._order_marginal.bounds
            circular, gap = self._order_period is not None, self.min_separation
            log_z = log_separation_constant(k, gap, high - low, circular)
            log_p = log_p - log_z.to(log_p)
        inside = self._inside(value, parts, densities)
        return torch.where(inside, log_p, log_p.new_full((), -torch.inf))

    @property
    def log_cardinality_probs(self) -> Tensor:
        """Log p(K), shape ``(Kmax + 1,)``."""
        return self.cardinality_probs.log()

    def with_cardinality(
        self, cardinality: Sequence[float] | Tensor | Distribution
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
            self.component if self.population is None else self.population,
            weights.to(self.cardinality_probs.device),
            shared=self.shared,
            min_separation=self.min_separation,
            order_by=self.layout.order_by,
            component_names=self.layout.component_names,
            shared_names=self.layout.shared_names,
            periods=self.layout.periods,
        )

    @property
    def members(self) -> "list[VariableKPrior]":
        """The prior of each class; the prior itself where there is one class."""
        return [self]

    @property
    def probs_by_class(self) -> list[Tensor]:
        """P(K) of each class."""
        return [self.cardinality_probs]

    def allows(self, theta: Tensor) -> Tensor:
        """Tell which rows ``(..., E)`` have a cardinality that is possible."""
        return (self.cardinality_probs > 0)[self.layout.cardinality(theta)]

    def bridged(self) -> "VariableKPrior":
        """Return the prior with some weight on each K between those that it allows.

        K of a chain changes by one in a move: it passes through them, and draws there
        do not count.
        """
        probs = self.cardinality_probs
        between = _between(probs > 0)
        if not between.any():
            return self
        mean = probs[probs > 0].mean()
        return self.with_cardinality(torch.where(between, mean, probs))

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "VariableKPrior":
        """Return the prior with another batch shape (independent copies)."""
        new = copy(self)
        Distribution.__init__(
            new, torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def to(self, device: str | torch.device) -> "VariableKPrior":
        """Move the prior to a device, in place, and return it."""
        self.cardinality_probs = self.cardinality_probs.to(device)
        laws = [
            law.distribution for law in (self._component_law, self._shared_law) if law
        ]
        components = [self.component]
        if self.population is not None:
            self.population.to(device)
            components = []
        for distribution in (*components, self.shared, *laws):
            if distribution is not None:
                move_all_tensor_to_device(distribution, device)
        self.__dict__.pop("_moments", None)
        return self

    def draw_component(self, shared: Tensor) -> Tensor:
        """Draw one component ``(N, D)`` given each row of shared parameters ``(N, S)``.

        By torch's global generator; those that no population ties to them are
        independent of them.
        """
        if self.population is None:
            num = torch.Size((len(shared),))
            return self.component.sample(num).reshape(len(shared), -1)
        return self.population.sample(shared, 1)[:, 0]

    def log_density_of_components(self, parts: ThetaParts) -> Tensor:
        """Log density of each component ``(..., Kmax)``, given the shared parameters.

        It is zero where there is no component, -inf outside the support.
        """
        # Padding becomes a point of the support, so that its gradient is no NaN.
        filled = torch.where(
            parts.mask.unsqueeze(-1),
            parts.components,
            self.component_marginals.middle(parts.components),
        )
        if self.population is None:
            assert self._component_law is not None
            each = self._component_law.log_density(filled)
        else:
            assert self._shared_law is not None
            # Nor may a distribution be made of parameters that are impossible.
            there = torch.isfinite(self._shared_law.log_density(parts.shared))
            middle = self.shared_marginals.middle(parts.shared)
            shared = torch.where(there.unsqueeze(-1), parts.shared, middle)
            each = self.population.log_density(filled, shared)
        return torch.where(parts.mask, each, each.new_zeros(()))

    def keeps_bounds(self, theta: Tensor) -> Tensor:
        """Tell which rows ``(..., E)`` keep the bounds that shared parameters set."""
        if self.population is None or not self.population.bounds_follow_shared:
            return torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
        parts = self.layout.unpack(theta)
        return torch.isfinite(self.log_density_of_components(parts)).all(-1)

    def separated(self, theta: Tensor) -> Tensor:
        """Tell which rows ``(..., E)``, in any order, keep the least separation.

        A gap may fall short of it by the rounding of two float32 numbers.
        """
        if self.min_separation is None:
            return torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
        parts = self.layout.unpack(theta)
        values = parts.components[..., self.layout.order_by]
        gap = smallest_gap(values, parts.mask, self._order_period)
        return gap >= self.min_separation - self.slack

    @property
    def slack(self) -> float:
        """By how much a gap may fall short of the least separation."""
        low, high = self._order_marginal.bounds
        return 2 * torch.finfo(torch.float32).eps * max(abs(low), abs(high))

    @property
    def separated_around(self) -> bool:
        """Whether a least separation also holds across the seam of a circle."""
        return self.min_separation is not None and self._order_period is not None

    @property
    def _order_marginal(self) -> Marginal:
        return self.component_marginals[self.layout.order_by]

    @property
    def _order_period(self) -> float | None:
        """Period of the order_by parameter, None if it is not circular."""
        period = self.layout.component_periods[self.layout.order_by]
        return period if math.isfinite(period) else None

    def _draw(self, num: int) -> Tensor:
        probs = self.cardinality_probs
        if num == 0:
            return probs.new_zeros(0, self.layout.size)
        return self._draw_given(torch.multinomial(probs, num, replacement=True))

    def _draw_given(self, k: Tensor) -> Tensor:
        """Rows with such cardinalities ``(N,)``."""
        layout, num = self.layout, len(k)
        shared = None
        if self.population is None:
            draws = self.component.sample(torch.Size((num * layout.max_cardinality,)))
            components = draws.reshape(num, layout.max_cardinality, -1).float()
        else:
            shared = self._draw_shared(num)
            assert shared is not None
            components = self.population.sample(shared, layout.max_cardinality)
        if self.min_separation is not None:
            components[..., layout.order_by] = sample_separated(
                k,
                layout.max_cardinality,
                self._order_marginal.bounds,
                self.min_separation,
                circular=self._order_period is not None,
            ).float()
        components = self.component_marginals.clamp(components)
        shared = self._draw_shared(num) if shared is None else shared
        return layout.canonical(layout.pack(k, components, shared))

    def _draw_shared(self, num: int) -> Tensor | None:
        if self.shared is None:
            return None
        shared = self.shared.sample(torch.Size((num,))).reshape(num, -1).float()
        return self.shared_marginals.clamp(shared)

    def _log_densities(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
        """Of components ``(..., Kmax)`` and shared parameters; zero where none are."""
        each = self.log_density_of_components(parts)
        shared = torch.zeros_like(each[..., 0])
        if self._shared_law is not None:
            shared = self._shared_law.log_density(parts.shared)
        return each, shared

    def _inside(
        self, value: Tensor, parts: ThetaParts, densities: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Tell which rows lie in the support, from :meth:`_log_densities`."""
        k = parts.cardinality.clamp(0, self.max_cardinality)
        inside = self.layout.is_well_formed(value)
        inside &= (self.cardinality_probs.to(value.device) > 0)[k]
        each, shared = densities
        inside &= torch.isfinite(each).all(-1) & torch.isfinite(shared)
        return inside & self.separated(value)

    def _population(
        self, component: Distribution | Component | Population
    ) -> Population | None:
        """The population that components come from, None for a distribution."""
        if isinstance(component, Population):
            return component
        if isinstance(component, Distribution) or not callable(component):
            return None
        if self.shared is None:
            raise ValueError(
                "component is a function of the shared parameters, of which there are "
                "none: shared must be their distribution, got None."
            )
        return Population(component, self.shared)

    def _checked_separation(self, separation: float | None) -> float | None:
        if separation is None or separation == 0:
            return None
        if not separation > 0:
            raise ValueError(f"min_separation must be positive, got {separation}.")
        marginal = self._order_marginal
        name = self.layout.component_names[self.layout.order_by]
        if not marginal.is_uniform:
            raise ValueError(
                "min_separation needs a uniform, independent marginal of the order_by "
                f"parameter {name!r} (its normalising constant has a closed form only "
                f"there), got {marginal}."
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
        # Squares of small or large units leave the range of single precision.
        device = self.cardinality_probs.device
        with torch.no_grad(), forked_rng(generator_for(0)):
            draws = self._draw(_NUM_MOMENT_SAMPLES).double()
        mean, variance = draws.mean(0), draws.var(0)
        if self.layout.num_counts > 1:
            return mean, variance
        k = torch.arange(self.max_cardinality + 1, device=device).to(mean)
        mean[0] = (self.cardinality_probs * k).sum()
        variance[0] = (self.cardinality_probs * (k - mean[0]).square()).sum()
        return mean, variance


class _SetSupport(constraints.Constraint):
    """Rows that a :class:`VariableKPrior` can produce, up to their order."""

    is_discrete = True
    event_dim = 1

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior = prior

    def check(self, value: Numbers) -> Tensor:
        """Return a boolean for every row, shape ``value.shape[:-1]``."""
        value = as_floats(value, "theta")
        warn_without_slots(value)
        parts = self.prior.layout.unpack(value)
        return self.prior._inside(value, parts, self.prior._log_densities(parts))


def _between(possible: Tensor) -> Tensor:
    """Which numbers are impossible, and lie between possible ones, ``(Kmax + 1,)``."""
    allowed = possible.nonzero().flatten()
    numbers = torch.arange(len(possible), device=possible.device)
    return (numbers > allowed.min()) & (numbers < allowed.max()) & ~possible


def check_independent(prior: VariableKPrior, what: str) -> None:
    """Raise TypeError if components depend on each other by shared parameters."""
    if prior.population is not None:
        raise TypeError(
            f"{what} takes components as independent of the shared parameters, but "
            "component is a function of them in this prior: its answer would be wrong. "
            "refine(..., method='smc') is exact."
        )


def check_covered(new: VariableKPrior, old: VariableKPrior) -> None:
    """Check that a new prior lies within the support of an old one.

    Raises:
        TypeError: If it is no prior over sets.
        ValueError: If their layouts differ, or some sets of the new prior are
            impossible under the old one.
    """
    if not isinstance(new, VariableKPrior):
        raise TypeError(f"prior must be a VariableKPrior, got {type(new).__name__}.")
    if new.layout != old.layout:
        raise ValueError(
            f"prior must have the layout {old.layout}, got {new.layout}. Weights of K "
            "reach to the same largest K, zeros among them: with_cardinality(weights)."
        )
    extra = (new.cardinality_probs > 0) & (old.cardinality_probs == 0)
    if extra.any():
        raise ValueError(
            "prior must give no weight to cardinalities that the training prior "
            f"excludes, got some for K = {extra.nonzero().flatten().tolist()}."
        )
    rows = new.sample((_NUM_CHECKED,), generator_for(0))
    missed = ~torch.isfinite(old.log_prob(rows))
    if not missed.any():
        return
    share = f"{missed.double().mean():.1%}"
    of = "by their separation"
    if not old.keeps_bounds(rows).all():
        of = "by bounds that follow shared parameters"
    if old.layout.num_counts > 1:
        raise ValueError(
            "prior must lie within the training prior's support, got one of which "
            f"{share} of the draws do not."
        )
    parts = old.layout.unpack(rows[missed])
    active = parts.components[parts.mask]
    columns = dict(zip(old.layout.component_names, active.unbind(-1), strict=True))
    columns |= zip(old.layout.shared_names, parts.shared.unbind(-1), strict=True)
    marginals = [*old.component_marginals, *(old.shared_marginals or ())]
    beyond = [
        f"{name} from {values.min():g} to {values.max():g} (training: "
        f"{marginal.bounds[0]:g} to {marginal.bounds[1]:g})"
        for (name, values), marginal in zip(columns.items(), marginals, strict=True)
        if values.numel()
        and (values.min() < marginal.bounds[0] or values.max() > marginal.bounds[1])
    ]
    raise ValueError(
        "prior must lie within the training prior's support, got one of which "
        f"{share} of the draws do not"
        + (f": {', '.join(beyond)}." if beyond else f", {of}.")
    )


def cardinality_weights(
    cardinality: Sequence[float] | np.ndarray | Tensor | Distribution,
) -> Tensor:
    """Normalise weights of K = 0..Kmax.

    Args:
        cardinality: Weights (a list, an array, a tensor), or a distribution over
            0..Kmax such as a ``Categorical`` or a ``Binomial``.

    Returns:
        Float32 probabilities, shape ``(Kmax + 1,)``.

    Raises:
        TypeError: If it is neither numbers nor a distribution.
        ValueError: If the weights are not a vector of at least two non-negative finite
            numbers with a positive sum, or the distribution has no largest K.
    """
    if isinstance(cardinality, Distribution):
        cardinality = _distribution_weights(cardinality)
    try:
        if not isinstance(cardinality, Tensor):
            cardinality = torch.from_numpy(np.array(cardinality, dtype=np.float64))
        weights = cardinality.detach().double()
    except (TypeError, ValueError) as error:
        raise TypeError(
            "cardinality must be weights for K = 0..Kmax or a distribution over "
            f"0..Kmax, got {type(cardinality).__name__}."
        ) from error
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


def _distribution_weights(cardinality: Distribution) -> Tensor:
    """Probabilities of 0..Kmax under a distribution of whole numbers."""
    if isinstance(cardinality, Categorical):
        return cardinality.probs
    name, support = type(cardinality).__name__, cardinality.support
    most = getattr(support, "upper_bound", None)
    if support is constraints.boolean:
        most = 1
    if cardinality.event_shape or most is None or not support.is_discrete:  # pyright: ignore
        raise ValueError(
            "cardinality must be weights for K = 0..Kmax or a distribution over "
            f"0..Kmax, got {name}, which has no largest K. Cut it off: "
            f"{name.lower()}.log_prob(torch.arange(Kmax + 1)).exp()."
        )
    k = torch.arange(int(torch.as_tensor(most).max()) + 1.0)
    return cardinality.log_prob(k).exp()


def _one_dimensional(distribution: Any, name: str) -> tuple[Distribution, int]:
    """An unchecked copy of a distribution over vectors, and their length."""
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
    return distribution, shape[1]


def _names(names: Sequence[str] | None, stem: str, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"{stem}_{i}" for i in range(1, count + 1))
    if len(names) != count:
        raise ValueError(f"{stem} has {count} parameter(s), got names {list(names)}.")
    return tuple(names)


class _Law(NamedTuple):
    """A distribution as it is evaluated, in a precision (None: as it comes)."""

    distribution: Distribution
    dtype: torch.dtype | None

    def log_density(self, values: Tensor) -> Tensor:
        """Of vectors of any batch shape, -inf outside the support."""
        flat = values.reshape(-1, values.shape[-1])
        if not len(flat):
            return values.new_zeros(values.shape[:-1])
        log_p = log_density(self.distribution, flat.to(self.dtype or flat.dtype))
        return log_p.reshape(values.shape[:-1]).to(values)


def _law(distribution: Distribution, marginals: Marginals) -> _Law:
    """In double precision, unless torch's density keeps its digits without.

    That of most families is lost to rounding well inside their bounds, and a normal
    one squares its scale.
    """
    with forked_rng(generator_for(0)):  # sbi's distributions draw when they are made
        double = in_double(distribution)
    if (not marginals.closed or marginals.extreme) and double is not distribution:
        point = marginals.middle(torch.zeros((), dtype=torch.float64))
        with suppress(RuntimeError):  # some of torch's densities mix precisions
            log_density(double, point.unsqueeze(0))
            return _Law(double, torch.float64)
    return _Law(distribution, None)
