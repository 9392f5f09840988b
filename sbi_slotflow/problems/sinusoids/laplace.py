r"""A posterior of sinusoids made by hand: pursuit, Gauss-Newton, Laplace for each K.

For each K the fits of :func:`matching_pursuit` give a density of the sorted
frequencies, a mixture over how many of the components are weak. With m weak ones, K - m
follow a Student t around the fit of K - m components, and m are drawn from the spectrum
g of that fit's residual, wherever in the band they may be:

.. math::
    q(f | K) = \sum_m \frac{\alpha_m}{a_m} \sum_{|W| = m} t_\nu(f_{\setminus W})\;
        m! \prod_{k \in W} g(f_k)

cut to the band and to separated frequencies, a_m being the share that is not cut. Then

.. math::
    q(K, f, \sigma, a, b) = q(K)\; q(f | K)\;
        p(\sigma | f)\; N(a, b | \hat a(f), \sigma^2 G(f)^{-1}),

the last two being the exact conditionals under a flat prior of the amplitudes. q(K)
follows from a pilot estimate of each K's evidence. It stands behind the interface of a
posterior, so that it can be refined, and be the classical rival of a trained one.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import gamma
from torch import Tensor
from torch.distributions import Categorical

from ...posterior.base import PosteriorOfOne
from ...posterior.refinable import Refinable
from ...seeding import draw_seed
from ...sets.checks import Numbers
from ...sets.distribution import SetDistribution
from ...sets.prior import VariableKPrior
from ..base import Problem
from ..simulator import WhiteNoise
from .fit import Floats, SineStatistics
from .pursuit import SinusoidFit, SpectralDensity, matching_pursuit

__all__ = ["LaplaceProposal", "laplace_proposal"]

_PILOT_DRAWS = 1_000
# Noise level that counts as none, relative to the prior's largest.
_LEAST = 1e-12
# Of the frequencies: degrees of freedom, most weak components, draws that estimate the
# shares a_m, least share of each m, least share of draws that must be allowed.
_DEGREES, _MOST_WEAK, _NORM_DRAWS = 8.0, 2, 10_000
_LEAST_WEIGHT, _LEAST_ACCEPTED = 0.02, 1e-3


def laplace_proposal(
    problem: Problem,
    x: Tensor,
    statistics: SineStatistics,
    cardinalities: Sequence[int] | None = None,
    seed: int = 0,
) -> "LaplaceProposal":
    """Fit one observation; see :func:`sbi_slotflow.rjmcmc.laplace_proposal`."""
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

    ``fits`` are those of 0, 1, ... components, ``cardinalities`` those to consider.
    """

    def __init__(
        self,
        problem: Problem,
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
        """Evaluate log p(x | theta) from the statistics; x is the proposal's own."""
        if x is not None:
            self.set_default_x(x)
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
        layout = self.prior.layout
        values = torch.full_like(self.prior.log_cardinality_probs.double(), -math.inf)
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
    """Distribution over sets, from densities by K and log q(K) ``(Kmax + 1,)``."""

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
                components = parts.components[chosen, :k].numpy()
                given_k = mode.log_prob(components, parts.shared[chosen, 0].numpy())
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
        sigma, gap = (
            min(max(sigma, low, _LEAST * high), high),
            owner.prior.min_separation,
        )
        self.frequencies = FrequencyProposal(
            fits, statistics, self.band, gap or 0.0, sigma, seed
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
        log_p = log_p - np.log(np.maximum(mass, 1e-300))
        log_p = np.where(mass < 1e-9, -math.log(high - low), log_p)
        return np.where((sigma >= low) & (sigma <= high), log_p, -np.inf)


class FrequencyProposal:
    """The mixture q(f | K), from fits of K, K - 1, ... components; see the module.

    How many fits there are decides how many may be weak.

    Raises:
        ValueError: If next to no draw keeps the separation within the band.
    """

    def __init__(
        self,
        fits: list[SinusoidFit],
        statistics: SineStatistics,
        band: tuple[float, float],
        separation: float,
        sigma: float,
        seed: int,
    ) -> None:
        self.num = len(fits[0].frequency)
        self.band, self.separation = band, separation
        self.layers = [
            _Layer(fit, weak, statistics, band, sigma)
            for weak, fit in enumerate(fits[: _MOST_WEAK + 1])
        ]
        rng = np.random.default_rng([seed, 2, self.num])
        draws = [layer.sample(_NORM_DRAWS, rng) for layer in self.layers]
        shares = [self._allowed(drawn).mean() for drawn in draws]
        self.log_accepted = np.log(np.maximum(shares, 0.5 / _NORM_DRAWS))
        # A layer whose draws are almost never allowed could not be drawn from.
        self._usable = np.array(shares) >= _LEAST_ACCEPTED
        if not self._usable.any():
            raise ValueError(
                f"{self.num} frequencies near the fit almost never keep the separation "
                f"{separation} within the band {band}."
            )
        self._set_shares(self._usable.astype(np.float64))

    def sample(self, size: int, rng: np.random.Generator) -> Floats:
        """Draw sorted frequencies, shape ``(size, K)``."""
        weights = np.exp(self.log_weights)
        which = rng.choice(len(self.layers), size=size, p=weights / weights.sum())
        frequency = np.empty((size, self.num))
        for i, layer in enumerate(self.layers):
            left = np.flatnonzero(which == i)
            while len(left):
                frequency[left] = layer.sample(len(left), rng)
                left = left[~self._allowed(frequency[left])]
        return frequency

    def log_prob(self, frequency: Floats) -> Floats:
        """Log density of sorted frequencies ``(N, K)``, shape ``(N,)``."""
        value = np.logaddexp.reduce(self._joint(frequency), axis=-1)
        return np.where(self._allowed(frequency), value, -np.inf)

    def adapt(self, frequency: Floats, log_weights: Floats) -> None:
        """Set the shares alpha to those that weighted draws ask for."""
        joint = self._joint(frequency)
        normal = joint - np.logaddexp.reduce(joint, axis=-1, keepdims=True)
        total = np.logaddexp.reduce(normal + log_weights[:, None], axis=0)
        shares = np.exp(total - np.logaddexp.reduce(total))
        self._set_shares(np.maximum(shares, _LEAST_WEIGHT) * self._usable)

    def _set_shares(self, shares: Floats) -> None:
        with np.errstate(divide="ignore"):
            self.log_weights = np.log(shares / shares.sum())

    def _joint(self, frequency: Floats) -> Floats:
        terms = [layer.log_prob(frequency) for layer in self.layers]
        return np.stack(terms, axis=-1) + self.log_weights - self.log_accepted

    def _allowed(self, frequency: Floats) -> NDArray[np.bool_]:
        low, high = self.band
        inside = ((frequency >= low) & (frequency <= high)).all(-1)
        gaps = np.diff(frequency, axis=-1)
        return np.asarray(inside & (gaps >= self.separation).all(-1))


class _Layer:
    """Sets of which ``weak`` components come from the residual's spectrum."""

    def __init__(
        self,
        fit: SinusoidFit,
        weak: int,
        statistics: SineStatistics,
        band: tuple[float, float],
        sigma: float,
    ) -> None:
        self.fit, self.weak = fit, weak
        num = len(fit.frequency)
        width = 1 / statistics.grids[0].duration
        # No wider than about a resolution element.
        least = np.eye(num) / (0.5 * width) ** 2
        covariance = np.linalg.inv(fit.information / sigma**2 + least)
        self.root = np.linalg.cholesky(covariance)
        self.spectrum = SpectralDensity(fit, statistics, band, sigma**2, 0.8, 0.1)

    def sample(self, size: int, rng: np.random.Generator) -> Floats:
        """Draw, sorted but for strong components that crossed (a negative gap)."""
        strong = rng.standard_normal((size, len(self.root))) @ self.root.T
        scale = np.sqrt(_DEGREES / rng.chisquare(_DEGREES, size))
        strong = self.fit.frequency + strong * scale[:, None]
        if not self.weak:
            return strong
        drawn = self.spectrum.sample((size, self.weak), rng)
        frequency = np.sort(np.concatenate([strong, drawn], axis=-1), axis=-1)
        crossed = (np.diff(strong, axis=-1) < 0).any(-1)
        frequency[crossed] = -1.0  # outside the band: not allowed
        return frequency

    def log_prob(self, frequency: Floats) -> Floats:
        if not self.weak:
            return self._log_t(frequency)
        num = frequency.shape[-1]
        log_g = self.spectrum.log_prob(frequency)
        terms = [
            self._log_t(np.delete(frequency, chosen, -1)) + log_g[:, chosen].sum(-1)
            for chosen in map(list, combinations(range(num), self.weak))
        ]
        return gammaln(self.weak + 1) + np.logaddexp.reduce(np.stack(terms), axis=0)

    def _log_t(self, frequency: Floats) -> Floats:
        dim = len(self.root)
        if not dim:
            return np.zeros(len(frequency))
        z = np.linalg.solve(self.root, (frequency - self.fit.frequency).T)
        norm = gammaln(0.5 * (_DEGREES + dim)) - gammaln(0.5 * _DEGREES)
        norm -= 0.5 * dim * math.log(_DEGREES * math.pi)
        norm -= np.log(np.diag(self.root)).sum()
        tail = 0.5 * (_DEGREES + dim)
        return norm - tail * np.log1p(np.square(z).sum(0) / _DEGREES)
