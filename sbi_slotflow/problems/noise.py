r"""Noise as it is: errors of samples, covariances, spectra, counts.

.. math::
    \epsilon \sim N(0, s^2 C) \qquad \text{or} \qquad
    x_t \sim \mathrm{Poisson}(\mu_t)

C is known: given by an error for each sample, a covariance or a power spectrum; the
level s may be a shared parameter. :meth:`GaussianNoise.whiten` maps a residual to
independent normal variables, which is what least squares, the evidence of cells, the
collapsed sampler and the checks of residuals ask for.

Example:
    >>> errors = torch.tensor([0.1, 0.1, 0.3, 0.2])
    >>> noise = GaussianNoise(errors=errors, level=0)  # in units that are inferred
    >>> white = noise.whiten(2 * errors, torch.tensor([2.0]))
    >>> white.round(decimals=5).tolist()
    [1.0, 1.0, 1.0, 1.0]

See Also:
    :class:`~sbi_slotflow.WhiteNoise`, one deviation for all samples.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sets.checks import as_count

__all__ = ["GaussianNoise", "PoissonNoise"]

Values = Tensor | NDArray[np.floating[Any]] | Sequence[float]


class GaussianNoise:
    r"""Gaussian noise of a known shape, whose level may be unknown.

    .. math::
        \log p(r | s) = -T \log s - \tfrac12 \log\det C - \tfrac{T}{2} \log 2\pi
            - \tfrac{1}{2 s^2}\, r^\top C^{-1} r

    Give exactly one of the first three arguments.

    Args:
        errors: Standard deviation of each sample, shape ``(T,)``, in units of the data
            (times s).
        covariance: C, shape ``(T, T)``, symmetric and positive definite.
        spectrum: Variance at each frequency of ``torch.fft.rfftfreq(T)``, shape
            ``(T // 2 + 1,)``: noise that is periodic in the record, with C circulant. A
            spectrum of :math:`\sigma^2` everywhere is white noise of deviation sigma.
        level: Index of the shared parameter that is s; None for s = 1.

    Raises:
        TypeError: If not exactly one shape is given.
        ValueError: If it is no shape of a noise.
    """

    def __init__(
        self,
        *,
        errors: Values | None = None,
        covariance: Values | None = None,
        spectrum: Values | None = None,
        level: int | None = None,
    ) -> None:
        given = {"errors": errors, "covariance": covariance, "spectrum": spectrum}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise TypeError(
                f"give exactly one of errors, covariance and spectrum, got {names}."
            )
        (self.kind,) = names
        shape = torch.as_tensor(given[self.kind], dtype=torch.float64).detach().cpu()
        if shape.ndim != (2 if self.kind == "covariance" else 1) or not shape.numel():
            raise ValueError(
                f"{self.kind} must have shape {'(T, T)' if shape.ndim == 2 else '(n,)'}"
                f", got {tuple(shape.shape)}."
            )
        if not torch.isfinite(shape).all():
            raise ValueError(f"{self.kind} must be finite, got NaN or Inf.")
        self.level = None if level is None else as_count(level, "level", 0)
        self.shape, self._root = shape, shape
        if self.kind == "covariance":
            if shape.shape[0] != shape.shape[1] or not torch.allclose(
                shape, shape.mT, rtol=1e-6, atol=1e-9 * float(shape.abs().max())
            ):
                raise ValueError("covariance must be square and symmetric.")
            root, failed = torch.linalg.cholesky_ex(0.5 * (shape + shape.mT))
            if failed:
                raise ValueError("covariance must be positive definite.")
            self._root = root
        elif not (shape > 0).all():
            raise ValueError(
                f"{self.kind} must be positive, got {float(shape.min()):g}."
            )

    def __repr__(self) -> str:
        level = "" if self.level is None else f", level={self.level}"
        return f"GaussianNoise({self.kind} {tuple(self.shape.shape)}{level})"

    @property
    def sigma(self) -> float | None:
        """1 if the level is known, else None, as of :class:`WhiteNoise`."""
        return 1.0 if self.level is None else None

    @property
    def shared_index(self) -> int:
        """Which shared parameter is the level."""
        return self.level or 0

    def scale(self, shared: Tensor) -> Tensor:
        """Level of each row, shape ``shared.shape[:-1]``."""
        if self.level is None:
            return shared.new_ones(shared.shape[:-1])
        return shared[..., self.level]

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal`` (B, T)."""
        self._check(signal)
        white = torch.empty_like(signal, dtype=torch.float64)
        white = white.normal_(generator=generator)
        noise = self._coloured(white) * self.scale(shared).double().unsqueeze(-1)
        return noise.to(signal)

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals, -inf where the level is not positive."""
        level, num = self.scale(shared).double(), residual.shape[-1]
        positive = level > 0
        safe = torch.where(positive, level, 1.0)
        white = self.unit_white(residual.double()) / safe.unsqueeze(-1)
        value = -0.5 * white.square().sum(-1) - num * safe.log()
        value = value - 0.5 * num * math.log(2 * math.pi) - self.log_det(num)
        return torch.where(positive, value, -math.inf).to(residual)

    def whiten(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Independent standard normal variables of noise ``(..., T)``."""
        level = self.scale(shared).to(residual)
        return self.unit_white(residual) / level.unsqueeze(-1)

    def unit_white(self, signal: Tensor) -> Tensor:
        """Map signals ``(..., T)`` to where noise is white, of level s."""
        self._check(signal)
        if self.kind == "errors":
            return signal / self._root.to(signal)
        if self.kind == "covariance":
            root = self._root.to(signal)
            solved = torch.linalg.solve_triangular(
                root,
                signal.flatten(0, -2).mT if signal.ndim > 1 else signal[:, None],
                upper=False,
            )
            return solved.mT.reshape(signal.shape)
        gain = self._root.sqrt().to(signal)
        return torch.fft.irfft(torch.fft.rfft(signal) / gain, n=signal.shape[-1])

    def log_det(self, num_data: int) -> float:
        """Half of the log determinant of C."""
        if self.kind == "errors":
            return float(self._root.log().sum())
        if self.kind == "covariance":
            return float(self._root.diagonal().log().sum())
        each = self._root.log()
        # All frequencies count twice, but for the first and, of an even number of
        # samples, the last.
        twice = 2 * each.sum() - each[0]
        return 0.5 * float(twice - each[-1] if num_data % 2 == 0 else twice)

    def _coloured(self, white: Tensor) -> Tensor:
        if self.kind == "errors":
            return white * self._root.to(white)
        if self.kind == "covariance":
            return white @ self._root.mT.to(white)
        gain = self._root.sqrt().to(white)
        return torch.fft.irfft(torch.fft.rfft(white) * gain, n=white.shape[-1])

    def _check(self, signal: Tensor) -> None:
        num = signal.shape[-1]
        expected = num // 2 + 1 if self.kind == "spectrum" else num
        if len(self.shape) != expected:
            raise ValueError(
                f"{self.kind} must have {expected} entries for signals of {num} "
                f"samples, got {len(self.shape)}."
            )


class PoissonNoise:
    r"""Counts whose expectation is the signal, background included.

    .. math::
        x_t \sim \mathrm{Poisson}(\max(\mu_t, 0)), \qquad
        \log p(x | \mu) = \sum_t x_t \log \mu_t - \mu_t - \log x_t!

    The density is that of whole numbers; a signal of zero, or one below it, explains no
    count. Gauss-Newton steps are on this density itself (:mod:`.counts`); only the
    first places of components are looked for by squares, of counts over their errors.
    How far posteriors of few counts are from Gaussian, ``refine`` says.
    """

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw counts less their expectation, of the shape of ``signal`` (B, T)."""
        rate = signal.double().clamp(min=0.0)
        return torch.poisson(rate, generator=generator).to(signal) - signal

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Raise: what is left of counts has no density of its own."""
        raise TypeError(
            "Poisson noise depends on the signal: use "
            "simulator.log_likelihood(theta, x)."
        )

    def log_prob_about(
        self, residual: Tensor, signal: Tensor, shared: Tensor
    ) -> Tensor:
        """Log probability of ``signal + residual``, shape ``(...)``."""
        rate, counts = signal.double(), (signal + residual).double().round()
        legal, rate = counts >= 0, rate.clamp(min=0.0)
        safe = torch.where(legal, counts, 0.0)
        each = torch.xlogy(safe, rate) - rate - torch.lgamma(safe + 1)
        return torch.where(legal, each, -math.inf).sum(-1).to(residual)
