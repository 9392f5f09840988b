r"""Distributions over the anchors of K components.

Every token t has a score; h_t, its sigmoid, is the chance that a component sits there.

:class:`CellChain`, for joint components, walks along the axis,

.. math::
    q(a_1 \le \ldots \le a_K | x, K) = \prod_k q(a_k | a_{k-1}, x, K), \qquad
    q(a_k = t | \cdot) \propto h_t \prod_{s < t} (1 - h_s),

s and t over the cells that are left to component k: the next component is at the first
cell that is not passed over. Scores depend on K, k and the anchor before, those within
its reach through a network of the two tokens. A chain may be tilted (:class:`Tilt`).

:class:`CellMarginals`, for factorised components, takes presences as independent
given K. The i-th of K components in order is then at t with the probability

.. math::
    q_i(a = t | x, K) = o_t\, e_{i-1}(o_{<t})\, e_{K-i}(o_{>t}) / e_K(o)

of a conditional Bernoulli sample, o the odds and e the elementary symmetric
polynomials.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cells import CellAxis
from .unique_rows import unique_rows

__all__ = ["CellChain", "CellMarginals", "Tilt", "draw_cells"]

NEGLIGIBLE = 1e-5
"""Share of the most probable anchor's probability below which another has none.

At that level a probability is a network's floor and no knowledge, but a single draw at
the other end of the band outweighs the width of a sharp posterior.
"""

LOG_ZERO = -1e30
# Bounds the memory of looking ahead.
_STATES_AT_ONCE = 1_024


class Tilt(NamedTuple):
    r"""A chain's probabilities times the exponential of its cells' shifts.

    .. math::
        \tilde q(a) \propto q(a) \exp \sum_t s_t\, 1_{t \in a}

    is a chain again, whose steps look ahead to what they leave possible (the twisted
    chains of Doob's h-transform). Each step is normalised, so that what looking ahead
    leaves out, a least separation's reach beyond the next cell, costs no exactness.

    Attributes:
        row: Which of P tilts is that of an observation and K, shape ``(B, Kmax + 1)``.
        shift: Shifts s, shape ``(P, L)``.
        ahead: Log of what is to come after component k at a cell, shape
            ``(P, Kmax, L)``.
    """

    row: Tensor
    shift: Tensor
    ahead: Tensor


class CellChain(nn.Module):
    """Anchors as a Markov chain along the axis.

    Args:
        axis: The location axis.
        token_features: Length of a token.
        max_cardinality: Largest cardinality Kmax.
        hidden_features: Width of the scores' networks.
        reach: Cells after an anchor whose scores depend on it in full.
    """

    def __init__(
        self,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        hidden_features: int = 64,
        reach: int = 6,
    ) -> None:
        super().__init__()
        self.axis, self.max_cardinality, self.reach = axis, max_cardinality, reach
        self.keys = nn.Linear(token_features, hidden_features)
        self.presence = nn.Linear(token_features, 1)
        nn.init.constant_(self.presence.bias, -2.0)
        # One embedding for each (K, k), and one for "no anchor yet".
        self.place = nn.Embedding(max_cardinality * max_cardinality, hidden_features)
        self.first = nn.Parameter(torch.zeros(token_features))
        self.query = nn.Sequential(
            nn.Linear(hidden_features + token_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, hidden_features),
        )
        self.offset = nn.Embedding(reach, hidden_features)
        self.near_token = nn.Linear(token_features, hidden_features)
        self.near_query = nn.Linear(hidden_features, hidden_features)
        self.near_score = nn.Linear(hidden_features, 1)
        nn.init.zeros_(self.near_score.weight)

    def log_prob(
        self,
        tokens: Tensor,
        edges: Tensor,
        owner: Tensor,
        anchors: Tensor,
        mask: Tensor,
        prune: bool = False,
        tilt: Tilt | None = None,
    ) -> Tensor:
        """Evaluate the log probability of N ascending rows of anchors.

        Args:
            tokens: Tokens of the observations, shape ``(B, L, C)``.
            edges: Edges of their cells, shape ``(B, L + 1)``.
            owner: Observation of each row, shape ``(N,)``.
            anchors: Anchors, shape ``(N, Kmax)``.
            mask: Active ones, shape ``(N, Kmax)``.
            prune: Whether anchors that are :data:`NEGLIGIBLE` are ruled out.
            tilt: What the chain is tilted by.

        Returns:
            Shape ``(N,)``; -inf for anchors that leave no room for a set.
        """
        row, k = mask.nonzero(as_tuple=True)
        count = mask.sum(-1)[row]
        before = torch.where(k > 0, anchors[row, k - 1], -1)
        starts = edges[owner.unsqueeze(-1), anchors]
        earliest = self.axis.earliest(starts)[row, k - 1]
        earliest = torch.where(k > 0, earliest, -torch.inf)
        step, which = self.next_log_probs(
            tokens, edges, owner[row], count, k, before, earliest, prune, tilt
        )
        value = step[which, anchors[row, k]]
        value = torch.where(value > 0.5 * LOG_ZERO, value, -torch.inf)
        return value.new_zeros(len(mask)).index_add(0, row, value)

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        edges: Tensor,
        owner: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
        prune: bool = False,
        tilt: Tilt | None = None,
    ) -> Tensor:
        """Draw anchors ``(N, Kmax)``, ascending, zero where inactive."""
        count = mask.sum(-1)
        anchors = torch.zeros_like(mask, dtype=torch.int64)
        earliest = torch.full_like(count, -torch.inf, dtype=torch.float64)
        before = torch.full_like(count, -1)
        for k in range(int(count.max()) if len(count) else 0):
            rows = (count > k).nonzero().squeeze(-1)
            step, which = self.next_log_probs(
                *(tokens, edges, owner[rows], count[rows], torch.full_like(rows, k)),
                *(before[rows], earliest[rows], prune, tilt),
            )
            steps = step.double().exp().cumsum(-1)
            level = torch.rand(
                len(rows), dtype=steps.dtype, device=steps.device, generator=generator
            )
            drawn = draw_cells(steps, which, level)
            anchors[rows, k] = before[rows] = drawn
            starts = edges[owner[rows], drawn]
            earliest[rows] = self.axis.lower(starts, earliest[rows])
        return anchors

    def next_log_probs(
        self,
        tokens: Tensor,
        edges: Tensor,
        owner: Tensor,
        count: Tensor,
        k: Tensor,
        before: Tensor,
        earliest: Tensor,
        prune: bool = False,
        tilt: Tilt | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log probabilities of the next anchor of N sets.

        Args:
            tokens: Tokens of the observations, shape ``(B, L, C)``.
            edges: Edges of their cells, shape ``(B, L + 1)``.
            owner: Observation of each set, shape ``(N,)``.
            count: Components of each set.
            k: Component whose anchor is next.
            before: Anchor of the one before, -1 for none.
            earliest: Earliest position of the one before, -inf for none.
            prune: Whether anchors that are :data:`NEGLIGIBLE` are ruled out.
            tilt: What the chain is tilted by.

        Returns:
            Those of M distinct states, shape ``(M, L)``, and the state of each set,
            shape ``(N,)``. Impossible anchors have less than half of ``LOG_ZERO``.
        """
        states, which = _distinct(owner, count, k, before, earliest)
        owner, count, k, before, earliest = states
        scores = self._scores(tokens, owner, count, k, before)
        feasible = self.axis.feasible(earliest, count - 1 - k, edges[owner])
        value = _log_first(scores, feasible)
        if tilt is not None:
            row = tilt.row[owner, count]
            # A cell's shift counts once.
            cells = torch.arange(value.shape[-1], device=value.device)
            again = cells == before.unsqueeze(-1)
            shift = tilt.shift[row].masked_fill(again, 0.0)
            value = (value + shift + tilt.ahead[row, k]).log_softmax(-1)
        if prune:
            most = value.amax(-1, keepdim=True)
            few = value < most + math.log(NEGLIGIBLE)
            value = value.masked_fill(few, LOG_ZERO).log_softmax(-1)
        return value, which

    def look_ahead(
        self, tokens: Tensor, edges: Tensor, count: Tensor, shift: Tensor
    ) -> Tensor:
        """Look ahead in P tilted chains, by backward recursion.

        Args:
            tokens: Tokens of each one's observation, shape ``(P, L, C)``.
            edges: Edges of its cells, shape ``(P, L + 1)``.
            count: Components, shape ``(P,)``.
            shift: Shifts, shape ``(P, L)``.

        Returns:
            :attr:`Tilt.ahead`.
        """
        num, cells = shift.shape
        ahead = shift.new_zeros(num, self.max_cardinality, cells)
        if not shift.any():
            return ahead
        cell = torch.arange(cells, device=shift.device)
        for k in range(int(count.max()) - 1, 0, -1):
            longer = (count > k).nonzero().squeeze(-1)
            for pair in longer.split(max(1, _STATES_AT_ONCE // cells)):
                owner, before = pair.repeat_interleave(cells), cell.repeat(len(pair))
                place = torch.full_like(owner, k)
                scores = self._scores(tokens, owner, count[owner], place, before)
                # As if the component before were at the start of its cell.
                earliest, left = edges[pair, :-1].flatten(), count[owner] - 1 - k
                feasible = self.axis.feasible(earliest, left, edges[owner])
                moved = shift[owner].masked_fill(cell == before.unsqueeze(-1), 0.0)
                value = _log_first(scores, feasible) + moved + ahead[owner, k]
                ahead[pair, k - 1] = value.logsumexp(-1).unflatten(0, (-1, cells))
        return ahead

    def _scores(
        self, tokens: Tensor, owner: Tensor, count: Tensor, k: Tensor, before: Tensor
    ) -> Tensor:
        """Scores ``(M, L)`` of component k of ``count`` after an anchor."""
        place = self.place((count - 1) * self.max_cardinality + k)
        started = (before >= 0).unsqueeze(-1)
        previous = torch.where(started, tokens[owner, before.clamp(min=0)], self.first)
        query = self.query(torch.cat([place, previous], -1))
        scores = (self.keys(tokens)[owner] @ query.unsqueeze(-1)).squeeze(-1)
        scores = scores / query.shape[-1] ** 0.5
        scores = scores + self.presence(tokens).squeeze(-1)[owner]
        reach = torch.arange(self.reach, device=tokens.device)
        cell = before.unsqueeze(-1) + reach
        inside = started & (cell < self.axis.num_anchors)
        cell = cell.clamp(0, self.axis.num_anchors - 1)
        near = self.near_token(tokens)[owner.unsqueeze(-1), cell]
        hidden = near + self.near_query(query).unsqueeze(-2) + self.offset(reach)
        extra = self.near_score(functional.gelu(hidden)).squeeze(-1)
        extra = torch.where(inside, extra, extra.new_zeros(()))
        return scores.scatter_add(-1, cell, extra)


class CellMarginals(nn.Module):
    """Anchors of the i-th of K components, independent of the others'.

    Args:
        axis: The location axis.
        token_features: Length of a token.
        max_cardinality: Largest cardinality Kmax.
        hidden_features: Width of the scores' network.
    """

    def __init__(
        self,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        hidden_features: int = 64,
    ) -> None:
        super().__init__()
        self.axis, self.max_cardinality = axis, max_cardinality
        self.scores = nn.Sequential(
            nn.Linear(token_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, max_cardinality),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Log probabilities of every slot's anchor.

        Args:
            tokens: Tokens, shape ``(B, L, C)``.

        Returns:
            Shape ``(B, Kmax, Kmax, L)`` (K - 1, slot, anchor); slots from K on are
            meaningless.
        """
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
    """Log elementary symmetric polynomials of all odds before each cell.

    Returns:
        Shape ``(B, Kmax, L, size + 1)``.
    """
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


def _distinct(*columns: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Distinct states, all of them in training, where few are equal."""
    if torch.is_grad_enabled():
        return columns, torch.arange(len(columns[0]), device=columns[0].device)
    return unique_rows(*columns)


def draw_cells(steps: Tensor, which: Tensor, level: Tensor) -> Tensor:
    """Draw cells from distributions, one for each row.

    Args:
        steps: Cumulative probabilities of M distributions, shape ``(M, L)``, float64.
        which: Distribution of each row, shape ``(N,)``.
        level: Uniform variables, shape ``(N,)``.
    """
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
