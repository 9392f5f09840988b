r"""Posteriors that are wrong in a known way, to see that a check notices.

Each function wraps a posterior and returns another, which can be checked, plotted and
compared like any other::

    report(faults.narrowed(posterior), problem).passed  # False

K is drawn from q(K | x), sharpened by :func:`oversharp`, and components given K from
the posterior's own draws, spoilt by the other faults. Moments of draws given K are
taken in canonical order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..posterior.base import Posterior
from ..sets.circular import circular_mean, near
from ..sets.distribution import SetDistribution
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


Spoil = Callable[[VariableKPrior, Tensor, int, torch.Generator | None], Tensor]
"""Turns rows ``(P, B, E)``, all of cardinality k, into wrong ones of the same shape."""


class FaultyPosterior(Posterior):
    """A posterior made wrong; it has no density.

    Args:
        posterior: The posterior.
        spoil: What happens to its draws given K; nothing if None.
        sharpness: Power to which q(K | x) is raised.
    """

    def __init__(
        self, posterior: Posterior, spoil: Spoil | None = None, sharpness: float = 1.0
    ) -> None:
        if posterior.prior.layout.num_counts > 1:
            raise TypeError(
                "faults spoil components of one class, those of this posterior have "
                "several."
            )
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
            given, most = self._posterior.given(x[columns]), int(here.sum(0).max())
            if self._spoil is None:
                found = given.sample((most,), size, generator)
            else:
                found = given.sample((max(most, _FEWEST_DRAWS),), size, generator)
                found = self._spoil(self._posterior.prior, found, size, generator)
            # Each column takes as many of its draws as it needs.
            row, column = here[:, columns].nonzero(as_tuple=True)
            place = (here.cumsum(0) - 1)[row, columns[column]]
            rows[row, columns[column]] = found[place, column]
        return rows.reshape(*shape, len(x), self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Raise: a spoilt posterior's density is not known."""
        raise NotImplementedError("log_prob does not exist for a faulty posterior.")


def narrowed(posterior: Posterior, factor: float = 0.8) -> FaultyPosterior:
    """Multiply the standard deviations of all parameters given K by a factor > 0."""
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}.")
    return FaultyPosterior(posterior, partial(_moved, factor=factor))


def shifted(posterior: Posterior, by: float = 0.5) -> FaultyPosterior:
    """Move all parameters by a share of their standard deviation given K."""
    return FaultyPosterior(posterior, partial(_moved, by=by))


def oversharp(posterior: Posterior, power: float = 2.0) -> FaultyPosterior:
    r"""Make q(K | x) too sure, :math:`\propto q(K | x)^{power}`, power > 0."""
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}.")
    return FaultyPosterior(posterior, sharpness=power)


def unmixed(posterior: Posterior) -> FaultyPosterior:
    """Let labels keep to themselves where components overlap.

    Each component stays between the midpoints of its own and its neighbours' mean
    ``order_by`` parameter, as where slots own a range each, or a sampler's labels never
    mix. Where components are well apart nothing changes.
    """
    return FaultyPosterior(posterior, _unmixed)


def independent(posterior: Posterior) -> FaultyPosterior:
    """Remove all dependence between components, and with shared parameters.

    Each component of a draw is taken from a draw of its own.
    """
    return FaultyPosterior(posterior, _independent)


def _moved(
    prior: VariableKPrior,
    rows: Tensor,
    k: int,
    generator: torch.Generator | None,
    factor: float = 1.0,
    by: float = 0.0,
) -> Tensor:
    """Scale deviations from the mean, and add standard deviations to them."""
    layout = prior.layout
    parts = layout.unpack(rows)

    def move(values: Tensor, periods: Sequence[float]) -> Tensor:
        mean = circular_mean(values.double(), periods)
        offset = near(values.double(), mean, periods) - mean
        moved = (mean + factor * offset + by * offset.std(0)).to(values.dtype)
        period = moved.new_tensor(periods)
        # Angles lie on their first turn.
        turned = moved.remainder(torch.where(period.isfinite(), period, 1.0))
        return torch.where(period.isfinite(), turned, moved)

    components = move(parts.components, layout.component_periods)
    components, shared = prior.component_marginals.clamp(components), parts.shared
    if layout.num_shared:
        shared = prior.shared_marginals.clamp(move(shared, layout.shared_periods))
    return layout.canonical(layout.pack(parts.cardinality, components, shared))


def _unmixed(
    prior: VariableKPrior, rows: Tensor, k: int, generator: torch.Generator | None
) -> Tensor:
    """Keep draws in which no component crosses to its neighbours' side."""
    if k < 2:
        return rows
    key = prior.layout.unpack(rows).components[..., :k, prior.layout.order_by]
    mean = key.mean(0)
    cuts = 0.5 * (mean[:, 1:] + mean[:, :-1])
    below, above = key[..., :-1] - cuts, cuts - key[..., 1:]
    excess = (below.clamp(min=0) + above.clamp(min=0)).sum(-1)
    # Without any good draw the least bad one stands in.
    order = excess.argsort(0)
    kept = (excess == 0).sum(0).clamp(min=1)
    share = torch.rand(excess.shape, generator=generator, device=rows.device)
    chosen = order.gather(0, (share * kept).long())
    return rows.gather(0, chosen.unsqueeze(-1).expand_as(rows))


def _independent(
    prior: VariableKPrior, rows: Tensor, k: int, generator: torch.Generator | None
) -> Tensor:
    """Take the components of one draw from as many draws."""
    layout = prior.layout
    parts = layout.unpack(rows)

    def shuffled(values: Tensor) -> Tensor:
        key = torch.rand(values.shape[:2], generator=generator, device=values.device)
        return values.gather(0, key.argsort(0).unsqueeze(-1).expand_as(values))

    columns = [shuffled(column) for column in parts.components.unbind(2)]
    shared = shuffled(parts.shared) if layout.num_shared else parts.shared
    components = torch.stack(columns, dim=-2)
    return layout.canonical(layout.pack(parts.cardinality, components, shared))
