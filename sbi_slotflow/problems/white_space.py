r"""Where noise is white and the background is gone.

.. math::
    y = (1 - U F U^\top)\, W (x - b_0 - N \bar\beta), \qquad W C W^\top = 1, \qquad
    W N V^{1/2} = U S R^\top, \qquad F = 1 - (1 + S^2 / s_0^2)^{-1/2}

C is the shape of the noise (:mod:`.noise`), :math:`b(s) = b_0 + N \beta` a background
that is linear in the shared parameters beta, :math:`\bar\beta` and V their prior mean
and covariance, :math:`s_0` a level that the noise seldom falls below. In y noise and
background together are white: of a background that is unknown, F = 1, nothing is left,
and least squares of components in y are those of x with beta fitted along; of one that
is well known nothing is taken but its mean. Where C depends on shared parameters, each
observation has a W of its own, by an estimate of them (:mod:`.noise_shape`). Given
components and noise level s, beta is Gaussian but for its prior:

.. math::
    P = \frac{N_w^\top N_w}{s^2}, \qquad
    P \hat\beta = \frac{N_w^\top W (x - b_0 - \sum_k s(\theta_k))}{s^2},
    \qquad N_w = W N .

Counts have no C: W divides by the root of the counts about a sample. Tokens and the
search for components see counts so, fits their likelihood (:mod:`.counts`).
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .counts import LEAST_COUNTS, CountLikelihood, smooth
from .noise import GaussianNoise, PoissonNoise
from .noise_shape import GivenResidual, NoiseShape, marks_of
from .simulator import AdditiveSimulator, WhiteNoise

__all__ = [
    "Background",
    "GivenWhite",
    "WhiteSpace",
    "Whitened",
    "known_variance",
    "linear_background",
    "white_space",
]

# Draws of the shared parameters that a background is probed with.
_PROBES, _CHUNK = 2_000, 256
# Share of the prior in which a level is lower than the one that shrinks a background.
_QUIET = 0.01
# Error above which a background is not linear, over its spread and over its size.
_TOLERANCE, _ROUNDING = 1e-6, 1e-12
# Counts about a sample, by which it is weighed where components are looked for.
_SMOOTHING = 0.25, 0.5, 0.25


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
        indices: Which shared parameters they are, P of them: those that the data know
            best compared with the prior come last.
        columns: What a unit of each adds, float64, shape ``(P, T)``.
        constant: What is there without them, shape ``(T,)``.
        mean: The parameters' prior mean, shape ``(P,)``.
        covariance: Their prior covariance, shape ``(P, P)``.
    """

    indices: tuple[int, ...]
    columns: Tensor
    constant: Tensor
    mean: Tensor
    covariance: Tensor


class WhiteSpace:
    """The map of data to where noise is white and the background is gone.

    Args:
        noise: The noise; None for white noise.
        background: The background; None for none.
        level: A low level of the noise.
        shape: What estimates the noise's shape; None where it is known.
    """

    def __init__(
        self,
        noise: "Whitened | PoissonNoise | None" = None,
        background: Background | None = None,
        level: float = 1.0,
        shape: NoiseShape | None = None,
    ) -> None:
        self.noise, self.background, self.level = noise, background, level
        self.shape = shape
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None
        own = isinstance(noise, PoissonNoise) or shape is not None
        if background and background.indices and not own:
            columns = background.columns
            white = (
                noise.unit_white(columns) if isinstance(noise, Whitened) else columns
            )
            self._fixed = white.unsqueeze(0), *self.shrunk(white.unsqueeze(0))

    @property
    def indices(self) -> tuple[int, ...]:
        """Shared parameters in which the background is linear."""
        return () if self.background is None else self.background.indices

    @cached_property
    def mark(self) -> tuple[float, ...]:
        """Numbers by which another space is told from this one."""
        if self.shape is not None:
            if self.background is None:
                return self.shape.mark
            of = torch.cat([self.background.columns, self.background.constant[None]])
            return (*self.shape.mark, *marks_of(of))
        if self._num_data is None:
            return ()
        # Waves of a few periods, in the noise's own unit.
        time = torch.arange(self._num_data).double() / self._num_data
        waves = torch.stack([(2 * math.pi * k * time + k).cos() for k in range(4)])
        size = 1.0
        if self._fixed is not None:
            size = float(self._fixed[0].abs().amax()) or 1.0
        seen = self.given(waves).data.norm(dim=-1)
        return (size, *seen.tolist())

    @property
    def _num_data(self) -> int | None:
        if self.background is not None:
            return len(self.background.constant)
        if isinstance(self.noise, GaussianNoise) and self.shape is None:
            size = len(self.noise.shape)
            return max(1, 2 * size - 2) if self.noise.kind == "spectrum" else size
        return None

    def given(self, data: Tensor) -> "GivenWhite":
        """The map for observations ``(B, T)``, whose counts may be its weights."""
        data = data.flatten(1)
        weights = None
        if isinstance(self.noise, PoissonNoise):
            near = smooth(data.double(), _SMOOTHING)
            weights = (near.clamp(min=0.0) + LEAST_COUNTS).rsqrt()
        values = None
        if self.shape is not None:
            values = self.shape.estimate(self._without_trend(data.double()))
        columns = basis = share = None
        if self._fixed is not None:
            columns, basis, share = (part.to(data.device) for part in self._fixed)
        elif self.background and self.background.indices:
            columns = self.background.columns.to(data.device)
            if weights is not None:
                columns = columns * weights.unsqueeze(1)
            else:
                assert self.shape is not None
                assert values is not None
                columns = self.shape.white(columns, values.unsqueeze(1))
            basis, share = self.shrunk(columns)
        return GivenWhite(self, data, weights, columns, basis, share, values)

    def _without_trend(self, data: Tensor) -> Tensor:
        """Data ``(B, T)`` less the background that fits best, noise being white."""
        if self.background is None:
            return data
        left = data - self.background.constant.to(data)
        columns = self.background.columns.to(data)
        if not len(columns):
            return left
        basis = torch.linalg.svd(columns, full_matrices=False)[2]
        return left - (left @ basis.mT) @ basis

    def shrunk(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """U ``(B, P, T)`` of white columns ``(B, P, T)``, and F ``(B, P)``."""
        assert self.background is not None
        root = torch.linalg.cholesky_ex(self.background.covariance)[0].to(columns)
        scaled = root.mT @ columns
        # In the noise's unit numbers may be far from one, their squares out of range.
        unit = scaled.abs().amax((-2, -1), keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        _, size, rows = torch.linalg.svd(scaled / unit, full_matrices=False)
        loud = size * unit.squeeze(-1) / self.level
        return rows, 1 - torch.hypot(torch.ones_like(loud), loud).reciprocal()


class GivenWhite:
    """The map for given observations.

    Attributes:
        data: The observations there, float64, shape ``(B, T)``.
        columns: The background's columns there, ``(B or 1, P, T)``; None without.
        values: Parameters of the noise's shape by which it is white, ``(B, P)``; None
            where the shape is known.
        likelihood: That of counts, which takes the place of squares; None of others.
    """

    def __init__(
        self,
        space: WhiteSpace,
        data: Tensor,
        weights: Tensor | None,
        columns: Tensor | None,
        basis: Tensor | None,
        share: Tensor | None,
        values: Tensor | None = None,
    ) -> None:
        self.space, self.columns, self.values = space, columns, values
        self._weights, self._basis, self._share = weights, basis, share
        data = counts = data.double()
        owner = torch.arange(len(data), device=data.device)
        usual = data
        if space.background is not None:
            data = data - space.background.constant.to(data)
            mean = space.background.mean @ space.background.columns
            usual = data - mean.to(data)
        self._raw = data
        self.likelihood = None
        if weights is not None:
            self.likelihood = _likelihood(space, counts)
        self.data = self._without_background(self.white(usual, owner), owner)
        self._right = None
        if columns is not None:
            self._right = _inner(self.white(data, owner), columns)

    def white(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` of observations ``(N,)`` where noise is white."""
        if self._weights is not None:
            weights = self._weights[owner].to(signal)
            return signal * weights.reshape(
                len(owner), *[1] * (signal.ndim - 2), signal.shape[-1]
            )
        if self.values is not None:
            assert self.space.shape is not None
            values = self.values[owner].reshape(
                len(owner), *[1] * (signal.ndim - 2), self.values.shape[-1]
            )
            return self.space.shape.white(signal, values)
        noise = self.space.noise
        return noise.unit_white(signal) if isinstance(noise, Whitened) else signal

    def noise_given(self, left: Tensor, owner: Tensor) -> GivenResidual:
        """What residuals ``(N, T)`` where noise is white say of its level and shape."""
        assert self.space.shape is not None
        assert self.values is not None
        return self.space.shape.given(left, self.values[owner])

    def __call__(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` where noise is white and the background gone."""
        return self._without_background(self.white(signal, owner), owner)

    def moments(
        self, signal: Tensor, owner: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inner products of columns with data less signals ``(N, T)``, ``(N, P)``.

        And those of the columns with each other, ``(N, P, P)``; where noise is white by
        shared parameters ``(N, S)``, if its shape depends on them.
        """
        assert self.columns is not None
        assert self._right is not None
        if self.likelihood is not None:
            return self.likelihood.moments(signal, owner)
        shape = self.space.shape
        if shape is not None:
            assert self.space.background is not None
            assert shared is not None
            values = shared[:, shape.indices]
            columns = self.space.background.columns.to(signal)
            columns = shape.white(columns, values.unsqueeze(1))
            left = shape.white(self._raw[owner] - signal, values)
            return _inner(left, columns), columns @ columns.mT
        which = owner if len(self.columns) > 1 else torch.zeros_like(owner)
        columns = self.columns[which] if len(self.columns) > 1 else self.columns
        right = self._right[owner] - _inner(self.white(signal.double(), owner), columns)
        gram = self.columns @ self.columns.mT
        return right, gram[which]

    def _without_background(self, white: Tensor, owner: Tensor) -> Tensor:
        if self._basis is None or self._share is None or not white.numel():
            return white
        basis, share = self._basis.to(white), self._share.to(white)
        if len(basis) > 1:
            basis, share = basis[owner], share[owner]
        flat = white.reshape(len(owner), -1, white.shape[-1])
        inner = (flat @ basis.mT) * share.unsqueeze(-2)
        return (flat - inner @ basis).reshape(white.shape)


def _likelihood(space: WhiteSpace, counts: Tensor) -> CountLikelihood:
    background = space.background
    if background is None:
        nothing = counts.new_zeros(0, counts.shape[-1])
        none = nothing[:, 0], counts.new_zeros(0, 0)
        return CountLikelihood(counts, nothing, torch.zeros_like(counts[0]), *none)
    return CountLikelihood(
        counts,
        background.columns,
        background.constant,
        background.mean,
        background.covariance,
    )


def white_space(
    simulator: AdditiveSimulator, prior: VariableKPrior
) -> WhiteSpace | None:
    """The space in which components of a simulator are fitted.

    None for white noise without a background, which needs none.

    Raises:
        TypeError: If the background is not linear, or has noise beside it of which it
            is not known how loud it is.
    """
    noise = simulator.noise
    background = linear_background(simulator, prior)
    level, index = 1.0, noise_index(noise)
    if index is not None and index < len(prior.shared_marginals):
        # The background is known no better than in the most quiet record.
        least = torch.tensor(_QUIET, dtype=torch.float64)
        level = float(prior.shared_marginals[index].quantile(least))
    if isinstance(noise, WhiteNoise):
        if background is None:
            return None
        if noise.sigma is None:
            return WhiteSpace(None, background, level)
        errors = torch.full_like(background.constant, noise.sigma)
        return WhiteSpace(GaussianNoise(errors=errors), background)
    if isinstance(noise, GaussianNoise | PoissonNoise):
        of = getattr(noise, "function", None) is not None
        shape = NoiseShape(cast(GaussianNoise, noise), prior) if of else None
        return WhiteSpace(noise, background, level, shape)
    if background is not None:
        raise TypeError(
            f"beside a background the noise must be WhiteNoise, GaussianNoise or "
            f"PoissonNoise, got {type(noise).__name__}."
        )
    if isinstance(noise, Whitened):
        return WhiteSpace(noise)
    warnings.warn(
        f"{type(noise).__name__} has no unit_white(): Gauss-Newton steps take it for "
        "white noise.",
        stacklevel=3,
    )
    return None


def known_variance(noise: object, space: WhiteSpace | None) -> float | None:
    """Variance of a noise where it is white; None if it is not known."""
    if isinstance(noise, WhiteNoise | GaussianNoise):
        if noise.sigma is None:
            return None
        # In a space its errors are ones.
        return noise.sigma**2 if space is None else 1.0
    return 1.0 if isinstance(noise, PoissonNoise) else None


def noise_index(noise: object) -> int | None:
    """Index of the shared parameter that scales a noise, if one does."""
    if isinstance(noise, WhiteNoise | GaussianNoise) and noise.sigma is None:
        return noise.shared_index
    return None


def linear_background(
    simulator: AdditiveSimulator, prior: VariableKPrior
) -> Background | None:
    """The background as columns, one for each shared parameter but the noise level.

    Raises:
        TypeError: If it is not linear in them together, or the noise level is one.
    """
    if simulator.background is None:
        return None
    generator = torch.Generator().manual_seed(0)
    rows = prior.sample((_PROBES,), generator).double()
    shared = prior.layout.unpack(rows).shared
    level, names = noise_index(simulator.noise), prior.layout.shared_names
    shape = getattr(simulator.noise, "depends_on", ())
    of_noise = [*([] if level is None else [level]), *shape]
    found = torch.cat(
        [simulator.background_signal(part) for part in shared.split(_CHUNK)]
    )
    base, columns = shared[0], []
    indices = [i for i in range(shared.shape[-1]) if i not in of_noise]
    for i in [*indices, *of_noise]:
        moved, far = base.clone(), (shared[:, i] - base[i]).abs().argmax()
        moved[i] = shared[far, i]
        change = simulator.background_signal(moved[None])[0] - found[0]
        gap = moved[i] - base[i]
        columns.append(change / torch.where(gap == 0, 1.0, gap))
    for i in reversed(of_noise):
        if columns.pop().abs().max() > 0:
            raise TypeError(
                f"{names[i]!r}, which the noise reads, is part of the background too: "
                "give it a parameter of its own."
            )
    matrix = torch.stack([torch.zeros_like(found[0]), *columns])[1:]
    constant = found[0] - base[indices] @ matrix
    error = (found - constant - shared[:, indices] @ matrix).abs().max()
    spread = (found - found.mean(0)).abs().max()
    if error > _TOLERANCE * spread + _ROUNDING * found.abs().max():
        raise TypeError(
            f"background must be linear in {[names[i] for i in indices]} for "
            "components to be fitted beside it, got one that is not."
        )
    # Where bounds cut a parameter off, those after it are given its value.
    deviation = shared[:, indices].std(0)
    order = (deviation * matrix.norm(dim=-1)).argsort(stable=True).tolist()
    indices, matrix = [indices[i] for i in order], matrix[order]
    beta = shared[:, indices]
    away = beta - beta.mean(0)
    covariance = away.mT @ away / (len(beta) - 1)
    return Background(tuple(indices), matrix, constant, beta.mean(0), covariance)


def _inner(signal: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``(N, P)`` of signals ``(N, T)`` and ``(N or 1, P, T)``."""
    return (columns @ signal.unsqueeze(-1)).squeeze(-1)
