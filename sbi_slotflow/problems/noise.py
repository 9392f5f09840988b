r"""Noise as it is: errors of samples, covariances, spectra, counts.

.. math::
    \epsilon \sim N(0, s^2 C) \qquad \text{or} \qquad
    x_t \sim \mathrm{Poisson}(\mu_t)

C is given by an error for each sample, a covariance or a power spectrum; the level s
may be a shared parameter, and errors or spectrum a function of others: the slope of a
spectrum, a jitter beside known errors. :meth:`GaussianNoise.whiten` maps a residual to
independent normal variables, which is what least squares, the evidence of cells, the
collapsed sampler and the checks of residuals ask for.

Example:
    >>> errors = torch.tensor([0.1, 0.1, 0.3, 0.2])
    >>> noise = GaussianNoise(errors=errors, level=0)  # in units that are inferred
    >>> white = noise.whiten(2 * errors, torch.tensor([2.0]))
    >>> white.round(decimals=5).tolist()
    [1.0, 1.0, 1.0, 1.0]

    Noise whose spectrum falls with a slope that is the second shared parameter:

    >>> frequency = torch.fft.rfftfreq(4).clamp(min=0.25)
    >>> red = GaussianNoise(
    ...     spectrum=lambda shared: frequency ** -shared[..., 1:2],
    ...     level=0, depends_on=1)
    >>> red.whiten(torch.ones(4), torch.tensor([1.0, 2.0])).tolist()
    [0.25, 0.25, 0.25, 0.25]

See Also:
    :class:`~sbi_slotflow.WhiteNoise`, one deviation for all samples;
    :mod:`.noise_shape`, how an unknown shape is estimated.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sets.checks import as_count, as_floats

__all__ = ["GaussianNoise", "PoissonNoise"]

Values = Tensor | NDArray[np.floating[Any]] | Sequence[float]
# Of shared parameters (..., S): an array (..., n).
Shape = Callable[[Tensor], Tensor]


class GaussianNoise:
    r"""Gaussian noise of a known shape, whose level may be unknown.

    .. math::
        \log p(r | s) = -T \log s - \tfrac12 \log\det C - \tfrac{T}{2} \log 2\pi
            - \tfrac{1}{2 s^2}\, r^\top C^{-1} r

    Give exactly one of the first three arguments. Errors and a spectrum may be
    functions of shared parameters ``(..., S)``, whose values have that array last,
    ``(..., T)`` for errors; ``depends_on`` says which parameters they read.

    Args:
        errors: Standard deviation of each sample, shape ``(T,)``, in units of the data
            (times s).
        covariance: C, shape ``(T, T)``, symmetric and positive definite.
        spectrum: Variance at each frequency of ``torch.fft.rfftfreq(T)``, shape
            ``(T // 2 + 1,)``: noise that is periodic in the record, with C circulant. A
            spectrum of :math:`\sigma^2` everywhere is white noise of deviation sigma.
        level: Index of the shared parameter that is s; None for s = 1.
        depends_on: Indices of the shared parameters that a function reads, or the only
            one.

    Raises:
        TypeError: If not exactly one shape is given, or a function without
            ``depends_on``.
        ValueError: If it is no shape of a noise.
    """

    def __init__(
        self,
        *,
        errors: Values | Shape | None = None,
        covariance: Values | None = None,
        spectrum: Values | Shape | None = None,
        level: int | None = None,
        depends_on: int | Sequence[int] = (),
    ) -> None:
        given = {"errors": errors, "covariance": covariance, "spectrum": spectrum}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise TypeError(
                f"give exactly one of errors, covariance and spectrum, got {names}."
            )
        (self.kind,) = names
        self.level = None if level is None else as_count(level, "level", 0)
        every = np.atleast_1d(np.asarray(depends_on)).tolist()
        self.depends_on = tuple(sorted(as_count(i, "depends_on", 0) for i in every))
        self.function = self._function(given[self.kind])
        if self.function is not None:
            return
        shape = torch.as_tensor(given[self.kind], dtype=torch.float64).detach().cpu()
        if shape.ndim != (2 if self.kind == "covariance" else 1) or not shape.numel():
            raise ValueError(
                f"{self.kind} must have shape {'(T, T)' if shape.ndim == 2 else '(n,)'}"
                f", got {tuple(shape.shape)}."
            )
        if not torch.isfinite(shape).all():
            raise ValueError(f"{self.kind} must be finite, got NaN or Inf.")
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

    def _function(self, given: Any) -> Shape | None:
        """The shape as a function of shared parameters, if it is one."""
        if not callable(given):
            if self.depends_on:
                raise TypeError(
                    "depends_on is for errors or a spectrum that is a function of "
                    f"shared parameters, got {self.kind} {type(given).__name__}."
                )
            return None
        if self.kind == "covariance":
            raise TypeError(
                "covariance must be an array; of unknown shape, give errors or a "
                "spectrum as a function of shared parameters."
            )
        if not self.depends_on:
            raise TypeError(
                f"depends_on must say which shared parameters {self.kind} reads, got "
                "none."
            )
        if self.level in self.depends_on or len(set(self.depends_on)) < len(
            self.depends_on
        ):
            raise ValueError(
                "depends_on must name each parameter once, and not the level, got "
                f"{self.depends_on} beside level={self.level}."
            )
        return cast(Shape, given)

    def __repr__(self) -> str:
        level = "" if self.level is None else f", level={self.level}"
        if self.function is not None:
            level = f" of {self.depends_on}{level}"
        else:
            level = f" {tuple(self.shape.shape)}{level}"
        return f"GaussianNoise({self.kind}{level})"

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
        root = self.root(shared.double(), signal.shape[-1])
        white = torch.empty_like(signal, dtype=torch.float64)
        white = white.normal_(generator=generator)
        noise = self.coloured_given(white, root) * self.scale(
            shared
        ).double().unsqueeze(-1)
        return noise.to(signal)

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals, -inf where level or shape is not positive."""
        level, num = self.scale(shared).double(), residual.shape[-1]
        positive, root = level > 0, self.root(shared.double(), num)
        if self.function is not None:
            positive = positive & (root > 0).all(-1)
            root = torch.where(positive.unsqueeze(-1), root, 1.0)
        safe = torch.where(positive, level, 1.0)
        white = self.white_given(residual.double(), root) / safe.unsqueeze(-1)
        value = -0.5 * white.square().sum(-1) - num * safe.log()
        value = value - 0.5 * num * math.log(2 * math.pi) - self.log_det(root, num)
        return torch.where(positive, value, -math.inf).to(residual)

    def whiten(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Independent standard normal variables of noise ``(..., T)``."""
        level = self.scale(shared).to(residual)
        root = self.root(shared.double(), residual.shape[-1])
        return self.white_given(residual, root) / level.unsqueeze(-1)

    def unit_white(self, signal: Tensor) -> Tensor:
        """Map signals ``(..., T)`` to where noise is white, of level s.

        Raises:
            TypeError: If the shape depends on shared parameters.
        """
        if self.function is not None:
            raise TypeError(
                f"{self.kind} depends on shared parameters {self.depends_on}: there is "
                "no one space where noise is white; use whiten(residual, shared)."
            )
        root = self.root(signal.new_empty(0), signal.shape[-1])
        return self.white_given(signal, root)

    def root(self, shared: Tensor, num_data: int) -> Tensor:
        """A root of C: errors, a Cholesky factor or an amplitude spectrum.

        Of a shape that is a function, one for each row of ``shared`` ``(..., S)``.

        Raises:
            ValueError: If it does not fit signals of ``num_data`` samples, or a
                function returns something that is no shape of a noise.
        """
        num = num_data // 2 + 1 if self.kind == "spectrum" else num_data
        if self.function is None:
            shape = self._root
            found = self.shape
        else:
            found = as_floats(self.function(shared), self.kind).to(shared)
            # Where a deviation is zero the density is: no draw of a prior has to raise.
            if not (found >= 0).all() or found.isinf().any():
                raise ValueError(
                    f"{self.kind} must be positive and finite, got values from "
                    f"{float(found.min()):g} to {float(found.max()):g}."
                )
            shape = found
            if found.ndim != shared.ndim or found.shape[:-1] != shared.shape[:-1]:
                raise ValueError(
                    f"{self.kind} must map shared parameters {tuple(shared.shape)} to "
                    f"{(*shared.shape[:-1], 'n')}, got {tuple(found.shape)}: "
                    "shared[..., i : i + 1] keeps the last axis."
                )
        if found.shape[-1] != num:
            raise ValueError(
                f"{self.kind} must have {num} entries for signals of {num_data} "
                f"samples, got {found.shape[-1]}."
            )
        return shape.sqrt() if self.kind == "spectrum" else shape

    def power(self, signal: Tensor) -> Tensor:
        """Mean squares ``(..., n)`` of signals ``(..., T)`` where C is diagonal.

        Those of noise are those of :meth:`root` times s^2, in the mean.
        """
        if self.kind == "spectrum":
            num = signal.shape[-1]
            if not signal.numel():
                return signal.new_zeros(*signal.shape[:-1], num // 2 + 1)
            return torch.fft.rfft(signal).abs().square() / num
        return signal.square()

    def multiplicity(self, num_data: int) -> Tensor:
        """How many of the data each of :meth:`power` stands for, ``(n,)``."""
        if self.kind != "spectrum":
            return torch.ones(num_data, dtype=torch.float64)
        twice = torch.full((num_data // 2 + 1,), 2.0, dtype=torch.float64)
        # All frequencies count twice, but for the first and, of an even number of
        # samples, the last.
        twice[0] = 1.0
        if num_data % 2 == 0:
            twice[-1] = 1.0
        return twice

    def log_det(self, root: Tensor, num_data: int) -> Tensor:
        """Log determinant of a :meth:`root`, half of C's."""
        if self.kind == "covariance":
            return root.diagonal().log().sum()
        return (self.multiplicity(num_data).to(root) * root.log()).sum(-1)

    def white_given(self, signal: Tensor, root: Tensor) -> Tensor:
        """Map signals ``(..., T)`` to where noise of a :meth:`root` is white."""
        root = root.to(signal)
        if self.kind == "errors":
            return signal / root
        if self.kind == "covariance":
            solved = torch.linalg.solve_triangular(
                root,
                signal.flatten(0, -2).mT if signal.ndim > 1 else signal[:, None],
                upper=False,
            )
            return solved.mT.reshape(signal.shape)
        if not signal.numel():  # of which there is no transform
            return signal
        return torch.fft.irfft(torch.fft.rfft(signal) / root, n=signal.shape[-1])

    def coloured_given(self, white: Tensor, root: Tensor) -> Tensor:
        """The inverse of :meth:`white_given`."""
        if self.kind == "errors":
            return white * root.to(white)
        if self.kind == "covariance":
            return white @ root.mT.to(white)
        return torch.fft.irfft(torch.fft.rfft(white) * root, n=white.shape[-1])


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
