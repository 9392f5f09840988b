r"""Heads beside the slots: the cardinality and the shared parameters.

The cardinality head is a classifier over K = 0..Kmax (eq. 10 of the paper),

.. math::
    q(K | x) = \mathrm{softmax}(W e_{cls} + b + \log p(K)) ,

whose logits are trained with the training prior p(K) in place, so that another prior
can be put there afterwards. The shared head is a density of the shared parameters
given x and K, trained by likelihood (the paper instead regresses a sampled sigma).
Where components are found by least squares, :class:`NoiseHead` reads the noise level
from the residual.

Example:
    >>> head = CardinalityHead(4, torch.tensor([0.5, 0.5]).log())
    >>> head(torch.zeros(3, 4)).exp().sum(-1).round(decimals=4).tolist()
    [1.0, 1.0, 1.0]

See Also:
    :class:`.set_distribution.NetworkSets`, which multiplies the heads' densities.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .charts import Chart
from .encoders import mlp
from .flows import ConditionalFlow, RowContext
from .local import LocalDensity

__all__ = [
    "CardinalityHead",
    "NoiseHead",
    "PriorSharedHead",
    "SharedGivenX",
    "SharedHead",
]


class CardinalityHead(nn.Module):
    """Classifier over K = 0..Kmax."""

    log_prior: Tensor

    def __init__(self, embedding_features: int, log_prior: Tensor) -> None:
        super().__init__()
        self.logits = mlp(embedding_features, embedding_features, len(log_prior))
        self.register_buffer("log_prior", log_prior.float().clone())

    def forward(self, embedding: Tensor) -> Tensor:
        """Return log q(K | x), shape ``(B, Kmax + 1)``."""
        return functional.log_softmax(self.logits(embedding) + self.log_prior, dim=-1)


class SharedHead(nn.Module):
    """Density of the shared parameters ``(N, S)`` of N rows, given x and K.

    ``level`` is the log of the residual's standard deviation in each row, shape
    ``(N,)``; only :class:`NoiseHead` reads it.
    """

    def __init__(
        self, chart: Chart, embedding_features: int, max_cardinality: int
    ) -> None:
        super().__init__()
        self.chart = chart
        self.flow = ConditionalFlow(
            chart.num_features,
            embedding_features + max_cardinality + 1,
            num_layers=1 if chart.num_features == 1 else 2,
        )

    def log_prob(
        self, shared: Tensor, context: RowContext, level: Tensor | None = None
    ) -> Tensor:
        """Evaluate the log density of N rows, shape ``(N,)``."""
        u, log_det = self.chart.forward(shared)
        value = self._log_density(u, context) + log_det
        return torch.where(self.chart.contains(shared), value, -torch.inf)

    def sample(
        self,
        context: RowContext,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Draw the shared parameters ``(N, S)`` of N rows."""
        return self.chart.inverse(self._draw(context, generator))

    def _log_density(self, u: Tensor, context: RowContext) -> Tensor:
        return self.flow.log_prob(u, context)

    def _draw(self, context: RowContext, generator: torch.Generator | None) -> Tensor:
        return self.flow.sample(context, generator)


class NoiseHead(nn.Module):
    r"""Density of the noise level sigma given x, K and the residual of K components.

    .. math::
        v = \sqrt{2T}\,(\log\sigma - \log\hat\sigma)

    is nearly normal given the residual's standard deviation :math:`\hat\sigma`; it is
    cut off at the ends of the prior's support, and a flow learns the rest.
    """

    def __init__(
        self, chart: Chart, num_data: int, embedding_features: int, max_cardinality: int
    ) -> None:
        super().__init__()
        if chart.num_features != 1:
            raise ValueError(
                "the noise level must be the only shared parameter, got "
                f"{chart.num_features} of them."
            )
        self.chart = chart
        self.scale = 1 / math.sqrt(2 * num_data)
        self.local = LocalDensity(
            1,
            embedding_features + max_cardinality + 1,
            own_features=0,
            num_layers=1,
            from_identity=True,
        )

    def log_prob(
        self, shared: Tensor, context: RowContext, level: Tensor | None = None
    ) -> Tensor:
        """Evaluate the log density of N rows; see :meth:`SharedHead.log_prob`."""
        assert level is not None
        inside = self.chart.contains(shared) & (shared > 0).all(-1)
        log_sigma = torch.where(inside.unsqueeze(-1), shared.double(), 1.0).log()
        v = (log_sigma - level.unsqueeze(-1)) / self.scale
        ends = self._ends(level)
        v = torch.maximum(torch.minimum(v, ends[1]), ends[0])
        value = self.local.log_prob(v, *_unit(v), ends, context)
        log_det = (-math.log(self.scale) - log_sigma.squeeze(-1)).to(value)
        return torch.where(inside, value + log_det, -torch.inf)

    def sample(
        self,
        context: RowContext,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Draw sigma ``(N, 1)`` of N rows; see :meth:`SharedHead.log_prob`."""
        assert level is not None
        zero = torch.zeros_like(level).unsqueeze(-1)
        v, _ = self.local.sample(*_unit(zero), self._ends(level), context, generator)
        shared = (level.unsqueeze(-1) + self.scale * v).exp().float()
        return self.chart.marginals.clamp(shared)

    def _ends(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest v, each of shape ``(N, 1)``."""
        bounds = level.new_tensor(self.chart.marginals[0].bounds, dtype=torch.float64)
        low, high = (bounds.log() - level.double().unsqueeze(-1)).div(self.scale).mT
        return low.unsqueeze(-1), high.unsqueeze(-1)


class PriorSharedHead(SharedHead):
    """The shared parameters' prior, standard normal in a chart's coordinates."""

    def __init__(self, chart: Chart) -> None:
        nn.Module.__init__(self)
        self.chart = chart

    def _log_density(self, u: Tensor, context: RowContext) -> Tensor:
        normal = torch.distributions.Normal(u.new_zeros(()), u.new_ones(()))
        return normal.log_prob(u).sum(-1)

    def _draw(self, context: RowContext, generator: torch.Generator | None) -> Tensor:
        u = torch.empty(len(context.which), self.chart.num_features)
        return u.to(context.values).normal_(generator=generator)


class SharedGivenX:
    """The shared parameters' density given B observations."""

    def __init__(
        self, head: SharedHead | NoiseHead, embedding: Tensor, num_cardinalities: int
    ) -> None:
        self.head, self._sizes = head, num_cardinalities
        every = torch.eye(num_cardinalities).to(embedding).repeat(len(embedding), 1)
        repeated = embedding.repeat_interleave(num_cardinalities, dim=0)
        self._values = torch.cat([repeated, every], dim=-1)

    def log_prob(
        self,
        shared: Tensor,
        owner: Tensor,
        cardinality: Tensor,
        level: Tensor | None = None,
    ) -> Tensor:
        """Evaluate N rows of observations ``(N,)`` and K; see :class:`SharedHead`."""
        return self.head.log_prob(shared, self._context(owner, cardinality), level)

    def sample(
        self,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Draw N rows; see :meth:`log_prob`."""
        return self.head.sample(self._context(owner, cardinality), generator, level)

    def _context(self, owner: Tensor, cardinality: Tensor) -> RowContext:
        return RowContext(self._values, owner * self._sizes + cardinality)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean zero and factor one for rows of v."""
    return torch.zeros_like(v), torch.ones_like(v).unsqueeze(-1)
