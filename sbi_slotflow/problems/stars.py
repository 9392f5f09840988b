r"""Stars on an image with a sky.

.. math::
    x_{ij} = b + \sum_{k=1}^{K} F_k\, \Psi(j - x_k)\, \Psi(i - y_k) + \epsilon_{ij},
    \qquad \Psi(d) = \int_{d}^{d + 1} N(u; 0, s^2)\, du

with white noise of standard deviation sigma. Places are in pixels from the image's
outer edge, so that pixel 0 reaches from 0 to 1. theta is
[K, sigma, sky, (x, y, flux)_1, ..., (x, y, flux)_Kmax], ascending in x.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Distribution

from ..nn.spec import register
from ..sets.checks import as_count
from ..sets.prior import VariableKPrior
from .base import log_uniform, uniform
from .placed import Image
from .simulator import AdditiveSimulator, WhiteNoise

__all__ = ["StarSignal", "stars"]

_CELL = 4


@register("signal")
@dataclass(frozen=True)
class StarSignal:
    """Stars of components (x, y, flux): a Gaussian, integrated over pixels.

    Attributes:
        size: Pixels on each side.
        psf: Standard deviation s of a star, in pixels.
    """

    size: int
    psf: float

    kind: ClassVar[str] = "stars"

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which a file rebuilds the signal."""
        return {"kind": self.kind, "size": self.size, "psf": self.psf}

    def __call__(self, components: Tensor) -> Tensor:
        """Map components ``(..., 3)`` to images ``(..., size, size)``."""
        x, y, flux = components.unbind(-1)
        rows, columns = self._profile(y), self._profile(x)
        return flux[..., None, None] * rows.unsqueeze(-1) * columns.unsqueeze(-2)

    def _profile(self, place: Tensor) -> Tensor:
        """Shares ``(..., size)`` of a star's light in each row of pixels."""
        edges = torch.arange(self.size + 1).to(place) - place.unsqueeze(-1)
        return 0.5 * torch.erf(edges / (math.sqrt(2) * self.psf)).diff(dim=-1)


def stars(*, size: int = 32, max_cardinality: int = 6, psf: float = 1.5) -> Image:
    """Make the star problem.

    ==========  ====================  ====================
    parameter   prior                 unit
    ==========  ====================  ====================
    K           uniform, 0..Kmax
    sigma       uniform, 0.5-1.5      counts
    sky         uniform, 0-20         counts
    x, y        uniform, 0-size       pixels from the edge
    flux        log-uniform, 20-400   counts
    ==========  ====================  ====================

    With sigma = 1 and a psf of 1.5 pixels a star of flux F has the signal-to-noise
    ratio 0.19 F: 4 to 75.

    Args:
        size: Pixels on each side, a multiple of 4.
        max_cardinality: Largest cardinality Kmax, at least one.
        psf: Standard deviation of a star, in pixels.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = stars(size=16, max_cardinality=3)
        >>> theta = problem.prior.sample((5,))
        >>> problem.simulator(theta).shape
        torch.Size([5, 16, 16])
    """
    if as_count(size, "size") % _CELL:
        raise ValueError(f"size must be a multiple of {_CELL}, got {size}.")
    as_count(max_cardinality, "max_cardinality")
    if not 0 < psf < math.inf:
        raise ValueError(f"psf must be positive and finite, got {psf}.")
    side = uniform(0.0, size)
    parts: list[Distribution] = [side, side, log_uniform(20.0, 400.0)]
    shared: list[Distribution] = [uniform(0.5, 1.5), uniform(0.0, 20.0)]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0] * (max_cardinality + 1),
        shared=MultipleIndependent(shared, validate_args=False),
        order_by=0,
        component_names=("x", "y", "flux"),
        shared_names=("sigma", "sky"),
    )

    def sky(shared: Tensor) -> Tensor:
        level = shared[..., 1, None, None]
        return level.expand(*shared.shape[:-1], size, size)

    simulator = AdditiveSimulator(
        StarSignal(size, psf), WhiteNoise(), prior.layout, background=sky
    )
    return Image("stars", prior, simulator, linear=("flux",))
