r"""Importance weights of sets, with a proposal that can see a missing component.

Draws of q that lack a component all fit alike, and plain weights look perfect. So a
share :math:`\epsilon` of the draws gets one more component c from the prior:

.. math::
    q'(\theta) = (1 - \epsilon\, e_K)\, q(\theta)
        + \epsilon\, e_{K - 1} \sum_j q(\theta \setminus j)\, p_c(\theta_j)

If something is missing some of these fit far better, and the weights' tail shows it.
e_K is 1 for the cardinalities below Kmax that q deems possible at all: sets of the
others are few, and the sum costs as much as K evaluations of q.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ..component_proposals import PriorComponents
from ..layout import ThetaLayout
from ..prior import VariableKPrior
from ..seeding import forked_rng

__all__ = ["Proposal", "WithExtraComponent"]

# Probability from which a cardinality is deemed possible.
_POSSIBLE = 1e-3


class Proposal(Protocol):
    """A posterior that can be refined: it draws sets and evaluates their density."""

    @property
    def prior(self) -> VariableKPrior:
        """Prior over the theta rows."""
        ...

    def sample_batched(
        self, sample_shape: torch.Size, x: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        """Draw rows ``(*sample_shape, B, E)`` for observations ``(B, T)``."""
        ...

    def log_prob_batched(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate log densities ``(S, B)`` of rows ``(S, B, E)``."""
        ...


class WithExtraComponent:
    """The proposal q', see the module.

    Args:
        proposal: The proposal q.
        share: Share epsilon of draws with a component from the prior.

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, proposal: Proposal, share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"defensive must lie in [0, 1), got {share}.")
        self.proposal, self.prior, self.share = proposal, proposal.prior, share

    def sample(self, num: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw rows ``(num, B, E)``; some may break the least separation."""
        layout = self.prior.layout
        theta = self.proposal.sample_batched(torch.Size((num,)), x, generator=generator)
        parts = layout.unpack(theta)
        with forked_rng(generator):
            chosen = torch.rand(theta.shape[:-1], device=theta.device) < self.share
            extra = self.prior.component.sample(torch.Size((chosen.numel(),)))
        chosen &= _entries(self._extended(x), parts.cardinality)
        extra = extra.reshape(*chosen.shape, -1).to(theta)
        slots = torch.arange(layout.max_cardinality, device=theta.device)
        place = (slots == parts.cardinality.unsqueeze(-1)) & chosen.unsqueeze(-1)
        components = torch.where(
            place.unsqueeze(-1), extra.unsqueeze(-2), parts.components
        )
        k = parts.cardinality + chosen.long()
        return layout.canonical(layout.pack(k, components, parts.shared))

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate log q' of rows ``(S, B, E)``, float64, shape ``(S, B)``."""
        log_q = self.proposal.log_prob_batched(theta, x).double()
        if not self.share:
            return log_q
        k, extended = self.prior.layout.cardinality(theta), self._extended(x)
        keep = torch.where(_entries(extended, k), 1 - self.share, 1.0).double()
        log_q = log_q + keep.log()
        longer = _entries(extended, k - 1) & (k > 0)
        most = int(longer.sum(0).max()) if len(theta) else 0
        if not most:
            return log_q
        # Those rows of each observation first, and as many as the most has.
        order = (~longer).byte().argsort(dim=0, stable=True)[:most]
        rows = theta.gather(0, order.unsqueeze(-1).expand(-1, -1, theta.shape[-1]))
        extra = torch.full_like(log_q, -torch.inf)
        extra = extra.scatter(0, order, self._log_longer(rows, x))
        extra = torch.where(longer, extra, -torch.inf)
        return torch.logaddexp(log_q, extra + math.log(self.share))

    def _extended(self, x: Tensor) -> Tensor:
        """Cardinalities that may get one more component, ``(B, Kmax + 1)``."""
        most = self.prior.max_cardinality
        extended = torch.ones(len(x), most + 1, dtype=torch.bool, device=x.device)
        cardinality = getattr(self.proposal, "cardinality", None)
        if cardinality is not None:
            probs = torch.atleast_2d(cardinality(x).probs)
            extended &= probs.to(x.device) >= _POSSIBLE
        extended[:, most] = False
        return extended

    def _log_longer(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log of the sum over components, one of them from the prior; ``(S, B)``."""
        layout = self.prior.layout
        k = layout.cardinality(theta)
        terms = [torch.full(k.shape, -torch.inf).to(theta).double()]
        for j in range(int(k.max())):
            present = j < k
            shorter = _without(layout, theta, torch.full_like(k, j))
            shorter = torch.where(present.unsqueeze(-1), shorter, theta)
            rest = self.proposal.log_prob_batched(shorter, x).double()
            extra = self._log_component(layout.unpack(theta).components[..., j, :])
            terms.append(torch.where(present, rest + extra, -torch.inf))
        return torch.stack(terms).logsumexp(0)

    def _log_component(self, components: Tensor) -> Tensor:
        flat = components.reshape(-1, components.shape[-1])
        inside = [m.quantile(torch.tensor(0.5)) for m in self.prior.component_marginals]
        zero = (flat == 0).all(-1, keepdim=True)  # padding, which is not used
        flat = torch.where(zero, torch.stack(inside).to(flat), flat)
        log_p = PriorComponents(self.prior.component).log_prob_component(flat)
        return log_p.double().reshape(components.shape[:-1])


def _entries(table: Tensor, k: Tensor) -> Tensor:
    """Entries ``(S, B)`` of a table ``(B, Kmax + 1)`` at k ``(S, B)``."""
    return table.gather(-1, k.clamp(min=0).mT).mT


def _without(layout: ThetaLayout, theta: Tensor, index: Tensor) -> Tensor:
    """Rows without component ``index``; unchanged where it is padding."""
    parts = layout.unpack(theta)
    slots = torch.arange(layout.max_cardinality, device=theta.device)
    source = slots + (slots >= index.unsqueeze(-1))
    source = source.clamp(max=layout.max_cardinality - 1)
    components = parts.components.gather(
        -2, source.unsqueeze(-1).expand_as(parts.components)
    )
    k = torch.where(index < parts.cardinality, parts.cardinality - 1, parts.cardinality)
    return layout.pack(k, components, parts.shared)
