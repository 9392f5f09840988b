"""Density of shared parameters in some of which a background is linear."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .charts import Chart
from .flows import RowContext
from .heads import Moments, NoiseHead, SetSummary, SharedHead
from .local import LocalDensity

__all__ = ["BackgroundHead"]

# Stands for infinity; what rounding may put past an end.
_OPEN, _SLACK = 1e6, 1e-4
# Levels of quantiles that a prior's mean and variance are taken of.
_LEVELS = (torch.arange(1_000, dtype=torch.float64) + 0.5) / 1_000
# Least precision of a natural coordinate, whose prior covers [-1, 1] or has unit width.
_RIDGE = 1e-3


class BackgroundHead(nn.Module):
    r"""Density of shared parameters, in some of which the background is linear.

    .. math::
        q(\beta, s | \Theta, x, K) = q(s | x, K)\,
            N(\beta; \hat\beta, P^{-1}) \; \text{within its prior's bounds}, \qquad
        P = \frac{G}{s^2} + \Lambda

    G and the right side of :math:`P \hat\beta = r / s^2` are inner products of the
    background's columns with each other, and with what components leave of the data;
    :math:`\Lambda` is one over the prior's variance where that is not uniform (and its
    mean is part of the right side). Bounds cut off one parameter after the other, in
    their order: exact where they cut little. The other shared parameters, the noise
    level s among them, have a head of their own.

    Args:
        chart: The chart of all shared parameters.
        linear: Those in which the background is linear.
        level: The noise level among them; None if it is known, s = 1.
        others: The head of those that are not linear; None if there are none.
    """

    def __init__(
        self,
        chart: Chart,
        linear: Sequence[int],
        level: int | None,
        others: "SharedHead | NoiseHead | None",
    ) -> None:
        super().__init__()
        self.chart, self.linear, self.level = chart, list(linear), level
        self.rest = [i for i in range(chart.num_features) if i not in self.linear]
        self.others = others
        self.local = LocalDensity(
            len(self.linear), 1, own_features=0, num_layers=0, location_scale=False
        )
        scales, ends = [], []
        for i in self.linear:
            marginal = chart.marginals[i]
            middle, half, _ = marginal.natural_scale
            low, high = (math.isfinite(bound) for bound in marginal.bounds)
            # A uniform prior adds nothing but its ends, another about a normal one.
            w = (marginal.quantile(_LEVELS) - middle) / half
            precision = 0.0 if marginal.is_uniform else float(1 / w.var())
            scales.append((middle, half, precision, float(w.mean())))
            ends.append((-1.0 if low else -_OPEN, 1.0 if high else _OPEN))
        numbers = torch.tensor(scales, dtype=torch.float64).reshape(-1, 4)
        self.middle, self.width, self.precision, self.mean = numbers.unbind(-1)
        self.low, self.high = torch.tensor(ends, dtype=torch.float64).unbind(-1)

    def reads(self, least: Any) -> Moments:
        """What is asked of least squares, of observations, components and masks.

        The background's moments, and those that the other parameters' head reads.
        """
        reads = getattr(self.others, "reads", None)
        of_others = None if reads is None else reads(least)

        def moments(owner: Tensor, components: Tensor, mask: Tensor) -> tuple[Any, ...]:
            rows = owner, components, mask
            if of_others is None:
                return partial(least.background_moments, *rows), ()
            return partial(least.background_moments, *rows), (of_others(*rows),)

        return moments

    @property
    def summary(self) -> SetSummary | None:
        """What the head of the other shared parameters sees of the components."""
        return getattr(self.others, "summary", None)

    def log_prob(
        self,
        shared: Tensor,
        context: RowContext,
        level: Tensor | None,
        moments: tuple[Any, ...],
    ) -> Tensor:
        """Evaluate the log density of N rows, given the moments of each."""
        value = torch.zeros(len(shared)).to(shared)
        background, others = moments
        if self.others is not None:
            value = self.others.log_prob(shared[:, self.rest], context, level, *others)
        w = (shared[:, self.linear].double() - self._to(shared, self.middle)) / (
            self._to(shared, self.width)
        )
        ends = self._ends(w)
        allowed = ((w >= ends[0] - _SLACK) & (w <= ends[1] + _SLACK)).all(-1)
        w = torch.maximum(torch.minimum(w, ends[1]), ends[0])
        gaussian = self._gaussian(shared, background)
        local = self.local.log_prob(w, *gaussian, ends, _nothing(w))
        local = local - self.width.log().sum().to(local)
        return value + torch.where(allowed, local.to(value), -torch.inf)

    def sample(
        self,
        context: RowContext,
        generator: torch.Generator | None,
        level: Tensor | None,
        moments: tuple[Any, ...],
    ) -> Tensor:
        """Draw the shared parameters ``(N, S)`` of N rows."""
        num = len(context.which)
        shared = torch.zeros(num, self.chart.num_features).to(context.values)
        background, others = moments
        if self.others is not None:
            shared[:, self.rest] = self.others.sample(
                context, generator, level, *others
            )
        gaussian = self._gaussian(shared, background)
        like = gaussian[0]
        w, _ = self.local.sample(
            *gaussian, self._ends(like), _nothing(like), generator=generator
        )
        value = self._to(w, self.middle) + self._to(w, self.width) * w
        shared[:, self.linear] = value.to(shared)
        return self.chart.marginals.clamp(shared)

    def _gaussian(
        self, shared: Tensor, moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Means ``(N, P)`` and factors ``(N, P, P)`` of natural coordinates."""
        right, gram = moments(shared.double())
        half = self._to(right, self.width)
        right = (right - (gram @ self._to(right, self.middle))) * half
        gram = gram * half * half.unsqueeze(-1)
        weight = right.new_ones(len(right))
        if self.level is not None:
            weight = shared[:, self.level].double().square().reciprocal()
        precision = gram * weight[:, None, None]
        # Columns that nearly coincide are told apart by the prior's range alone.
        ridge = self._to(right, self.precision) + _RIDGE
        precision = precision + torch.diag_embed(ridge.expand_as(right))
        covariance = torch.linalg.inv(precision)
        right = right * weight.unsqueeze(-1)
        right = right + self._to(right, self.precision * self.mean)
        mean = (covariance @ right.unsqueeze(-1)).squeeze(-1)
        return mean, torch.linalg.cholesky(0.5 * (covariance + covariance.mT))

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            self._to(like, end).expand_as(like) for end in (self.low, self.high)
        )
        return low, high

    @staticmethod
    def _to(like: Tensor, numbers: Tensor) -> Tensor:
        return numbers.to(like.device)


def _nothing(rows: Tensor) -> RowContext:
    """A context that says nothing."""
    which = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return RowContext(torch.zeros(1, 1, device=rows.device), which)
