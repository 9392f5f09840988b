r"""Posteriors that are wrong in a known way, to see that a check notices.

Each function wraps a posterior and returns another, which can be checked, plotted and
compared like any other::

    report(faults.narrowed(posterior), problem).passed  # False

K is drawn from q(K | x), sharpened by :func:`oversharp`, and components given K from
the posterior's own draws, spoilt by the other faults. Moments of draws given K are
taken in canonical order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..posterior.base import Posterior
from ..sets.circular import circular_mean, near
from ..sets.distribution import SetDistribution
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior

__all__ = [
    "FaultyPosterior",
    "independent",
    "narrowed",
    "oversharp",
    "shifted",
    "unmixed",
]

_FEWEST_DRAWS = 256


class Spoil(Protocol):
    """Turns draws given K, ``(P, B, E)``, into wrong ones of the same shape."""

    def __call__(
        self, rows: Tensor, k: int, generator: torch.Generator | None
    ) -> Tensor:
        """Spoil rows, all of cardinality k."""
        ...


class FaultyPosterior(Posterior):
    """A posterior made wrong; it has no density."""

    def __init__(
        self, posterior: Posterior, spoil: Spoil | None = None, sharpness: float = 1.0
    ) -> None:
        self.posterior, self.prior = posterior, posterior.prior
        self.simulator = posterior.simulator
        self._x, self._device = posterior.default_x, posterior._device
        self._spoil, self._sharpness = spoil, sharpness

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.posterior.event_shape

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` exists."""
        return False

    def given(self, x: Tensor) -> "FaultySets":
        """Return the faulty distribution given observations ``(B, *event)``."""
        return FaultySets(self.posterior, x, self._spoil, self._sharpness)

    def with_cardinality_prior(
        self, weights: Sequence[float] | Tensor
    ) -> "FaultyPosterior":
        """Return the posterior under another prior of K, with the same fault."""
        other: Any = self.posterior
        return FaultyPosterior(
            other.with_cardinality_prior(weights), self._spoil, self._sharpness
        )


class FaultySets(SetDistribution):
    """A faulty posterior given B observations."""

    def __init__(
        self, posterior: Posterior, x: Tensor, spoil: Spoil | None, sharpness: float
    ) -> None:
        self.layout, self.num_observations = posterior.prior.layout, len(x)
        self._posterior, self._given_x, self._spoil = posterior, x, spoil
        self._logits = sharpness * posterior.given(x).cardinality().logits

    def cardinality(self) -> Categorical:
        """Return q(K | x) as the faulty posterior has it."""
        return Categorical(logits=self._logits)

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows ``(*sample_shape, B, E)``."""
        shape, x = torch.Size(sample_shape), self._given_x
        num = shape.numel()
        counts = torch.full((num, len(x)), k or 0, device=x.device)
        if k is None and num:
            probs = self.cardinality().probs.float()
            counts = torch.multinomial(probs, num, True, generator=generator).mT
        rows = x.new_zeros(num, len(x), self.layout.size).float()
        for size in counts.unique().tolist():
            here = counts == size
            columns = here.any(0).nonzero().squeeze(-1)
            most = int(here.sum(0).max())
            found = self._of_size(most, x[columns], size, generator)
            # Each column takes as many of its draws as it needs.
            place = (here.cumsum(0) - 1)[:, columns]
            for_column = torch.arange(len(columns), device=x.device).expand_as(place)
            inside = here[:, columns]
            row = inside.nonzero()[:, 0]
            rows[row, columns[for_column[inside]]] = found[
                place[inside], for_column[inside]
            ]
        return rows.reshape(*shape, len(x), self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raise: a spoilt posterior's density is not known."""
        raise NotImplementedError("log_prob does not exist for a faulty posterior.")

    def _of_size(
        self, num: int, x: Tensor, k: int, generator: torch.Generator | None
    ) -> Tensor:
        """Draw rows ``(num, B, E)`` of cardinality k."""
        pool = num if self._spoil is None else max(num, _FEWEST_DRAWS)
        rows = self._posterior.given(x).sample((pool,), k, generator)
        if self._spoil is not None:
            rows = self._spoil(rows, k, generator)
        return rows[:num]


def narrowed(
    posterior: Posterior,
    factor: float = 0.8,
    *,
    periods: Mapping[str, float] | None = None,
) -> FaultyPosterior:
    """Pull all parameters towards their mean given K."""
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}.")
    return FaultyPosterior(posterior, _Moved(posterior.prior, periods, factor, 0.0))


def shifted(
    posterior: Posterior, by: float = 0.5, *, periods: Mapping[str, float] | None = None
) -> FaultyPosterior:
    """Move all parameters by a share of their standard deviation given K."""
    return FaultyPosterior(posterior, _Moved(posterior.prior, periods, 1.0, by))


def oversharp(posterior: Posterior, power: float = 2.0) -> FaultyPosterior:
    r"""Make q(K | x) too sure, :math:`\propto q(K | x)^{power}`."""
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}.")
    return FaultyPosterior(posterior, sharpness=power)


def unmixed(posterior: Posterior) -> FaultyPosterior:
    """Let labels keep to themselves where components overlap.

    Each component stays between the midpoints of its own and its neighbours' mean
    ``order_by`` parameter, as where slots own a range each, or a sampler's labels never
    mix. Where components are well apart nothing changes.
    """
    return FaultyPosterior(posterior, _Unmixed(posterior.prior.layout))


def independent(posterior: Posterior) -> FaultyPosterior:
    """Remove all dependence between components, and with shared parameters.

    Each component of a draw is taken from a draw of its own.
    """
    return FaultyPosterior(posterior, _Independent(posterior.prior.layout))


class _Moved:
    """Scales deviations from the mean, and adds standard deviations to them."""

    def __init__(
        self,
        prior: VariableKPrior,
        periods: Mapping[str, float] | None,
        factor: float,
        by: float,
    ) -> None:
        self.prior, self.factor, self.by = prior, factor, by
        layout = prior.layout
        periods = layout.periods if periods is None else periods
        known = (*layout.component_names, *layout.shared_names)
        if unknown := sorted(set(periods) - set(known)):
            raise ValueError(f"periods must name parameters of {known}, got {unknown}.")
        self.component_periods = _periods(layout.component_names, periods)
        self.shared_periods = _periods(layout.shared_names, periods)

    def __call__(
        self, rows: Tensor, k: int, generator: torch.Generator | None
    ) -> Tensor:
        layout, prior = self.prior.layout, self.prior
        parts = layout.unpack(rows)
        components = self._move(parts.components, self.component_periods)
        components = _wrapped(components, self.component_periods)
        components = prior.component_marginals.clamp(components)
        shared = parts.shared
        if layout.num_shared:
            shared = self._move(shared, self.shared_periods)
            shared = prior.shared_marginals.clamp(_wrapped(shared, self.shared_periods))
        return layout.canonical(layout.pack(parts.cardinality, components, shared))

    def _move(self, values: Tensor, periods: Tensor) -> Tensor:
        mean = circular_mean(values.double(), periods.to(values.device))
        offset = near(values.double(), mean, periods.tolist()) - mean
        moved = mean + self.factor * offset + self.by * offset.std(0)
        return moved.to(values.dtype)


class _Unmixed:
    """Draws in which no component crosses to its neighbours' side."""

    def __init__(self, layout: ThetaLayout) -> None:
        self.layout = layout

    def __call__(
        self, rows: Tensor, k: int, generator: torch.Generator | None
    ) -> Tensor:
        if k < 2:
            return rows
        key = self.layout.unpack(rows).components[..., :k, self.layout.order_by]
        mean = key.mean(0)
        cuts = 0.5 * (mean[:, 1:] + mean[:, :-1])
        crossed = (key[..., :-1] - cuts).clamp(min=0) + (cuts - key[..., 1:]).clamp(
            min=0
        )
        excess = crossed.sum(-1)
        # Without any good draw the least bad one stands in.
        order = excess.argsort(0)
        kept = (excess == 0).sum(0).clamp(min=1)
        share = torch.rand(excess.shape, generator=generator, device=rows.device)
        chosen = order.gather(0, (share * kept).long())
        return rows.gather(0, chosen.unsqueeze(-1).expand_as(rows))


class _Independent:
    """Components of one draw come from as many draws."""

    def __init__(self, layout: ThetaLayout) -> None:
        self.layout = layout

    def __call__(
        self, rows: Tensor, k: int, generator: torch.Generator | None
    ) -> Tensor:
        layout = self.layout
        parts = layout.unpack(rows)
        num, batch = rows.shape[:2]
        columns = [
            _shuffled(parts.components[:, :, j], generator)
            for j in range(layout.max_cardinality)
        ]
        shared = parts.shared
        if layout.num_shared:
            shared = _shuffled(shared, generator)
        components = torch.stack(columns, dim=-2)
        assert components.shape[:2] == (num, batch)
        return layout.canonical(layout.pack(parts.cardinality, components, shared))


def _periods(names: tuple[str, ...], periods: Mapping[str, float]) -> Tensor:
    """Periods ``(C,)`` of named parameters, float64, infinite without one."""
    return torch.tensor(
        [periods.get(name, math.inf) for name in names], dtype=torch.float64
    )


def _shuffled(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Permute the first axis of ``(P, B, C)``, in each column of its own."""
    key = torch.rand(values.shape[:2], generator=generator, device=values.device)
    return values.gather(0, key.argsort(0).unsqueeze(-1).expand_as(values))


def _wrapped(values: Tensor, periods: Tensor) -> Tensor:
    """Angles on their first turn, [0, period)."""
    periods = periods.to(values)
    turned = values.remainder(torch.where(periods.isfinite(), periods, 1.0))
    return torch.where(periods.isfinite(), turned, values)
