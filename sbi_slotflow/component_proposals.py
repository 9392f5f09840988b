r"""Densities from which reversible-jump moves draw one component.

.. math::
    q(\theta | x, K) = (1 - d)\, \frac{1}{K} \sum_{i=1}^{K} q_i(\theta | x, K)
        + d\, p(\theta)

q_i is the density of slot i of K, p the prior of a component and d a defensive share.
It keeps q positive wherever the prior is, so that a component which the slots do not
know of can be born and, as the reverse of a birth, die.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from .nn.component_mixture import ComponentMixture, component_mixture
from .posterior import SlotPosterior
from .seeding import forked_rng, generator_for

__all__ = ["ComponentProposal", "PriorComponents", "SlotMixture", "slot_mixtures"]


@runtime_checkable
class ComponentProposal(Protocol):
    """A density over one component that can be drawn from and evaluated."""

    def sample_component(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n components, shape ``(n, D)``."""
        ...

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the normalised log density ``(n,)`` of components ``(n, D)``."""
        ...


@dataclass(frozen=True)
class PriorComponents:
    """The prior of one component as a proposal.

    Attributes:
        component: Distribution with event shape ``(D,)``, ``prior.component``.
    """

    component: Distribution

    def sample_component(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n components, shape ``(n, D)``."""
        with forked_rng(generator):
            return self.component.sample(torch.Size((n,))).reshape(n, -1)

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the log density ``(n,)`` of components ``(n, D)``."""
        values = self.component.log_prob(components)
        # Univariate distributions that nobody wrapped keep the parameters apart.
        return values.sum(-1) if values.ndim > 1 else values


@dataclass(frozen=True)
class SlotMixture:
    """The slots of one observation given K, mixed with the prior.

    Attributes:
        slots: The slots' density of a component.
        prior: The prior of a component.
        defensive_share: Share d of the prior.
    """

    slots: ComponentMixture
    prior: PriorComponents
    defensive_share: float

    def sample_component(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n components, shape ``(n, D)``."""
        from_prior = torch.rand(n, 1, generator=generator) < self.defensive_share
        return torch.where(
            from_prior,
            self.prior.sample_component(n, generator),
            self.slots.sample(n, generator),
        )

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the log density ``(n,)`` of components ``(n, D)``."""
        components = components.float()
        slots = self.slots.log_prob(components)
        prior = self.prior.log_prob_component(components)
        share = torch.tensor(self.defensive_share)
        return torch.logaddexp(slots + (-share).log1p(), prior + share.log())


@torch.no_grad()
def slot_mixtures(
    posterior: SlotPosterior, x: Tensor | None = None, defensive_share: float = 0.1
) -> tuple[SlotMixture, ...]:
    """Make the proposals q(theta | x, K) for K = 1..Kmax.

    Args:
        posterior: A trained posterior.
        x: One observation ``(T,)`` or ``(1, T)``; the posterior's default x if None.
        defensive_share: Share of the prior in each mixture, in (0, 1].

    Returns:
        Kmax mixtures on the CPU, that of K = 1 first.

    Raises:
        TypeError: If posterior is no ``SlotPosterior``.
        ValueError: If x is not one observation, the share is out of range, or the
            chart is no density.
    """
    if not isinstance(posterior, SlotPosterior):
        raise TypeError(
            f"posterior must be a SlotPosterior, got {type(posterior).__name__}."
        )
    if not 0 < defensive_share <= 1:
        raise ValueError(f"defensive_share must lie in (0, 1], got {defensive_share}.")
    estimator = posterior.posterior_estimator.eval()
    if not estimator.chart.is_density:
        raise ValueError(
            f"posterior must have densities, got the {estimator.chart.kind!r} chart."
        )
    x = posterior.default_x if x is None else torch.as_tensor(x)
    if x is None:
        raise ValueError("x must be given where the posterior has no default x.")
    batch = torch.atleast_2d(x).to(estimator.x_scale)
    if len(batch) != 1:
        raise ValueError(f"x must be one observation, got a batch of {len(batch)}.")
    estimator.check_condition(batch)
    estimator = deepcopy(estimator).cpu()
    encoding = estimator.encode(batch.cpu())
    prior = PriorComponents(deepcopy(posterior.prior).to("cpu").component)
    return tuple(
        SlotMixture(
            component_mixture(
                estimator.component_head, encoding, k, generator_for(0, k)
            ),
            prior,
            defensive_share,
        )
        for k in range(1, posterior.prior.max_cardinality + 1)
    )
