r"""The density of one component of a set, whichever it is.

.. math::
    q(\theta | x, K) = \sum_m w_m\, q_m(\theta | x, K)

m runs over the slots of K, anchored ones at every anchor that they take. Moves between
sets of components draw from it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .anchored_head import AnchoredHead
from .component_head import ComponentHead
from .encoders import Encoding
from .factorised_head import FactorisedHead
from .flows import RowContext
from .joint_head import JointHead

__all__ = ["ComponentMixture", "component_mixture"]

# Rows of anchors that are drawn to learn which ones joint slots take.
_NUM_DRAWS = 256
# Anchors of factorised slots that are left out.
_NEGLIGIBLE = 1e-4


class ComponentMixture(Protocol):
    """A density over one component that can be drawn from and evaluated."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n components, shape ``(n, D)``."""
        ...

    def log_prob(self, components: Tensor) -> Tensor:
        """Evaluate log densities ``(n,)`` of components ``(n, D)``."""
        ...


@torch.no_grad()
def component_mixture(
    head: ComponentHead | AnchoredHead,
    encoding: Encoding,
    k: int,
    generator: torch.Generator,
) -> ComponentMixture:
    """Make the density of a component of one observation's sets of K.

    Args:
        head: The estimator's component head.
        encoding: Embeddings of one observation.
        k: Cardinality K.
        generator: Source of randomness: which anchors joint slots take is learnt from
            draws.
    """
    if isinstance(head, ComponentHead):
        slots = torch.arange(k, device=encoding.context.device)
        contexts = head.slots(
            encoding, torch.zeros_like(slots), torch.full_like(slots, k), slots
        )
        return _SlotMixture(head, contexts.values[contexts.which])
    if isinstance(head, JointHead):
        return _joint(head, encoding, k, generator)
    assert isinstance(head, FactorisedHead)
    return _factorised(head, encoding, k)


@dataclass(frozen=True)
class _SlotMixture:
    """K slots with equal weights, contexts ``(K, C)``."""

    head: ComponentHead
    contexts: Tensor

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        slots = torch.randint(
            len(self.contexts), (n,), generator=generator, device=self.contexts.device
        )
        u = self.head.flow.sample(RowContext(self.contexts, slots), generator)
        return self.head.chart.inverse(u)

    @torch.no_grad()
    def log_prob(self, components: Tensor) -> Tensor:
        chart, num_slots = self.head.chart, len(self.contexts)
        inside = chart.contains(components)
        point = chart.some_point(components)
        u, log_det = chart.forward(torch.where(inside[:, None], components, point))
        every = torch.arange(num_slots, device=u.device).repeat(len(u))
        values = self.head.flow.log_prob(
            u.repeat_interleave(num_slots, dim=0), RowContext(self.contexts, every)
        )
        mixed = values.reshape(-1, num_slots).logsumexp(-1)
        mixed = mixed - torch.tensor(float(num_slots)).log()
        return torch.where(inside, mixed + log_det, -torch.inf)


@dataclass(frozen=True)
class _AnchoredMixture:
    """M anchored densities: weights and anchors ``(M,)``, edges ``(L + 1,)``."""

    head: AnchoredHead
    weights: Tensor
    anchors: Tensor
    edges: Tensor
    contexts: Tensor
    centre: Tensor
    mean: Tensor
    factor: Tensor

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        m = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        w, _ = self.head.local.sample(
            self.mean[m], self.factor[m], self._limits(m), self._context(m), generator
        )
        w = self.head.local_chart.absolute(w, self.anchors[m], self.centre[m])
        return self.head.in_support(w)

    @torch.no_grad()
    def log_prob(self, components: Tensor) -> Tensor:
        head = self.head
        inside = head.chart.contains(components)
        point = head.chart.some_point(components)
        coordinates, log_det = head.local_chart.coordinates(
            torch.where(inside[:, None], components, point)
        )
        position = coordinates[:, :1]
        edges = self.edges.expand(len(position), -1)
        anchors = head.axis.anchors(position, edges).squeeze(-1)
        row, m = (anchors.unsqueeze(-1) == self.anchors).nonzero(as_tuple=True)
        w = head.local_chart.relative(coordinates[row], self.anchors[m], self.centre[m])
        low, high = self._limits(m)
        w = torch.maximum(torch.minimum(w, high), low)
        values = head.local.log_prob(
            w, self.mean[m], self.factor[m], (low, high), self._context(m)
        )
        each = values.new_full((len(components), len(self.anchors)), -torch.inf)
        each[row, m] = values + self.weights[m].log()
        return torch.where(inside, each.logsumexp(-1) + log_det.float(), -torch.inf)

    def _limits(self, m: Tensor) -> tuple[Tensor, Tensor]:
        anchors = self.anchors[m]
        return self.head.limits(anchors, self.edges[anchors], self.edges[anchors + 1])

    def _context(self, m: Tensor) -> RowContext:
        own = self.head.own_features
        told = self.contexts.new_zeros(len(m), own) if own else None
        return RowContext(self.contexts, m, told)


def _joint(
    head: JointHead, encoding: Encoding, k: int, generator: torch.Generator
) -> _AnchoredMixture:
    assert encoding.tokens is not None
    owner = torch.zeros(_NUM_DRAWS, dtype=torch.int64, device=encoding.context.device)
    active = torch.arange(head.max_cardinality, device=owner.device) < k
    mask = active.expand(_NUM_DRAWS, -1)
    edges = head.edges(encoding)
    anchors = head.pointer.sample(
        encoding.tokens, edges, owner, mask, generator, prune=True
    )
    sets = head.sets(encoding, owner, anchors, mask)
    counts = torch.bincount(sets.which, minlength=len(sets.anchors))
    weights = counts.float().repeat_interleave(k) / (_NUM_DRAWS * k)
    which = torch.arange(len(sets.anchors), device=owner.device).repeat_interleave(k)
    place = torch.arange(k, device=owner.device).repeat(len(sets.anchors))
    contexts = sets.contexts[which * head.max_cardinality + place]
    if sets.peaks is None:
        assert head.gaussian is not None
        told = contexts.new_zeros(len(contexts), head.own_features)
        every = torch.arange(len(contexts), device=owner.device)
        mean, factor = head.gaussian(RowContext(contexts, every, told))
    else:
        mean = sets.peaks.mode[which, place]
        factor = sets.peaks.marginal(which, place)
    return _AnchoredMixture(
        head,
        weights,
        sets.anchors[which, place],
        edges[0],
        contexts,
        sets.centre[which, place],
        mean,
        factor,
    )


def _factorised(head: FactorisedHead, encoding: Encoding, k: int) -> _AnchoredMixture:
    assert encoding.tokens is not None
    probs = head.pointer(encoding.tokens)[0, k - 1, :k].exp().mean(0)
    anchors = (probs > _NEGLIGIBLE).nonzero().squeeze(-1)
    weights = probs[anchors] / probs[anchors].sum()
    zero = torch.zeros_like(anchors)
    contexts = head.contexts(encoding, zero, zero + k, anchors)
    values = contexts.values[contexts.which]
    mean, factor = head.gaussian(contexts)
    centre, edges = head.gaussian.centre(values), head.edges(encoding)[0]
    return _AnchoredMixture(head, weights, anchors, edges, values, centre, mean, factor)
