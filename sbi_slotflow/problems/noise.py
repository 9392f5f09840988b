r"""Noise models: how a simulator turns a noise-free signal into data.

A noise model draws noise for a batch of signals and, where it can, evaluates the exact
log density of a residual. Both may depend on the shared parameters.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["NoiseModel", "WhiteNoise", "white_log_prob"]


class NoiseModel(Protocol):
    """What an :class:`~sbi_slotflow.AdditiveSimulator` needs of its noise."""

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal`` (B, T) given ``shared`` (B, S)."""
        ...

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density (...) of residuals (..., T) given ``shared`` (..., S)."""
        ...


@dataclass(frozen=True)
class WhiteNoise:
    r"""Independent Gaussian noise of one standard deviation.

    .. math::
        \log p(r) = -T \log\sigma - \tfrac{T}{2} \log 2\pi - \|r\|^2 / (2\sigma^2)

    Attributes:
        sigma: The standard deviation, or None to read it from a shared parameter.
        shared_index: Which shared parameter is the standard deviation.
    """

    sigma: float | None = None
    shared_index: int = 0

    def scale(self, shared: Tensor) -> Tensor:
        """Standard deviation of each row, shape ``shared.shape[:-1]``."""
        if self.sigma is None:
            return shared[..., self.shared_index]
        return shared.new_full(shared.shape[:-1], self.sigma)

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal``."""
        noise = torch.empty_like(signal).normal_(generator=generator)
        return noise.mul_(self.scale(shared).unsqueeze(-1))

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals, -inf where sigma is not positive."""
        return white_log_prob(residual, self.scale(shared))


def white_log_prob(residual: Tensor, sigma: Tensor) -> Tensor:
    """Log density of white noise.

    Args:
        residual: Residuals, shape ``(..., T)``.
        sigma: Standard deviations, shape ``(...)``.

    Returns:
        Shape ``(...)``, -inf where sigma is not positive.
    """
    sigma = sigma.to(residual)
    norm = residual.shape[-1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    value = -norm - 0.5 * residual.square().sum(-1) / sigma.square()
    return torch.where(sigma > 0, value, value.new_full((), -math.inf))
