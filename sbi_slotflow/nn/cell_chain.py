r"""Distributions over the cells of K components, :math:`q(a_1 \le \ldots \le a_K | x)`.

:class:`CellChain` is a Markov chain along the axis: the cell of component k depends on
the cell before,

.. math::
    q(a | x, K) = \prod_{k=1}^K q(a_k | a_{k-1}, k, K, x), \qquad
    q(a_k = t | a_{k-1}) \propto \sigma(s_t) \prod_{a_{k-1} \le u < t} \sigma(-s_u),

the probability that t is the first cell that is not passed over. The scores s come from
the token of each cell. Each step is normalised over the feasible cells (see
:meth:`.cells.CellAxis.feasible`), so the product sums to one over all feasible sets.

:class:`CellMarginals` is the law of the paper's independent slots: the i-th cell of K
that are drawn without replacement with given odds,

.. math::
    q_i(t) = \frac{e_{i-1}(o_{<t})\, o_t\, e_{K-i}(o_{>t})}{e_K(o)},

o the odds and e the elementary symmetric polynomials.

Example:
    >>> _ = torch.manual_seed(0)
    >>> chain = CellChain(CellAxis(0, 5), token_features=4, max_cardinality=2)
    >>> edges = torch.arange(6.0, dtype=torch.float64).expand(1, -1)
    >>> given = ChainGivenX(chain, torch.randn(1, 5, 4), edges)
    >>> owner, mask = torch.tensor([0]), torch.tensor([[True, True]])
    >>> given.sample(owner, mask).shape
    torch.Size([1, 2])

See Also:
    :mod:`.cell_sets`, where the likeliest sets are weighed by their evidence.
"""

import math
from abc import ABC, abstractmethod
from copy import copy
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cells import CellAxis, unique_rows
from .encoders import mlp

__all__ = [
    "CellChain",
    "CellDistribution",
    "CellMarginals",
    "ChainGivenX",
    "FlooredCells",
    "PrunedChain",
    "Tilt",
    "UniformCells",
    "draw_cells",
]

NEGLIGIBLE = 1e-5
"""Share of the most probable cell's probability below which a cell is pruned.

At that level a probability is a network's floor and no knowledge, but a single draw at
the other end of the band outweighs the width of a sharp posterior.
"""

LOG_ZERO = -1e30
# Share of the floor.
_FLOOR = 1e-6


class CellDistribution(Protocol):
    """A distribution over ascending rows of cells, given observations."""

    def log_prob(self, owner: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Evaluate log probabilities ``(N,)`` of ascending cells ``(N, Kmax)``.

        They are -inf for cells that leave no room for a set.
        """
        ...

    def sample(
        self, owner: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw cells ``(N, Kmax)``, ascending, zero where inactive."""
        ...


class _Steps(ABC):
    """Cells drawn one after the other."""

    def __init__(self, axis: CellAxis, edges: Tensor) -> None:
        self.axis, self.edges = axis, edges

    @abstractmethod
    def _next(
        self, owner: Tensor, count: Tensor, k: Tensor, before: Tensor, feasible: Tensor
    ) -> Tensor:
        """Log probabilities ``(M, L)`` of the next cell of M distinct states."""

    def log_prob(self, owner: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Evaluate log probabilities; see :meth:`CellDistribution.log_prob`."""
        row, k = mask.nonzero(as_tuple=True)
        before = torch.where(k > 0, cells[row, k - 1], -1)
        starts = self.edges[owner.unsqueeze(-1), cells]
        earliest = self.axis.earliest(starts)[row, k - 1]
        earliest = torch.where(k > 0, earliest, -torch.inf)
        count = mask.sum(-1)[row]
        held = torch.where(k > 0, self.axis.held(cells)[row, k - 1], 0)
        step, which = self.next_log_probs(owner[row], count, k, before, earliest, held)
        value = step[which, cells[row, k]]
        value = torch.where(value > 0.5 * LOG_ZERO, value, -torch.inf)
        return value.new_zeros(len(mask)).index_add(0, row, value)

    @torch.no_grad()
    def sample(
        self, owner: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw cells; see :meth:`CellDistribution.sample`."""
        count = mask.sum(-1)
        cells = torch.zeros_like(mask, dtype=torch.int64)
        earliest = torch.full_like(count, -torch.inf, dtype=torch.float64)
        before = torch.full_like(count, -1)
        for k in range(int(count.max()) if len(count) else 0):
            rows = (count > k).nonzero().squeeze(-1)
            place = torch.full_like(rows, k)
            last = self.axis.held(cells[rows, : k + 1])[:, max(0, k - 1)]
            step, which = self.next_log_probs(
                owner[rows],
                count[rows],
                place,
                before[rows],
                earliest[rows],
                last if k else torch.zeros_like(last),
            )
            steps = step.double().exp().cumsum(-1)
            level = torch.rand(
                len(rows), dtype=steps.dtype, device=steps.device, generator=generator
            )
            drawn = draw_cells(steps, which, level)
            cells[rows, k] = before[rows] = drawn
            starts = self.edges[owner[rows], drawn]
            earliest[rows] = self.axis.lower(starts, earliest[rows])
        return cells

    def next_log_probs(
        self,
        owner: Tensor,
        count: Tensor,
        k: Tensor,
        before: Tensor,
        earliest: Tensor,
        held: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log probabilities of the next cell of N sets.

        Component k of ``count`` follows the cell ``before``; see
        :meth:`.cells.CellAxis.feasible` for ``earliest`` and ``held``.
        """
        states = owner, count, k, before, earliest, held
        # In training few states are equal.
        which = torch.arange(len(owner), device=owner.device)
        if not torch.is_grad_enabled():
            states, which = unique_rows(*states)
        owner, count, k, before, earliest, held = states
        edges, left = self.edges[owner], count - 1 - k
        feasible = self.axis.feasible(earliest, left, edges, before, held)
        return self._next(owner, count, k, before, feasible), which


class UniformCells(_Steps):
    """Every feasible cell is as probable as any other, step by step."""

    def _next(
        self, owner: Tensor, count: Tensor, k: Tensor, before: Tensor, feasible: Tensor
    ) -> Tensor:
        # A feasible cell is not before the last one, as it ends beyond its start.
        value = torch.zeros_like(feasible, dtype=self.edges.dtype)
        return value.masked_fill(~feasible, LOG_ZERO).log_softmax(-1)


class FlooredCells:
    r"""A distribution over cells with a floor below all feasible sets.

    .. math::
        q(a) = (1 - \epsilon)\, p(a) + \epsilon\, u(a), \qquad \epsilon = 10^{-6}

    No feasible set then has probability zero, so that weights of draws can correct
    whatever p is wrong about.
    """

    def __init__(self, cells: CellDistribution, floor: UniformCells) -> None:
        self.cells, self.floor = cells, floor

    def log_prob(self, owner: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        """Evaluate log probabilities; see :meth:`CellDistribution.log_prob`."""
        if not len(owner):
            return self.floor.log_prob(owner, cells, mask)
        value = self.cells.log_prob(owner, cells, mask)
        floor = self.floor.log_prob(owner, cells, mask) + math.log(_FLOOR)
        # Its slope is that of 0, not NaN, where both are -inf.
        floor = floor.to(value).clamp(min=LOG_ZERO)
        value = torch.logaddexp(value + math.log1p(-_FLOOR), floor)
        return value.masked_fill(value <= LOG_ZERO, -torch.inf)

    @torch.no_grad()
    def sample(
        self, owner: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw cells; see :meth:`CellDistribution.sample`."""
        if not len(owner):
            return torch.zeros_like(mask, dtype=torch.int64)
        cells = self.cells.sample(owner, mask, generator)
        level = torch.rand(
            len(owner), dtype=torch.float64, device=owner.device, generator=generator
        )
        few = (level < _FLOOR).nonzero().squeeze(-1)
        if len(few):
            cells[few] = self.floor.sample(owner[few], mask[few], generator)
        return cells


class CellChain(nn.Module):
    """Cells as a Markov chain along the axis."""

    def __init__(
        self,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        hidden_features: int = 64,
        reach: int = 6,
    ) -> None:
        super().__init__()
        self.axis, self.max_cardinality = axis, max_cardinality
        self.keys = nn.Linear(token_features, hidden_features)
        self.presence = nn.Linear(token_features, 1)
        nn.init.constant_(self.presence.bias, -2.0)
        # One embedding for each (K, k), and one for "no cell yet".
        self.place = nn.Embedding(max_cardinality * max_cardinality, hidden_features)
        self.first = nn.Parameter(torch.zeros(token_features))
        widths = hidden_features + token_features, hidden_features, hidden_features
        self.query = mlp(*widths)
        steps = torch.tensor(axis.steps(reach))
        self.register_buffer("steps", steps, persistent=False)
        self.offset = nn.Embedding(len(steps), hidden_features)
        self.near_token = nn.Linear(token_features, hidden_features)
        self.near_query = nn.Linear(hidden_features, hidden_features)
        self.near_score = nn.Linear(hidden_features, 1)
        nn.init.zeros_(self.near_score.weight)


class ChainGivenX(_Steps):
    """A chain given B observations, as it is trained."""

    def __init__(self, chain: CellChain, tokens: Tensor, edges: Tensor) -> None:
        super().__init__(chain.axis, edges)
        self.chain, self.tokens = chain, tokens
        self._keys, self._near = chain.keys(tokens), chain.near_token(tokens)
        self._presence = chain.presence(tokens).squeeze(-1)

    def one(self, observation: int) -> Self:
        """The chain of one of the observations."""
        new, here = copy(self), slice(observation, observation + 1)
        new.tokens, new.edges = self.tokens[here], self.edges[here]
        new._keys, new._near = self._keys[here], self._near[here]
        new._presence = self._presence[here]
        return new

    def _next(
        self, owner: Tensor, count: Tensor, k: Tensor, before: Tensor, feasible: Tensor
    ) -> Tensor:
        return _log_first(self._scores(owner, count, k, before), feasible)

    def _scores(
        self, owner: Tensor, count: Tensor, k: Tensor, before: Tensor
    ) -> Tensor:
        """Scores ``(M, L)`` of component k of ``count`` after a cell."""
        chain, steps = self.chain, self.chain.get_buffer("steps")
        place = chain.place((count - 1) * chain.max_cardinality + k)
        started = (before >= 0).unsqueeze(-1)
        previous = self.tokens[owner, before.clamp(min=0)]
        previous = torch.where(started, previous, chain.first)
        query = chain.query(torch.cat([place, previous], -1))
        scores = (self._keys[owner] @ query.unsqueeze(-1)).squeeze(-1)
        scores = scores / query.shape[-1] ** 0.5 + self._presence[owner]
        cell, inside = self.axis.stepped(before, steps)
        inside &= started
        near = self._near[owner.unsqueeze(-1), cell]
        hidden = near + chain.near_query(query).unsqueeze(-2) + chain.offset.weight
        extra = chain.near_score(functional.gelu(hidden)).squeeze(-1)
        extra = torch.where(inside, extra, extra.new_zeros(()))
        return scores.scatter_add(-1, cell, extra)


class Tilt(NamedTuple):
    r"""A chain's probabilities times the exponential of its cells' shifts.

    .. math::
        \tilde q(a) \propto q(a) \exp \sum_t s_t\, 1_{t \in a}

    is a chain again, whose steps look ahead to what they leave possible (the twisted
    chains of Doob's h-transform). Each step is normalised, so that what looking ahead
    leaves out, a least separation's reach beyond the next cell, costs no exactness.
    """

    row: Tensor  # Which of P tilts is that of an observation and K, (B, Kmax + 1)
    shift: Tensor  # Shifts s, (P, L)
    ahead: Tensor  # Log of what is to come after component k at a cell, (P, Kmax, L)


class PrunedChain(ChainGivenX):
    """A chain for inference: tilted, and without :data:`NEGLIGIBLE` cells."""

    tilt: Tilt | None = None

    def with_tilt(self, tilt: Tilt) -> "PrunedChain":
        """The same chain, tilted."""
        new = copy(self)
        new.tilt = tilt
        return new

    def tilted(self, shift: Tensor, count: int) -> "PrunedChain":
        """The chain of one observation and K, tilted by shifts ``(1, L)``."""
        row = torch.zeros(1, self.chain.max_cardinality + 1).to(shift).long()
        return self.with_tilt(Tilt(row, shift, self._look_ahead(shift, count)))

    def _next(
        self, owner: Tensor, count: Tensor, k: Tensor, before: Tensor, feasible: Tensor
    ) -> Tensor:
        value = super()._next(owner, count, k, before, feasible)
        if self.tilt is not None:
            row = self.tilt.row[owner, count]
            # A cell's shift counts once.
            cells = torch.arange(value.shape[-1], device=value.device)
            again = cells == before.unsqueeze(-1)
            shift = self.tilt.shift[row].masked_fill(again, 0.0)
            value = (value + shift + self.tilt.ahead[row, k]).log_softmax(-1)
        few = value < value.amax(-1, keepdim=True) + math.log(NEGLIGIBLE)
        return value.masked_fill(few, LOG_ZERO).log_softmax(-1)

    def _look_ahead(self, shift: Tensor, count: int) -> Tensor:
        """:attr:`Tilt.ahead` of one observation and K, by backward recursion."""
        cells = shift.shape[-1]
        ahead = shift.new_zeros(1, self.chain.max_cardinality, cells)
        if not shift.any():
            return ahead
        before = torch.arange(cells, device=shift.device)
        owner = torch.zeros_like(before)
        moved = shift.expand(cells, -1).masked_fill(
            torch.eye(cells, dtype=torch.bool, device=shift.device), 0.0
        )
        # As if the component before were at the start of its cell.
        earliest, edges = self.edges[0, :-1], self.edges.expand(cells, -1)
        counts = torch.full_like(before, count)
        for k in range(count - 1, 0, -1):
            feasible = self.axis.feasible(earliest, counts - 1 - k, edges)
            place = torch.full_like(before, k)
            value = super()._next(owner, counts, place, before, feasible)
            ahead[:, k - 1] = (value + moved + ahead[:, k]).logsumexp(-1)
        return ahead


class CellMarginals(nn.Module):
    """Cells of the i-th of K components, independent of the others'."""

    def __init__(
        self,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        hidden_features: int = 64,
    ) -> None:
        super().__init__()
        self.axis, self.max_cardinality = axis, max_cardinality
        self.scores = mlp(token_features, hidden_features, max_cardinality)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log probabilities of every slot's cell."""
        odds = self.scores(tokens).mT  # (B, K - 1, L)
        size = self.max_cardinality
        before, after = _symmetric(odds, size), _symmetric(odds.flip(-1), size)
        after = after.flip(-2)
        total = torch.logaddexp(
            before[..., -1, :], _shift(before[..., -1, :]) + odds[..., -1:]
        )
        values = []
        for k in range(1, size + 1):
            slots = torch.arange(size, device=odds.device)
            others = (k - 1 - slots).clamp(min=0)
            each = before[:, k - 1, :, slots] + after[:, k - 1, :, others]
            each = each + odds[:, k - 1, :, None] - total[:, k - 1, k, None, None]
            values.append(each.mT)
        return torch.stack(values, 1)


def _symmetric(odds: Tensor, size: int) -> Tensor:
    """Log elementary symmetric polynomials of all odds before each cell."""
    state = odds.new_full((*odds.shape[:-1], size + 1), LOG_ZERO)
    state[..., 0] = 0.0
    states = []
    for cell in odds.unbind(-1):
        states.append(state)
        state = torch.logaddexp(state, _shift(state) + cell.unsqueeze(-1))
    return torch.stack(states, -2)


def _shift(state: Tensor) -> Tensor:
    """Move every entry up by one, log 0 into the first."""
    return functional.pad(state[..., :-1], (1, 0), value=LOG_ZERO)


def draw_cells(steps: Tensor, which: Tensor, level: Tensor) -> Tensor:
    """Draw cells from distributions, one for each row."""
    # One search through all distributions, the m-th of which covers [m, m + 1].
    size = steps.shape[-1]
    first = torch.arange(len(steps)).to(steps).unsqueeze(-1)
    line = (first + steps / steps[:, -1:]).flatten()
    base = which.to(level)
    # Short of the end, so that rounding leaves no row beyond its last cell.
    level = torch.minimum(base + level, torch.nextafter(base + 1, base))
    return torch.searchsorted(line, level, right=True) - which * size


def _log_first(scores: Tensor, feasible: Tensor) -> Tensor:
    """Log probability that each feasible cell is the first one not passed over."""
    passed = functional.logsigmoid(-scores).masked_fill(~feasible, 0.0)
    passed = passed.cumsum(-1) - passed
    value = functional.logsigmoid(scores) + passed
    return value.masked_fill(~feasible, LOG_ZERO).log_softmax(-1)
