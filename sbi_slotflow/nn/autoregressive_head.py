r"""Components in cells, drawn one after the other in the order of their location.

.. math::
    \log q(\theta_1 \ldots \theta_K | x, K) = \log q(a_1 \ldots a_K | x, K)
        + \sum_k \log q(\theta_k | \theta_{<k}, a_1 \ldots a_K, x, K)

It costs O(K) to evaluate and to draw, and least separations hold by construction. The
cells follow a chain (:mod:`.cell_chain`), and where modes are found by Gauss-Newton
steps, their evidence (:mod:`.cell_sets`). Given the cells, each component has a
Gaussian, cut off at the ends of its cell and bent by a flow (:mod:`.local`).

See Also:
    :mod:`.modes`, where the Gaussians come from; :mod:`.cell_head`, slots
    without order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..sets.layout import ThetaParts
from .cell_chain import (
    CellChain,
    CellDistribution,
    ChainGivenX,
    FlooredCells,
    PrunedChain,
    UniformCells,
)
from .cell_head import CellHead
from .cell_sets import CellSets
from .cells import CellAxis, OccupiedCells, unique_rows
from .charts import Chart
from .encoders import Encoding, Observations, mlp
from .flows import RowContext
from .gauss_newton import SignalFit
from .heads import SharedGivenX
from .modes import ModeFinder, Modes
from .set_distribution import SetsGivenK
from .spec import Matching

__all__ = ["NO_FIT", "AutoregressiveHead"]

# Cells within which two components are told of each other.
_REACH = 6
# Float32 rows round: that far past an end counts as on it.
_SLACK = 1e-4


NO_FIT = (
    "refine_slots needs a signal that can be fitted: a problem whose build_fit() "
    "returns a SignalFit, and, for a signal of your own, fit=... where its estimator "
    "is loaded (fit=problem.build_fit())."
)


class _Conditioned(NamedTuple):
    """What follows from the cells of N rows, each distinct set once."""

    which: Tensor  # Set of each row, (N,)
    cells: OccupiedCells  # The S distinct sets
    upper: Tensor  # Largest positions, (S, Kmax)
    contexts: Tensor  # Contexts of components, (S Kmax, C)
    near: Tensor  # Whether a component is near the one before, (S, Kmax)
    centre: Tensor  # Angles about which components' are unwrapped, (S, Kmax, P)
    modes: Modes | None  # Modes found by Gauss-Newton steps; None without
    # Log of each row's residual level above whole cells, (N,); None without modes
    level: Tensor | None


class AutoregressiveHead(CellHead):
    """Components in cells that know of those before them.

    ``refine_steps`` Gauss-Newton steps on the likelihood of all K components give the
    Gaussians of the components and the evidence by which the ``weighed_sets`` likeliest
    sets of cells are weighed; without, the network predicts the Gaussians from the
    tokens. The flow learns what is not Gaussian; without layers there is none.
    """

    keeps_separation = True

    def __init__(
        self,
        chart: Chart,
        axis: CellAxis,
        token_features: int,
        max_cardinality: int,
        trunk_features: int = 128,
        flow: dict[str, Any] | None = None,
        fit: SignalFit | None = None,
        refine_steps: int = 0,
        weighed_sets: int = 512,
    ) -> None:
        super().__init__(chart, axis, max_cardinality)
        self.find_modes: ModeFinder | None = None
        self.weighed_sets, fitted = weighed_sets, bool(refine_steps)
        self.cells = CellChain(axis, token_features, max_cardinality)
        seen = max_cardinality + 1 + 3 * token_features + 2 * (_REACH + 1)
        if fitted:
            if fit is None:
                raise ValueError(NO_FIT)
            self.find_modes = ModeFinder(chart, self.local_chart, fit, refine_steps)
            seen += self.find_modes.num_features
        flow = dict(flow or {})
        # Without layers there is nothing to learn above fitted modes.
        plain = fitted and not flow.get("num_layers", 1)
        flow |= {"location_scale": fitted and not plain, "from_identity": fitted}
        self.trunk: nn.Sequential | None = None
        if not plain:
            self.trunk = mlp(seen, trunk_features, trunk_features, activated=True)
        self._build_local(trunk_features, self.local_chart.num_features, flow)

    def given(
        self, encoding: Encoding, data: Observations, shared: SharedGivenX | None
    ) -> SetsGivenK:
        """Return the density given x; see :meth:`SetHead.given`."""
        tokens, edges = self.tokens_and_edges(encoding)
        finder, weighed = self.find_modes, self.find_modes and self.weighed_sets
        with torch.set_grad_enabled(torch.is_grad_enabled() and not weighed):
            cells = PrunedChain(self.cells, tokens, edges)
        find_modes = None if finder is None else partial(finder, data.x)
        parts: CellSets | None = None
        if finder is not None and weighed:
            cells = parts = CellSets(cells, finder, self.weighed_sets, data.x)
            find_modes = cells.modes
        floored = FlooredCells(cells, UniformCells(self.axis, edges))
        return _JointSets(self, tokens, edges, floored, find_modes, data, shared, parts)

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`SetHead.in_training`."""
        tokens, edges = self.tokens_and_edges(encoding)
        cells, finder = ChainGivenX(self.cells, tokens, edges), self.find_modes
        find_modes = None if finder is None else partial(finder, data.x)
        return _JointSets(self, tokens, edges, cells, find_modes, data, shared)

    def log_prob_cells(self, parts: ThetaParts, encoding: Encoding) -> Tensor:
        """Evaluate log q(a | x, K) of the cells of B sets, shape ``(B,)``."""
        (tokens, edges), mask = self.tokens_and_edges(encoding), parts.mask
        position = self.local_chart.position(self.coordinates(parts)[0])
        cells = torch.where(mask, self.axis.cells(position, edges), 0)
        owner = torch.arange(len(mask), device=mask.device)
        chain = ChainGivenX(self.cells, tokens, edges)
        return chain.log_prob(owner, cells, mask)


@dataclass(eq=False)
class _JointSets(SetsGivenK):
    """Joint components given B observations."""

    head: AutoregressiveHead
    tokens: Tensor
    edges: Tensor
    cells: CellDistribution
    find_modes: Callable[[OccupiedCells], Modes] | None
    data: Observations
    shared: SharedGivenX | None
    parts: CellSets | None = None

    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log densities; see :meth:`SetsGivenK.log_terms`."""
        # Components stand in canonical order: there is nothing to match.
        head, mask = self.head, parts.mask
        coordinates, log_det = head.coordinates(parts)
        position = head.local_chart.position(coordinates)
        cells = torch.where(mask, head.axis.cells(position, self.edges[owner]), 0)
        value = self.cells.log_prob(owner, cells, mask) + log_det
        whole = torch.full_like(owner, -1)
        local, level = self._log_local(coordinates, cells, mask, owner, whole)
        if self.parts is not None and len(owner):
            there = OccupiedCells.among(self.edges, owner, cells, mask)
            part, log_part = self.parts.parts_of(there, position)
            some = (part >= 0).nonzero().squeeze(-1)
            if len(some):
                of = (each[some] for each in (coordinates, cells, mask, owner, part))
                inside = self._log_local(*of)[0] + log_part[some].to(local)
                log_whole, log_parts = self.parts.log_shares
                both = torch.logaddexp(local[some] + log_whole, inside + log_parts)
                local = local.index_copy(0, some, both)
        value = value + local
        return value, self.log_shared(parts, owner, value, level)

    def _log_local(
        self,
        coordinates: Tensor,
        cells: Tensor,
        mask: Tensor,
        owner: Tensor,
        part: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Log densities ``(N,)`` within cells or parts of them, and residual levels."""
        head, position = self.head, self.head.local_chart.position(coordinates)
        sets = self.conditioned(owner, cells, mask, part)
        w = head.local_chart.relative(coordinates, cells, sets.centre[sets.which])
        row, k = mask.nonzero(as_tuple=True)
        which, here = sets.which[row], w[row, k]
        means = noise = torch.zeros_like(w)
        if sets.modes is not None:
            means, noise = sets.modes.whiten(w, sets.which, mask)
        context = self._context(sets, which, k, w, noise, row)
        if sets.modes is not None:
            mean, factor = means[row, k], sets.modes.block(which, k)
        else:
            mean, factor = head.predicted(context)
        before = torch.where(k > 0, position[row, k - 1], -torch.inf)
        low, high = self._limits(sets, which, k, before)
        allowed = ((here >= low - _SLACK) & (here <= high + _SLACK)).all(-1)
        here = torch.maximum(torch.minimum(here, high), low)
        anchors = cells[row, k]
        local = head.local.log_prob(here, mean, factor, (low, high), context, anchors)
        local = torch.where(allowed, local, -torch.inf)
        total = local.new_zeros(len(mask)).index_add(0, row, local)
        return total, sets.level

    @torch.no_grad()
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sets; see :meth:`SetsGivenK.sample`."""
        head, count = self.head, mask.sum(-1)
        cells = self.cells.sample(owner, mask, generator)
        part = torch.full_like(owner, -1)
        if self.parts is not None and len(owner):
            there = OccupiedCells.among(self.edges, owner, cells, mask)
            part = self.parts.sample_parts(there, generator)
        sets = self.conditioned(owner, cells, mask, part)
        shape = (*mask.shape, head.local_chart.num_features)
        w = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        noise = torch.zeros_like(w)
        before = w.new_full((len(mask),), -torch.inf)
        for k in range(int(count.max()) if len(mask) else 0):
            rows = mask[:, k].nonzero().squeeze(-1)
            which = sets.which[rows]
            context = self._context(sets, which, k, w, noise, rows)
            if sets.modes is not None:
                mean = sets.modes.mean(which, k, noise[rows, :k])
                factor = sets.modes.block(which, k)
            else:
                mean, factor = head.predicted(context)
            ends = self._limits(sets, which, k, before[rows])
            w[rows, k], noise[rows, k] = head.local.sample(
                mean, factor, ends, context, cells[rows, k], generator
            )
            before[rows] = cells[rows, k] + 0.5 + w[rows, k, 0]
        w = head.local_chart.absolute(w, cells, sets.centre[sets.which])
        components = head.components(w)
        level = sets.level
        return components, self.sample_shared(owner, mask, components, generator, level)

    def conditioned(
        self, owner: Tensor, cells: Tensor, mask: Tensor, part: Tensor | None = None
    ) -> _Conditioned:
        """Collect what follows from the cells ``(N, Kmax)`` of N rows, and parts."""
        part = torch.full_like(owner, -1) if part is None else part
        head, count = self.head, mask.sum(-1)
        which = torch.arange(len(owner), device=owner.device)
        if not torch.is_grad_enabled():
            columns, which = unique_rows(owner, count, part, *cells.unbind(-1))
            owner, count, part = columns[:3]
            cells = torch.stack(columns[3:], -1)
            mask = torch.arange(cells.shape[-1]).to(count) < count.unsqueeze(-1)
        sets = OccupiedCells.among(self.edges, owner, cells, mask)
        modes = level = None
        if self.find_modes is not None:
            modes = self.find_modes(sets)
            level = modes.level[which]
            if self.parts is not None and (part >= 0).any():
                sets = self.parts.within(sets, part)
                modes = self.parts.modes(sets, part)
        gaps = cells.diff(dim=-1, prepend=cells[:, :1]).clamp(min=0)
        contexts = self._contexts(sets, gaps, modes)
        if modes is None:
            centre = head.predicted.centre(contexts).unflatten(0, mask.shape)
        else:
            centre = modes.centre
        near = (gaps < _REACH) & ~_first(mask)
        upper = head.axis.upper(sets.ends, mask)
        return _Conditioned(which, sets, upper, contexts, near, centre, modes, level)

    def _contexts(
        self, sets: OccupiedCells, gaps: Tensor, modes: Modes | None
    ) -> Tensor:
        """Contexts ``(S Kmax, C)`` of components with gaps ``(S, Kmax)`` before."""
        here = self.tokens[sets.owner.unsqueeze(-1), sets.cells]
        if self.head.trunk is None:  # no layer of a flow looks at them
            return here.flatten(0, 1)
        mask, largest = sets.mask, self.head.max_cardinality
        sizes = functional.one_hot(mask.sum(-1), largest + 1).to(here)
        to_next = functional.pad(gaps[:, 1:], (0, 1))
        has_next = functional.pad(mask[:, 1:], (0, 1))
        seen = [
            here,
            sizes.unsqueeze(-2).expand(*mask.shape, -1),
            *_neighbour(here.roll(1, dims=1), gaps, mask & ~_first(mask)),
            *_neighbour(here.roll(-1, dims=1), to_next, has_next),
        ]
        if modes is not None:
            seen.append(modes.features(self.data.scale).to(here))
        return self.head.trunk(torch.cat(seen, -1)).flatten(0, 1)

    def _context(
        self,
        sets: _Conditioned,
        which: Tensor,
        k: int | Tensor,
        w: Tensor,
        noise: Tensor,
        row: Tensor,
    ) -> RowContext:
        """Contexts of component k of M rows, which see a near component before it."""
        near, own = sets.near[which, k].unsqueeze(-1), None
        # In training its weights shall have gradients, if only zeros.
        if self.head.trunk and (torch.is_grad_enabled() or near.any()):
            known = w if sets.modes is None else noise
            before = known[row, torch.as_tensor(k - 1).clamp(min=0)]
            if sets.modes is not None:
                before = before.clamp(-6.0, 6.0)
            own = torch.where(near, before, 0.0).float()
        largest = self.head.max_cardinality
        if isinstance(k, int):
            each = sets.contexts.unflatten(0, (-1, largest))
            return RowContext(each[:, k], which, own)
        return RowContext(sets.contexts, which * largest + k, own)

    def _limits(
        self, sets: _Conditioned, which: Tensor, k: int | Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates of component k, given the position before."""
        low = self.head.axis.lower(sets.cells.starts[which, k], before)
        return self.head.limits(sets.cells.cells[which, k], low, sets.upper[which, k])


def _first(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[-1], device=mask.device) == 0


def _neighbour(tokens: Tensor, gaps: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """A neighbour's token and, one-hot, its distance; zero if there is none."""
    distance = functional.one_hot(gaps.clamp(max=_REACH), _REACH + 1).to(tokens)
    there = there.unsqueeze(-1)
    return torch.where(there, tokens, 0.0), torch.where(there, distance, 0.0)
