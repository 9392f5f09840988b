r"""Components matched with reference points, so that they can be ranked one by one.

It is tempting to match every draw with the truth and to rank the truth among the
matched components. But then the draws have been pulled towards the truth, which ends
up in their middle too often, and an exact posterior looks too wide. So truth and draws
alike are matched with points that know x but not the truth: a draw from the posterior
given the true K that is used for nothing else (the one closest to the mean of many).
Given x, truth and draws stay exchangeable, and ranks stay uniform.

The match of the components of a row minimises

.. math::
    \sum_{k, d} \big(\theta_{\pi(k), d} - m_{k, d}\big)^2 / s_d^2

with points m and the posterior's standard deviations s, by the Hungarian method.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..nn.matching import hungarian
from ..sets.circular import circular_mean, near
from .draws import CalibrationDraws

__all__ = ["MatchedComponents", "above_rounding"]

# Matrices of costs handled at once.
_CHUNK = 20_000
# Below this share of their size, deviations are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class MatchedComponents:
    """Truths and draws given the true K, with labels of one meaning.

    Angles are shifted by whole turns to lie near the reference points.

    Attributes:
        source: Where the draws come from.
    """

    source: CalibrationDraws

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the component's parameters, then of the shared ones."""
        layout = self.source.layout
        return (*layout.component_names, *layout.shared_names)

    @property
    def mask(self) -> Tensor:
        """True where there is a component, shape ``(n, Kmax)``."""
        return self.source.layout.mask(self.source.cardinality)

    @property
    def periods(self) -> tuple[float, ...]:
        """Periods of the component's parameters, infinite without one."""
        return self.source.layout.component_periods

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shared parameters of truth ``(n, S)``, draws and guides ``(L, n, S)``."""
        layout, source = self.source.layout, self.source
        periods = layout.shared_periods
        guides = layout.unpack(source.guides).shared.double()
        centre = circular_mean(guides, periods)
        found = (layout.unpack(r).shared for r in (source.theta, source.given_k))
        truth, draws = (near(values.double(), centre, periods) for values in found)
        return truth, draws, near(guides, centre, periods)

    @cached_property
    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Matched components of truth ``(n, Kmax, D)``, draws and guides likewise."""
        rows = (self.source.theta.unsqueeze(0), self.source.given_k, self.source.guides)
        truth, draws, guides = (self._matched(part) for part in rows)
        return truth[0], draws, guides

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of matched guides, each ``(n, Kmax, D)``."""
        guides = self.components[2]
        return guides.mean(0), above_rounding(guides.std(0), guides.abs().amax(0))

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor]:
        """Reference points ``(n, Kmax, D)`` and scales ``(n, 1, D)``."""
        guides = self.source.layout.unpack(self.source.guides).components.double()
        centre = circular_mean(guides, self.periods)
        offset = near(guides, centre, self.periods) - centre
        mask = self.mask.unsqueeze(-1)
        square = torch.where(mask, offset.square(), 0.0)
        count = mask.sum(-2, keepdim=True).clamp(min=1) * len(guides)
        variance = square.sum(0).sum(-2, keepdim=True) / count
        scale = above_rounding(variance.sqrt(), centre.abs().amax(-2, keepdim=True))
        distance = (square / scale.square()).sum((-2, -1))
        closest = distance.argmin(0)
        return guides[closest, torch.arange(self.source.num)], scale

    def _matched(self, rows: Tensor) -> Tensor:
        """Components ``(S, n, Kmax, D)`` of rows ``(S, n, E)``, relabelled."""
        layout = self.source.layout
        components = layout.unpack(rows).components.double()
        points, scale = self._points
        step = max(1, _CHUNK // self.source.num)
        parts = [self._match(part, points, scale) for part in components.split(step)]
        return torch.cat(parts)

    def _match(self, components: Tensor, points: Tensor, scale: Tensor) -> Tensor:
        periods = self.periods
        pairs = near(components.unsqueeze(-3), points.unsqueeze(-2), periods)
        pairs = (pairs - points.unsqueeze(-2)) / scale.unsqueeze(-2)
        cost = pairs.square().sum(-1).flatten(0, 1)
        counts = self.source.cardinality.repeat(len(components))
        order = hungarian(-cost, counts).reshape(components.shape[:-1])
        index = order.unsqueeze(-1).expand_as(components)
        return near(components.gather(-2, index), points, periods)


def above_rounding(scale: Tensor, size: Tensor) -> Tensor:
    """Scales of values of a size: never below their rounding; 1 where all are zero."""
    scale = torch.maximum(scale, _ROUNDING * size)
    return torch.where(scale > 0, scale, 1.0)
