r"""Matching pursuit of sinusoids, many observations at once.

The next component starts at the highest peak of the residual's spectrum; then all
components take Gauss-Newton steps together. What it earns, in nats, is

.. math::
    g_k = \tfrac{T}{2} \log \frac{\Vert r_{k-1} \Vert^2}{\Vert r_k \Vert^2}

An observation is done when the next component would earn little. For a network to
read: a fit this greedy errs where components blend.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .fit import SineFit, SineLeastSquares

__all__ = ["Pursued", "SinePursuit"]

_TWO_PI = 2 * math.pi
# Nats below which a component is not kept: noise alone earns about as much.
_LEAST_GAIN = 5.0
_NUM_STEPS = 2
# Resolution elements that a frequency may move in a step.
_FARTHEST = 0.5
# Points of the search grid for each resolution element.
_OVERSAMPLING = 2


class Pursued(NamedTuple):
    """Components that were found, in the order of their finding.

    Attributes:
        found: Which of the P were found, shape ``(B, P)``.
        phasor: Complex amplitudes at the reference time, shape ``(B, P)``.
        frequency: Frequencies, shape ``(B, P)``.
        gain: What each earned in nats, that of the first one not kept included, zero
            beyond; shape ``(B, P)``.
        residual: What is left of the data, shape ``(B, T)``.
    """

    found: Tensor
    phasor: Tensor
    frequency: Tensor
    gain: Tensor
    residual: Tensor


class SinePursuit:
    """Finds up to P sinusoids in a band.

    Args:
        fit: Their least squares.
        band: Lowest and highest frequency; a circle, if the data are complex and it is
            all of their spectrum.
        most: Largest number P of components.
        least_gain: Nats below which a component is not kept.
        num_steps: Gauss-Newton steps after each new component.
    """

    def __init__(
        self,
        fit: SineFit,
        band: tuple[float, float],
        most: int,
        least_gain: float = _LEAST_GAIN,
        num_steps: int = _NUM_STEPS,
    ) -> None:
        self.fit, self.band, self.most = fit, band, most
        self.least_gain, self.num_steps = least_gain, num_steps
        self.signal = fit.signal
        first = fit.grids[0]
        self.width = 1 / first.duration
        self._circular = fit.analytic and math.isclose(band[1] - band[0], first.rate)
        num = math.ceil((band[1] - band[0]) / self.width * _OVERSAMPLING)
        self.grid = torch.linspace(*band, num + 1, dtype=torch.float64)
        turns = (first.times - fit.reference_time).unsqueeze(-1) * self.grid
        wave = torch.polar(torch.full_like(turns, 2 / len(turns)), -_TWO_PI * turns)
        matrix = torch.cat([wave.real, wave.imag], -1)
        if fit.analytic:
            matrix = 0.5 * torch.cat([matrix, torch.cat([-wave.imag, wave.real], -1)])
        self._matrix = matrix.float()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Pursued:
        """Find components in observations ``(B, T)``."""
        batch, num_data = x.shape
        data = x.double()
        phasor = torch.zeros(batch, self.most, dtype=torch.complex128, device=x.device)
        frequency = torch.full_like(phasor.real, 0.5 * sum(self.band))
        found, gain = torch.zeros_like(frequency, dtype=torch.bool), phasor.real.clone()
        residual = x.clone()
        energy = data.square().sum(-1).clamp(min=1e-30)
        left = torch.arange(batch, device=x.device)
        for p in range(self.most):
            if not len(left):
                break
            peak, place = self._peak(residual[left])
            old = phasor[left, :p], frequency[left, :p]
            new = [
                torch.cat([a, b], -1) for a, b in zip(old, (peak, place), strict=True)
            ]
            noise = energy[left] / num_data
            given = self.fit.given(data[left])
            for _ in range(self.num_steps):
                new = self._step(given, *new, noise)
            rest = x[left] - self._total(*new).to(x)
            smaller = rest.double().square().sum(-1).clamp(min=1e-30)
            earned = 0.5 * num_data * (energy[left] / smaller).log()
            gain[left, p] = earned.clamp(min=0.0)
            kept = earned > self.least_gain
            left = left[kept]
            phasor[left, : p + 1], frequency[left, : p + 1] = (n[kept] for n in new)
            found[left, p] = True
            residual[left], energy[left] = rest[kept], smaller[kept]
        return Pursued(found, phasor, frequency, gain, residual)

    def _peak(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Phasors and frequencies ``(n, 1)`` of the spectra's highest points."""
        matrix = self._matrix.to(residual)
        seen = residual[:, : len(matrix)] @ matrix
        real, imag = seen.double().chunk(2, -1)
        best = (real.square() + imag.square()).argmax(-1, keepdim=True)
        phasor = torch.complex(real.gather(-1, best), imag.gather(-1, best))
        return phasor, self.grid.to(residual.device)[best]

    def _step(
        self, given: SineLeastSquares, phasor: Tensor, frequency: Tensor, noise: Tensor
    ) -> list[Tensor]:
        """Solve for amplitudes and a change of frequencies, linearised."""
        one = torch.ones_like(phasor)
        alpha = torch.stack([one, 1j * one, 0 * one], -1)
        beta = torch.stack([0 * one, 0 * one, _TWO_PI * 1j * phasor], -1)
        owner = torch.arange(len(phasor), device=phasor.device)
        gram = self.fit.gram(frequency, alpha, beta)
        inner = given.inner(owner, frequency, alpha, beta).flatten(-2)
        # Amplitudes about one and steps of part of an element, before the data.
        spread = torch.tensor([1.0, 1.0, _FARTHEST * self.width]).to(frequency)
        penalty = (noise.unsqueeze(-1) / spread.square()).repeat(1, phasor.shape[-1])
        solved = torch.linalg.solve(gram + torch.diag_embed(penalty), inner)
        real, imag, change = solved.unflatten(-1, (-1, 3)).unbind(-1)
        most = _FARTHEST * self.width
        moved = frequency + change.clamp(-most, most)
        low, high = self.band
        moved = low + (moved - low) % (high - low) if self._circular else moved
        return [torch.complex(real, imag), moved.clamp(low, high)]

    def _total(self, phasor: Tensor, frequency: Tensor) -> Tensor:
        phase = phasor.angle() - _TWO_PI * self.fit.reference_time * frequency
        components = torch.stack([phasor.abs(), phase, frequency], -1)
        return self.signal.total(
            components, torch.ones_like(frequency, dtype=torch.bool)
        )
