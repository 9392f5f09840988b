r"""Sets of cells, the likeliest of which are weighed by their evidence.

For one observation and K, let :math:`\pi` be the chain (:mod:`.cell_chain`), S the
sets of cells that it finds most probable (up to ``num_sets``, by beam search), and Z
the evidence of each set of S (:mod:`.modes`). The distribution is a self-normalised
mixture over S plus a tail,

.. math::
    q(a | x, K) = \begin{cases} (1 - c\, r)\, w_a & a \in S \\ c\, \pi(a) & a \notin S
        \end{cases}
    \qquad r = 1 - \sum_{a \in S} \pi(a)

.. math::
    w_a = (1 - \delta) \frac{Z_a}{\sum_{b \in S} Z_b}
        + \delta \frac{\pi(a)\, 1_{a \in P}}{\sum_{b \in P} \pi(b)} .

It sums to one exactly: S has :math:`1 - c r`, as the weights w sum to one, and the rest
has :math:`c \sum_{a \notin S} \pi(a) = c r`. Neither the quality of Z nor that of the
chain enters; they only decide how close q is to the posterior.

* P holds the sets of S whose likelihood at the mode is within 12 nats of the highest.
  Where two components share a cell, Laplace's approximation of Z may fail, so the
  chain keeps the share :math:`\delta` among them.
* :math:`c \le 1` is the ratio of evidence to chain in the less probable half of S: by
  that factor the chain overestimates sets that it ranks low.

To draw, a set is drawn from the chain. It is kept if it is outside S, with probability
c; otherwise a set of S is drawn by weight.

Where c r is not negligible, the chain is tilted (:class:`.cell_chain.Tilt`) and S is
searched anew: each cell is shifted by the difference between its log odds of holding a
component under w and under the chain.

Example:
    With :math:`S = \{a, b\}`, :math:`\pi = (0.5, 0.3)` and 0.2 left, :math:`Z = (1,
    3)`, c = 0.5 and :math:`\delta = 0`: r = 0.2, so q(a) = 0.9 / 4 = 0.225, q(b) =
    0.675, and all other sets share 0.1.

See Also:
    :class:`.cell_chain.FlooredCells`, the floor below it.
"""

import math
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .cell_chain import LOG_ZERO, PrunedChain, Tilt, draw_cells
from .cell_parts import divided, num_divisions, part_codes
from .cells import OccupiedCells, unique_rows
from .modes import ModeFinder, Modes, log_evidence

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
# The chain's share delta among sets whose modes are as high as the highest to that many
# nats.
_SAY, _AS_HIGH = 0.03, 12.0
# Bound on the modes that are kept for each K, in bytes for all observations together.
_MODE_BYTES = 2**24


# Sets that share cells are divided where they have more than that weight, and how many.
_WORTH_DIVIDING, _MOST_DIVIDED = 3e-3, 12
# Share of the mode above whole cells beside those above their parts.
_WHOLE = 0.3
# Share of all ways in which components stand in parts of cells, whatever the evidence.
_ANY_PART = 0.02


class _Weighed(NamedTuple):
    """Weighed sets of one observation and K."""

    tilt: Tilt  # What the chain is tilted by
    cells: Tensor  # The sets, likeliest first, (S, Kmax)
    modes: Modes  # Their modes
    evidence: Tensor  # Their log evidence, (S,)
    log_chain: Tensor  # Log probabilities by the chain, (S,)
    log_weight: Tensor  # Log weights w, (S,)
    log_tail: Tensor  # Log of c, ()
    outside: Tensor  # c r, ()


class _Parts(NamedTuple):
    """Weighed parts of sets, P in all."""

    of: Tensor  # Number of the divided set, (P,)
    code: Tensor  # Which part; see :class:`.cell_parts.CellParts`, (P,)
    starts: Tensor  # Where the components' parts start, (P, Kmax)
    ends: Tensor  # Where they end, same shape
    log_weight: Tensor  # Log q(b | a), (P,)
    modes: Modes


class _Table(NamedTuple):
    """Weighed sets of P pairs of an observation and a cardinality."""

    key: Tensor  # observation * (Kmax + 1) + K of the pairs, (P,)
    shift: Tensor  # Shifts of the chain's cells, (P, L)
    ahead: Tensor  # What they leave to come, see :class:`.cell_chain.Tilt`
    cells: Tensor  # The sets, (P, S, Kmax)
    log_weight: Tensor  # Log weights w, -inf for no set, (P, S)
    log_tail: Tensor  # Log of c, (P,)
    outside: Tensor  # c r, (P,)
    kept: Tensor  # Which of the kept modes is that of a set, -1 for none, (P, S)
    divided: Tensor  # Number of a divided set, -1 for others, (P, S)


class CellSets:
    """Distribution over the cells of B observations that weighs likely sets.

    The sets of an observation and K are weighed when first asked for, on their own, so
    that no result depends on what else was asked for. No gradient passes.
    """

    def __init__(
        self, chain: PrunedChain, find_modes: ModeFinder, num_sets: int, data: Tensor
    ) -> None:
        self.chain, self.find_modes, self.num_sets = chain, find_modes, num_sets
        self.data, self.edges = data, chain.edges
        self._size = chain.chain.max_cardinality + 1
        self._table: _Table | None = None
        self._modes: Modes | None = None
        self._parts: _Parts | None = None
        self._evidence: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._lock = Lock()
        numbers = ((self._size - 1) * find_modes.local_chart.num_features) ** 2
        most = _MODE_BYTES // (8 * numbers * max(1, len(data)))
        self._num_kept = max(1, min(num_sets, most))

    @torch.no_grad()
    def log_prob(self, owner: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Evaluate log probabilities; see :meth:`CellDistribution.log_prob`."""
        table, pair, *_ = self._weighed(owner, mask)
        chain = self._chain(table).log_prob(owner, cells, mask)
        place = _find(table, pair, cells)
        inside = torch.log1p(-table.outside)[pair]
        inside = inside + table.log_weight.flatten()[place.clamp(min=0)]
        value = torch.where(place >= 0, inside, chain + table.log_tail[pair])
        return value.to(chain)

    @torch.no_grad()
    def sample(
        self, owner: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw cells; see :meth:`CellDistribution.sample`."""
        table, pair, *_ = self._weighed(owner, mask)
        cells = self._chain(table).sample(owner, mask, generator)
        level = torch.rand(
            *(2, len(owner)),
            dtype=torch.float64,
            device=owner.device,
            generator=generator,
        )
        weighed = _find(table, pair, cells) >= 0
        weighed |= level[0].log() > table.log_tail[pair]
        drawn = draw_cells(table.log_weight.exp().cumsum(-1), pair, level[1])
        return torch.where(weighed.unsqueeze(-1), table.cells[pair, drawn], cells)

    log_shares = math.log(_WHOLE), math.log1p(-_WHOLE)

    @torch.no_grad()
    def parts_of(self, sets: OccupiedCells, position: Tensor) -> tuple[Tensor, Tensor]:
        """Parts ``(S,)`` of components at positions ``(S, Kmax)``, and log q(b | a).

        Parts are -1, with probability one, where a set of cells is not divided.
        """
        number, parts = self._divided(sets)
        if not len(parts.of):
            return number, parts.log_weight.new_zeros(len(number))
        code = part_codes(sets, position)
        found = _place(
            torch.stack([parts.of, parts.code], -1), torch.stack([number, code], -1)
        )
        value = parts.log_weight[found.clamp(min=0)].masked_fill(found < 0, -torch.inf)
        return found, torch.where(number >= 0, value, 0.0)

    @torch.no_grad()
    def sample_parts(
        self, sets: OccupiedCells, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw parts ``(S,)`` of sets of cells, -1 for whole cells."""
        number, parts = self._divided(sets)
        if not len(parts.of):
            return number
        level = torch.rand(
            len(number), dtype=torch.float64, device=number.device, generator=generator
        )
        whole = torch.rand(
            len(number), dtype=torch.float64, device=number.device, generator=generator
        )
        number = number.masked_fill(whole < _WHOLE, -1)
        # Sets stand one after the other, each with a total of one.
        steps = parts.log_weight.exp().cumsum(-1)
        size = torch.bincount(parts.of)
        last = size.cumsum(-1) - 1
        here = number.clamp(min=0)
        first, last = (last - size + 1)[here], last[here]
        before = torch.where(first > 0, steps[(first - 1).clamp(min=0)], 0.0)
        drawn = torch.searchsorted(steps, before + level * (steps[last] - before))
        drawn = torch.maximum(torch.minimum(drawn, last), first)
        return torch.where(number >= 0, drawn, -1)

    def within(self, sets: OccupiedCells, part: Tensor) -> OccupiedCells:
        """The sets, with the starts and ends of their parts ``(S,)``."""
        parts = self._parts
        if parts is None or not len(parts.of):
            return sets
        here, there = part.clamp(min=0), (part >= 0).unsqueeze(-1)
        starts = torch.where(there, parts.starts[here], sets.starts)
        ends = torch.where(there, parts.ends[here], sets.ends)
        return sets._replace(starts=starts, ends=ends)

    @torch.no_grad()
    def modes(self, sets: OccupiedCells, part: Tensor | None = None) -> Modes:
        """Modes above sets of cells, or parts of them; the heaviest are kept."""
        if not len(sets.owner):
            return self.find_modes(self.data, sets)
        table, pair, known, parts = self._weighed(sets.owner, sets.mask)
        place = _find(table, pair, sets.cells)
        kept = table.kept.flatten()[place.clamp(min=0)]
        kept = torch.where(place >= 0, kept, -1)
        if part is not None:
            kept = torch.where(part >= 0, len(known.level) + part, kept)
            known = Modes(*map(torch.cat, zip(known, parts.modes, strict=True)))
        return self._completed(known, kept, sets)

    @torch.no_grad()
    def evidence(
        self, observation: int, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log evidence, residual levels and sizes of weighed sets, and what is left.

        The first three are of shape ``(S,)``; a size is the number of parameters. The
        last is the probability of all sets that were not weighed, ``()``.
        """
        owner = torch.tensor([observation], device=self.edges.device)
        mask = torch.arange(self._size - 1, device=owner.device)[None] < count
        self._weighed(owner, mask)
        return self._evidence[observation * self._size + count]

    def _divided(self, sets: OccupiedCells) -> tuple[Tensor, _Parts]:
        """Numbers ``(S,)`` of divided sets, -1 for others, and all parts."""
        table, pair, _, parts = self._weighed(sets.owner, sets.mask)
        place = _find(table, pair, sets.cells)
        number = table.divided.flatten()[place.clamp(min=0)]
        return torch.where(place >= 0, number, -1), parts

    def _completed(self, known: Modes, place: Tensor, sets: OccupiedCells) -> Modes:
        """Modes of sets at places ``(S,)`` among known ones; -1 for one to be found."""
        new = (place < 0).nonzero().squeeze(-1)
        found = known.rows(place.clamp(min=0))
        if len(new):
            fitted = self.find_modes(self.data, sets.part(new))
            for part, fresh in zip(found, fitted, strict=True):
                part[new] = fresh
        return found

    def _weighed(
        self, owner: Tensor, mask: Tensor
    ) -> tuple[_Table, Tensor, Modes, _Parts]:
        """Sets of all pairs that occur, each row's pair, all kept modes and parts."""
        keys = owner * self._size + mask.sum(-1)
        wanted, pair = keys.unique(return_inverse=True)
        with self._lock:
            known = [] if self._table is None else self._table.key.tolist()
            for key in wanted.tolist():
                if key not in known:
                    found = self._weigh(*divmod(key, self._size))
                    self._keep(key, *self._divide(found, *divmod(key, self._size)))
            table, modes, parts = self._table, self._modes, self._parts
        assert table is not None
        assert modes is not None
        assert parts is not None
        where = (table.key == wanted.unsqueeze(-1)).int().argmax(-1)
        return _Table(*(part[where] for part in table)), pair, modes, parts

    def _keep(self, key: int, found: _Weighed, divided: Tensor, parts: _Parts) -> None:
        """Add the sets of one pair to the table, and the modes of the heaviest."""
        num, index = len(found.cells), found.cells.new_tensor([key])
        mask = torch.arange(self._size - 1).to(index) < key % self._size
        transform = self.find_modes.local_chart
        sizes = transform.num_coordinates(found.cells, mask.expand_as(found.cells))
        level, outside = found.modes.level, found.outside
        self._evidence[key] = found.evidence, level, sizes, outside
        best = found.log_weight.argsort(descending=True)[: self._num_kept]
        modes = found.modes.rows(best)
        first = 0 if self._modes is None else len(self._modes.level)
        kept = torch.full_like(found.cells[:, 0], -1)
        kept[best] = first + torch.arange(len(best)).to(kept)
        # Tables of all numbers of sets have one shape.
        spare = 0, self.num_sets - num
        table = _Table(
            index,
            found.tilt.shift,
            found.tilt.ahead,
            functional.pad(found.cells, (0, 0, *spare)).unsqueeze(0),
            functional.pad(found.log_weight, spare, value=-torch.inf).unsqueeze(0),
            found.log_tail.unsqueeze(0),
            found.outside.unsqueeze(0),
            functional.pad(kept, spare, value=-1).unsqueeze(0),
            functional.pad(divided, spare, value=-1).unsqueeze(0),
        )
        if self._table is not None:
            assert self._modes is not None
            assert self._parts is not None
            before = int(self._table.divided.max()) + 1
            table.divided[table.divided >= 0] += before
            parts = parts._replace(of=parts.of + before)
            table = _Table(*map(torch.cat, zip(self._table, table, strict=True)))
            modes = Modes(*map(torch.cat, zip(self._modes, modes, strict=True)))
            both = zip(self._parts.modes, parts.modes, strict=True)
            all_modes = Modes(*map(torch.cat, both))
            columns = zip(self._parts[:-1], parts[:-1], strict=True)
            of, code, starts, ends, weight = map(torch.cat, columns)
            parts = _Parts(of, code, starts, ends, weight, all_modes)
        self._table, self._modes, self._parts = table, modes, parts

    def _weigh(self, observation: int, count: int) -> _Weighed:
        """Weigh the sets of one pair, more of them where they are not enough."""
        scouts = max(1, int(_SCOUTS * self.num_sets))
        chain = self.chain.one(observation)
        shift = chain.tokens.new_zeros(1, chain.tokens.shape[1])
        found = self._tabulated(chain.tilted(shift, count), observation, count, scouts)
        for i in range(_ROUNDS):
            seen = found.log_chain.logsumexp(-1).exp()
            if found.outside <= _ENOUGH or seen <= _HOPELESS:
                break
            tilted = chain.tilted(self._corrected(found, count), count)
            num = self.num_sets if i == _ROUNDS - 1 else scouts
            found = self._tabulated(tilted, observation, count, num, found)
        return found

    def _tabulated(
        self,
        chain: PrunedChain,
        observation: int,
        count: int,
        num: int,
        known: _Weighed | None = None,
    ) -> _Weighed:
        """Weigh the ``num`` likeliest sets of one pair; modes may be known."""
        cells, log_chain = self._likeliest(chain, count, num)
        mask = torch.arange(self._size - 1).to(cells) < count
        owner = torch.full_like(cells[:, 0], observation)
        sets = OccupiedCells.among(self.edges, owner, cells, mask.expand_as(cells))
        if known is None:
            modes = self.find_modes(self.data, sets)
        else:
            modes = self._completed(known.modes, _place(known.cells, cells), sets)
        evidence = log_evidence(modes, sets, self.find_modes.local_chart)
        assert chain.tilt is not None
        weights = self._weights(evidence, modes, log_chain)
        return _Weighed(chain.tilt, cells, modes, evidence, log_chain, *weights)

    def _weights(
        self, evidence: Tensor, modes: Modes, log_chain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights ``(S,)`` of sets, log c, and c r."""
        likelihood = -modes.misfit
        low = likelihood < likelihood.amax() - _AS_HIGH
        weight = torch.logaddexp(
            evidence.log_softmax(-1) + math.log1p(-_SAY),
            log_chain.masked_fill(low, -torch.inf).log_softmax(-1) + math.log(_SAY),
        )
        inside = log_chain.logsumexp(-1)
        last = slice(len(log_chain) // 2, None)
        ratio = weight[last].logsumexp(-1) - log_chain[last].logsumexp(-1) + inside
        log_tail = ratio.clamp(math.log(_LEAST_TAIL), 0.0)
        outside = log_tail.exp() * (1 - inside.exp()).clamp(min=0.0)
        return weight, log_tail, outside

    def _divide(
        self, found: _Weighed, observation: int, count: int
    ) -> tuple[_Weighed, Tensor, _Parts]:
        """Weigh the parts of heavy sets that share cells, and those sets anew."""
        mask = torch.arange(self._size - 1).to(found.cells) < count
        owner = torch.full_like(found.cells[:, 0], observation)
        sets = OccupiedCells.among(
            self.edges, owner, found.cells, mask.expand_as(found.cells)
        )
        worth = found.log_weight.masked_fill(num_divisions(sets) < 2, -torch.inf)
        chosen = worth.argsort(descending=True)[:_MOST_DIVIDED]
        chosen = chosen[worth[chosen] > math.log(_WORTH_DIVIDING)]
        number = torch.full_like(owner, -1)
        number[chosen] = torch.arange(len(chosen)).to(number)
        parts = divided(sets.part(chosen), self.chain.axis)
        within = sets.part(chosen[parts.of])
        within = within._replace(starts=parts.starts, ends=parts.ends)
        modes = self.find_modes(self.data, within)
        value = log_evidence(modes, within, self.find_modes.local_chart)
        total = _logsumexp(value, parts.of, len(chosen))
        ways = torch.bincount(parts.of, minlength=len(chosen)).to(value)
        share = torch.logaddexp(
            value - total[parts.of] + math.log1p(-_ANY_PART),
            math.log(_ANY_PART) - ways[parts.of].log(),
        )
        evidence = found.evidence.index_copy(0, chosen, total)
        weights = self._weights(evidence, found.modes, found.log_chain)
        log_weight, log_tail, outside = weights
        found = found._replace(
            evidence=evidence, log_weight=log_weight, log_tail=log_tail, outside=outside
        )
        return found, number, _Parts(*parts, share, modes)

    def _corrected(self, found: _Weighed, count: int) -> Tensor:
        """Shifts ``(1, L)`` that let the chain agree with the evidence on each cell."""
        shift = found.tilt.shift
        taken = shift.new_zeros(len(found.cells), shift.shape[-1])
        taken.scatter_(-1, found.cells[:, :count], 1.0)
        seen, true = (
            part.softmax(-1).to(taken) @ taken
            for part in (found.log_chain, found.log_weight)
        )
        change = true.logit(_LEAST_CHANCE) - seen.logit(_LEAST_CHANCE)
        change = change.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT)
        return shift + torch.where(true > _CERTAIN, _CERTAIN_SHIFT, change)

    def _chain(self, table: _Table) -> PrunedChain:
        """The chain, tilted as in a table."""
        row = torch.zeros(len(self.data) * self._size).to(table.key)
        row[table.key] = torch.arange(len(table.key)).to(row)
        tilt = Tilt(row.unflatten(0, (-1, self._size)), table.shift, table.ahead)
        return self.chain.with_tilt(tilt)

    def _likeliest(
        self, chain: PrunedChain, count: int, num: int
    ) -> tuple[Tensor, Tensor]:
        """Look for the likeliest sets of one observation and K, by beam search."""
        edges = chain.edges[0]
        cells = torch.zeros(1, self._size - 1).to(edges).long()
        total, earliest = edges.new_zeros(1), edges.new_full((1,), -torch.inf)
        for k in range(count):
            before = cells[:, k - 1] if k else torch.full_like(cells[:, 0], -1)
            owner = torch.zeros_like(before)
            held = chain.axis.held(cells[:, :k])[:, -1] if k else owner
            step, which = chain.next_log_probs(
                owner, owner + count, owner + k, before, earliest, held
            )
            step = step.masked_fill(step < 0.5 * LOG_ZERO, -torch.inf)
            grown = (total.unsqueeze(-1) + step[which]).flatten()
            total, best = grown.topk(min(num, len(grown)))
            total, best = total[total.isfinite()], best[total.isfinite()]
            parent, cell = best // step.shape[-1], best % step.shape[-1]
            cells = cells[parent]
            cells[:, k] = cell
            earliest = chain.axis.lower(edges[cell], earliest[parent])
        enough = total >= total[0] + math.log(_LEAST_SHARE)
        return cells[enough], total[enough]


def _logsumexp(values: Tensor, group: Tensor, num: int) -> Tensor:
    """Log of the sum of exponentials in each of ``num`` groups."""
    top = values.new_full((num,), -torch.inf)
    top = top.scatter_reduce(0, group, values, "amax")
    sums = values.new_zeros(num).index_add(0, group, (values - top[group]).exp())
    return top + sums.log()


def _find(table: _Table, pair: Tensor, cells: Tensor) -> Tensor:
    """Places ``(N,)`` of sets in their table, flattened; -1 for those not weighed."""
    there = table.log_weight.flatten().isfinite().nonzero().squeeze(-1)
    keys = (there // table.log_weight.shape[-1]).unsqueeze(-1)
    known = torch.cat([keys, table.cells.flatten(0, 1)[there]], -1)
    place = _place(known, torch.cat([pair.unsqueeze(-1), cells], -1))
    return torch.where(place >= 0, there[place.clamp(min=0)], -1)


def _place(known: Tensor, rows: Tensor) -> Tensor:
    """Places ``(N,)`` of rows ``(N, C)`` among known ones ``(M, C)``; -1 for none."""
    _, which = unique_rows(*torch.cat([known, rows]).unbind(-1))
    place = torch.full_like(which, -1)
    place[which[: len(known)]] = torch.arange(len(known)).to(which)
    return place[which[len(known) :]]
