r"""Densities from which moves between sets draw one component.

:class:`PooledComponents` learns one from draws of a posterior, or from any other
population. The components of all sets are sorted by the parameter that orders them and
cut into slices of equal size. In the chart's coordinates u,

.. math::
    g(\theta) = d\, p(\theta) + (1 - d) \left| \frac{du}{d\theta} \right|
        \sum_s w_s\, t_\nu(u;\, m_s, \Sigma_s), \qquad w_s \propto h_s^{1/4}

nu is 5 or 6, m_s and Sigma_s are mean and covariance of a slice and h_s the interval
that it spans: components that all sets agree on are many and narrow, and need proposals
least. The prior's share d keeps g positive, so that a component which no set knows of
can be born and, as the reverse of a birth, die.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..nn.charts import Chart, WhiteningChart
from ..seeding import forked_rng
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior

__all__ = [
    "ComponentProposal",
    "PooledClasses",
    "PooledComponents",
    "PriorComponents",
    "pooled_components",
]

_MOST_SLICES, _LEAST_IN_SLICE = 128, 24
_FREEDOM = 5
_INFLATION = 1.5
_WIDTH_POWER = 0.25


@runtime_checkable
class ComponentProposal(Protocol):
    """A density over one component that can be drawn from and evaluated."""

    def sample_component(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw n components, shape ``(n, D)``."""
        ...

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the normalised log density ``(n,)`` of components ``(n, D)``."""
        ...


@dataclass(frozen=True)
class PriorComponents:
    """The prior of one component, ``prior.component``, as a proposal."""

    component: Distribution

    def sample_component(self, n: int, generator: torch.Generator | None) -> Tensor:
        """See :class:`ComponentProposal`."""
        with forked_rng(generator):
            return self.component.sample(torch.Size((n,))).reshape(n, -1)

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the log density ``(n,)`` of components ``(n, D)``."""
        values = self.component.log_prob(components)
        # Univariate distributions that nobody wrapped keep the parameters apart.
        return values.sum(-1) if values.ndim > 1 else values


class PooledComponents:
    """Components like those of a population of rows ``(M, E)``, see the module.

    The prior's share d lies in (0, 1]; the chart is a density, whitening by the prior
    if None.
    """

    def __init__(
        self,
        theta: Tensor,
        prior: VariableKPrior,
        prior_share: float = 0.2,
        chart: Chart | None = None,
    ) -> None:
        if not 0 < prior_share <= 1:
            raise ValueError(f"prior_share must lie in (0, 1], got {prior_share}.")
        layout = prior.layout
        if chart is None:
            chart = WhiteningChart(prior.component_marginals)
        self.chart, self.prior = chart, PriorComponents(prior.component)
        parts = layout.unpack(theta)
        components = parts.components[parts.mask].double()
        # Copies of a component, as particles have them, would make slices of no width.
        place = components[:, layout.order_by]
        order = place.argsort()
        first = torch.ones(min(1, len(order)), dtype=torch.bool)
        order = order[torch.cat([first, place[order].diff() != 0])]
        num = min(_MOST_SLICES, len(order) // _LEAST_IN_SLICE)
        self.prior_share = prior_share if num else 1.0
        if not num:
            return
        size = len(order) // num
        slices = components[order[: num * size]].reshape(num, size, -1)
        place = slices[..., layout.order_by]
        width = place[:, -1] - place[:, 0]
        weights = (width / width.max()) ** _WIDTH_POWER
        self.weights = weights / weights.sum()
        u, _ = chart.forward(slices)
        self.mean = u.mean(1)
        away = u - self.mean.unsqueeze(1)
        covariance = _INFLATION**2 * (away.mT @ away) / (size - 1)
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        # Slices of few distinct components are degenerate.
        self.factor = torch.linalg.cholesky(
            covariance + torch.diag_embed(0.01 * diagonal + 1e-16)
        )
        dim = u.shape[-1]
        # An odd or even freedom that makes the density's power a whole number.
        self.freedom = _FREEDOM + (dim + _FREEDOM) % 2
        self.inverse = torch.linalg.inv(self.factor)
        log_norm = (
            math.lgamma(0.5 * (self.freedom + dim))
            - math.lgamma(0.5 * self.freedom)
            - 0.5 * dim * math.log(self.freedom * math.pi)
        )
        scale = self.factor.diagonal(dim1=-2, dim2=-1).prod(-1)
        self.height = self.weights / scale * math.exp(log_norm)

    def sample_component(self, n: int, generator: torch.Generator | None) -> Tensor:
        """See :class:`ComponentProposal`."""
        broad = self.prior.sample_component(n, generator).double()
        if self.prior_share == 1:
            return broad
        which = torch.multinomial(self.weights, n, True, generator=generator)
        shape = n, self.mean.shape[-1]
        z = torch.randn(shape, dtype=torch.float64, generator=generator)
        # Student's t: a normal over the root of a chi-square over its freedom.
        squares = torch.randn(n, self.freedom, dtype=torch.float64, generator=generator)
        z = z / squares.square().mean(-1, keepdim=True).sqrt()
        u = self.mean[which] + (self.factor[which] @ z.unsqueeze(-1)).squeeze(-1)
        from_prior = torch.rand(n, 1, generator=generator) < self.prior_share
        return torch.where(from_prior, broad, self.chart.inverse(u))

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the log density ``(n,)`` of components ``(n, D)``."""
        prior = self.prior.log_prob_component(components.float()).double()
        if self.prior_share == 1:
            return prior
        inside = self.chart.contains(components)
        point = self.chart.some_point(components)
        u, log_det = self.chart.forward(
            torch.where(inside.unsqueeze(-1), components, point).double()
        )
        apart = [c.unsqueeze(-1) - m for c, m in zip(u.T, self.mean.T, strict=True)]
        away = torch.zeros_like(apart[0])
        for d in range(len(apart)):
            z = sum(self.inverse[:, d, e] * apart[e] for e in range(d + 1))
            away += z * z
        kernel = (1 + away / self.freedom).reciprocal()
        kernel = _power(kernel, (self.freedom + u.shape[-1]) // 2)
        pooled = torch.where(inside, (kernel @ self.height).log() + log_det, -math.inf)
        share = self.prior_share
        return torch.logaddexp(pooled + math.log1p(-share), prior + math.log(share))


class PooledClasses:
    """Components of any class like those of a population of rows ``(M, E)``.

    A class is proposed as often as the rows have it, and as the prior expects it.
    """

    def __init__(
        self, theta: Tensor, prior: MultiClassPrior, prior_share: float = 0.2
    ) -> None:
        layout = self.layout = prior.layout
        self.classes = [
            PooledComponents(row, member, prior_share)
            for row, member in zip(layout.views(theta), prior.members, strict=True)
        ]
        counts = layout.counts(theta).double().mean(0) + 1e-3
        expected = prior.component.weights.double()
        shares = (1 - prior_share) * counts / counts.sum() + prior_share * expected
        self.shares = shares / shares.sum()

    def sample_component(self, n: int, generator: torch.Generator | None) -> Tensor:
        """See :class:`ComponentProposal`."""
        found = torch.zeros(n, self.layout.num_component_params, dtype=torch.float64)
        if not n:
            return found
        label = torch.multinomial(self.shares, n, True, generator=generator)
        for c, proposal in enumerate(self.classes):
            rows = (label == c).nonzero().squeeze(-1)
            if not len(rows):
                continue
            own = proposal.sample_component(len(rows), generator).double()
            found[rows] = self.layout.from_class(own, c)
        return found

    def log_prob_component(self, components: Tensor) -> Tensor:
        """Evaluate the log density ``(n,)`` of components ``(n, D)``."""
        found = torch.full((len(components),), -math.inf, dtype=torch.float64)
        for c, proposal in enumerate(self.classes):
            rows = (components[:, 0] == c).nonzero().squeeze(-1)
            if not len(rows):
                continue
            own = self.layout.to_class(components[rows], c)
            found[rows] = proposal.log_prob_component(own) + self.shares[c].log()
        return found


def pooled_components(
    theta: Tensor, prior: VariableKPrior, chart: Chart
) -> ComponentProposal:
    """Learn a proposal of components, of one class or of several, from rows."""
    if isinstance(prior, MultiClassPrior):
        return PooledClasses(theta, prior)
    return PooledComponents(theta, prior, chart=chart)


def _power(base: Tensor, exponent: int) -> Tensor:
    """A whole power by squaring, several times as fast as torch's."""
    result = base if exponent % 2 else torch.ones_like(base)
    while exponent := exponent // 2:
        base = base * base
        result = result * base if exponent % 2 else result
    return result
