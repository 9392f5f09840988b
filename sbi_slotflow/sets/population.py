r"""Components that are drawn from a population, whose parameters are shared ones.

.. math::
    p(\theta_1, \ldots, \theta_K | s) = \prod_{k=1}^K p(\theta_k | s), \qquad
    p(\theta) = \int p(\theta | s)\, p(s)\, \mathrm{d}s

Given the shared parameters s (mean and width of a flux, a scale, a floor) components
are independent of each other; without them they are not. The marginal p(theta) of one
component is what charts, cells and least squares are built from, and what births are
proposed by: an average over a few hundred values of s, evenly spread under their prior.
Where each parameter has a ``cdf`` given s, the marginal's distribution function is
tabulated (:class:`~.marginals.TabulatedMarginal`). Parameters whose density is the same
for every s (a place) keep the marginal that they would have without a population.

Example:
    Times are uniform; logarithms of fluxes have a mean and a width of their own:

    >>> from torch.distributions import Independent, Normal, Uniform
    >>> def component(shared):
    ...     mean, width = shared.unbind(-1)
    ...     return [Uniform(0.0, 10.0), Normal(mean, width)]
    >>> low, high = torch.tensor([0.0, 0.1]), torch.tensor([3.0, 0.5])
    >>> population = Population(component, Independent(Uniform(low, high), 1))
    >>> [str(marginal) for marginal in population.marginals]
    ['uniform', 'Normal of a population']
    >>> given = torch.tensor([[1.0, 0.2], [2.0, 0.2]])
    >>> population.sample(given, 3).shape
    torch.Size([2, 3, 2])
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from sbi.utils.torchutils import set_validate_args
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    constraints,
)

from ..seeding import forked_rng, generator_for
from .laws import bounds_of, column_log_density, flattened
from .marginals import (
    FittedMarginal,
    Marginal,
    Marginals,
    TabulatedMarginal,
    ends_of,
    fitted_marginal,
    line_of,
    marginals_of,
)
from .transforms import log_normal

__all__ = ["Component", "Population"]

Component = Callable[[Tensor], Distribution | Sequence[Distribution]]
"""Maps shared parameters ``(B, S)`` to the distribution of a component of each row."""

# Values of the shared parameters that the marginal is an average over, and those of
# them that make the mixture from which components are proposed.
_NUM_NODES, _NUM_MIXED = 512, 256
# Normal scores at which the distribution function is tabulated.
_SCORES = torch.linspace(-4.5, 4.5, 97, dtype=torch.float64)
_HALVINGS = 60
# Draws of each node that tell which densities depend on it.
_NUM_DRAWS, _MOST_FITTED = 64, 10_000
# Densities evaluated at once.
_MOST_NUMBERS = 2**22
_ADVICE = (
    "component(shared) must return, for shared (B, S), a torch Distribution of batch "
    "shape (B,) and event shape (D,), or a list of D univariate distributions of batch "
    "shape (B,) or (), all in the dtype of shared"
)


class _Product(Distribution):
    """Independent univariate distributions of batch shape ``(B,)``, one a parameter."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, parts: Sequence[Distribution], num: int) -> None:
        self.parts = [part.expand(torch.Size((num,))) for part in parts]
        super().__init__(torch.Size((num,)), torch.Size((len(parts),)), False)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape)
        return torch.stack([part.sample(shape).double() for part in self.parts], -1)

    def column(self, function: str, index: int, value: Tensor) -> Tensor:
        return _of_univariate(self.parts[index], function, value)

    def column_log_density(self, value: Tensor) -> Tensor:
        columns = zip(self.parts, value.unbind(-1), strict=True)
        return torch.stack([column_log_density(p, v) for p, v in columns], -1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        ends = [bounds_of(part) for part in self.parts]
        low, high = (torch.stack(side, -1) for side in zip(*ends, strict=True))
        return low, high


class _Joint(Distribution):
    """A user's distribution over vectors, of batch shape ``(B,)``; columns if it can.

    ``flat`` is the same law as a batch ``(B, D)`` of univariate ones, None if
    parameters depend on each other given s.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, law: Distribution) -> None:
        self.law = law
        flat = flattened(law)
        shape = law.batch_shape + law.event_shape
        self.flat = flat if flat is not None and flat.batch_shape == shape else None
        super().__init__(law.batch_shape, law.event_shape, False)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return self.law.sample(torch.Size(sample_shape)).double()

    def column(self, function: str, index: int, value: Tensor) -> Tensor:
        assert self.flat is not None
        wide = value.unsqueeze(-1).expand(*value.shape, *self.event_shape)
        return _of_univariate(self.flat, function, wide)[..., index]

    def column_log_density(self, value: Tensor) -> Tensor:
        assert self.flat is not None
        return column_log_density(self.flat, value)

    def bounds(self) -> tuple[Tensor, Tensor]:
        shape = self.batch_shape + self.event_shape
        low, high = (end.reshape(shape) for end in bounds_of(self.law))
        return low, high


def _of_univariate(law: Distribution, function: str, value: Tensor) -> Tensor:
    """``cdf`` or ``log_density`` of values that broadcast with its batch."""
    return law.cdf(value) if function == "cdf" else column_log_density(law, value)


class _Marginal(Distribution):
    """The marginal of one component, an even mixture over nodes ``(M, S)``.

    Draws and densities are of the same mixture, so that it is a proper proposal.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, population: "Population", nodes: Tensor) -> None:
        self.population, self.nodes = population, nodes
        size = torch.Size((population.num_params,))
        super().__init__(torch.Size(), size, False)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw components ``(*sample_shape, D)``, float32."""
        shape = torch.Size(sample_shape)
        which = torch.randint(len(self.nodes), (shape.numel(),))
        found = self.population.sample(self.nodes[which.to(self.nodes.device)], 1)
        return found.reshape(*shape, self.population.num_params)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)`` of components ``(..., D)``."""
        flat = value.reshape(-1, value.shape[-1])
        step = max(1, _MOST_NUMBERS // (len(self.nodes) * flat.shape[-1]))
        nodes = self.nodes.to(flat.device)
        parts = [
            self.population.log_density(
                some.expand(len(nodes), -1, -1), nodes
            ).logsumexp(0)
            for some in flat.split(step)
        ]
        found = torch.cat(parts) if parts else flat.new_zeros(0)
        return found.reshape(value.shape[:-1]) - math.log(len(nodes))


class Population:
    """The density of components given shared parameters, and its marginal.

    Args:
        component: Maps shared parameters ``(B, S)``, float64, to the distribution of a
            component of each row: a torch distribution of batch shape ``(B,)`` and
            event shape ``(D,)``, or a list of D univariate ones of batch shape ``(B,)``
            or ``()``, independent given the shared parameters.
        shared: Distribution of the shared parameters.

    Attributes:
        marginals: Marginals of a component's parameters.
        marginal: Distribution of one component without knowledge of the shared
            parameters.
        bounds_follow_shared: Whether the support depends on the shared parameters.

    Raises:
        TypeError: If ``component`` returns something else.
        ValueError: If shapes are others, a support is no product of intervals, or its
            ends follow shared parameters without bounds of their own.
    """

    def __init__(
        self,
        component: Component,
        shared: Distribution,
    ) -> None:
        self.component = component
        self._shared = marginals_of(shared)
        nodes = _nodes(shared, self._shared)
        with torch.no_grad(), forked_rng(generator_for(0)):
            self.num_params = int(self._given(nodes[:2]).event_shape[0])
            self.marginals = self._marginals(nodes)
        self.marginal = _Marginal(self, nodes[:_NUM_MIXED])

    def sample(self, shared: Tensor, num: int) -> Tensor:
        """Draw ``num`` components of each row ``(N, S)``, float32 ``(N, num, D)``."""
        if not len(shared) or not num:
            return torch.zeros(len(shared), num, self.num_params).to(shared.device)
        given = self._given(shared)
        draws = given.sample(torch.Size((num,))).movedim(0, 1)
        draws = self.marginals.clamp(draws.float())
        if self.bounds_follow_shared:
            # Rounding to single precision may lead out of the bounds of this row.
            low, high = (end.unsqueeze(1).expand(draws.shape) for end in given.bounds())
            far, wide = draws.new_full((), torch.inf), draws.double()
            least, most = low.float().nextafter(far), high.float().nextafter(-far)
            draws = torch.where(wide <= low, least, draws)
            draws = torch.where(wide >= high, most, draws)
        return draws

    def log_density(self, components: Tensor, shared: Tensor) -> Tensor:
        """Log density ``(..., K)`` of components ``(..., K, D)`` given ``(..., S)``.

        It is -inf outside the support that a component has given s. Shared parameters
        must lie in their own support.
        """
        batch, num = components.shape[:-2], components.shape[-2]
        flat = components.double().reshape(-1, num, self.num_params).movedim(0, 1)
        if not flat.numel():
            return components.new_zeros(components.shape[:-1])
        given = self._given(shared.reshape(-1, shared.shape[-1]))
        if isinstance(given, _Product):
            found = given.column_log_density(flat).sum(-1)
        else:
            found = column_log_density(given.law, flat)
        return found.movedim(0, 1).reshape(*batch, num).to(components)

    def to(self, device: str | torch.device) -> None:
        """Move what is kept to a device, in place."""
        self.marginal.nodes = self.marginal.nodes.to(device)

    def _given(self, shared: Tensor) -> _Product | _Joint:
        """The distribution of a component of each row ``(N, S)``, checked."""
        num = len(shared)
        try:
            found: Any = self.component(shared.double())
        except RuntimeError as error:
            raise ValueError(f"{_ADVICE}; it fails: {error}") from error
        if isinstance(found, list | tuple):
            for part in found:
                if not isinstance(part, Distribution):
                    raise TypeError(f"{_ADVICE}, got {type(part).__name__} in a list.")
                set_validate_args(part, False)
                if part.event_shape or part.batch_shape not in ((), (1,), (num,)):
                    raise ValueError(
                        f"{_ADVICE}, got {type(part).__name__} of batch shape "
                        f"{tuple(part.batch_shape)} and event shape "
                        f"{tuple(part.event_shape)} for B = {num}."
                    )
            if not found:
                raise ValueError(f"{_ADVICE}, got an empty list.")
            return _Product(found, num)
        if not isinstance(found, Distribution):
            raise TypeError(f"{_ADVICE}, got {type(found).__name__}.")
        set_validate_args(found, False)
        if found.batch_shape != (num,) or len(found.event_shape) != 1:
            raise ValueError(
                f"{_ADVICE}, got {type(found).__name__} of batch shape "
                f"{tuple(found.batch_shape)} and event shape "
                f"{tuple(found.event_shape)} for B = {num}."
            )
        return _Joint(found)

    def _marginals(self, nodes: Tensor) -> Marginals:
        """Marginals of the mixture over nodes; those free of s as they are."""
        given = self._given(nodes)
        for part in given.parts if isinstance(given, _Product) else [given.law]:
            _check_parameters(part)
        low, high = self._outer_bounds(given)
        if isinstance(given, _Joint) and given.flat is None:
            mixed = MixtureSameFamily(
                Categorical(torch.ones(len(nodes)).double(), validate_args=False),
                given.law,
                validate_args=False,
            )
            return marginals_of(mixed)
        first = self._given(nodes[:1])
        if isinstance(first, _Product):
            alone: list[Marginal] = [marginals_of(part)[0] for part in first.parts]
        else:
            alone = list(marginals_of(first.law))
        draws = given.sample(torch.Size((_NUM_DRAWS,))).flatten(0, 1)
        follows = self._follows(given, draws)
        found = []
        for d in range(self.num_params):
            if not follows[d]:
                found.append(alone[d])
                continue
            name = f"{_family(given, d)} of a population"
            ends = (float(low[d]), float(high[d]))
            found.append(_tabulated(given, d, name, ends, draws[:, d]))
        return Marginals(found)

    def _follows(self, given: _Product | _Joint, draws: Tensor) -> list[bool]:
        """Which parameters have a density that depends on the shared ones."""
        some = draws[:: max(1, len(draws) // 256)].unsqueeze(1)
        some = some.expand(-1, *given.batch_shape, -1)
        log_p = given.column_log_density(some)
        first = log_p[:, :1]
        same = (log_p == first) | ((log_p - first).abs() <= 1e-9 * (1 + first.abs()))
        return (~same.flatten(0, 1).all(0)).tolist()

    def _outer_bounds(self, given: _Product | _Joint) -> tuple[Tensor, Tensor]:
        """Ends ``(D,)`` of the support for any shared parameters."""
        low, high = given.bounds()
        follow = (low != low[:1]).any(0) | (high != high[:1]).any(0)
        self.bounds_follow_shared = bool(follow.any())
        if self.bounds_follow_shared:
            sides = [marginal.inside(torch.float32) for marginal in self._shared]
            if any(not math.isfinite(b) for m in self._shared for b in m.bounds):
                raise ValueError(
                    "component(shared) has bounds that follow the shared parameters, "
                    "whose own prior must then be bounded: its bounds are "
                    f"{[marginal.bounds for marginal in self._shared]}. Give it "
                    "bounds, or let only the density inside follow them."
                )
            corners = torch.cartesian_prod(*torch.tensor(sides).double())
            ends = self._given(corners.reshape(-1, len(sides))).bounds()
            low, high = torch.cat([low, ends[0]]), torch.cat([high, ends[1]])
        return low.amin(0), high.amax(0)


def _check_parameters(law: Distribution) -> None:
    """Raise ValueError if a parameter of a distribution is not one that it may have."""
    law = getattr(law, "base_dist", law)
    for name, constraint in law.arg_constraints.items():
        value = getattr(law, name, None)
        if constraint.is_discrete or not isinstance(value, Tensor):
            continue
        good = constraint.check(value)
        if not good.all():
            bad = value[~good] if good.shape == value.shape else value
            raise ValueError(
                f"component(shared) must be a distribution for all shared parameters "
                f"that shared allows, got {type(law).__name__} with {name} = "
                f"{float(bad.flatten()[0]):g}, which must be {constraint}: bound the "
                "prior of what it reads, or let component take its exponential."
            )


def _nodes(shared: Distribution, marginals: Marginals) -> Tensor:
    """Values ``(M, S)`` of the shared parameters, evenly spread under their prior."""
    with torch.no_grad(), forked_rng(generator_for(0)):
        fitted = any(isinstance(marginal, FittedMarginal) for marginal in marginals)
        if marginals.whitening is None and not fitted:
            sobol = torch.quasirandom.SobolEngine(len(marginals), True, seed=0)
            shares = sobol.draw(_NUM_NODES, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            nodes = marginals.inverse(torch.special.ndtri(shares))
        else:
            draws = shared.sample(torch.Size((_NUM_NODES,)))
            nodes = draws.reshape(_NUM_NODES, -1).double().cpu()
        return marginals.clamp(nodes.float()).double()


def _family(given: _Product | _Joint, index: int) -> str:
    law = given.parts[index] if isinstance(given, _Product) else given.law
    while isinstance(law, Independent):
        law = law.base_dist
    return type(law).__name__


def _tabulated(
    given: _Product | _Joint,
    index: int,
    name: str,
    bounds: tuple[float, float],
    draws: Tensor,
) -> Marginal:
    """One parameter's marginal, by the mean of its distribution functions.

    Where there is none, or it jumps, by shift and scale of draws.
    """
    line, num = line_of(*bounds), len(draws)
    (ends,) = ends_of(None, *(torch.tensor([end]).double() for end in bounds))
    draws = draws[torch.randperm(num)].clamp(*ends)
    targets = torch.special.ndtr(_SCORES)

    def share(t: Tensor) -> Tensor:
        x = line.inverse(t).unsqueeze(-1)
        below, above = (end[:, index] for end in given.bounds())
        # What transforms of torch say beyond their support need not be a share.
        found = given.column(
            "cdf", index, torch.minimum(torch.maximum(x, below), above)
        )
        found = torch.where(x <= below, 0.0, torch.where(x >= above, 1.0, found))
        return found.clamp(0.0, 1.0).mean(-1)

    try:
        known, _ = line.forward(draws)
        low, high = known.min().expand_as(targets), known.max().expand_as(targets)
        width = (high - low).clamp(min=1e-6)
        for _ in range(_HALVINGS):  # until all scores lie between
            low = torch.where(share(low) > targets, low - width, low)
            high = torch.where(share(high) < targets, high + width, high)
            width = 2 * width
    except NotImplementedError:
        return fitted_marginal(name, bounds, ends, draws[:_MOST_FITTED])
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = share(middle) < targets
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = line.inverse(low)
    density = given.column("log_density", index, x.unsqueeze(-1)).exp().mean(-1)
    slope = density.log() - line.forward(x)[1] - log_normal(_SCORES)
    steps = low.diff()
    if not ((steps > 0).all() and slope.isfinite().all()):
        return fitted_marginal(name, bounds, ends, draws[:_MOST_FITTED])
    knots = torch.stack([low, _SCORES, slope], -1)
    return TabulatedMarginal(bounds, ends, name, tuple(map(tuple, knots.tolist())))
