r"""A problem with a population whose posterior is known by quadrature.

Each of K components has a height :math:`h \sim N(\mu, \tau^2)`, and x is the sum of the
heights times a known shape b, plus white noise, so that

.. math::
    x | K, \mu, \tau \sim N(K \mu\, b,\; K \tau^2\, b b^T + \sigma^2 I)

and p(K, mu, tau | x) is a sum over K and an integral over two numbers.
"""

import math

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Normal,
    Uniform,
)

from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise
from sbi_slotflow.nn.charts import Chart, WhiteningChart
from sbi_slotflow.posterior.base import Posterior
from sbi_slotflow.problems import Problem
from sbi_slotflow.sets.distribution import SetDistribution

LOW, HIGH = torch.tensor([0.5, 0.1]), torch.tensor([2.5, 0.8])
SIGMA, LENGTH, MOST = 0.5, 6, 2
SHAPE = torch.linspace(0.2, 1.0, LENGTH, dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.4, 0.4])


def heights(shared: Tensor) -> Distribution:
    """The population."""
    return Independent(Normal(shared[:, :1], shared[:, 1:]), 1)


def signal(components: Tensor) -> Tensor:
    return components * SHAPE.to(components)


def problem() -> Problem:
    prior = VariableKPrior(
        heights,
        WEIGHTS,
        shared=Independent(Uniform(LOW, HIGH), 1),
        component_names=("height",),
        shared_names=("mean", "width"),
    )
    simulator = AdditiveSimulator(signal, WhiteNoise(SIGMA), prior.layout)
    return Problem("heights", prior, simulator)


class Quadrature(SetDistribution):
    """The exact posterior of observations ``(B, T)``, by a rule of midpoints.

    Attributes:
        log_evidence: Log p(x), ``(B,)``, to 1e-6.
        probs: p(K | x), ``(B, Kmax + 1)``.
        means: Posterior means of mean and width, ``(B, 2)``.
    """

    def __init__(self, x: Tensor, num: int = 100) -> None:
        self.problem, self.x, self.num = problem(), x.double(), num
        self.layout, self.num_observations = self.problem.layout, len(x)
        grid = (torch.arange(num, dtype=torch.float64) + 0.5) / num
        self.axes = LOW.double() + (HIGH - LOW).double() * grid.unsqueeze(-1)
        mean, width = torch.meshgrid(*self.axes.T, indexing="ij")
        power, inner = SHAPE.square().sum(), self.x @ SHAPE
        inner = inner[:, None, None]
        terms = []
        for k in range(MOST + 1):
            # The covariance has one direction of its own.
            own = k * width.square()
            square = self.x.square().sum(-1)[:, None, None]
            square = square - 2 * k * mean * inner + (k * mean).square() * power
            along = inner - k * mean * power
            chi = square - own * along.square() / (SIGMA**2 + own * power)
            log_det = 2 * LENGTH * math.log(SIGMA) + torch.log1p(own * power / SIGMA**2)
            value = chi / SIGMA**2 + log_det + LENGTH * math.log(2 * math.pi)
            terms.append(WEIGHTS[k].double().log() - 0.5 * value)
        joint = torch.stack(terms, 1)  # (B, Kmax + 1, num, num)
        self.log_evidence = joint.flatten(1).logsumexp(1) - 2 * math.log(num)
        self.weights = joint.flatten(1).softmax(1).reshape(joint.shape)
        self.probs = self.weights.sum((2, 3))
        pairs = [(self.weights * v).sum((1, 2, 3)) for v in (mean, width)]
        self.means = torch.stack(pairs, -1)

    def cardinality(self) -> Categorical:
        return Categorical(self.probs)

    def log_prob(self, theta: Tensor) -> Tensor:
        theta = theta.double()
        x = self.x.expand(*theta.shape[:-1], -1)
        log_p = self.problem.prior.log_prob(theta)
        inside = torch.isfinite(log_p)
        log_p[inside] += self.problem.log_likelihood(theta[inside], x[inside])
        return log_p - self.log_evidence

    def sample(self, sample_shape=(), k=None, generator=None) -> Tensor:
        shape = torch.Size(sample_shape)
        weights = self.weights
        if k is not None:
            only = torch.zeros_like(weights)
            only[:, k] = weights[:, k]
            weights = only
        cell = torch.multinomial(
            weights.flatten(1), max(1, shape.numel()), True, generator=generator
        )[:, : shape.numel()].mT  # (S, B)
        count = cell // self.num**2
        place = torch.stack([cell // self.num % self.num, cell % self.num], -1)
        u = torch.rand(place.shape, generator=generator, dtype=torch.float64)
        shared = LOW.double() + (HIGH - LOW).double() * (place + u) / self.num
        mean, width = shared.unsqueeze(-2).unbind(-1)
        # Heights of the prior, put right by what x says of their sum.
        z = torch.randn(*cell.shape, MOST, generator=generator, dtype=torch.float64)
        there = torch.arange(MOST) < count.unsqueeze(-1)
        height = torch.where(there, mean + width * z, 0.0)
        power, own = SHAPE.square().sum(), count * width.squeeze(-1).square()
        noise = torch.randn(*cell.shape, generator=generator, dtype=torch.float64)
        seen = self.x @ SHAPE / power + SIGMA / power.sqrt() * noise
        miss = (seen - height.sum(-1)) / (own + SIGMA**2 / power)
        height = height + (width.square() * miss.unsqueeze(-1)) * there
        rows = self.layout.pack(count, height.unsqueeze(-1), shared).float()
        return self.layout.canonical(rows).reshape(*shape, *rows.shape[1:])


class Exact(Posterior):
    """The posterior of :class:`Quadrature`."""

    event_shape = torch.Size((LENGTH,))  # type: ignore[assignment]

    def __init__(self) -> None:
        self.prior = problem().prior

    def given(self, x: Tensor) -> SetDistribution:
        return Quadrature(x)


class _Loose(Quadrature):
    def sample(self, sample_shape=(), k=None, generator=None) -> Tensor:
        rows = super().sample(sample_shape, k, generator)
        if rows.ndim == 3:
            rows[..., 1:3] = rows[..., 1:3].roll(1, dims=0)
        return rows


class Loose(Exact):
    """As if shared parameters were drawn without a look at the components."""

    def given(self, x: Tensor) -> SetDistribution:
        return _Loose(x)


class WithoutPopulation(Posterior):
    """A posterior that knows neither x nor the population.

    Its draws have independent components of the right marginal: what must be put right
    is all that x and the shared parameters say.
    """

    event_shape = torch.Size((LENGTH,))  # type: ignore[assignment]

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior = prior
        self.alone = VariableKPrior(
            Independent(Normal(torch.tensor([1.5]), torch.tensor([1.2])), 1),
            prior.cardinality_probs,
            shared=prior.shared,
            component_names=prior.layout.component_names,
            shared_names=prior.layout.shared_names,
        )

    @property
    def chart(self) -> Chart:
        return WhiteningChart(self.prior.component_marginals)

    def given(self, x: Tensor) -> SetDistribution:
        return _Alone(self.alone, len(x))


class _Alone(SetDistribution):
    def __init__(self, prior: VariableKPrior, num: int) -> None:
        self.prior, self.layout, self.num_observations = prior, prior.layout, num

    def cardinality(self) -> Categorical:
        probs = self.prior.cardinality_probs
        return Categorical(probs.expand(self.num_observations, -1))

    def sample(self, sample_shape=(), k=None, generator=None) -> Tensor:
        prior, shape = self.prior, (*sample_shape, self.num_observations)
        if k is not None:
            prior = prior.with_cardinality(torch.eye(MOST + 1)[k])
        return prior.sample(shape, generator)

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.prior.log_prob(theta).expand(len(theta), self.num_observations)
