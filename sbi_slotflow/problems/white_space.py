r"""Where noise is white and the background is gone.

.. math::
    y = (1 - Q Q^\top)\, W (x - b_0), \qquad W C W^\top = 1, \qquad
    Q = \mathrm{orth}(W N)

C is the shape of the noise (:mod:`.noise`), :math:`b(s) = b_0 + N \beta` a background
that is linear in the shared parameters beta. Least squares of components in y are those
of x with beta fitted along, whatever its value. Given components and noise level s,
beta is Gaussian:

.. math::
    P = \frac{N_w^\top N_w}{s^2}, \qquad
    P \hat\beta = \frac{N_w^\top W (x - b_0 - \sum_k s(\theta_k))}{s^2},
    \qquad N_w = W N .
"""

import warnings
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .noise import PoissonNoise
from .simulator import AdditiveSimulator, WhiteNoise

__all__ = [
    "Background",
    "GivenWhite",
    "WhiteSpace",
    "Whitened",
    "linear_background",
    "white_space",
]

# Draws of the shared parameters that a background is probed with.
_PROBES = 16
# Relative error above which a background is not linear, or a column adds nothing.
_TOLERANCE = 1e-6
# Counts about a sample, and how many are added: a sample of none has an error too.
_SMOOTHING, _LEAST_COUNTS = (0.25, 0.5, 0.25), 1.0


@runtime_checkable
class Whitened(Protocol):
    """Noise that can be made white."""

    def unit_white(self, signal: Tensor) -> Tensor:
        """Map signals ``(..., T)`` to where noise is white, of one level."""
        ...


@dataclass(frozen=True)
class Background:
    """A background that is linear in some shared parameters.

    Attributes:
        indices: Which shared parameters they are, P of them.
        columns: What a unit of each adds, float64, shape ``(P, T)``.
        constant: What is there without them, shape ``(T,)``.
    """

    indices: tuple[int, ...]
    columns: Tensor
    constant: Tensor


class WhiteSpace:
    """The map of data to where noise is white and the background is gone.

    Args:
        noise: The noise; None for white noise.
        background: The background; None for none.
    """

    def __init__(
        self,
        noise: "Whitened | PoissonNoise | None" = None,
        background: Background | None = None,
    ) -> None:
        self.noise, self.background = noise, background
        self._fixed: tuple[Tensor, Tensor] | None = None
        if background is not None and not isinstance(noise, PoissonNoise):
            columns = background.columns
            white = noise.unit_white(columns) if noise is not None else columns
            self._fixed = white.unsqueeze(0), _orthonormal(white.unsqueeze(0))

    @property
    def indices(self) -> tuple[int, ...]:
        """Shared parameters in which the background is linear."""
        return () if self.background is None else self.background.indices

    def given(self, data: Tensor) -> "GivenWhite":
        """The map for observations ``(B, T)``, whose counts may be its weights."""
        data = data.flatten(1)
        weights = None
        if isinstance(self.noise, PoissonNoise):
            kernel = torch.tensor(_SMOOTHING, dtype=torch.float64)[None, None]
            padded = torch.nn.functional.pad(
                data.double().unsqueeze(1), (1, 1), "replicate"
            )
            near = torch.nn.functional.conv1d(padded, kernel.to(padded)).squeeze(1)
            weights = (near.clamp(min=0.0) + _LEAST_COUNTS).rsqrt()
        columns = basis = None
        if self._fixed is not None:
            columns, basis = (part.to(data.device) for part in self._fixed)
        elif self.background is not None:
            assert weights is not None
            columns = self.background.columns.to(weights) * weights.unsqueeze(1)
            basis = _orthonormal(columns)
        return GivenWhite(self, data, weights, columns, basis)


class GivenWhite:
    """The map for given observations.

    Attributes:
        data: The observations there, float64, shape ``(B, T)``.
        columns: The background's columns there, ``(B or 1, P, T)``; None without.
    """

    def __init__(
        self,
        space: WhiteSpace,
        data: Tensor,
        weights: Tensor | None,
        columns: Tensor | None,
        basis: Tensor | None,
    ) -> None:
        self.space, self.columns = space, columns
        self._weights, self._basis = weights, basis
        data = data.double()
        if space.background is not None:
            data = data - space.background.constant.to(data)
        owner = torch.arange(len(data), device=data.device)
        white = self.white(data, owner)
        self.data = self._without_background(white, owner)
        self._right = None if columns is None else _inner(white, columns)

    def white(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` of observations ``(N,)`` where noise is white."""
        if self._weights is not None:
            weights = self._weights[owner].to(signal)
            return signal * weights.reshape(
                len(owner), *[1] * (signal.ndim - 2), signal.shape[-1]
            )
        noise = self.space.noise
        return noise.unit_white(signal) if isinstance(noise, Whitened) else signal

    def __call__(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` where noise is white and the background gone."""
        return self._without_background(self.white(signal, owner), owner)

    def moments(self, signal: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products of columns with data less signals ``(N, T)``, ``(N, P)``.

        And those of the columns with each other, ``(N, P, P)``.
        """
        assert self.columns is not None
        assert self._right is not None
        which = owner if len(self.columns) > 1 else torch.zeros_like(owner)
        columns = self.columns[which] if len(self.columns) > 1 else self.columns
        right = self._right[owner] - _inner(self.white(signal.double(), owner), columns)
        gram = self.columns @ self.columns.mT
        return right, gram[which]

    def _without_background(self, white: Tensor, owner: Tensor) -> Tensor:
        if self._basis is None:
            return white
        basis = self._basis.to(white)
        basis = basis[owner] if len(basis) > 1 else basis
        flat = white.reshape(len(owner), -1, white.shape[-1])
        return (flat - (flat @ basis.mT) @ basis).reshape(white.shape)


def white_space(
    simulator: AdditiveSimulator, prior: VariableKPrior
) -> WhiteSpace | None:
    """The space in which components of a simulator are fitted.

    None for white noise without a background, which needs none.

    Raises:
        TypeError: If the background is not linear.
    """
    noise = simulator.noise
    background = linear_background(simulator, prior)
    if isinstance(noise, WhiteNoise):
        return None if background is None else WhiteSpace(None, background)
    if isinstance(noise, Whitened | PoissonNoise):
        return WhiteSpace(noise, background)
    warnings.warn(
        f"{type(noise).__name__} has no unit_white(): Gauss-Newton steps take it for "
        "white noise.",
        stacklevel=3,
    )
    return None if background is None else WhiteSpace(None, background)


def linear_background(
    simulator: AdditiveSimulator, prior: VariableKPrior
) -> Background | None:
    """The background as columns, one for each shared parameter that it depends on.

    Raises:
        TypeError: If it is not linear in them together.
    """
    if simulator.background is None:
        return None
    generator = torch.Generator().manual_seed(0)
    rows = prior.sample((_PROBES,), generator).double()
    shared = prior.layout.unpack(rows).shared
    base, other = shared[0], shared[1]
    found = simulator.background_signal(shared)
    columns, indices = [], []
    for i in range(shared.shape[-1]):
        moved = base.clone()
        moved[i] = other[i]
        change = simulator.background_signal(moved[None])[0] - found[0]
        if change.abs().max() > 0:
            columns.append(change / (other[i] - base[i]))
            indices.append(i)
    constant = found[0]
    matrix = torch.zeros(0, found.shape[-1], dtype=torch.float64)
    if indices:
        matrix = torch.stack(columns)
        constant = constant - base[indices] @ matrix
    error = found - constant - shared[:, indices] @ matrix
    if error.abs().max() > _TOLERANCE * found.abs().max():
        names = [prior.layout.shared_names[i] for i in indices]
        raise TypeError(
            f"background must be linear in {names} for components to be fitted beside "
            "it, got one that is not."
        )
    return Background(tuple(indices), matrix, constant)


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal rows that span columns ``(B, P, T)``, zero for what adds nothing."""
    length = columns.norm(dim=-1, keepdim=True)
    unit = columns / torch.where(length > 0, length, 1.0)
    _, size, rows = torch.linalg.svd(unit, full_matrices=False)
    kept = size > _TOLERANCE * size[:, :1]
    return rows * kept.unsqueeze(-1)


def _inner(signal: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``(N, P)`` of signals ``(N, T)`` and ``(N or 1, P, T)``."""
    return (columns @ signal.unsqueeze(-1)).squeeze(-1)
