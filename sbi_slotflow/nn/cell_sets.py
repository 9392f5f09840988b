r"""Anchors whose likeliest sets are weighed by their evidence.

A chain (:mod:`.cell_chain`) knows what a network saw at a glance. Where each set's peak
is fitted, its evidence Z (:mod:`.evidence`) tells much better how probable it is.
With S the sets that the chain deems likeliest and :math:`\pi` the chain's
probabilities,

.. math::
    q(a | x, K) = \begin{cases} (1 - c r)\, w_a & a \in S \\ c\, \pi(a) & \text{else}
        \end{cases}
    \qquad w_a = (1 - \delta) \frac{Z_a}{\sum_{b \in S} Z_b}
        + \delta \frac{\pi(a)\, 1_{a \in P}}{\sum_{b \in P} \pi(b)},
    \qquad r = 1 - \sum_{a \in S} \pi(a)

which is exactly normalised. P are the sets of S whose peaks are as high as the highest,
to a few nats: where two components share a cell, Laplace's approximation of Z may fail,
and the chain keeps a small say. The factor :math:`c \le 1` tells how much too probable
the chain deems sets beyond S, judged by the less likely half of S. To draw, a set is
drawn from the chain, and replaced by one of S, drawn by weight, if it is in S, or else
with the probability :math:`1 - c`.

Where c r is not negligible, the chain is tilted (:class:`~.cell_chain.Tilt`) before it
is asked for more sets: each cell by what the evidence makes of the odds that a
component sits there, and by much where it leaves no doubt. What some sets were wrong
about is then wrong no more in sets beyond S.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .cell_chain import LOG_ZERO, CellChain, Tilt, draw_cells
from .evidence import log_evidence
from .modes import ModeFinder
from .unique_rows import unique_rows

__all__ = ["CellSets"]

# Sets less likely than that share of the likeliest are not weighed.
_LEAST_SHARE = 1e-5
_LEAST_TAIL = 1e-4
# Share of the sets that are weighed at first, and how often before the chain is
# corrected for the last time; the probability of sets beyond them that calls for more.
_SCOUTS, _ROUNDS, _ENOUGH = 0.25, 2, 1e-5
# Where the first sets have less of the chain's probability, more would be as few: the
# network knows next to nothing.
_HOPELESS = 0.01
# Largest shift of a cell in a round, and the smallest probability that is told from
# none; the probability that leaves no doubt, and a cell's shift there.
_LARGEST_SHIFT, _LEAST_CHANCE = 1.0, 1e-6
_CERTAIN, _CERTAIN_SHIFT = 0.999, 4.0
# The chain's say delta among sets whose peaks are as high as the highest to that many
# nats.
_SAY, _AS_HIGH = 0.03, 12.0
# Bounds the memory of looking for sets, and that of what is remembered.
_SETS_AT_ONCE, _MOST_REMEMBERED = 2_048, 2**23


class _Table(NamedTuple):
    """Weighed sets of P pairs of an observation and a cardinality.

    Attributes:
        keys: ``observation * (Kmax + 1) + K`` of the pairs, shape ``(P,)``.
        shift: Shifts of the chain's cells, shape ``(P, L)``.
        ahead: What they leave to come, see :class:`~.cell_chain.Tilt`.
        anchors: The sets, likeliest first, shape ``(P, S, Kmax)``.
        log_chain: Log probabilities by the chain, -inf for no set, shape ``(P, S)``.
        log_weight: Log weights w, shape ``(P, S)``.
        log_tail: Log of c, shape ``(P,)``.
        outside: c r, shape ``(P,)``.
    """

    keys: Tensor
    shift: Tensor
    ahead: Tensor
    anchors: Tensor
    log_chain: Tensor
    log_weight: Tensor
    log_tail: Tensor
    outside: Tensor


class CellSets:
    """Distribution over anchors that weighs the likeliest sets of a chain.

    Sets are weighed when first asked for, and remembered. No gradient passes.

    Args:
        chain: The chain.
        find_modes: Finder of peaks, for the evidence.
        num_sets: Sets to weigh at most, for each observation and cardinality.
        data: The observations, shape ``(B, T)``.
        tokens: Their tokens, shape ``(B, L, C)``.
        edges: Edges of their cells, shape ``(B, L + 1)``.
    """

    def __init__(
        self,
        chain: CellChain,
        find_modes: ModeFinder,
        num_sets: int,
        data: Tensor,
        tokens: Tensor,
        edges: Tensor,
    ) -> None:
        self.chain, self.find_modes, self.num_sets = chain, find_modes, num_sets
        self.data, self.tokens, self.edges = (
            part.detach().clone() for part in (data, tokens, edges)
        )
        self._weights = _weights(chain)
        self._table: _Table | None = None

    def is_of(
        self, chain: CellChain, data: Tensor, tokens: Tensor, edges: Tensor
    ) -> bool:
        """Tell whether all is as it was when this was made."""
        before = self._weights, self.data, self.tokens, self.edges
        now = _weights(chain), data, tokens, edges
        return chain is self.chain and all(
            a.shape == b.shape and a.device == b.device and torch.equal(a, b)
            for a, b in zip(before, now, strict=True)
        )

    @torch.no_grad()
    def log_prob(self, owner: Tensor, anchors: Tensor, mask: Tensor) -> Tensor:
        """Evaluate the log probability of N ascending rows of anchors.

        Args:
            owner: Observation of each row, shape ``(N,)``.
            anchors: Anchors, zero where inactive, shape ``(N, Kmax)``.
            mask: Active ones, shape ``(N, Kmax)``.

        Returns:
            Shape ``(N,)``; -inf for anchors that leave no room for a set.
        """
        table, pair = self._weigh(owner, mask)
        chain = self.chain.log_prob(
            *(self.tokens, self.edges, owner, anchors, mask),
            prune=True,
            tilt=self._tilt(table),
        )
        place = _find(table, pair, anchors)
        inside = torch.log1p(-table.outside)[pair]
        inside = inside + table.log_weight.flatten()[place.clamp(min=0)]
        value = torch.where(place >= 0, inside, chain + table.log_tail[pair])
        return value.to(chain)

    @torch.no_grad()
    def sample(
        self, owner: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw anchors ``(N, Kmax)``, ascending, zero where inactive."""
        table, pair = self._weigh(owner, mask)
        anchors = self.chain.sample(
            *(self.tokens, self.edges, owner, mask, generator),
            prune=True,
            tilt=self._tilt(table),
        )
        level = torch.rand(
            *(2, len(owner)),
            dtype=torch.float64,
            device=owner.device,
            generator=generator,
        )
        weighed = _find(table, pair, anchors) >= 0
        weighed |= level[0].log() > table.log_tail[pair]
        drawn = draw_cells(table.log_weight.exp().cumsum(-1), pair, level[1])
        return torch.where(weighed.unsqueeze(-1), table.anchors[pair, drawn], anchors)

    def _weigh(self, owner: Tensor, mask: Tensor) -> tuple[_Table, Tensor]:
        """Weighed sets of all pairs that occur, and the pair of each row."""
        keys = owner * (mask.shape[-1] + 1) + mask.sum(-1)
        wanted, table = keys.unique(), self._table
        if table is not None:
            wanted = wanted[~torch.isin(wanted, table.keys)]
        step = max(1, _SETS_AT_ONCE // self.num_sets)
        for start in range(0, len(wanted), step):
            more = self._weighed_pairs(wanted[start : start + step])
            if table is not None:
                more = _Table(*map(torch.cat, zip(table, more, strict=True)))
            table = more
        assert table is not None
        few = table.anchors.numel() <= _MOST_REMEMBERED
        self._table = table if few else None
        return table, self._rows(table).flatten()[keys]

    def _weighed_pairs(self, keys: Tensor) -> _Table:
        """Weigh sets of P pairs, more of them where they are not enough."""
        scouts = max(1, int(_SCOUTS * self.num_sets))
        shift = self.tokens.new_zeros(len(keys), self.tokens.shape[1])
        table = self._tabulated(keys, shift, scouts)
        for i in range(_ROUNDS):
            seen = table.log_chain.logsumexp(-1).exp()
            left = (table.outside > _ENOUGH) & (seen > _HOPELESS)
            left = left.nonzero().squeeze(-1)
            if not len(left):
                break
            some = _Table(*(part[left] for part in table))
            num = self.num_sets if i == _ROUNDS - 1 else scouts
            more = self._tabulated(some.keys, self._corrected(some), num)
            for part, new in zip(table, more, strict=True):
                part[left] = new
        return table

    def _tabulated(self, keys: Tensor, shift: Tensor, num: int) -> _Table:
        """Weigh the ``num`` likeliest sets of P pairs."""
        size = self.chain.max_cardinality + 1
        owner, count = keys // size, keys % size
        tokens, edges = self.tokens[owner], self.edges[owner]
        row = torch.arange(len(keys), device=keys.device).unsqueeze(-1)
        ahead = self.chain.look_ahead(tokens, edges, count, shift)
        tilt = Tilt(row.expand(-1, size), shift, ahead)
        anchors, chain = self._likeliest(tokens, edges, count, tilt, num)
        pair, place = chain.isfinite().nonzero(as_tuple=True)
        mask = torch.arange(size - 1).to(count) < count.unsqueeze(-1)
        found = self._fitted(owner[pair], anchors[pair, place], mask[pair])
        evidence, likelihood = (
            chain.index_put((pair, place), part.to(chain)) for part in found
        )
        best = likelihood.amax(-1, keepdim=True)
        as_high = chain.masked_fill(likelihood < best - _AS_HIGH, -torch.inf)
        weight = torch.logaddexp(
            evidence.log_softmax(-1) + math.log1p(-_SAY),
            as_high.log_softmax(-1) + math.log(_SAY),
        )
        inside = chain.logsumexp(-1)
        ranks = torch.arange(num, device=chain.device)
        last = ranks >= (chain.isfinite().sum(-1, keepdim=True) // 2)
        tail = [part.masked_fill(~last, -torch.inf) for part in (weight, chain)]
        ratio = tail[0].logsumexp(-1) - tail[1].logsumexp(-1) + inside
        log_tail = ratio.clamp(math.log(_LEAST_TAIL), 0.0)
        outside = log_tail.exp() * (1 - inside.exp()).clamp(min=0.0)
        # Tables of all numbers of sets have one shape.
        spare = 0, self.num_sets - num
        anchors = functional.pad(anchors, (0, 0, *spare))
        chain, weight = (
            functional.pad(p, spare, value=-torch.inf) for p in (chain, weight)
        )
        return _Table(keys, shift, ahead, anchors, chain, weight, log_tail, outside)

    def _corrected(self, table: _Table) -> Tensor:
        """Shifts ``(P, L)`` that let the chain agree with the evidence on each cell."""
        most = self.chain.max_cardinality
        count = table.keys % (most + 1)
        active = torch.arange(most).to(count) < count.unsqueeze(-1)
        taken = table.shift.new_zeros(*table.log_chain.shape, table.shift.shape[-1])
        there = active.unsqueeze(1).expand_as(table.anchors).to(taken)
        taken = taken.scatter_reduce(-1, table.anchors, there, "amax")
        seen, true = (
            (part.softmax(-1).to(taken).unsqueeze(1) @ taken).squeeze(1)
            for part in (table.log_chain, table.log_weight)
        )
        change = true.logit(_LEAST_CHANCE) - seen.logit(_LEAST_CHANCE)
        change = change.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT)
        change = torch.where(true > _CERTAIN, _CERTAIN_SHIFT, change)
        return table.shift + change

    def _tilt(self, table: _Table) -> Tilt:
        return Tilt(self._rows(table), table.shift, table.ahead)

    def _rows(self, table: _Table) -> Tensor:
        """Rows of the table, by observation and cardinality, ``(B, Kmax + 1)``."""
        size = self.chain.max_cardinality + 1
        row = table.keys.new_zeros(len(self.data) * size)
        row[table.keys] = torch.arange(len(table.keys), device=row.device)
        return row.unflatten(0, (-1, size))

    def _fitted(
        self, owner: Tensor, anchors: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log evidences ``(S,)`` of sets, and the log likelihoods of their peaks."""
        starts, ends = (self.edges[owner.unsqueeze(-1), anchors + i] for i in (0, 1))
        cells = anchors, starts, ends, mask
        peaks = self.find_modes(self.data, owner, *cells, remember=True)
        evidence = log_evidence(peaks, *cells, self.find_modes.local_chart)
        return evidence, -self.data.shape[-1] * peaks.noise

    def _likeliest(
        self, tokens: Tensor, edges: Tensor, count: Tensor, tilt: Tilt, num: int
    ) -> tuple[Tensor, Tensor]:
        """Look for the chain's likeliest sets of P pairs, by beam search.

        Returns:
            The sets, shape ``(P, S, Kmax)``, likeliest first, and their log
            probabilities, shape ``(P, S)``, float64, -inf where there is no set.
        """
        chain, pairs = self.chain, torch.arange(len(count), device=count.device)
        anchors = count.new_zeros(len(count), num, chain.max_cardinality)
        total = edges.new_full((len(count), num), -torch.inf)
        total[:, 0] = 0.0
        earliest = torch.full_like(total, -torch.inf)
        for k in range(int(count.max())):
            active = pairs[count > k]
            row, place = total[active].isfinite().nonzero(as_tuple=True)
            pair = active[row]
            before = anchors[pair, place, k - 1] if k else torch.full_like(pair, -1)
            step, which = chain.next_log_probs(
                *(tokens, edges, pair, count[pair], torch.full_like(pair, k)),
                *(before, earliest[pair, place], True, tilt),
            )
            cells = step.shape[-1]
            step = step.masked_fill(step < 0.5 * LOG_ZERO, -torch.inf)
            grown = total.new_full((len(active), num, cells), -torch.inf)
            grown[row, place] = total[pair, place].unsqueeze(-1) + step[which]
            total[active], best = grown.flatten(1).topk(num)
            parent, cell = best // cells, best % cells
            index = parent.unsqueeze(-1).expand(-1, -1, anchors.shape[-1])
            anchors[active] = anchors[active].gather(1, index)
            anchors[active, :, k] = cell
            earliest[active] = chain.axis.lower(
                edges[active].gather(-1, cell), earliest[active].gather(1, parent)
            )
        few = total < total[:, :1] + math.log(_LEAST_SHARE)
        return anchors, total.masked_fill(few, -torch.inf)


def _find(table: _Table, pair: Tensor, anchors: Tensor) -> Tensor:
    """Places ``(N,)`` of sets in their table, flattened; -1 for those not weighed."""
    there = table.log_weight.flatten().isfinite().nonzero().squeeze(-1)
    keys = torch.cat([there // table.log_weight.shape[-1], pair])
    sets = torch.cat([table.anchors.flatten(0, 1)[there], anchors])
    _, which = unique_rows(keys, *sets.unbind(-1))
    place = torch.full_like(which, -1)
    place[which[: len(there)]] = there
    return place[which[len(there) :]]


def _weights(chain: CellChain) -> Tensor:
    """A copy of the chain's weights."""
    return torch.cat([weight.detach().flatten() for weight in chain.parameters()])
