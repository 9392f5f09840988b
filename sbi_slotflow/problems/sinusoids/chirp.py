r"""Fourier amplitudes on an even grid of frequencies, however fine, in a narrow band.

.. math::
    X_j = \frac{2}{\sum_n w_n} \sum_n w_n x_n\,
        e^{-2\pi i (f_0 + j \Delta)\, \tau_n / r}, \qquad
    \tau_n = n - \tfrac{N - 1}{2}, \quad j = 0 \ldots P - 1

is, with :math:`j\tau = \tfrac12 [j^2 + \tau^2 - (j - \tau)^2]`, a convolution with a
chirp between two multiplications (Bluestein 1970; Rabiner, Schafer and Rader 1969).
Three short FFTs' worth of work stand in for a matrix of N P numbers, which would not
stay in a processor's cache.
"""

import math

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

__all__ = ["ChirpTransform"]


class ChirpTransform(nn.Module):
    """Amplitudes of a record under several tapers, phases referred to its middle.

    Args:
        tapers: Tapers w, shape ``(W, N)``, float64.
        rate: Samples r per second.
        start: First frequency f_0 of the grid.
        step: Its step.
        num: Number P of frequencies.
    """

    def __init__(
        self, tapers: Tensor, rate: float, start: float, step: float, num: int
    ) -> None:
        super().__init__()
        length = tapers.shape[-1]
        self.num, self._size = num, int(next_fast_len(length + num - 1) or 0)
        middle = 0.5 * (length - 1)
        tau = torch.arange(length, dtype=torch.float64) - middle
        j = torch.arange(num, dtype=torch.float64)
        scale = 2 / tapers.sum(-1, keepdim=True) * tapers
        before = scale * _unit_circle(-(start + 0.5 * step * tau) * tau / rate)
        after = _unit_circle(-0.5 * step * j.square() / rate)
        # Where the circular convolution wraps, lags are negative.
        lag = torch.arange(self._size, dtype=torch.float64)
        lag = torch.where(lag < num, lag, lag - self._size) + middle
        kernel = torch.fft.fft(_unit_circle(0.5 * step * lag.square() / rate))
        for name, values in (("before", before), ("kernel", kernel), ("after", after)):
            pairs = torch.view_as_real(values).float()
            self.register_buffer(name, pairs, persistent=False)

    def forward(self, record: Tensor) -> Tensor:
        """Map a record ``(B, N)`` to amplitudes ``(B, W, P)``, complex."""
        before, kernel, after = (
            torch.view_as_complex(self.get_buffer(name))
            for name in ("before", "kernel", "after")
        )
        spectrum = torch.fft.fft(record.unsqueeze(-2) * before, n=self._size)
        return torch.fft.ifft(spectrum * kernel)[..., : self.num] * after


def _unit_circle(turns: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(turns), 2 * math.pi * (turns - turns.round()))
