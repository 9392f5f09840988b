"""The search for sources, which :mod:`~sbi_slotflow.catalogue.sources` explains."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout
from .sources import TAIL, Sources

__all__ = ["checked_weights", "fit_sources"]

_MAX_ROUNDS = 50
_MOST_DRAWS = 2_000
# Sources of this probability are found even if only more probable ones are wanted:
# else those that are alternatives would be taken for one.
_LEAST_PROBABLE = 0.1
# Share of draws whose assignment may still change at the end.
_SETTLED = 1e-3
# Share of a normal within 0.385 standard deviations of its mean.
_CORE, _CORE_WIDTH = 0.3, 0.385
# Least scale, as a share of the range of all components.
_LEAST_SCALE = 1e-9


def fit_sources(
    samples: Tensor,
    layout: ThetaLayout,
    *,
    weights: Tensor | None = None,
    min_probability: float = 0.1,
) -> Sources:
    """Find the sources of a posterior.

    Of many samples, 2,000 are used, evenly spaced (in weight, if they have weights).

    Args:
        samples: Theta rows in any order, shape ``(S, E)``.
        layout: Layout of theta; its ``periods`` say what is circular.
        weights: Importance weights, not negative, shape ``(S,)``.
        min_probability: Sources that are less probable are left out.

    Returns:
        Sources, ascending in the ``order_by`` parameter.

    Raises:
        TypeError: If the samples are not a floating-point tensor.
        ValueError: If an argument is malformed or out of range.
    """
    weights = checked_weights(samples, layout, weights)
    if not 0 < min_probability < 1:
        raise ValueError(f"min_probability must lie in (0, 1), got {min_probability}.")
    samples = samples.detach().cpu()
    if len(samples) > _MOST_DRAWS:
        # Evenly through the weights, without a random number.
        points = (torch.arange(_MOST_DRAWS) + 0.5) / _MOST_DRAWS
        index = torch.searchsorted(weights.cumsum(0), points.double())
        samples = samples[index.clamp(max=int(weights.nonzero().max()))]
        weights = torch.full((_MOST_DRAWS,), 1 / _MOST_DRAWS, dtype=torch.float64)
    samples, weights = samples[weights > 0], weights[weights > 0]
    fit = _Fit(layout, layout.canonical(samples), weights)
    least = min(min_probability, _LEAST_PROBABLE)
    sources, owner = fit.pruned(*fit.improved(fit.reference()), least)
    while (seed := fit.densest(owner, least)) is not None:
        more = _joined(sources, seed)
        more, owner = fit.pruned(*fit.improved(more), least)
        if len(more) <= len(sources):
            break
        sources = more
    sources = sources.subset(sources.existence >= min_probability)
    return sources.subset(sources.centre[:, layout.order_by].argsort())


def checked_weights(
    samples: Tensor, layout: ThetaLayout, weights: Tensor | None
) -> Tensor:
    """Weights of rows, float64, summing to one."""
    layout.validate(samples, "samples")
    if samples.ndim != 2 or not len(samples):
        raise ValueError(
            f"samples must have shape (S, {layout.size}) with S >= 1, got "
            f"{tuple(samples.shape)}."
        )
    if weights is None:
        return torch.full((len(samples),), 1 / len(samples), dtype=torch.float64)
    if weights.shape != samples.shape[:1]:
        raise ValueError(
            f"weights must have shape ({len(samples)},), got {tuple(weights.shape)}."
        )
    weights = weights.detach().cpu().double()
    total = weights.sum()
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and total > 0):
        raise ValueError("weights must be finite, not negative and not all zero.")
    return weights / total


class _Fit:
    """The improvement of sources on one set of weighted draws."""

    def __init__(self, layout: ThetaLayout, samples: Tensor, weights: Tensor) -> None:
        self.layout, self.weights = layout, weights
        parts = layout.unpack(samples)
        self.components, self.mask = parts.components.double(), parts.mask
        self.cardinality = parts.cardinality
        self.least = float(0.5 * weights.square().sum())  # half of 1 / ESS
        self.periods = layout.component_periods
        active = self.components[self.mask]
        if not len(active):
            active = self.components.new_zeros(1, layout.num_component_params)
        span = active.amax(0) - active.amin(0)
        period = span.new_tensor(self.periods)
        span = torch.where(period.isfinite(), period, span)
        span = torch.maximum(span, 1e-6 * active.abs().amax(0))
        self.span = torch.where(span > 0, span, 1.0)

    def reference(self) -> Sources:
        """The draw closest to the mean, among those of the most probable K."""
        probs = torch.zeros(self.mask.shape[-1] + 1, dtype=torch.float64)
        k = int(probs.index_add(0, self.cardinality, self.weights).argmax())
        given = self.cardinality == k
        components = self.components[given, :k]
        weights = self.weights[given].reshape(-1, 1, 1)
        mean = circular_mean(components, self.periods, weights)
        gaps = near(components, mean, self.periods) - mean
        variance = (weights * gaps.square()).sum(0) / weights.sum()
        scale = torch.maximum(variance.sqrt(), _LEAST_SCALE * self.span)
        centre = components[(gaps / scale).square().sum((1, 2)).argmin()]
        return self._sources(
            torch.full((k,), 0.5, dtype=torch.float64),
            centre,
            self._core_scale(centre),
            self._rate(None),
        )

    def improved(self, sources: Sources) -> tuple[Sources, Tensor]:
        """Improve sources and assignments in turn until these settle."""
        owner = sources.match(self.components, self.mask)
        for _ in range(_MAX_ROUNDS):
            sources = self._update(sources, owner)
            previous, owner = owner, sources.match(self.components, self.mask)
            changed = (owner != previous).any(-1)
            if self.weights[changed].sum() <= _SETTLED:
                break
        return sources, owner

    def pruned(
        self, sources: Sources, owner: Tensor, min_probability: float
    ) -> tuple[Sources, Tensor]:
        """Leave out improbable sources, the least probable one at a time."""
        while len(sources):
            share = ((owner >= 0) * self.weights.unsqueeze(-1)).sum(0)
            if share.min() >= min_probability:
                break
            kept = torch.arange(len(sources)) != share.argmin()
            sources, owner = self.improved(sources.subset(kept))
        return sources, owner

    def densest(self, owner: Tensor, share: float) -> Sources | None:
        """A source where a share of the draws has a free component in least space."""
        free = self._free(owner)
        draw, component = free.nonzero(as_tuple=True)
        weights = self.weights[draw]
        if not weights.sum() > share:
            return None
        values = self.components[draw, component]
        place = values[:, self.layout.order_by]
        order = place.argsort()
        place, values, weights = place[order], values[order], weights[order]
        total = weights.cumsum(0)
        before = total - weights
        last = torch.searchsorted(total, before + share * (1 - 1e-9))
        possible = last < len(place)
        first = possible.nonzero().squeeze(-1)
        last = last[possible]
        narrowest = int((place[last] - place[first]).argmin())
        inside = slice(int(first[narrowest]), int(last[narrowest]) + 1)
        centre, scale = self._moments(values[inside], weights[inside], weights[inside])
        probability = torch.tensor([share], dtype=torch.float64)
        return self._sources(probability, centre[None], scale[None], self._rate(owner))

    def _update(self, sources: Sources, owner: Tensor) -> Sources:
        there = owner >= 0
        share = (there * self.weights.unsqueeze(-1)).sum(0)
        centre, scale = sources.centre.clone(), sources.scale.clone()
        for i in range(len(sources)):
            draws = there[:, i].nonzero().squeeze(-1)
            if len(draws):
                values = self.components[draws, owner[draws, i]]
                gaps = near(values, centre[i], self.periods) - centre[i]
                squares = (gaps / scale[i]).square().sum(-1)
                # The t's weights of draws: far ones count little.
                tail = (TAIL + values.shape[-1]) / (TAIL + squares)
                weights = self.weights[draws]
                centre[i], scale[i] = self._moments(values, weights * tail, weights)
        # Neither certain nor impossible, as far as so many draws can tell.
        existence = (share + self.least) / (1 + 2 * self.least)
        return self._sources(existence, centre, scale, self._rate(owner))

    def _moments(
        self, values: Tensor, weights: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means and scales ``(D,)`` of components ``(n, D)``."""
        weights = weights.unsqueeze(-1)
        mean = circular_mean(values, self.periods, weights)
        gaps = near(values, mean, self.periods) - mean
        variance = (weights * gaps.square()).sum(0) / total.sum()
        return mean, torch.maximum(variance.sqrt(), _LEAST_SCALE * self.span)

    def _core_scale(self, centre: Tensor) -> Tensor:
        """Scales ``(N, D)`` of the components that lie nearest to each centre."""
        scale = torch.empty_like(centre)
        for i, point in enumerate(centre):
            gaps = (near(self.components, point, self.periods) - point).abs()
            place = gaps[..., self.layout.order_by].masked_fill(~self.mask, math.inf)
            nearest = place.argmin(-1)
            closest = gaps[torch.arange(len(gaps)), nearest]
            has_any = self.cardinality > 0
            order = place.amin(-1)[has_any].argsort()
            weights = self.weights[has_any][order]
            core = closest[has_any][order][weights.cumsum(0) <= _CORE * weights.sum()]
            width = core.amax(0) if len(core) else closest.amax(0)
            scale[i] = width
        return torch.maximum(scale / _CORE_WIDTH, 1e-6 * self.span)

    def _free(self, owner: Tensor) -> Tensor:
        """Mark components that belong to no source, shape ``(S, Kmax)``."""
        free = self.mask.clone()
        draw, source = (owner >= 0).nonzero(as_tuple=True)
        free[draw, owner[draw, source]] = False
        return free

    def _rate(self, owner: Tensor | None) -> float:
        """Components of the background, a draw; a half if nothing is assigned yet."""
        if owner is None:
            return 0.5
        return float((self._free(owner).sum(-1) * self.weights).sum()) + self.least

    def _sources(
        self, existence: Tensor, centre: Tensor, scale: Tensor, rate: float
    ) -> Sources:
        log_background = math.log(rate) - float(self.span.log().sum())
        return Sources(self.layout, existence, centre, scale, log_background)


def _joined(sources: Sources, more: Sources) -> Sources:
    parts: Sequence[str] = ("existence", "centre", "scale")
    joined = {n: torch.cat([getattr(sources, n), getattr(more, n)]) for n in parts}
    return replace(more, **joined)
