r"""Density of the level and the shape of noise, where both are unknown.

.. math::
    q(\eta, s | \Theta, x, K) = q(\eta | \Theta, x, K)\, q(s | \eta, \Theta, x, K)

Least squares, which know the residual, give a Gaussian of the shape eta, which is cut
off at its prior's bounds, and the level's estimate given the shape, about which it is
nearly lognormal (:class:`.heads.NoiseHead`). Flows learn the rest.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .charts import Chart, WhiteningChart
from .flows import RowContext
from .heads import NoiseHead, SharedHead
from .local import LocalDensity

__all__ = ["ShapeHead"]

# Stands for infinity.
_OPEN = 1e6


class _Residual(Protocol):
    """What N residuals say of level and shape."""

    mean: Tensor
    factor: Tensor

    def level(self, natural: Tensor) -> Tensor: ...


class ShapeHead(SharedHead):
    """Density of the shape of noise, and of its level if that is unknown.

    Args:
        chart: Chart of these parameters.
        level: Which of them is the level; None if it is known.
        num_data: Numbers T in one x.
        embedding_features: Length of what is known of x.
        max_cardinality: Largest cardinality.
    """

    def __init__(
        self,
        chart: Chart,
        level: int | None,
        num_data: int,
        embedding_features: int,
        max_cardinality: int,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.chart, self.level = chart, level
        self.shape = [i for i in range(chart.num_features) if i != level]
        marginals = [chart.marginals[i] for i in self.shape]
        scales = [marginal.natural_scale[:2] for marginal in marginals]
        self.middle, self.width = torch.tensor(scales, dtype=torch.float64).unbind(-1)
        ends = torch.tensor([marginal.bounds for marginal in marginals]).double()
        low, high = ((ends - self.middle[:, None]) / self.width[:, None]).unbind(-1)
        self.low, self.high = low.clamp(min=-_OPEN), high.clamp(max=_OPEN)
        self.noise: NoiseHead | None = None
        sizes = embedding_features, max_cardinality
        if level is not None:
            inner = WhiteningChart([chart.marginals[level]])
            self.noise = NoiseHead(inner, num_data, *sizes)
        self.local = LocalDensity(
            len(self.shape),
            embedding_features + max_cardinality + 1,
            own_features=0,
            num_layers=1,
            from_identity=True,
        )

    def reads(self, least: Any) -> Callable[[Tensor, Tensor, Tensor], Any]:
        """What is asked of least squares, of observations, components and masks."""
        return least.noise_given

    def log_prob(
        self,
        shared: Tensor,
        context: RowContext,
        level: Tensor | None = None,
        moments: _Residual | None = None,
    ) -> Tensor:
        """Evaluate the log density of N rows, given what their residuals say."""
        assert moments is not None
        inside = self.chart.contains(shared)
        natural = shared[:, self.shape].double() - self.middle.to(shared.device)
        natural = natural / self.width.to(natural)
        ends = self._ends(natural)
        natural = torch.maximum(torch.minimum(natural, ends[1]), ends[0])
        value = self.local.log_prob(
            natural, moments.mean, moments.factor, ends, context
        )
        value = value - self.width.log().sum().to(value)
        if self.noise is not None:
            sigma = shared[:, self.level : self.level + 1]  # pyright: ignore
            value = value + self.noise.log_prob(sigma, context, moments.level(natural))
        return torch.where(inside, value, -torch.inf)

    def sample(
        self,
        context: RowContext,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
        moments: _Residual | None = None,
    ) -> Tensor:
        """Draw the parameters ``(N, S)`` of N rows."""
        assert moments is not None
        ends = self._ends(moments.mean)
        natural, _ = self.local.sample(
            moments.mean, moments.factor, ends, context, generator=generator
        )
        shared = torch.zeros(len(natural), self.chart.num_features).to(natural)
        shared[:, self.shape] = (
            self.middle.to(natural) + self.width.to(natural) * natural
        )
        if self.noise is not None:
            sigma = self.noise.sample(context, generator, moments.level(natural))
            shared[:, self.level] = sigma[:, 0].to(shared)
        return self.chart.marginals.clamp(shared.float())

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (end.to(like).expand_as(like) for end in (self.low, self.high))
        return low, high
