"""Observations of given sinusoids, and their evidence on a grid in the time domain.

Phases are taken in the middle of the long record, where they do not depend on the
frequency; they are uniform, so the prior is the same. sigma is summed out first: given
K the likelihood depends on everything else through the residual energy alone.
"""

import math

import numpy as np
import torch

from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.sinusoids.fit import Floats

__all__ = [
    "evidence_of_none",
    "evidence_of_one",
    "evidence_of_two",
    "observe",
    "theta_row",
]


def theta_row(
    problem: Sinusoids, components: list[list[float]], sigma: float
) -> torch.Tensor:
    """Theta of given components (A, phi, f), float64, shape ``(1, E)``."""
    layout = problem.layout
    padded = torch.zeros(1, layout.max_cardinality, 3, dtype=torch.float64)
    given = torch.tensor(components, dtype=torch.float64)
    padded[0, : len(components)] = given.reshape(-1, 3)
    level = torch.full((1, 1), sigma, dtype=torch.float64)
    return layout.pack(torch.tensor([len(components)]), padded, level)


def observe(
    problem: Sinusoids, components: list[list[float]], sigma: float, seed: int
) -> torch.Tensor:
    """An observation of given components, float64, shape ``(T,)``."""
    theta = theta_row(problem, components, sigma)
    return problem.simulator(theta, torch.Generator().manual_seed(seed))[0]


class _SummedOverSigma:
    """log p(x | residual energy), the noise level summed out on a fine grid."""

    def __init__(self, problem: Sinusoids, energies: tuple[float, float]) -> None:
        low, high = problem.prior.shared_marginals[0].bounds
        edges = np.linspace(low, high, 2001)
        sigma = 0.5 * (edges[1:] + edges[:-1])
        self.log_energy = np.linspace(
            math.log(energies[0]), math.log(energies[1]), 1500
        )
        exponent = -0.5 * np.exp(self.log_energy)[:, None] / sigma**2
        exponent -= problem.num_data * np.log(sigma * math.sqrt(2 * math.pi))
        self.value = np.logaddexp.reduce(exponent, axis=-1) - math.log(len(sigma))

    def __call__(self, energy: Floats) -> Floats:
        return np.interp(np.log(energy), self.log_energy, self.value)


def evidence_of_none(problem: Sinusoids, x: Floats) -> float:
    energy = float(x @ x)
    return float(
        _SummedOverSigma(problem, (0.9 * energy, 1.1 * energy))(np.array(energy))
    )


def evidence_of_one(problem: Sinusoids, x: Floats, num: int = 900) -> float:
    """Log p(x | K = 1), summed over the whole band, all phases and amplitudes."""
    times = _times(problem)
    low, high = problem.prior.component_marginals[2].bounds
    frequency = low + (np.arange(num) + 0.5) * (high - low) / num
    low, high = problem.prior.component_marginals[0].bounds
    amplitude, weights = _gauss(low, high, 32)
    phase = 2 * math.pi * np.arange(96) / 96
    a = amplitude[:, None] * np.cos(phase)
    b = -amplitude[:, None] * np.sin(phase)
    energy = np.empty((num, *a.shape))
    for i, f in enumerate(frequency):
        cos, sin = np.cos(2 * math.pi * f * times), np.sin(2 * math.pi * f * times)
        energy[i] = x @ x - 2 * a * (x @ cos) - 2 * b * (x @ sin)
        energy[i] += a * a * (cos @ cos) + b * b * (sin @ sin) + 2 * a * b * (cos @ sin)
    log_p = _SummedOverSigma(problem, (energy.min(), energy.max()))(energy)
    share = weights[:, None] / (high - low) / (num * len(phase))
    return _log_sum(log_p, np.log(share))


def evidence_of_two(
    problem: Sinusoids, x: Floats, truth: Floats, sigma: float
) -> float:
    """Log p(x | K = 2), summed over 6 standard deviations about the truth.

    Args:
        problem: A problem with a uniform amplitude.
        x: The observation.
        truth: Its components, shape ``(2, 3)``; they must be clear and far apart.
        sigma: Its noise level.
    """
    times, duration = _times(problem), problem.grids[0].duration
    # Those of a long record alone, which are too wide.
    num = problem.grids[0].num_samples
    sd = sigma * math.sqrt(2 / num)
    low, high = problem.prior.component_marginals[0].bounds
    signals, log_weights = [], []
    for size, phi, f in truth:
        amplitude, amplitude_weight = _gauss(
            max(low, size - 6 * sd), min(high, size + 6 * sd), 14
        )
        frequency_sd = sd / size * math.sqrt(3) / (math.pi * duration)
        frequency, frequency_weight = _gauss(
            f - 6 * frequency_sd, f + 6 * frequency_sd, 16
        )
        centre = phi + math.pi * duration * f
        phase, phase_weight = _gauss(centre - 6 * sd / size, centre + 6 * sd / size, 16)
        mesh = np.meshgrid(amplitude, phase, frequency, indexing="ij")
        each = [part.reshape(-1, 1) for part in mesh]
        signals.append(each[0] * np.cos(2 * math.pi * each[2] * times + each[1]))
        weight = np.einsum(
            "i,j,k->ijk", amplitude_weight, phase_weight, frequency_weight
        )
        log_weights.append(np.log(weight.ravel() / (2 * math.pi * (high - low))))
    low, high = problem.prior.component_marginals[2].bounds
    separation = problem.prior.min_separation or 0.0
    # K! / W^K / Z_K with Z_2 = (1 - d / W)^2
    log_prior = math.log(2) - 2 * math.log(high - low - separation)
    own = [np.square(s).sum(-1) - 2 * s @ x for s in signals]
    energy = own[0][:, None] + own[1] + 2 * signals[0] @ signals[1].T + x @ x
    log_p = _SummedOverSigma(problem, (energy.min(), energy.max()))(energy)
    return log_prior + _log_sum(log_p, log_weights[0][:, None] + log_weights[1])


def _times(problem: Sinusoids) -> Floats:
    times = torch.cat([grid.times for grid in problem.grids]).numpy()
    return times - 0.5 * problem.grids[0].duration


def _gauss(low: float, high: float, num: int) -> tuple[Floats, Floats]:
    """Nodes and weights of Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    half = 0.5 * (high - low)
    return low + half * (nodes + 1), half * weights


def _log_sum(log_p: Floats, log_weight: Floats) -> float:
    total = log_p + log_weight
    largest = total.max()
    return float(largest + np.log(np.exp(total - largest).sum()))
