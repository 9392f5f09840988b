r"""A posterior of sinusoids made by hand: pursuit, Gauss-Newton, Laplace for each K.

For each K the fits of :func:`matching_pursuit` give a density of the frequencies, see
:mod:`.frequencies`. Then

.. math::
    q(K, f, \sigma, a, b) = q(K)\; q(f | K)\;
        p(\sigma | f)\; N(a, b | \hat a(f), \sigma^2 G(f)^{-1}),

the last two being the exact conditionals under a flat prior of the amplitudes. q(K)
follows from a pilot estimate of each K's evidence. It stands behind the interface of a
posterior, so that it can be refined, and be the classical rival of a trained one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import gamma
from torch import Tensor
from torch.distributions import Categorical

from ...posterior.base import PosteriorOfOne
from ...posterior.refine import Refinable
from ...seeding import draw_seed
from ...sets.checks import Numbers, as_floats
from ...sets.distribution import SetDistribution
from ...sets.prior import VariableKPrior
from ..noise import WhiteNoise
from .frequencies import FrequencyProposal
from .pursuit import SinusoidFit, matching_pursuit
from .statistics import Floats, SineStatistics

if TYPE_CHECKING:
    from .problem import Sinusoids

__all__ = ["LaplaceProposal", "laplace_proposal"]

_PILOT_DRAWS = 1_000
# Noise level that counts as none, relative to the prior's largest.
_LEAST = 1e-12


def laplace_proposal(
    problem: "Sinusoids",
    x: Numbers,
    cardinalities: Sequence[int] | None = None,
    seed: int = 0,
) -> "LaplaceProposal":
    """Fit a :class:`LaplaceProposal` to one observation.

    Args:
        problem: A sinusoid problem with white noise.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        cardinalities: Cardinalities to consider; all that the prior allows if None.
        seed: Seed of the pilot draws.

    Raises:
        TypeError: If the problem is of another kind.
        ValueError: If x is malformed or a cardinality impossible.
    """
    x = as_floats(x, "x")
    statistics = problem.statistics(x)
    prior = problem.prior
    possible = prior.cardinality_probs.nonzero().flatten().tolist()
    wanted = possible if cardinalities is None else sorted(set(cardinalities))
    if not wanted or not set(wanted) <= set(possible):
        raise ValueError(f"cardinalities must be among {possible}, got {wanted}.")
    fits = matching_pursuit(
        x.reshape(-1).double().numpy(),
        statistics,
        prior.component_marginals[2].bounds,
        max(wanted),
        prior.min_separation or 0.0,
    )
    fitted = [k for k in wanted if k < len(fits)]
    return LaplaceProposal(problem, x.reshape(-1), statistics, fits, fitted, seed)


class LaplaceProposal(Refinable, PosteriorOfOne):
    """Laplace approximation for each K; make it with :func:`laplace_proposal`.

    Rows are float64: at low noise a frequency is known better than float32 resolves.

    Args:
        problem: The sinusoid problem.
        x: The observation, shape ``(T,)``.
        statistics: Its statistics.
        fits: Fits of 0, 1, ... components.
        cardinalities: Those to consider, each with a fit.
        seed: Seed of the pilot draws.
    """

    def __init__(
        self,
        problem: "Sinusoids",
        x: Tensor,
        statistics: SineStatistics,
        fits: list[SinusoidFit],
        cardinalities: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.problem, self.prior, self.x = problem, problem.prior, x
        self.simulator = problem.simulator
        self.statistics = statistics
        self.sigma_bounds = problem.prior.shared_marginals[0].bounds
        self.modes = {k: _Mode(self, fits[k::-1], seed) for k in cardinalities}
        self.log_evidence_by_cardinality = self._pilot(seed)

    def _distribution(self) -> "LaplaceSets":
        return LaplaceSets(self.prior, self.modes, self._log_q_k)

    def log_likelihood(self, theta: Tensor, x: Numbers | None = None) -> Tensor:
        """Evaluate log p(x | theta) from the sufficient statistics.

        The same as the problem's own, at a cost that does not grow with the record.

        Args:
            theta: Rows ``(..., E)``.
            x: Left out, or the observation of the proposal.

        Returns:
            Float64, shape ``(...)``.
        """
        if x is not None:
            self._check(x)
        return self.statistics.log_likelihood_of(theta, self.prior.layout, WhiteNoise())

    @property
    def _log_q_k(self) -> Tensor:
        log_joint = self.log_evidence_by_cardinality.clone()
        log_joint += self.prior.log_cardinality_probs.double()
        # A share for each K considered: an evidence that came out low is put right by
        # the weights, one that came out as zero never would be.
        # And where the prior explains the data with no K, all are as good.
        share = 0.01 if torch.isfinite(log_joint).any() else 1.0
        probs = (1 - share) * log_joint.softmax(-1).nan_to_num()
        for k in self.modes:
            probs[k] += share / len(self.modes)
        return probs.log()

    def _pilot(self, seed: int) -> Tensor:
        """Importance-sampling estimates of log p(x | K), -inf where K has no mode."""
        rng = np.random.default_rng([seed, 1])
        values = torch.full(
            (self.prior.max_cardinality + 1,), -math.inf, dtype=torch.float64
        )
        layout = self.prior.layout
        for k, mode in self.modes.items():
            for _ in range(2):  # the second with the shares that the first asks for
                rows = mode.sample(_PILOT_DRAWS, rng)
                parts = layout.unpack(rows)
                components = parts.components[:, :k].numpy()
                log_p = self.prior.log_prob(rows) - self.prior.log_cardinality_probs[k]
                weights = log_p.double() + self.log_likelihood(rows)
                weights -= torch.from_numpy(
                    mode.log_prob(components, parts.shared[:, 0].numpy())
                )
                values[k] = weights.logsumexp(0) - math.log(_PILOT_DRAWS)
                if torch.isfinite(values[k]):
                    mode.frequencies.adapt(components[..., 2], weights.numpy())
        return values


class LaplaceSets(SetDistribution):
    """Distribution over sets of a :class:`LaplaceProposal`.

    Args:
        prior: Prior over theta rows.
        modes: Densities given K, by K.
        log_q_k: log q(K), shape ``(Kmax + 1,)``.
    """

    num_observations = 1

    def __init__(
        self, prior: VariableKPrior, modes: Mapping[int, "_Mode"], log_q_k: Tensor
    ) -> None:
        self.layout, self.modes, self.log_q_k = prior.layout, modes, log_q_k

    def cardinality(self) -> Categorical:
        """Return q(K) over 0..Kmax, batch shape ``(1,)``."""
        return Categorical(logits=self.log_q_k.unsqueeze(0))

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw float64 rows ``(*sample_shape, 1, E)`` in canonical order.

        As the amplitudes' conditional is a Gaussian, some may lie outside the prior's
        support.
        """
        num = torch.Size(sample_shape).numel()
        rng = np.random.default_rng(draw_seed(generator))
        if k is None:
            probs = self.log_q_k.exp().numpy()
            counts = rng.choice(len(probs), size=num, p=probs / probs.sum())
        elif k in self.modes:
            counts = np.full(num, k)
        else:
            raise ValueError(
                f"k must be among the cardinalities considered, {sorted(self.modes)}, "
                f"got {k!r}."
            )
        rows = torch.empty(num, self.layout.size, dtype=torch.float64)
        for value in np.unique(counts):
            chosen = torch.from_numpy(counts == value)
            rows[chosen] = self.modes[int(value)].sample(int(chosen.sum()), rng)
        return rows.reshape(*sample_shape, 1, self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate float64 log densities ``(S, 1)`` of rows ``(S, 1, E)``.

        -inf where a K was not considered, or a phase, a frequency or sigma lies outside
        its bounds.
        """
        rows = self.layout.canonical(theta.double()).reshape(-1, self.layout.size)
        parts = self.layout.unpack(rows)
        values = torch.full((len(rows),), -math.inf, dtype=torch.float64)
        for k, mode in self.modes.items():
            chosen = parts.cardinality == k
            if chosen.any():
                given_k = mode.log_prob(
                    parts.components[chosen, :k].numpy(),
                    parts.shared[chosen, 0].numpy(),
                )
                values[chosen] = self.log_q_k[k] + torch.from_numpy(given_k)
        return values.reshape(theta.shape[:-1])


class _Mode:
    """q(f, sigma, a, b | K), from the fits of K, K - 1, ... components."""

    def __init__(
        self, owner: LaplaceProposal, fits: list[SinusoidFit], seed: int
    ) -> None:
        self.owner = owner
        self.num = len(fits[0].frequency)
        self.band = owner.prior.component_marginals[2].bounds
        statistics = owner.statistics
        low, high = owner.sigma_bounds
        sigma = math.sqrt(max(fits[0].energy, 0.0) / statistics.num_data)
        self._least_energy = (_LEAST * high) ** 2 * statistics.num_data
        self.frequencies = FrequencyProposal(
            fits,
            statistics,
            self.band,
            owner.prior.min_separation or 0.0,
            min(max(sigma, low, _LEAST * high), high),
            seed,
        )

    def sample(self, size: int, rng: np.random.Generator) -> Tensor:
        """Draw theta rows, shape ``(size, E)``."""
        frequency = self.frequencies.sample(size, rng)
        mean, root, energy = self._conditional(frequency)
        sigma = self._draw_sigma(energy, rng)
        noise = rng.standard_normal((size, 2 * self.num, 1))
        spread = torch.linalg.solve_triangular(
            torch.from_numpy(root).mT, torch.from_numpy(noise), upper=True
        )
        amplitudes = mean + sigma[:, None] * spread.squeeze(-1).numpy()
        components = self.owner.statistics.components(
            amplitudes.reshape(size, self.num, 2), frequency
        )
        layout = self.owner.prior.layout
        padded = np.zeros((size, layout.max_cardinality, 3))
        padded[:, : self.num] = components
        return layout.pack(
            torch.full((size,), self.num),
            torch.from_numpy(padded),
            torch.from_numpy(sigma[:, None]),
        )

    def log_prob(self, components: Floats, sigma: Floats) -> Floats:
        """Log density of sorted components ``(N, K, 3)`` and sigma ``(N,)``."""
        frequency = components[..., 2]
        mean, root, energy = self._conditional(np.clip(frequency, *self.band))
        amplitudes = self.owner.statistics.linear_amplitudes(components)
        miss = amplitudes.reshape(len(sigma), -1) - mean
        z = np.einsum("nji,nj->ni", root, miss) / sigma[:, None]
        value = -0.5 * np.square(z).sum(-1)
        value -= 2 * self.num * (np.log(sigma) + 0.5 * math.log(2 * math.pi))
        value += np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        value += self._log_prob_sigma(sigma, energy)
        value += self.frequencies.log_prob(frequency)
        amplitude, phase = components[..., 0], components[..., 1]
        low, high = self.owner.prior.component_marginals[1].bounds
        inside = ((amplitude > 0) & (phase >= low) & (phase <= high)).all(-1)
        # (a, b) to (A, phi)
        value += np.log(np.where(amplitude > 0, amplitude, 1.0)).sum(-1)
        return np.where(inside, value, -np.inf)

    def _conditional(self, frequency: Floats) -> tuple[Floats, Floats, Floats]:
        """Best amplitudes, root of the Gram matrix and residual energy."""
        statistics = self.owner.statistics
        gram = statistics.gram(frequency, frequency)
        size = gram.shape[-1]
        ridge = 1e-9 * statistics.num_data * np.eye(size)
        root = torch.linalg.cholesky(torch.from_numpy(gram + ridge))
        right = statistics.projections(frequency).reshape(len(frequency), size, 1)
        half = torch.linalg.solve_triangular(root, torch.from_numpy(right), upper=False)
        mean = torch.linalg.solve_triangular(root.mT, half, upper=True).squeeze(-1)
        energy = statistics.energy - half.square().sum((-2, -1)).numpy()
        return mean.numpy(), root.numpy(), np.maximum(energy, self._least_energy)

    def _precision(self, energy: Floats) -> tuple[Any, Floats, Floats]:
        """1 / sigma^2 given f, a gamma variable, and its range in probability."""
        shape = 0.5 * (self.owner.statistics.num_data - 2 * self.num - 1)
        variable = gamma(shape, scale=2 / energy)
        low, high = self.owner.sigma_bounds
        least = variable.cdf(1 / high**2)
        most = variable.cdf(1 / low**2) if low > 0 else np.ones_like(energy)
        return variable, least, most

    def _draw_sigma(self, energy: Floats, rng: np.random.Generator) -> Floats:
        variable, least, most = self._precision(energy)
        low, high = self.owner.sigma_bounds
        uniform = rng.random(len(energy))
        precision = variable.ppf(least + uniform * (most - least))
        sigma = 1 / np.sqrt(np.maximum(precision, 1 / high**2))
        beyond = most - least < 1e-9
        sigma = np.where(beyond, low + uniform * (high - low), sigma)
        return np.clip(sigma, max(low, _LEAST * high), high)

    def _log_prob_sigma(self, sigma: Floats, energy: Floats) -> Floats:
        variable, least, most = self._precision(energy)
        low, high = self.owner.sigma_bounds
        log_p = variable.logpdf(1 / sigma**2) + math.log(2) - 3 * np.log(sigma)
        mass = most - least
        log_p = np.where(
            mass < 1e-9,
            -math.log(high - low),
            log_p - np.log(np.maximum(mass, 1e-300)),
        )
        return np.where((sigma >= low) & (sigma <= high), log_p, -np.inf)
