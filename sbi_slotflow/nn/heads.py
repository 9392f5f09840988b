r"""Heads beside the slots: the cardinality and the shared parameters.

The cardinality head is a classifier over K = 0..Kmax (eq. 10 of the paper),

.. math::
    q(K | x) = \mathrm{softmax}(W e_{cls} + b + \log p(K)) ,

whose logits are trained with the training prior p(K) in place, so that another prior
can be put there afterwards. The shared head is a density of the shared parameters
given x and K, trained by likelihood (the paper instead regresses a sampled sigma).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .charts import Chart
from .flows import ConditionalFlow, RowContext

__all__ = ["CardinalityHead", "PriorSharedHead", "SharedHead"]


class CardinalityHead(nn.Module):
    """Classifier over K = 0..Kmax.

    Args:
        embedding_features: Length of the cardinality embedding.
        log_prior: log p(K) of the training prior, shape ``(Kmax + 1,)``; -inf excludes
            a cardinality.
    """

    log_prior: Tensor

    def __init__(self, embedding_features: int, log_prior: Tensor) -> None:
        super().__init__()
        self.logits = nn.Sequential(
            nn.Linear(embedding_features, embedding_features),
            nn.GELU(),
            nn.Linear(embedding_features, len(log_prior)),
        )
        self.register_buffer("log_prior", log_prior.float().clone())

    def forward(self, embedding: Tensor) -> Tensor:
        """Return log q(K | x), shape ``(B, Kmax + 1)``."""
        return functional.log_softmax(self.logits(embedding) + self.log_prior, dim=-1)


class SharedHead(nn.Module):
    """Density of the shared parameters given x and K.

    Args:
        chart: Chart of the shared parameters.
        embedding_features: Length of the shared embedding.
        max_cardinality: Largest cardinality Kmax.
        hidden_features: Width of the flow's networks.
        num_layers: Coupling layers of the flow.
        num_bins: Bins of its splines.
    """

    def __init__(
        self,
        chart: Chart,
        embedding_features: int,
        max_cardinality: int,
        hidden_features: int = 64,
        num_layers: int = 1,
        num_bins: int = 8,
    ) -> None:
        super().__init__()
        self.chart = chart
        self.num_cardinalities = max_cardinality + 1
        self.flow = ConditionalFlow(
            chart.num_features,
            embedding_features + self.num_cardinalities,
            hidden_features=hidden_features,
            num_layers=num_layers if chart.num_features == 1 else 2 * num_layers,
            num_bins=num_bins,
        )

    def log_prob(
        self, shared: Tensor, embedding: Tensor, owner: Tensor, cardinality: Tensor
    ) -> Tensor:
        """Evaluate the log density of N rows.

        Args:
            shared: Shared parameters, shape ``(N, S)``.
            embedding: Shared embeddings of the observations, shape ``(B, C)``.
            owner: Observation of each row, shape ``(N,)``.
            cardinality: K of each row, shape ``(N,)``.

        Returns:
            Log densities, shape ``(N,)``.
        """
        u, log_det = self.chart.forward(shared)
        context = self._context(embedding, owner, cardinality)
        value = self.flow.log_prob(u, context) + log_det
        return torch.where(self.chart.contains(shared), value, -torch.inf)

    def sample(
        self,
        embedding: Tensor,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the shared parameters ``(N, S)`` of N rows; see :meth:`log_prob`."""
        context = self._context(embedding, owner, cardinality)
        return self.chart.inverse(self.flow.sample(context, generator))

    def _context(
        self, embedding: Tensor, owner: Tensor, cardinality: Tensor
    ) -> RowContext:
        # Every pair (observation, K) once.
        num = len(embedding)
        every = torch.eye(self.num_cardinalities).to(embedding)
        values = torch.cat(
            [
                embedding.repeat_interleave(self.num_cardinalities, dim=0),
                every.repeat(num, 1),
            ],
            dim=-1,
        )
        return RowContext(values, owner * self.num_cardinalities + cardinality)


class PriorSharedHead(nn.Module):
    """Stands in for a head that is switched off: the shared parameters' prior.

    In a chart's coordinates the prior is standard normal.

    Args:
        chart: Chart of the shared parameters.
    """

    def __init__(self, chart: Chart) -> None:
        super().__init__()
        self.chart = chart

    def log_prob(
        self, shared: Tensor, embedding: Tensor, owner: Tensor, cardinality: Tensor
    ) -> Tensor:
        """Evaluate the prior's log density; see :meth:`SharedHead.log_prob`."""
        u, log_det = self.chart.forward(shared)
        normal = torch.distributions.Normal(u.new_zeros(()), u.new_ones(()))
        value = normal.log_prob(u).sum(-1) + log_det
        return torch.where(self.chart.contains(shared), value, -torch.inf)

    def sample(
        self,
        embedding: Tensor,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from the prior; see :meth:`SharedHead.sample`."""
        u = torch.empty(len(owner), self.chart.num_features).to(embedding)
        return self.chart.inverse(u.normal_(generator=generator))
