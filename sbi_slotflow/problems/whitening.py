"""Signals where noise is white, of a known shape or of that of shared parameters."""

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .noise import GaussianNoise
from .noise_shape import NoiseShape
from .simulator import WhiteNoise

__all__ = ["Whitening"]


class Whitening:
    """Maps signals to where noise is white, of the level that a row says.

    Args:
        noise: The noise.
        prior: Prior of the shared parameters.
        data: Data ``(T,)``; a shape that is not known is estimated from them, for all
            that asks for none.

    Attributes:
        shape: What is unknown of the noise's shape; None if nothing is.
        usual: Shared parameters ``(1, S)`` with the shape that the data suggest.
    """

    def __init__(
        self, noise: WhiteNoise | GaussianNoise, prior: VariableKPrior, data: Tensor
    ) -> None:
        self.noise, self.shape = noise, None
        self.usual = torch.zeros(1, prior.layout.num_shared, dtype=torch.float64)
        if isinstance(noise, GaussianNoise) and noise.function is not None:
            self.shape = NoiseShape(noise, prior)
            self.usual[:] = self.shape.usual
            self.usual[:, self.shape.indices] = self.shape.estimate(data[None])

    def __call__(self, signal: Tensor, shared: Tensor | None = None) -> Tensor:
        """Map signals ``(..., T)``, with rows ``(C, S)`` ones of ``(C, ..., T)``."""
        if self.shape is None:
            return self.noise.unit_white(signal)
        return self._gaussian.white_given(signal, self._root(signal, shared))

    def as_usual(self, white: Tensor, shared: Tensor) -> Tensor:
        """Signals ``(C, T)``, white by rows ``(C, S)``, as the usual shape has them."""
        if self.shape is None:
            return white
        return self(self.coloured(white, shared))

    def coloured(self, white: Tensor, shared: Tensor) -> Tensor:
        """Signals ``(C, T)`` as they were before they were made white by rows."""
        if self.shape is None:
            return white
        return self._gaussian.coloured_given(white, self._root(white, shared))

    def log_det(self, shared: Tensor, num_data: int) -> Tensor:
        """Log determinant of the map's inverse ``(C,)``; zero of a known shape."""
        if self.shape is None:
            return torch.zeros_like(shared[:, 0]) if shared.shape[1] else shared.sum(1)
        root = self._gaussian.root(shared, num_data)
        return self._gaussian.log_det(root, num_data)

    @property
    def _gaussian(self) -> GaussianNoise:
        assert isinstance(self.noise, GaussianNoise)
        return self.noise

    def _root(self, signal: Tensor, shared: Tensor | None) -> Tensor:
        rows = self.usual if shared is None else shared
        root = self._gaussian.root(rows.double(), signal.shape[-1])
        if shared is None:
            return root[0]
        return root.reshape(len(rows), *[1] * (signal.ndim - 2), root.shape[-1])
