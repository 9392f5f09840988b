r"""Sums of sinusoids on regular time grids, fast and accurate.

A sample at time :math:`t = (i M + j)\,\Delta` splits into a coarse and a fine step, and

.. math::
    A \cos(\omega t + \phi) = \mathrm{Re}\, \left[ A e^{i(\omega i M \Delta + \phi)}
        \cdot e^{i \omega j \Delta} \right]

turns the T samples of K sinusoids into a product of an (T/M, 2K) and a (2K, M) matrix:
about :math:`2\sqrt{T}` sines a component instead of T. Angles are reduced to one turn
in float64 before the sine is taken, so the error stays near float32 rounding however
long the record is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "SineSignal"]


@dataclass(frozen=True)
class Grid:
    """A regular time grid that starts at 0 and leaves out its end.

    Attributes:
        duration: Length of the record in seconds.
        rate: Samples per second.

    Raises:
        ValueError: If either is not positive and finite, or there is no sample.
    """

    duration: float
    rate: float

    def __post_init__(self) -> None:
        for name in ("duration", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {getattr(self, name)}."
                )
        if not self.num_samples:
            raise ValueError(f"duration times rate must be at least 1, got {self}.")

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return round(self.duration * self.rate)

    @property
    def times(self) -> Tensor:
        """Sample times in seconds, float64, shape ``(num_samples,)``."""
        return torch.arange(self.num_samples, dtype=torch.float64) / self.rate

    @property
    def middle(self) -> float:
        """Middle of the first and the last sample time in seconds."""
        return 0.5 * (self.num_samples - 1) / self.rate


@dataclass(frozen=True)
class SineSignal:
    """Signals A cos(2 pi f t + phi) of components (A, phi, f) on several grids.

    The grids' samples are concatenated in order.

    Attributes:
        grids: Time grids.
        analytic: Whether signals are A exp i(2 pi f t + phi); each grid then gives its
            real parts, then its imaginary ones.
    """

    grids: tuple[Grid, ...]
    analytic: bool = False

    @property
    def num_samples(self) -> int:
        """Length T of a signal, the grids' samples together."""
        num = sum(grid.num_samples for grid in self.grids)
        return 2 * num if self.analytic else num

    def __call__(self, components: Tensor) -> Tensor:
        """Evaluate each component on its own.

        Args:
            components: (A, phi, f), shape ``(..., 3)``.

        Returns:
            Signals of shape ``(..., T)``.
        """
        flat = components.reshape(-1, 1, 3)
        mask = torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
        total = self.total(flat, mask)
        return total.reshape(*components.shape[:-1], self.num_samples)

    def total(self, components: Tensor, mask: Tensor) -> Tensor:
        """Add up the active components of each row.

        Args:
            components: (A, phi, f), shape ``(B, Kmax, 3)``.
            mask: Active components, shape ``(B, Kmax)``.

        Returns:
            Signals of shape ``(B, T)`` in the dtype of ``components``.
        """
        amplitude, phase, frequency = components.unbind(-1)
        amplitude = torch.where(mask, amplitude, amplitude.new_zeros(()))
        turns = phase.double() / (2 * math.pi)
        parts = [turns, turns - 0.25] if self.analytic else [turns]
        streams = [
            _on_grid(grid, amplitude, part, frequency.double())
            for grid in self.grids
            for part in parts
        ]
        return torch.cat(streams, dim=-1)


def _on_grid(grid: Grid, amplitude: Tensor, turns: Tensor, frequency: Tensor) -> Tensor:
    num = grid.num_samples
    fine = near_square_root(num)
    coarse = -(-num // fine)
    step = (frequency / grid.rate).unsqueeze(-1)  # turns a sample, (B, K, 1)
    i = torch.arange(coarse, device=step.device, dtype=step.dtype) * fine
    j = torch.arange(fine, device=step.device, dtype=step.dtype)
    cos_i, sin_i = _unit_circle(step * i + turns.unsqueeze(-1), amplitude.dtype)
    cos_j, sin_j = _unit_circle(step * j, amplitude.dtype)
    amplitude = amplitude.unsqueeze(-1)
    left = torch.cat([amplitude * cos_i, -amplitude * sin_i], dim=1)  # (B, 2K, I)
    right = torch.cat([cos_j, sin_j], dim=1)  # (B, 2K, J)
    return torch.bmm(left.mT, right).flatten(1)[:, :num]


def near_square_root(num: int) -> int:
    """The largest divisor not above the root if it is near it, else the root."""
    root = max(1, math.isqrt(num))
    return next((d for d in range(root, root // 2, -1) if num % d == 0), root)


def _unit_circle(turns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = ((turns - turns.round()) * (2 * math.pi)).to(dtype)
    return angle.cos(), angle.sin()
