r"""Exact trans-dimensional posterior of sinusoids, by collapsed reversible-jump MCMC.

Given frequencies and sigma the model is linear and Gaussian in (A cos phi, A sin phi).
So moves propose frequencies only: random walks on scales from a third of the loudest
line's Cramer-Rao bound to thrice the resolution, of one frequency or of two neighbours,
independent redraws, births, deaths, splits and merges. All amplitudes are then drawn
from their exact conditional under a working prior, and the move is accepted with the
marginal likelihood times the amplitudes' true prior over the working one. sigma has a
Gibbs step. No network and no sampling package is involved: this is what others are
judged by.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ...posterior.convergence import Convergence, convergence_of
from ...posterior.draws import ChainDraws
from ...sets.checks import as_count
from ...sets.prior import VariableKPrior
from ...sets.separation import log_separation_constant
from ..collapsed import counted
from ..simulator import WhiteNoise
from .fit import Floats, SineStatistics
from .pursuit import SinusoidFit, SpectralDensity, matching_pursuit

__all__ = ["CollapsedSampler", "collapsed"]

# Probabilities of the moves, in the kernel's order.
_MOVES: dict[str, float] = {
    "walk": 0.36,
    "pair": 0.1,
    "redraw": 0.08,
    "birth": 0.12,
    "death": 0.12,
    "split": 0.06,
    "merge": 0.06,
    "refresh": 0.1,
}
_UNIFORM_SHARE = 0.3
# Temperatures where chains do not converge without, and the ratio of two.
_LEVELS, _COOLING = 8, 0.6
# Twice the log likelihood by which a chain's start may fall short of the best fit.
_WORST_START = 60.0


def collapsed(
    prior: VariableKPrior,
    statistics: SineStatistics,
    x: Tensor,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 5_000,
    num_levels: int | None = None,
    thin: int = 20,
    burn_in: int = 40_000,
) -> ChainDraws:
    """Draw from the posterior; see :func:`sbi_slotflow.rjmcmc.collapsed`.

    Without ``start`` chains begin at pursuits of different size. Those that do not
    converge by themselves are run again beside hotter ones, whose likelihood is raised
    to a power: ``num_levels`` temperatures, 1 and then 8 if None.
    """
    as_count(1 if num_levels is None else num_levels, "num_levels")
    seed = as_count(seed, "seed", 0)
    as_count(num_chains, "num_chains")
    as_count(num_draws, "num_draws")
    as_count(thin, "thin")
    as_count(burn_in, "burn_in", 0)
    sampler = CollapsedSampler(prior, statistics, x)
    skipped = math.ceil(burn_in / thin)
    chains = range(num_chains)
    if start is None:
        # 0, -1, +1, 0, -1, ... components more than the best fit
        starts = [sampler.start(sampler.best_size + (0, -1, 1)[i % 3]) for i in chains]
    else:
        starts = [sampler.inside(start[i % len(start)]) for i in chains]

    def run(levels: int) -> tuple[Tensor, Convergence]:
        theta, acceptance = _chains(
            sampler, starts, seed, num_draws, skipped, thin, levels
        )
        rows = theta.flatten(0, 1)
        values = statistics.log_likelihood_of(rows, prior.layout, WhiteNoise())
        values = values.reshape(theta.shape[:-1])
        possible = prior.allows(theta)
        found = convergence_of(prior, theta, values, acceptance, counted=possible)
        return theta, found

    theta, found = run(num_levels or 1)
    if num_levels is None and not found.converged:
        theta, found = run(_LEVELS)
    found.warn()
    weights = counted(prior, theta)
    return ChainDraws(prior.layout, theta, x.reshape(-1), weights, diagnostics=found)


def _chains(
    sampler: "CollapsedSampler",
    starts: list[Tensor],
    seed: int,
    num_draws: int,
    skipped: int,
    thin: int,
    num_levels: int,
) -> tuple[Tensor, dict[str, float]]:
    """Rows ``(chains, draws, E)``, and the acceptance of each kind of move."""
    betas = _COOLING ** np.arange(num_levels, dtype=np.float64)
    chains, counts = [], []
    for chain, start in enumerate(starts):
        rng = np.random.default_rng([seed, chain])
        rows, tried = sampler.run(start, skipped + num_draws, thin, rng, betas)
        chains.append(rows[skipped:])
        counts.append(tried)
    tried, accepted = np.sum(counts, axis=0).T
    shares = (accepted / np.maximum(tried, 1)).tolist()
    names = _MOVES if num_levels == 1 else [*_MOVES, "exchange"]
    return torch.stack(chains), dict(zip(names, shares, strict=False))


class CollapsedSampler:
    """The sampler of one observation; :func:`collapsed` runs it.

    Attributes:
        best_size: Number of components that the Bayesian information criterion prefers.
    """

    def __init__(
        self, prior: VariableKPrior, statistics: SineStatistics, x: Tensor
    ) -> None:
        try:
            from . import collapsed_kernel as _kernel
        except ImportError as error:
            raise ImportError(
                "the collapsed sampler needs numba: pip install sbi-slotflow[rjmcmc]."
            ) from error
        self._kernel = _kernel
        self.prior, self.statistics = prior.bridged(), statistics
        _check_families(self.prior)
        band = self.prior.component_marginals[2].bounds
        self.fits = matching_pursuit(
            x.reshape(-1).double().numpy(),
            statistics,
            band,
            self.prior.max_cardinality,
            self.prior.min_separation or 0.0,
        )
        # What counts as no residual: far less than the prior's largest noise leaves.
        most = self.prior.shared_marginals[0].bounds[1]
        least = statistics.num_data * (1e-12 * most) ** 2
        self._criterion = _criterion(self.fits, statistics, least)
        self.best_size = int(self._criterion.argmin())
        self._births = _kernel.Births(
            *_birth_density(self.fits[: self.best_size + 2], statistics, band, least)
        )
        s = statistics
        sizes = s.offsets, s.lengths.astype(float), s.intervals
        self._data = _kernel.Data(
            s.energy, float(s.num_data), s.starts, s.steps, *sizes, s.values, s.slopes
        )
        low, high = band
        amplitude = self.prior.component_marginals[0]
        self._target = _kernel.Target(
            log_prior=_log_prior(self.prior, high - low),
            band=band,
            separation=max(0.0, (self.prior.min_separation or 0.0) - self.prior.slack),
            amplitude=amplitude.bounds,
            log_amplitude=amplitude.is_log_uniform,
            sigma=self.prior.shared_marginals[0].bounds,
            working_variance=0.25 * amplitude.bounds[1] ** 2,
            resolution=1 / statistics.grids[0].duration,
            least_step=self._least_step(),
            edges=np.cumsum(list(_MOVES.values())),
        )

    def _least_step(self) -> float:
        """A third of the Cramer-Rao bound of the loudest frequency, or less.

        A sinusoid's bound is sqrt(6) sigma / (pi A T sqrt(N)) or less.
        """
        fit, num = self.fits[self.best_size], self.statistics.num_data
        resolution = 1 / self.statistics.grids[0].duration
        sigma = math.sqrt(max(fit.energy, 0.0) / num)
        sigma = max(sigma, self.prior.shared_marginals[0].bounds[0])
        loudest = np.hypot(*fit.amplitudes.T).max(initial=0.0)
        bound = math.inf
        if loudest > 0:
            bound = math.sqrt(6 / num) * sigma / (math.pi * loudest) * resolution
        return min(max(bound / 3, 1e-9 * resolution), 1e-3 * resolution)

    def start(self, size: int) -> Tensor:
        """A theta row near the fit of ``size`` components, inside the prior's bounds.

        If that fit is ruled out, or the prior or the pursuit has no such size, the
        nearest size will do. Ruled out are fits with an amplitude that the prior
        excludes, and those with a criterion far worse than the best of the rest. From
        there a chain may find no way: amplitudes must lie within the prior's bounds at
        every step, whatever components too many or too few do to the others.
        """
        possible = self.prior.cardinality_probs[: len(self.fits)].nonzero().flatten()
        nearest = [int(k) for k in possible[(possible - size).abs().argsort()]]
        if not nearest:  # the pursuit has no such sets
            generator = torch.Generator().manual_seed(size)
            return self.prior.sample((), generator).double()
        allowed = [k for k in nearest if self._is_allowed(self.fits[k])]
        best = min((self._criterion[k] for k in allowed), default=math.inf)
        likely = [k for k in allowed if self._criterion[k] <= best + _WORST_START]
        fit = self.fits[(likely or nearest)[0]]
        components = self.statistics.components(fit.amplitudes, fit.frequency)
        sigma = math.sqrt(max(fit.energy, 0.0) / self.statistics.num_data)
        layout = self.prior.layout
        padded = torch.zeros(layout.max_cardinality, 3, dtype=torch.float64)
        padded[: len(components)] = torch.from_numpy(components)
        number = torch.tensor(len(components))
        return self.inside(layout.pack(number, padded, padded.new_tensor([sigma])))

    def inside(self, row: Tensor) -> Tensor:
        """A theta row with amplitudes and sigma a little inside the prior's bounds."""
        layout = self.prior.layout
        parts = layout.unpack(row.double())
        low, high = self.prior.component_marginals[0].bounds
        margin = 1e-6 * (high - low)
        components = parts.components.clone()
        components[..., 0].clamp_(low + margin, high - margin)
        components = torch.where(parts.mask.unsqueeze(-1), components, 0.0)
        low, high = self.prior.shared_marginals[0].bounds
        margin = 1e-3 * (high - low)
        shared = parts.shared.clamp(low + margin, high - margin)
        return layout.pack(parts.cardinality, components, shared)

    def _is_allowed(self, fit: SinusoidFit) -> bool:
        """Whether a fit's amplitudes lie within the prior's bounds, or nearly."""
        low, high = self.prior.component_marginals[0].bounds
        num = self.statistics.num_data
        slack = 4 * math.sqrt(2 * max(fit.energy, 0.0)) / num
        radius = np.hypot(fit.amplitudes[:, 0], fit.amplitudes[:, 1])
        return bool(((radius > low - slack) & (radius < high + slack)).all())

    def run(
        self,
        start: Tensor,
        num_draws: int,
        thin: int,
        rng: np.random.Generator,
        betas: Floats | None = None,
    ) -> tuple[Tensor, np.ndarray]:
        """Run one chain from a row of positive prior density, ``thin`` moves a draw.

        ``betas`` are powers of the likelihood, the first of them 1; only that if None.

        Returns:
            Theta rows ``(num_draws, E)``, and for each move how often it was tried and
            accepted, ``(moves, 2)``.
        """
        layout, statistics = self.prior.layout, self.statistics
        parts = layout.unpack(start.double())
        components = parts.components[parts.mask].numpy()
        k, frequency, amplitudes, sigma, counts = self._kernel.run_chain(
            rng,
            self._data,
            self._target,
            self._births,
            np.ones(1) if betas is None else betas,
            components[:, 2].copy(),
            statistics.linear_amplitudes(components).ravel(),
            float(parts.shared[0]),
            num_draws,
            thin,
        )
        amplitudes = amplitudes.reshape(*frequency.shape, 2)
        rows = layout.pack(
            torch.from_numpy(k),
            torch.from_numpy(statistics.components(amplitudes, frequency)),
            torch.from_numpy(sigma[:, None]),
        )
        return layout.canonical(rows), counts


def _check_families(prior: VariableKPrior) -> None:
    amplitude, phase, frequency = prior.component_marginals
    sigma = prior.shared_marginals[0]
    others = phase, frequency, sigma
    fits = amplitude.is_uniform or amplitude.is_log_uniform
    if not (fits and all(m.is_uniform for m in others)):
        raise ValueError(
            "the prior must have a uniform or log-uniform amplitude and a uniform "
            f"phase, frequency and sigma, got {[str(m) for m in (amplitude, *others)]}."
        )


def _log_prior(prior: VariableKPrior, width: float) -> Floats:
    """Log p(K) plus the log density of K sorted frequencies, for each K."""
    k = torch.arange(prior.max_cardinality + 1)
    values = prior.log_cardinality_probs.double() + torch.lgamma(k + 1.0).double()
    values = values - k * math.log(width)
    if prior.min_separation is not None:
        values = values - log_separation_constant(k, prior.min_separation, width)
    return values.numpy()


def _criterion(
    fits: list[SinusoidFit], statistics: SineStatistics, least: float
) -> Floats:
    """The Bayesian information criterion of each fit."""
    num = statistics.num_data
    energy = np.array([max(fit.energy, least) for fit in fits])
    size = np.arange(len(fits), dtype=np.float64)
    return np.asarray(num * np.log(energy) + 3 * size * math.log(num), dtype=np.float64)


def _birth_density(
    fits: list[SinusoidFit],
    statistics: SineStatistics,
    band: tuple[float, float],
    least: float,
) -> tuple[Floats, Floats]:
    """Where new components are tried: at peaks of the residuals of all fits."""
    variance = max(fits[-1].energy, least) / statistics.num_data
    densities = [
        SpectralDensity(fit, statistics, band, variance, 0.5, _UNIFORM_SHARE)
        for fit in fits
    ]
    cumulative = np.mean([d.cumulative for d in densities], axis=0)
    density = np.mean([np.exp(d.log_density) for d in densities], axis=0)
    return cumulative, np.log(density)
