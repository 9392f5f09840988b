r"""A linear-Gaussian problem whose trans-dimensional posterior is known exactly.

.. math::
    x = \sum_{k=1}^{K} H \theta_k + \epsilon, \qquad
    \theta_k \sim N(\mu, \tau^2 I_D), \quad \epsilon \sim N(0, \sigma^2 I_T)

with the columns of H orthonormal. Given K, data and components are jointly Gaussian:

.. math::
    p(x | K) = N(x;\, K H \mu,\; K \tau^2 H H^T + \sigma^2 I), \qquad
    p(\theta_1..\theta_K | x, K) = N(m_K, C_K)

    m_K = \mu + g_K\,(H^T x - K \mu) \text{ for every k}, \quad
    C_K = (\tau^2 I_K - \tau^2 g_K 1 1^T) \otimes I_D, \quad
    g_K = \tau^2 / (K \tau^2 + \sigma^2)

The posterior is exchangeable, so the density of the set is K! times this one, and a
sorted draw is a draw in canonical order. Components are weakly anti-correlated and K is
truly uncertain, which makes it a yardstick for every method in the package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal

from ..posterior.refinable import Refinable
from ..seeding import forked_rng
from ..sets.checks import Numbers
from ..sets.distribution import SetDistribution
from ..sets.prior import VariableKPrior
from .base import Problem
from .simulator import AdditiveSimulator, WhiteNoise

__all__ = ["ExactLinearGaussianPosterior", "LinearGaussian", "linear_gaussian"]


@dataclass(frozen=True)
class _LinearSignal:
    """Signals H theta."""

    design: Tensor

    def __call__(self, components: Tensor) -> Tensor:
        return components @ self.design.to(components).mT

    def total(self, components: Tensor, mask: Tensor) -> Tensor:
        active = torch.where(mask.unsqueeze(-1), components, components.new_zeros(()))
        return self(active.sum(-2))


@dataclass(frozen=True)
class LinearGaussian(Problem):
    """The linear-Gaussian problem.

    Attributes:
        design: Matrix H with orthonormal columns, shape ``(T, D)``.
        mean: Prior mean mu of a component, shape ``(D,)``.
        tau: Prior standard deviation of a component.
        sigma: Standard deviation of the noise.
    """

    design: Tensor
    mean: Tensor
    tau: float
    sigma: float

    def exact_posterior(self) -> "ExactLinearGaussianPosterior":
        """Return the closed-form posterior."""
        return ExactLinearGaussianPosterior(self)


def linear_gaussian(max_cardinality: int = 3) -> LinearGaussian:
    """Make the linear-Gaussian problem, with K uniform on 0..Kmax.

    Components have two parameters with mean (1.5, 0) and standard deviation 0.5; x has
    six entries with noise of standard deviation 1.

    Args:
        max_cardinality: Largest cardinality Kmax.
    """
    num_data, mean, tau, sigma = 6, torch.tensor([1.5, 0.0]), 0.5, 1.0
    rows = torch.arange(num_data) + 0.5
    columns = [torch.cos(math.pi * d * rows / num_data) for d in (0, 1)]
    design = torch.stack([c / c.norm() for c in columns], dim=-1)
    prior = VariableKPrior(
        Independent(Normal(mean, torch.full((2,), tau)), 1),
        [1.0] * (max_cardinality + 1),
        component_names=("level", "slope"),
    )
    simulator = AdditiveSimulator(
        _LinearSignal(design), WhiteNoise(sigma), prior.layout
    )
    return LinearGaussian("linear_gaussian", prior, simulator, design, mean, tau, sigma)


class ExactLinearGaussianPosterior(Refinable):
    """Closed-form posterior of a linear-Gaussian problem."""

    def __init__(self, problem: LinearGaussian) -> None:
        self.problem, self.prior = problem, problem.prior
        self.simulator = problem.simulator

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.problem.design.shape[:1]

    def given(self, x: Tensor) -> "LinearGaussianSets":
        """Return the distribution over sets given observations ``(B, T)``."""
        return LinearGaussianSets(self.problem, x)

    def log_evidence_by_cardinality(self, x: Numbers | None = None) -> Tensor:
        """Evaluate log p(x | K), float64, shape ``(B, Kmax + 1)``."""
        return self.given(self.observations(x)).log_evidence

    def log_evidence(self, x: Numbers | None = None) -> Tensor:
        """Evaluate log p(x), float64, shape ``(B,)``."""
        joint = self.log_evidence_by_cardinality(x)
        return torch.logsumexp(joint + self.prior.log_cardinality_probs, dim=-1)

    def with_cardinality_prior(
        self, weights: Sequence[float] | Tensor
    ) -> "ExactLinearGaussianPosterior":
        """Return the posterior under another prior of K, weights of 0..Kmax."""
        prior = self.prior.with_cardinality(weights)
        new = ExactLinearGaussianPosterior(replace(self.problem, prior=prior))
        return new if self.default_x is None else new.set_default_x(self.default_x)


class LinearGaussianSets(SetDistribution):
    """The closed-form posterior given observations ``(B, T)``.

    Attributes:
        log_evidence: log p(x | K), float64, shape ``(B, Kmax + 1)``.
    """

    def __init__(self, problem: LinearGaussian, x: Tensor) -> None:
        self.problem, self.layout = problem, problem.layout
        self.num_observations = len(x)
        x = x.double()
        self._inside = x @ problem.design.double()
        num_data, num_params = problem.design.shape
        k = torch.arange(self.layout.max_cardinality + 1, dtype=torch.float64)
        variance = k * problem.tau**2 + problem.sigma**2
        mean = k.unsqueeze(-1) * problem.mean.double()
        miss = self._inside.unsqueeze(-2) - mean
        rest = x.square().sum(-1) - self._inside.square().sum(-1)
        square = miss.square().sum(-1) / variance + rest[:, None] / problem.sigma**2
        log_det = 2 * (num_data - num_params) * math.log(problem.sigma)
        log_det = num_params * variance.log() + log_det
        log_det = log_det + num_data * math.log(2 * math.pi)
        self.log_evidence = -0.5 * (square + log_det)

    def cardinality(self) -> Categorical:
        """Return p(K | x), batch shape ``(B,)``."""
        prior = self.problem.prior
        return Categorical(logits=self.log_evidence + prior.log_cardinality_probs)

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows ``(*sample_shape, B, E)`` in canonical order."""
        layout, problem = self.layout, self.problem
        shape = torch.Size(sample_shape)
        num = shape.numel()
        with forked_rng(generator):
            counts = self.cardinality().sample(torch.Size((max(1, num),)))[:num]
            if k is not None:
                counts = torch.full_like(counts, k)
            size = (*counts.shape, layout.max_cardinality, layout.num_component_params)
            noise = torch.randn(size, dtype=torch.float64)
        active = layout.mask(counts).unsqueeze(-1)
        noise = torch.where(active, noise, 0.0)
        mean, gain = self._moments(counts)
        # (I - a 11^T)^2 = I - g 11^T with a = (1 - sqrt(1 - g K)) / K
        number = counts.clamp(min=1).double()
        a = (1 - (1 - gain * counts).sqrt()) / number
        common = a[..., None, None] * noise.sum(-2, keepdim=True)
        components = mean.unsqueeze(-2) + problem.tau * (noise - common)
        rows = layout.canonical(layout.pack(counts, components.float()))
        return rows.reshape(*shape, self.num_observations, layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log densities ``(S, B)`` of sets ``(S, B, E)``, float64."""
        problem, layout = self.problem, self.layout
        parts = layout.unpack(theta)
        k = parts.cardinality
        value = self.cardinality().logits.gather(-1, k.mT).mT
        mean, gain = self._moments(k)
        miss = (parts.components.double() - mean.unsqueeze(-2)) / problem.tau
        miss = torch.where(parts.mask.unsqueeze(-1), miss, 0.0)
        # inverse and determinant of I - g 11^T
        left = 1 - gain * k
        square = miss.square().sum((-2, -1))
        square = square + gain / left * miss.sum(-2).square().sum(-1)
        dim = layout.num_component_params
        log_det = dim * (left.log() + 2 * k * math.log(problem.tau))
        log_det = log_det + dim * k * math.log(2 * math.pi)
        value = value + torch.lgamma(k + 1.0).double() - 0.5 * (square + log_det)
        return torch.where(problem.prior.support.check(theta), value, -math.inf)

    def _moments(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean ``(..., B, D)`` of each component, and g_K ``(..., B)``."""
        problem = self.problem
        k = counts.double()
        gain = problem.tau**2 / (k * problem.tau**2 + problem.sigma**2)
        mean = problem.mean.double()
        miss = self._inside - k.unsqueeze(-1) * mean
        return mean + gain.unsqueeze(-1) * miss, gain
