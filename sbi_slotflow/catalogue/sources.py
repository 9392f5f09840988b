r"""Sources: what the components of many draws have in common.

A draw of a posterior over sets is described by N sources and a background. Source i is
there with probability :math:`p_i` and, if so, has a component that follows Student's t
with two degrees of freedom about :math:`m_i` (on the circle, where a parameter is
circular) with scales :math:`s_i`: posteriors have tails, which a normal would make
sources of their own. The background is a Poisson process with rate :math:`\lambda`,
uniform over the box of all components. The log likelihood of a draw whose components
are assigned to sources so that source i has component :math:`j(i)` is, up to a
constant,

.. math::
    \sum_i \log\frac{p_i}{1 - p_i} + \log t_2(\theta_{j(i)}; m_i, s_i)
        - \log \lambda b(\theta_{j(i)})

with the sum over the sources that have one. Sources and assignments are improved in
turn until assignments settle (classification EM); Roodaki, Bect and Fleury (2014,
IEEE Trans. Signal Process. 62) fit such a model, with normals, by stochastic EM. It
starts from a reference: the draw of the most probable K that lies closest to the mean
of those draws in canonical order. Then, as long as the components that belong to no
source crowd anywhere, a source is put where they are densest, and all are improved
again.

Draws enter in canonical order, so that the result is blind to labels.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..sets.checks import as_rows, as_weights
from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout

__all__ = ["TAIL", "Sources", "best_matching", "checked_weights", "fit_sources"]

TAIL = 2.0
"""Degrees of freedom of a source's t."""
_MAX_ROUNDS = 50
_MOST_DRAWS = 2_000
# Sources of this probability are found even if only more probable ones are wanted:
# else those that are alternatives would be taken for one.
_LEAST_PROBABLE = 0.1
# Share of draws whose assignment may still change at the end.
_SETTLED = 1e-3
# Share of components in sources below which another start is tried too.
_ENOUGH_EXPLAINED = 0.8
# Share of a normal within 0.385 standard deviations of its mean.
_CORE, _CORE_WIDTH = 0.3, 0.385
# Least scale, as a share of the range of all components.
_LEAST_SCALE = 1e-9
# What a source has one of.
_PARTS = ("existence", "centre", "scale")


@dataclass(frozen=True)
class Sources:
    """Sources of one observation's posterior.

    Attributes:
        layout: Layout of theta.
        existence: Probability p that each source is there, shape ``(N,)``.
        centre: Centres m, shape ``(N, D)``.
        scale: Scales s, shape ``(N, D)``.
        log_background: Log of the background's density of components.
    """

    layout: ThetaLayout
    existence: Tensor
    centre: Tensor
    scale: Tensor
    log_background: float

    def __len__(self) -> int:
        return len(self.existence)

    def assign(self, theta: Tensor) -> Tensor:
        """Find the component of each source.

        A true row is assigned like any draw: if the posterior is right, source i gets a
        true component with the probability ``existence[i]``.
        """
        self.layout.validate(theta)
        parts = self.layout.unpack(self.layout.canonical(theta.detach().cpu()))
        return self.match(parts.components.double(), parts.mask)

    def match(self, components: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`assign`, for components ``(S, Kmax, D)`` and their mask."""
        gains = self.gains(components)
        return best_matching(gains.masked_fill(~mask[:, None, :], -math.inf))

    def gains(self, components: Tensor) -> Tensor:
        """What components ``(S, Kmax, D)`` add in a source, ``(S, N, Kmax)``.

        Beside what they would in the background, nats.
        """
        size = components.shape[-1]
        shape = (len(components), len(self), components.shape[1])
        squares = components.new_zeros(shape)
        for d, period in enumerate(self.layout.component_periods):
            gaps = components[:, None, :, d] - self.centre[:, None, d]
            if math.isfinite(period):
                gaps = gaps - period * (gaps / period).round()
            squares += (gaps / self.scale[:, None, d]).square()
        odds = self.existence.log() - (-self.existence).log1p()
        peak = odds - self.scale.log().sum(-1) - self.log_background
        peak = peak + math.lgamma(0.5 * (TAIL + size)) - math.lgamma(0.5 * TAIL)
        peak = peak - 0.5 * size * math.log(TAIL * math.pi)
        return peak[:, None] - 0.5 * (TAIL + size) * (squares / TAIL).log1p()

    def subset(self, kept: Tensor) -> "Sources":
        """Return some of the sources, by index or mask."""
        return replace(self, **{name: getattr(self, name)[kept] for name in _PARTS})


def best_matching(gains: Tensor) -> Tensor:
    r"""Match the components of many draws with sources.

    The matching of a draw maximises :math:`\sum_{(i, j) \in M} g_{ij}` over sets M of
    pairs in which no source and no component appears twice. Where the sources that the
    components prefer differ, they are the best matching, and nothing has to be solved:
    that is most draws.
    """
    num, num_sources = gains.shape[:2]
    owner = torch.full((num, num_sources), -1)
    if not gains.numel():
        return owner
    value, preferred = gains.max(1)
    wanted = value > 0
    votes = torch.zeros(num, num_sources, dtype=torch.int64)
    votes.scatter_add_(1, preferred, wanted.long())
    simple = (votes <= 1).all(1)
    draw, component = (wanted & simple.unsqueeze(-1)).nonzero(as_tuple=True)
    owner[draw, preferred[draw, component]] = component
    contested = (~simple).nonzero().squeeze(-1)
    positive = gains[contested].clamp(min=0.0).numpy()
    solved = np.full(positive.shape[:2], -1)
    for chosen, matrix in zip(solved, positive, strict=True):
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        chosen[rows] = np.where(matrix[rows, columns] > 0, columns, -1)
    owner[contested] = torch.from_numpy(solved)
    return owner


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
    sources, owner = fit.settled(fit.reference(), least)
    if fit.explained(owner) < _ENOUGH_EXPLAINED or len(sources) > fit.usual:
        # Where all components lie in one place, the background is as narrow as it.
        other, taken = fit.settled(fit.reference(empty=True), least)
        if fit.score(other, taken) > fit.score(sources, owner):
            sources = other
    sources = sources.subset(sources.existence >= min_probability)
    return sources.subset(sources.centre[:, layout.order_by].argsort())


def checked_weights(
    samples: Tensor, layout: ThetaLayout, weights: Tensor | None
) -> Tensor:
    """Weights of rows, float64, summing to one."""
    as_rows(samples, layout)
    if weights is None:
        return torch.full((len(samples),), 1 / len(samples), dtype=torch.float64)
    return as_weights(weights, len(samples))


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

    def settled(self, sources: Sources, least: float) -> tuple[Sources, Tensor]:
        """Improve sources, and add some where free components crowd."""
        sources, owner = self.pruned(*self.improved(sources), least)
        while (seed := self.densest(owner, least)) is not None:
            pairs = {n: [getattr(sources, n), getattr(seed, n)] for n in _PARTS}
            joined = replace(seed, **{n: torch.cat(pair) for n, pair in pairs.items()})
            more, taken = self.pruned(*self.improved(joined), least)
            if len(more) <= len(sources):
                break
            sources, owner = more, taken
        return sources, owner

    def explained(self, owner: Tensor) -> float:
        """Share of all components that belong to a source."""
        total = float((self.mask.sum(-1) * self.weights).sum())
        free = float((self._free(owner).sum(-1) * self.weights).sum())
        return 1 - free / total if total else 1.0

    def score(self, sources: Sources, owner: Tensor) -> float:
        """Mean log likelihood of a draw, with its components in their sources."""
        background = self.weights @ self.mask.sum(-1).double() * sources.log_background
        rate = math.exp(sources.log_background + float(self.span.log().sum()))
        gains = sources.gains(self.components)
        taken = gains.gather(-1, owner.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        taken = torch.where(owner >= 0, taken, 0.0).sum(-1)
        absent = (-sources.existence).log1p().sum()
        return float(self.weights @ taken + background + absent) - rate

    @property
    def usual(self) -> int:
        """The most probable K above zero, if there is any."""
        counts = torch.bincount(self.cardinality, self.weights)
        return 1 + int(counts[1:].argmax()) if len(counts) > 1 else 0

    def reference(self, empty: bool = False) -> Sources:
        """The draw closest to the mean, among those of the most probable K.

        With an ``empty`` background, of the most probable K above zero.
        """
        counts = torch.bincount(self.cardinality, self.weights)
        k = self.usual if empty else int(counts.argmax())
        given = self.cardinality == k
        components = self.components[given, :k]
        weights = self.weights[given].reshape(-1, 1, 1)
        mean = circular_mean(components, self.periods, weights)
        gaps = near(components, mean, self.periods) - mean
        variance = (weights * gaps.square()).sum(0) / weights.sum()
        scale = torch.maximum(variance.sqrt(), _LEAST_SCALE * self.span)
        centre = components[(gaps / scale).square().sum((1, 2)).argmin()]
        half = torch.full((k,), 0.5, dtype=torch.float64)
        rate = self.least if empty else 0.5
        return self._sources(half, centre, self._core_scale(centre), rate=rate)

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
            scale[i] = core.amax(0) if len(core) else closest.amax(0)
        return torch.maximum(scale / _CORE_WIDTH, 1e-6 * self.span)

    def _free(self, owner: Tensor) -> Tensor:
        """Mark components that belong to no source, shape ``(S, Kmax)``."""
        free = self.mask.clone()
        draw, source = (owner >= 0).nonzero(as_tuple=True)
        free[draw, owner[draw, source]] = False
        return free

    def _rate(self, owner: Tensor) -> float:
        """Components of the background, a draw."""
        return float((self._free(owner).sum(-1) * self.weights).sum()) + self.least

    def _sources(
        self, existence: Tensor, centre: Tensor, scale: Tensor, rate: float
    ) -> Sources:
        log_background = math.log(rate) - float(self.span.log().sum())
        return Sources(self.layout, existence, centre, scale, log_background)
