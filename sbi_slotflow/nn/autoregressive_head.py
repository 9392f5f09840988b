r"""Anchored components that know of those before them.

In canonical order,

.. math::
    \log q = \log q(a_1 \ldots a_K | x, K)
        + \sum_k \log q(\theta_k | \theta_{<k}, a_1 \ldots a_K, x, K)

is O(K) to evaluate and to draw, and least separations hold by construction. Anchors
follow a chain (:mod:`.cell_chain`), weighed by their evidence where peaks are fitted
(:mod:`.cell_sets`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..sets.layout import ThetaParts
from .cell_chain import CellChain
from .cell_head import CellHead, trunk_network
from .cell_sets import CellSets
from .cells import CellAxis
from .charts import Chart
from .encoders import Encoding
from .flows import RowContext
from .gauss_newton import SignalFit
from .local_density import LocalDensity, LocalGaussian
from .modes import ModeFinder, Modes
from .spec import Matching
from .unique_rows import unique_rows

__all__ = ["AutoregressiveHead", "ConditionedSets"]

# Cells within which two components are told of each other.
_REACH = 6
# Float32 rows round: that far past an end counts as on it.
_SLACK = 1e-4


class ConditionedSets(NamedTuple):
    """Distinct sets of anchors and everything that follows from them.

    Attributes:
        which: Set of each row, shape ``(N,)``.
        anchors: Anchors, shape ``(S, Kmax)``.
        mask: Active ones, shape ``(S, Kmax)``.
        starts: Where their cells start, shape ``(S, Kmax)``.
        ends: Where they end, shape ``(S, Kmax)``.
        upper: Largest positions, shape ``(S, Kmax)``.
        contexts: Contexts of components, shape ``(S Kmax, C)``.
        near: Whether a component is near the one before, shape ``(S, Kmax)``.
        centre: Angles about which components' are unwrapped, shape ``(S, Kmax, P)``.
        peaks: Modes found by Gauss-Newton; None without.
    """

    which: Tensor
    anchors: Tensor
    mask: Tensor
    starts: Tensor
    ends: Tensor
    upper: Tensor
    contexts: Tensor
    near: Tensor
    centre: Tensor
    peaks: Modes | None

    @property
    def noise(self) -> Tensor | None:
        """Log of each row's residual level, shape ``(N,)``; None without peaks."""
        return None if self.peaks is None else self.peaks.noise[self.which]


class AutoregressiveHead(CellHead):
    """Anchored components that know of those before them.

    ``refine_steps`` Gauss-Newton steps on the likelihood of all K components, from
    their anchors, give the Gaussian that the local densities start from, with its
    covariance between components (see :mod:`.modes`), and at inference the evidence by
    which the ``weighed_sets`` likeliest sets of anchors are weighed; without, the
    network predicts it from the tokens. What is left is the flow's to learn; without
    layers it takes the peaks' Gaussians, cut off at the cells' ends, as they are.

    Args:
        chart: Chart of a component.
        axis: The location axis.
        token_features: Length of a token.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Width of a component's context.
        flow: Options of the flow.
        fit: The signal, for Gauss-Newton.
        refine_steps: Gauss-Newton steps; 0 for none.
        weighed_sets: Sets of anchors to weigh by their evidence; 0 for none.

    Raises:
        ValueError: If the chart is no density or a fit is missing.
    """

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
        super().__init__(chart, axis)
        self.max_cardinality = max_cardinality
        features = self.own_features = self.local_chart.num_features
        self.find_modes: ModeFinder | None = None
        self.gaussian: LocalGaussian | None = None
        seen = max_cardinality + 1 + 3 * token_features + 2 * (_REACH + 1)
        self.pointer = CellChain(axis, token_features, max_cardinality)
        if refine_steps:
            if fit is None:
                raise ValueError(
                    "refine_slots needs a signal that can be fitted: a problem whose "
                    "build_fit() returns a SignalFit, and, for a signal of your own, "
                    "fit=... where its estimator is loaded."
                )
            self.find_modes = ModeFinder(chart, self.local_chart, fit, refine_steps)
            seen += self.find_modes.num_features
        self.weighed_sets = weighed_sets
        self._last: CellSets | None = None
        flow = dict(flow or {})
        # Without layers there is nothing to learn above fitted peaks.
        plain = bool(refine_steps) and not flow.get("num_layers", 1)
        self.trunk: nn.Sequential | None = None
        if not plain:
            self.trunk = trunk_network(seen, trunk_features)
        if not refine_steps:
            self.gaussian = LocalGaussian(
                features, trunk_features, self.local_chart.num_circular
            )
        self.local = LocalDensity(
            features,
            trunk_features,
            own_features=features,
            **{
                **flow,
                "location_scale": bool(refine_steps) and not plain,
                "from_identity": bool(refine_steps),
            },
        )

    @property
    def keeps_separation(self) -> bool:
        """Components know where the one before is."""
        return True

    def anchor_log_prob(
        self, parts: ThetaParts, encoding: Encoding, owner: Tensor
    ) -> Tensor:
        """Log probabilities ``(N,)`` of the anchors alone; for training."""
        position = self._coordinates(parts)[0][..., 0]
        return self._anchors(position, parts.mask, encoding, owner, inference=False)[1]

    def _anchors(
        self,
        position: Tensor,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        inference: bool,
    ) -> tuple[Tensor, Tensor]:
        """Anchors ``(N, Kmax)`` of positions, and their log probabilities ``(N,)``."""
        edges = self.edges(encoding)
        anchors = torch.where(mask, self.axis.anchors(position, edges[owner]), 0)
        assert encoding.tokens is not None
        weighed = self._weighed(encoding) if inference and len(mask) else None
        if weighed is not None:
            return anchors, weighed.log_prob(owner, anchors, mask)
        return anchors, self.pointer.log_prob(
            encoding.tokens, edges, owner, anchors, mask, prune=inference
        )

    def _weighed(self, encoding: Encoding) -> CellSets | None:
        """The anchors' distribution where sets are weighed."""
        if self.find_modes is None or not self.weighed_sets:
            return None
        assert encoding.data is not None
        assert encoding.tokens is not None
        args = encoding.data, encoding.tokens, self.edges(encoding)
        if self._last is None or not self._last.is_of(self.pointer, *args):
            self._last = CellSets(
                self.pointer, self.find_modes, self.weighed_sets, *args
            )
        return self._last

    def _log_prob(
        self,
        coordinates: Tensor,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        matching: Matching,
        inference: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # Components stand in canonical order: there is nothing to match.
        position = coordinates[..., 0]
        anchors, value = self._anchors(position, mask, encoding, owner, inference)
        sets = self.sets(encoding, owner, anchors, mask)
        w = self.local_chart.relative(coordinates, anchors, sets.centre[sets.which])
        row, k = mask.nonzero(as_tuple=True)
        which, here = sets.which[row], w[row, k]
        means = noise = torch.zeros_like(w)
        if sets.peaks is not None:
            means, noise = sets.peaks.whiten(w, sets.which, mask)
        context = self.context(sets, which, k, w, noise, row)
        if sets.peaks is not None:
            mean, factor = means[row, k], sets.peaks.block(which, k)
        else:
            assert self.gaussian is not None
            mean, factor = self.gaussian(context)
        before = torch.where(k > 0, position[row, k - 1], -torch.inf)
        low, high = self._limits(sets, which, k, before)
        allowed = ((here >= low - _SLACK) & (here <= high + _SLACK)).all(-1)
        here = torch.maximum(torch.minimum(here, high), low)
        local = self.local.log_prob(here, mean, factor, (low, high), context)
        local = torch.where(allowed, local, -torch.inf)
        return value.index_add(0, row, local), sets.noise

    def _sample(
        self,
        mask: Tensor,
        encoding: Encoding,
        owner: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        assert encoding.tokens is not None
        weighed = self._weighed(encoding) if len(mask) else None
        if weighed is not None:
            anchors = weighed.sample(owner, mask, generator)
        else:
            cells = encoding.tokens, self.edges(encoding), owner, mask
            anchors = self.pointer.sample(*cells, generator, prune=True)
        sets = self.sets(encoding, owner, anchors, mask)
        shape = (*mask.shape, self.local_chart.num_features)
        w = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        noise = torch.zeros_like(w)
        before = w.new_full((len(mask),), -torch.inf)
        largest = int(mask.sum(-1).max()) if len(mask) else 0
        for k in range(largest):
            rows = mask[:, k].nonzero().squeeze(-1)
            which = sets.which[rows]
            context = self.context(sets, which, k, w, noise, rows)
            mean, factor = self._given_before(sets, which, k, noise[rows, :k], context)
            ends = self._limits(sets, which, k, before[rows])
            w[rows, k], noise[rows, k] = self.local.sample(
                mean, factor, ends, context, generator
            )
            before[rows] = anchors[rows, k] + 0.5 + w[rows, k, 0]
        w = self.local_chart.absolute(w, anchors, sets.centre[sets.which])
        return w, sets.noise

    def sets(
        self, encoding: Encoding, owner: Tensor, anchors: Tensor, mask: Tensor
    ) -> ConditionedSets:
        """Collect what follows from the anchors of N rows, each distinct set once.

        Args:
            encoding: Embeddings of B observations.
            owner: Observation of each row, shape ``(N,)``.
            anchors: Ascending anchors, zero where inactive, shape ``(N, Kmax)``.
            mask: Active ones, shape ``(N, Kmax)``.
        """
        tokens, count = encoding.tokens, mask.sum(-1)
        assert tokens is not None
        which = torch.arange(len(owner), device=owner.device)
        if not torch.is_grad_enabled():
            columns, which = unique_rows(owner, count, *anchors.unbind(-1))
            owner, count, anchors = *columns[:2], torch.stack(columns[2:], -1)
            mask = torch.arange(anchors.shape[-1]).to(count) < count.unsqueeze(-1)
        edges = self.edges(encoding)
        starts, ends = (edges[owner.unsqueeze(-1), anchors + i] for i in (0, 1))
        peaks = None
        if self.find_modes is not None:
            assert encoding.data is not None
            cells = anchors, starts, ends, mask
            remember = not torch.is_grad_enabled()
            peaks = self.find_modes(encoding.data, owner, *cells, remember=remember)
        gaps = anchors.diff(dim=-1, prepend=anchors[:, :1]).clamp(min=0)
        first = torch.arange(mask.shape[-1], device=mask.device) == 0
        here = tokens[owner.unsqueeze(-1), anchors]
        contexts = self._contexts(here, mask, gaps, peaks)
        if peaks is not None:
            centre = peaks.centre
        else:
            assert self.gaussian is not None
            centre = self.gaussian.centre(contexts).unflatten(0, mask.shape)
        near = (gaps < _REACH) & ~first
        upper = self.axis.upper(ends, mask)
        return ConditionedSets(
            which, anchors, mask, starts, ends, upper, contexts, near, centre, peaks
        )

    def _contexts(
        self, here: Tensor, mask: Tensor, gaps: Tensor, peaks: Modes | None
    ) -> Tensor:
        """Contexts ``(S Kmax, C)`` of components at tokens ``(S, Kmax, C)``."""
        if self.trunk is None:  # no layer of a flow looks at them
            return here.flatten(0, 1)
        first = torch.arange(mask.shape[-1], device=mask.device) == 0
        sizes = functional.one_hot(mask.sum(-1), self.max_cardinality + 1).to(here)
        to_next = functional.pad(gaps[:, 1:], (0, 1))
        has_next = functional.pad(mask[:, 1:], (0, 1))
        seen = [
            here,
            sizes.unsqueeze(-2).expand(*mask.shape, -1),
            *_neighbour(here.roll(1, dims=1), gaps, mask & ~first),
            *_neighbour(here.roll(-1, dims=1), to_next, has_next),
        ]
        if peaks is not None:
            seen.append(peaks.features.to(here))
        return self.trunk(torch.cat(seen, -1)).flatten(0, 1)

    def context(
        self,
        sets: ConditionedSets,
        which: Tensor,
        k: int | Tensor,
        w: Tensor,
        noise: Tensor,
        row: Tensor,
    ) -> RowContext:
        """Contexts of component k of M rows, with the component before if it is near.

        Args:
            sets: The sets.
            which: Set of each of the M, shape ``(M,)``.
            k: Component of each.
            w: Local coordinates of all rows, shape ``(N, Kmax, D)``.
            noise: The same, whitened by the peaks.
            row: Row of each of the M.
        """
        near, own = sets.near[which, k].unsqueeze(-1), None
        # In training its weights shall have gradients, if only zeros.
        if self.trunk and (torch.is_grad_enabled() or near.any()):
            known = w if sets.peaks is None else noise
            before = known[row, torch.as_tensor(k - 1).clamp(min=0)]
            if sets.peaks is not None:
                before = before.clamp(-6.0, 6.0)
            own = torch.where(near, before, 0.0).float()
        if isinstance(k, int):
            each = sets.contexts.unflatten(0, (-1, self.max_cardinality))
            return RowContext(each[:, k], which, own)
        return RowContext(sets.contexts, which * self.max_cardinality + k, own)

    def _given_before(
        self,
        sets: ConditionedSets,
        which: Tensor,
        k: int,
        noise: Tensor,
        context: RowContext,
    ) -> tuple[Tensor, Tensor]:
        """Gaussian of component k given the noise ``(M, k, D)`` of those before."""
        if sets.peaks is None:
            assert self.gaussian is not None
            return self.gaussian(context)
        mean = sets.peaks.mean(which, k, noise)
        return mean, sets.peaks.block(which, k)

    def _limits(
        self, sets: ConditionedSets, which: Tensor, k: int | Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates of component k, given the position before."""
        low = self.axis.lower(sets.starts[which, k], before)
        return self.limits(sets.anchors[which, k], low, sets.upper[which, k])


def _neighbour(tokens: Tensor, gaps: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """A neighbour's token and, one-hot, its distance; zero if there is none."""
    distance = functional.one_hot(gaps.clamp(max=_REACH), _REACH + 1).to(tokens)
    there = there.unsqueeze(-1)
    return torch.where(there, tokens, 0.0), torch.where(there, distance, 0.0)
