r"""Heads beside the slots: the cardinality and the shared parameters.

The cardinality head is a classifier over K = 0..Kmax (eq. 10 of the paper),

.. math::
    q(K | x) = \mathrm{softmax}(W e_{cls} + b + \log p(K)) ,

whose logits are trained with the training prior p(K) in place, so that another prior
can be put there afterwards. The shared head is a density of the shared parameters
given x and K, trained by likelihood (the paper instead regresses a sampled sigma).
Where components are found by least squares, :class:`NoiseHead` reads the noise level
from the residual. Where they come from a population whose parameters are shared, those
are drawn given the components that were drawn before them (:class:`SetSummary`).

Example:
    >>> head = CardinalityHead(4, torch.tensor([0.5, 0.5]).log())
    >>> head(torch.zeros(3, 4)).exp().sum(-1).round(decimals=4).tolist()
    [1.0, 1.0, 1.0]

See Also:
    :class:`.set_distribution.NetworkSets`, which multiplies the heads' densities.
"""

import math
from collections.abc import Callable
from typing import Any, cast

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
    "SetSummary",
    "SharedGivenX",
    "SharedHead",
]


# What heads read off residuals, of observations, components and masks.
Moments = Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]

# Of what is seen of a set: its width, and the largest coordinate.
_SUMMARY, _FARTHEST = 32, 6.0


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


class SetSummary(nn.Module):
    r"""What a shared head sees of the components of N sets.

    .. math::
        h\left( \frac1K \sum_k u_k,\; \frac1K \sum_k u_k^2,\; K \right)

    with u the coordinates of a component in its chart and h a small network: the mean
    and the spread of a population, and of how many components they are known.
    """

    def __init__(self, chart: Chart, max_cardinality: int) -> None:
        super().__init__()
        self.chart, self.num_cardinalities = chart, max_cardinality + 1
        features = 2 * chart.num_features + self.num_cardinalities
        self.network = mlp(features, 2 * _SUMMARY, _SUMMARY)

    def forward(self, components: Tensor, cardinality: Tensor) -> Tensor:
        """Summarise components ``(N, Kmax, D)``, of which K ``(N,)`` are there."""
        slots = torch.arange(components.shape[1], device=components.device)
        active = (slots < cardinality.unsqueeze(-1)).unsqueeze(-1)
        point = self.chart.some_point(components)
        u, _ = self.chart.forward(torch.where(active, components, point))
        u = torch.where(active, u.clamp(-_FARTHEST, _FARTHEST), 0.0).float()
        count = cardinality.clamp(min=1).unsqueeze(-1)
        sizes = functional.one_hot(cardinality, self.num_cardinalities).to(u)
        moments = u.sum(1) / count, u.square().sum(1) / count
        return self.network(torch.cat([*moments, sizes], -1))


class SharedHead(nn.Module):
    """Density of the shared parameters ``(N, S)`` of N rows, given x and K.

    ``level`` is the log of the residual's standard deviation in each row, shape
    ``(N,)``; only :class:`NoiseHead` reads it. With a ``summary`` the density is one
    given the components too.
    """

    def __init__(
        self,
        chart: Chart,
        embedding_features: int,
        max_cardinality: int,
        summary: SetSummary | None = None,
    ) -> None:
        super().__init__()
        self.chart, self.summary = chart, summary
        layers = 1 if chart.num_features == 1 else 2
        self.flow = ConditionalFlow(
            chart.num_features,
            embedding_features + max_cardinality + 1,
            num_layers=layers if summary is None else 2 * layers,
            own_features=0 if summary is None else _SUMMARY,
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
        v, _ = self.local.sample(
            *_unit(zero), self._ends(level), context, generator=generator
        )
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
        self.chart, self.summary = chart, None

    def _log_density(self, u: Tensor, context: RowContext) -> Tensor:
        normal = torch.distributions.Normal(u.new_zeros(()), u.new_ones(()))
        return normal.log_prob(u).sum(-1)

    def _draw(self, context: RowContext, generator: torch.Generator | None) -> Tensor:
        u = torch.empty(len(context.which), self.chart.num_features)
        return u.to(context.values).normal_(generator=generator)


class SharedGivenX:
    """The shared parameters' density given B observations."""

    def __init__(
        self,
        head: nn.Module,
        embedding: Tensor,
        num_cardinalities: int,
        moments: Moments | None = None,
    ) -> None:
        self.head, self._sizes, self._moments = head, num_cardinalities, moments
        every = torch.eye(num_cardinalities).to(embedding).repeat(len(embedding), 1)
        repeated = embedding.repeat_interleave(num_cardinalities, dim=0)
        self._values = torch.cat([repeated, every], dim=-1)

    def log_prob(
        self,
        shared: Tensor,
        owner: Tensor,
        cardinality: Tensor,
        level: Tensor | None = None,
        components: Tensor | None = None,
    ) -> Tensor:
        """Evaluate N rows of observations ``(N,)`` and K; see :class:`SharedHead`.

        Components ``(N, Kmax, D)`` are looked at by heads that read residuals, and by
        those with a :class:`SetSummary`.
        """
        context = self._context(owner, cardinality, components)
        if self._moments is not None:
            moments = self._moments_of(owner, cardinality, components)
            return cast(Any, self.head).log_prob(shared, context, level, moments)
        return cast(Any, self.head).log_prob(shared, context, level)

    def sample(
        self,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
        components: Tensor | None = None,
    ) -> Tensor:
        """Draw N rows; see :meth:`log_prob`."""
        context = self._context(owner, cardinality, components)
        if self._moments is not None:
            moments = self._moments_of(owner, cardinality, components)
            return cast(Any, self.head).sample(context, generator, level, moments)
        return cast(Any, self.head).sample(context, generator, level)

    def _moments_of(
        self, owner: Tensor, cardinality: Tensor, components: Tensor | None
    ) -> tuple[Any, ...]:
        assert self._moments is not None
        assert components is not None
        slots = torch.arange(components.shape[1], device=components.device)
        return self._moments(owner, components, slots < cardinality.unsqueeze(-1))

    def _context(
        self, owner: Tensor, cardinality: Tensor, components: Tensor | None
    ) -> RowContext:
        summary, own = getattr(self.head, "summary", None), None
        if summary is not None:
            assert components is not None
            own = summary(components, cardinality)
        return RowContext(self._values, owner * self._sizes + cardinality, own)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean zero and factor one for rows of v."""
    return torch.zeros_like(v), torch.ones_like(v).unsqueeze(-1)
