r"""Prior over sets of components of several classes.

.. math::
    p(K_a, K_b, \ldots, \Theta_a, \Theta_b, \ldots, s)
        = p(s)\, \prod_c p_c(K_c, \Theta_c)

Each class has a prior over sets of its own, whose densities multiply.

See Also:
    :mod:`sbi_slotflow.sets.classes`, how rows hold them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from sbi.utils.torchutils import move_all_tensor_to_device
from torch import Tensor
from torch.distributions import Distribution, constraints

from .checks import Numbers, as_floats
from .classes import ClassLayout, ClassMarginals
from .layout import ThetaParts
from .marginals import Marginals, marginals_of
from .prior import (
    VariableKPrior,
    _law,
    _one_dimensional,
    cardinality_weights,
)

__all__ = ["ClassComponents", "MultiClassPrior"]


class ClassComponents(Distribution):
    """One component of any class, the class as often as priors expect it.

    Args:
        layout: The layout of all classes.
        classes: Distribution of a component of each.
        weights: Share of each class, ``(C,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self, layout: ClassLayout, classes: Sequence[Distribution], weights: Tensor
    ) -> None:
        self.layout, self.classes, self.weights = layout, list(classes), weights
        event = torch.Size((layout.num_component_params,))
        super().__init__(torch.Size(), event, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw components ``(*sample_shape, D)``."""
        shape = torch.Size(sample_shape)
        num = shape.numel()
        found = self.weights.new_zeros(num, self.layout.num_component_params)
        if not num:
            return found.reshape(*shape, found.shape[-1])
        label = torch.multinomial(self.weights, num, replacement=True)
        for c, component in enumerate(self.classes):
            own = component.sample(torch.Size((num,))).reshape(num, -1).to(found)
            own = self.layout.from_class(own, c)
            found = torch.where((label == c).unsqueeze(-1), own, found)
        return found.reshape(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)`` of components ``(..., D)``, -inf of no class."""
        found = value.new_full(value.shape[:-1], -torch.inf)
        for c, component in enumerate(self.classes):
            there = value[..., 0] == c
            if not there.any():  # torch's distributions want a row
                continue
            own = self.layout.to_class(value[there], c)
            log_p = component.log_prob(own)
            log_p = log_p.sum(-1) if log_p.ndim > 1 else log_p
            found[there] = log_p.to(found) + self.weights[c].log().to(found)
        return found


class MultiClassPrior(VariableKPrior):
    r"""Prior :math:`p(s) \prod_c p_c(K_c, \Theta_c)` over rows of several classes.

    Args:
        classes: A prior for each class by its name, in the order of the rows' blocks;
            without shared parameters.
        shared: Distribution of the parameters that all share, event shape ``(S,)``.
        shared_names: Their names; ``shared_1..shared_S`` if omitted.
        periods: Periods of circular shared parameters by name.
        validate_args: As in torch; sbi switches it off.

    Raises:
        TypeError: If a class is no :class:`VariableKPrior`, or ``shared`` is no torch
            distribution.
        ValueError: If there is no class, a class has shared parameters or classes of
            its own, or names collide.

    Example:
        >>> from torch.distributions import Independent, Uniform
        >>> def unit(num):
        ...     return Independent(Uniform(torch.zeros(num), torch.ones(num)), 1)
        >>> line = VariableKPrior(unit(2), [1, 1, 1], component_names=("f", "height"))
        >>> burst = VariableKPrior(unit(1), [1, 1], component_names=("time",))
        >>> prior = MultiClassPrior({"line": line, "burst": burst})
        >>> prior.layout.names[:3]
        ['K_line', 'K_burst', 'line.f_1']
        >>> prior.sample((5,)).shape
        torch.Size([5, 7])
    """

    def __init__(
        self,
        classes: Mapping[str, VariableKPrior],
        *,
        shared: Distribution | None = None,
        shared_names: Sequence[str] | None = None,
        periods: Mapping[str, float] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(classes, Mapping):
            raise TypeError(
                f"classes must map names to priors, got {type(classes).__name__}."
            )
        for name, prior in classes.items():
            if not isinstance(prior, VariableKPrior):
                raise TypeError(
                    f"class {name!r} must be a VariableKPrior, got "
                    f"{type(prior).__name__}."
                )
            if isinstance(prior, MultiClassPrior):
                raise ValueError(f"class {name!r} must not have classes of its own.")
        self.classes = dict(classes)
        self.population = None
        self.shared, num_shared = None, 0
        if shared is not None:
            self.shared, num_shared = _one_dimensional(shared, "shared")
        names = tuple(f"shared_{i}" for i in range(1, num_shared + 1))
        if shared_names is not None:
            names = tuple(shared_names)
        if len(names) != num_shared:
            raise ValueError(
                f"shared has {num_shared} parameter(s), got names {list(names)}."
            )
        layouts = {name: prior.layout for name, prior in self.classes.items()}
        self.layout: ClassLayout = ClassLayout.of(layouts, names, periods)
        self.log_joint = _joint([p.log_cardinality_probs for p in self.members])
        # Of the number of all together, beside what follows from each class's.
        self._log_said = torch.zeros(self.layout.max_cardinality + 1).double()
        self.component_marginals = ClassMarginals(
            self.layout, [prior.component_marginals for prior in self.members]
        )
        self.shared_marginals, self._shared_law = Marginals(()), None
        if self.shared is not None:
            self.shared_marginals = marginals_of(
                self.shared, self.layout.shared_periods
            )
            self._shared_law = _law(self.shared, self.shared_marginals)
        self.cardinality_probs = self._totals()
        self.component = self._components()
        apart = [p.min_separation for p in self.members if p.min_separation]
        # Of any class: whether there is one is all that is asked.
        self.min_separation = min(apart) if apart else None
        Distribution.__init__(
            self,
            torch.Size(),
            torch.Size((self.layout.size,)),
            validate_args=False if validate_args is None else validate_args,
        )

    @property
    def members(self) -> list[VariableKPrior]:
        """The priors of the classes, in order."""
        return list(self.classes.values())

    @property
    def log_counts(self) -> Tensor:
        r"""What counts add to a set's density beside its components'.

        .. math:: \log p(K_1 \ldots K_C | K) + \sum_c \log K_c! - \log K!

        float64, of shape ``(K_1max + 1, ..., K_Cmax + 1)``, -inf where impossible.
        """
        joint = self.log_joint
        sizes = [torch.arange(n, dtype=torch.float64) for n in joint.shape]
        grids = torch.meshgrid(*sizes, indexing="ij")
        total = torch.stack(grids).sum(0)
        ways = sum(torch.lgamma(grid + 1) for grid in grids) - torch.lgamma(total + 1)
        log_total = self.cardinality_probs.double().log()[total.long()]
        value = joint - log_total + ways
        return torch.where(joint.isfinite(), value, -torch.inf)

    def log_prob(self, value: Numbers) -> Tensor:
        """Evaluate the log density of the set; see :meth:`VariableKPrior.log_prob`."""
        value = as_floats(value, "theta")
        layout = self.layout
        good = layout.is_well_formed(value)
        total = self._log_shared(value)
        for row, prior in zip(layout.views(value), self.members, strict=True):
            total = total + prior.log_prob(row)
        change = self.log_joint - _joint(
            [prior.log_cardinality_probs for prior in self.members]
        )
        change = torch.where(self.log_joint.isfinite(), change, -torch.inf)
        counts = layout.counts(value).unbind(-1)
        index = [
            count.clamp(0, most - 1)
            for count, most in zip(counts, change.shape, strict=True)
        ]
        total = total + change.to(value)[tuple(index)]
        return torch.where(good, total, total.new_full((), -torch.inf))

    def with_cardinality(
        self,
        cardinality: Sequence[float] | Tensor | Distribution | Mapping[str, Any],
    ) -> "MultiClassPrior":
        """Return the same prior with other cardinalities.

        Args:
            cardinality: Weights of each class's K by its name (classes that are not
                named keep theirs), or of the number of all components together: then
                p(K_1..K_C) given that number stays as it is.

        Raises:
            ValueError: If there is no such class, or weights do not fit.
        """
        if isinstance(cardinality, Mapping):
            for name in cardinality:
                self.layout.of_class(name)
            members = {
                name: prior.with_cardinality(cardinality[name])
                if name in cardinality
                else prior
                for name, prior in self.classes.items()
            }
            new = self._with_members(members)
            # What was said of all together stays said.
            new._log_said = self._log_said
            total = _totals_of(new.log_joint.shape)
            return new._with_joint(new.log_joint + new._log_said[total])
        weights = cardinality_weights(cardinality).double()
        if len(weights) != self.max_cardinality + 1:
            raise ValueError(
                f"cardinality must hold {self.max_cardinality + 1} weights "
                f"(K = 0..{self.max_cardinality}, all classes together), got "
                f"{len(weights)}. Those of a class: with_cardinality({{'name': ...}})."
            )
        old = self.cardinality_probs.double()
        if (weights[old == 0] > 0).any():
            bad = ((weights > 0) & (old == 0)).nonzero().flatten().tolist()
            raise ValueError(
                f"cardinality must be zero where no class has components, got some "
                f"for K = {bad}."
            )
        new = self._with_members(self.classes)
        ratio = torch.where(old > 0, weights / old, 0.0).log()
        new._log_said = self._log_said + ratio
        total = _totals_of(self.log_joint.shape)
        return new._with_joint(self.log_joint + ratio[total])

    def allows(self, theta: Tensor) -> Tensor:
        """Tell which rows ``(..., E)`` have numbers that are possible together."""
        counts = self.layout.counts(theta).unbind(-1)
        return torch.isfinite(self.log_joint)[tuple(counts)]

    @property
    def probs_by_class(self) -> list[Tensor]:
        """P(K) of each class, whatever there is of the others."""
        probs = self.log_joint.exp()
        others = [[d for d in range(probs.ndim) if d != c] for c in range(probs.ndim)]
        return [probs.sum(rest) if rest else probs for rest in others]

    def bridged(self) -> "MultiClassPrior":
        """Return the prior with some weight on numbers between possible ones.

        See the base. A move changes one number by one, or one up and another down: only
        where those do not lead everywhere, numbers on a shortest way get weight.
        """
        joint = self.log_joint
        possible = torch.isfinite(joint)
        linked = _linked(possible)
        between = linked & ~possible
        if not between.any():
            return self
        members = {}
        for c, (name, prior) in enumerate(self.classes.items()):
            others = [d for d in range(joint.ndim) if d != c]
            own = linked.any(others) if others else linked
            known = prior.cardinality_probs
            mean = known[known > 0].mean()
            weights = torch.where(own & (known == 0), mean, known)
            members[name] = prior.with_cardinality(weights)
        mean = joint[possible].exp().mean().log()
        new = self._with_members(members)
        return new._with_joint(torch.where(between, mean, joint))

    def to(self, device: str | torch.device) -> "MultiClassPrior":
        """Move the prior to a device, in place, and return it."""
        for prior in self.members:
            prior.to(device)
        for distribution in (self.shared, self._shared_law):
            if distribution is not None:
                move_all_tensor_to_device(
                    getattr(distribution, "distribution", distribution), device
                )
        self.log_joint = self.log_joint.to(device)
        self._log_said = self._log_said.to(device)
        self.cardinality_probs = self.cardinality_probs.to(device)
        self.component = self._components()
        self.__dict__.pop("_moments", None)
        return self

    def separated(self, theta: Tensor) -> Tensor:
        """Tell which rows keep the least separations of their classes."""
        kept = torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
        for row, prior in zip(self.layout.views(theta), self.members, strict=True):
            kept &= prior.separated(row)
        return kept

    @property
    def separated_around(self) -> bool:
        """Whether a class keeps its separation across the seam of a circle too."""
        return any(prior.separated_around for prior in self.members)

    def _with_members(self, members: Mapping[str, VariableKPrior]) -> "MultiClassPrior":
        layout = self.layout
        return MultiClassPrior(
            members,
            shared=self.shared,
            shared_names=layout.shared_names or None,
            periods=layout.periods,
        )

    def _with_joint(self, log_joint: Tensor) -> "MultiClassPrior":
        """Set log p(K_1..K_C) of a prior that was just made, but for its sum."""
        if not torch.isfinite(log_joint).any():
            raise ValueError(
                "cardinality must leave some numbers of components possible, got none."
            )
        self.log_joint = log_joint - log_joint.flatten().logsumexp(0)
        self.cardinality_probs = self._totals()
        self.component = self._components()
        return self

    def _totals(self) -> Tensor:
        """P(K) of all components together, ``(Kmax + 1,)``."""
        probs = self.log_joint.exp().flatten()
        total = _totals_of(self.log_joint.shape).flatten().to(probs.device)
        sums = probs.new_zeros(self.layout.max_cardinality + 1)
        return sums.index_add(0, total, probs).div(probs.sum()).float()

    def _components(self) -> ClassComponents:
        """A component of any class."""
        expected = []
        probs = self.log_joint.exp()
        for c, size in enumerate(probs.shape):
            others = [d for d in range(probs.ndim) if d != c]
            own = probs.sum(others) if others else probs
            expected.append((own * torch.arange(size).to(own)).sum())
        # No class shall be impossible to be born.
        weights = torch.stack(expected).clamp(min=1e-3).float()
        parts = [prior.component for prior in self.members]
        return ClassComponents(self.layout, parts, weights / weights.sum())

    def _log_shared(self, value: Tensor) -> Tensor:
        if self._shared_law is None:
            return torch.zeros_like(value[..., 0])
        return self._shared_law.log_density(self.layout.unpack(value).shared)

    def _draw(self, num: int) -> Tensor:
        layout, probs = self.layout, self.log_joint.exp()
        if num == 0:
            return self.cardinality_probs.new_zeros(0, layout.size)
        code = torch.multinomial(probs.flatten(), num, replacement=True)
        counts = torch.stack(torch.unravel_index(code, probs.shape), -1)
        rows = [prior._draw_given(counts[:, c]) for c, prior in enumerate(self.members)]
        shared = None
        if self.shared is not None:
            shared = self.shared.sample(torch.Size((num,))).reshape(num, -1).float()
            shared = self.shared_marginals.clamp(shared)
        return layout.joined(rows, shared)

    def _inside(
        self, value: Tensor, parts: ThetaParts, densities: tuple[Tensor, Tensor]
    ) -> Tensor:
        return torch.isfinite(self.log_prob(value))

    def _log_densities(self, parts: ThetaParts) -> tuple[Tensor, Tensor]:
        # The support asks for them and hands them to _inside, which needs none.
        nothing = torch.zeros_like(parts.mask, dtype=parts.shared.dtype)
        return nothing, nothing[..., 0]


def _linked(possible: Tensor) -> Tensor:
    """Possible numbers, and what is on a way between them, bool ``(K_1max + 1, ...)``.

    A step changes one number by one, or one up and another down.
    """
    ends = torch.eye(possible.ndim, dtype=torch.long)
    steps = [*ends, *(-ends)]
    steps += [a - b for a in ends for b in ends if not torch.equal(a, b)]
    cells, size = possible.nonzero(), torch.tensor(possible.shape)
    linked = torch.zeros_like(possible)
    linked[tuple(cells[0])] = True
    while True:
        known = [tuple(cell) for cell in linked.nonzero().tolist()]
        before: dict[tuple[int, ...], Any] = dict.fromkeys(known)
        queue = list(before)
        for cell in queue:  # breadth first, over all numbers
            if possible[cell] and not linked[cell]:
                while cell is not None:
                    linked[cell], cell = True, before[cell]
                break
            for step in steps:
                there = torch.tensor(cell) + step
                if ((there >= 0) & (there < size)).all():
                    key = tuple(there.tolist())
                    if key not in before:
                        before[key] = cell
                        queue.append(key)
        else:
            return linked


def _totals_of(shape: Sequence[int]) -> Tensor:
    """Number of all components, int64, for all numbers of each class."""
    grids = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
    return torch.stack(grids).sum(0)


def _joint(logs: Sequence[Tensor]) -> Tensor:
    """Log p(K_1..K_C) of independent numbers, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for log_p in logs:
        total = total.unsqueeze(-1) + log_p.double()
    return total
