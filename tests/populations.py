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


class Quadrature:
    """The exact posterior of one x ``(T,)``, to 1e-6.

    Attributes:
        log_evidence: Log p(x).
        probs: p(K | x), ``(Kmax + 1,)``.
        means: Posterior means of mean and width, ``(2,)``.
    """

    def __init__(self, x: Tensor, num: int = 400) -> None:
        grid = (torch.arange(num, dtype=torch.float64) + 0.5) / num
        mean, width = (
            (low + (high - low) * grid)
            for low, high in zip(LOW.double(), HIGH.double(), strict=True)
        )
        mean, width = torch.meshgrid(mean, width, indexing="ij")
        power, inner = SHAPE.square().sum(), (SHAPE * x.double()).sum()
        terms = []
        for k in range(MOST + 1):
            # The covariance has one direction of its own.
            own = k * width.square()
            rest = x.double() - k * mean.unsqueeze(-1) * SHAPE
            along = inner - k * mean * power
            chi = rest.square().sum(-1) - own * along.square() / (
                SIGMA**2 + own * power
            )
            log_det = 2 * LENGTH * math.log(SIGMA) + torch.log1p(own * power / SIGMA**2)
            terms.append(
                -0.5 * (chi / SIGMA**2 + log_det + LENGTH * math.log(2 * math.pi))
                + WEIGHTS[k].double().log()
            )
        joint = torch.stack(terms)
        self.log_evidence = float(joint.flatten().logsumexp(0)) - 2 * math.log(num)
        weights = joint.flatten().softmax(0).reshape(joint.shape)
        self.probs = weights.sum((1, 2))
        self.means = torch.stack([(weights * v).sum() for v in (mean, width)])


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
