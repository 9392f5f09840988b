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

from ..seeding import forked_rng
from ..sets.prior import VariableKPrior
from .base import Problem
from .noise import WhiteNoise
from .simulator import AdditiveSimulator

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


class ExactLinearGaussianPosterior:
    """Closed-form posterior, behind the interface of a :class:`SlotPosterior`.

    Args:
        problem: The linear-Gaussian problem.
    """

    def __init__(self, problem: LinearGaussian) -> None:
        self.problem = problem
        self.prior = problem.prior
        self.default_x: Tensor | None = None

    def set_default_x(self, x: Tensor) -> "ExactLinearGaussianPosterior":
        """Set the observation to use where none is given."""
        self.default_x = self._batch(x)
        return self

    def log_evidence_by_cardinality(self, x: Tensor | None = None) -> Tensor:
        """Evaluate log p(x | K), float64, shape ``(B, Kmax + 1)``."""
        problem = self.problem
        x = self._batch(x)
        num_data, num_params = problem.design.shape
        k = torch.arange(self.prior.max_cardinality + 1, dtype=torch.float64)
        inside = x @ problem.design.double()
        variance = k * problem.tau**2 + problem.sigma**2
        miss = inside.unsqueeze(-2) - k.unsqueeze(-1) * problem.mean.double()
        rest = x.square().sum(-1) - inside.square().sum(-1)
        square = miss.square().sum(-1) / variance
        square = square + rest.unsqueeze(-1) / problem.sigma**2
        log_det = num_params * variance.log()
        log_det = log_det + 2 * (num_data - num_params) * math.log(problem.sigma)
        return -0.5 * (square + log_det + num_data * math.log(2 * math.pi))

    def log_evidence(self, x: Tensor | None = None) -> Tensor:
        """Evaluate log p(x), float64, shape ``(B,)``."""
        joint = self.log_evidence_by_cardinality(x)
        return torch.logsumexp(joint + self.prior.log_cardinality_probs, dim=-1)

    def cardinality(self, x: Tensor | None = None) -> Categorical:
        """Return p(K | x) over 0..Kmax, batched if x is a batch of more than one."""
        logits = self.log_evidence_by_cardinality(x) + self.prior.log_cardinality_probs
        return Categorical(logits=logits.squeeze(0) if len(logits) == 1 else logits)

    def with_cardinality_prior(
        self, weights: Sequence[float] | Tensor
    ) -> "ExactLinearGaussianPosterior":
        """Return the posterior under another prior of K.

        Args:
            weights: Weights of K = 0..Kmax.
        """
        prior = self.prior.with_cardinality(weights)
        new = ExactLinearGaussianPosterior(replace(self.problem, prior=prior))
        new.default_x = self.default_x
        return new

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        x: Tensor | None = None,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw theta rows for one observation, shape ``(*sample_shape, E)``.

        Args:
            sample_shape: Shape of the draws.
            x: One observation; the default if None.
            k: Cardinality to condition on.
            generator: Source of randomness.
        """
        return self.sample_batched(sample_shape, self._single(x), k, generator)[
            ..., 0, :
        ]

    def sample_batched(
        self,
        sample_shape: Sequence[int],
        x: Tensor,
        k: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Draw theta rows for B observations, shape ``(*sample_shape, B, E)``."""
        largest = self.prior.max_cardinality
        if k is not None and not 0 <= k <= largest:
            raise ValueError(f"k must be an integer in 0..{largest}, got {k!r}.")
        layout, problem = self.prior.layout, self.problem
        x = self._batch(x)
        shape = torch.Size(sample_shape)
        with forked_rng(generator):
            logits = self.log_evidence_by_cardinality(x)
            logits = logits + self.prior.log_cardinality_probs
            counts = Categorical(logits=logits).sample(torch.Size((shape.numel(),)))
            if k is not None:
                counts = torch.full_like(counts, k)
            size = (*counts.shape, layout.max_cardinality, layout.num_component_params)
            noise = torch.randn(size, dtype=torch.float64)
        active = layout.mask(counts).unsqueeze(-1)
        noise = torch.where(active, noise, 0.0)
        mean, gain = self._moments(x, counts)
        # (I - a 11^T)^2 = I - g 11^T with a = (1 - sqrt(1 - g K)) / K
        number = counts.clamp(min=1).double()
        a = (1 - (1 - gain * counts).sqrt()) / number
        common = a[..., None, None] * noise.sum(-2, keepdim=True)
        components = mean.unsqueeze(-2) + problem.tau * (noise - common)
        rows = layout.canonical(layout.pack(counts, components.float()))
        return rows.reshape(*shape, len(x), layout.size)

    def log_prob(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Evaluate the log density of sets ``(S, E)`` given one observation."""
        return self.log_prob_batched(theta.unsqueeze(-2), self._single(x)).squeeze(-1)

    def log_prob_batched(self, theta: Tensor, x: Tensor, **kwargs: object) -> Tensor:
        """Evaluate log densities ``(S, B)`` of sets ``(S, B, E)``, float64."""
        problem, layout = self.problem, self.prior.layout
        layout.validate(theta)
        parts = layout.unpack(theta)
        x = self._batch(x)
        logits = self.log_evidence_by_cardinality(x)
        log_k = torch.log_softmax(logits + self.prior.log_cardinality_probs, dim=-1)
        k = parts.cardinality
        value = log_k.expand(*k.shape, -1).gather(-1, k.unsqueeze(-1)).squeeze(-1)
        mean, gain = self._moments(x, k)
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
        return torch.where(self.prior.support.check(theta), value, -math.inf)

    def _moments(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean ``(..., B, D)`` of each component, and g_K ``(..., B)``."""
        problem = self.problem
        k = counts.double()
        gain = problem.tau**2 / (k * problem.tau**2 + problem.sigma**2)
        mean = problem.mean.double()
        inside = x @ problem.design.double()
        return mean + gain.unsqueeze(-1) * (inside - k.unsqueeze(-1) * mean), gain

    def _single(self, x: Tensor | None) -> Tensor:
        batch = self._batch(x)
        if len(batch) != 1:
            raise ValueError(f"x must be one observation, got a batch of {len(batch)}.")
        return batch

    def _batch(self, x: Tensor | None) -> Tensor:
        if x is None:
            if self.default_x is None:
                raise ValueError("x must be given where no default x is set.")
            return self.default_x
        batch = torch.atleast_2d(torch.as_tensor(x)).double()
        num = self.problem.design.shape[0]
        if batch.ndim != 2 or batch.shape[-1] != num:
            raise ValueError(
                f"x must have shape (batch, {num}), got {tuple(batch.shape)}."
            )
        if not torch.isfinite(batch).all():
            raise ValueError("x must be finite, got NaN or Inf.")
        return batch
