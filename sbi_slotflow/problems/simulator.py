r"""Simulators whose signal is the sum of the components' signals.

.. math::
    x = \sum_{k=1}^{K} s(\theta_k) + \epsilon, \qquad
    \epsilon \sim p(\epsilon | s_1 \ldots s_S)
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..sets.checks import Numbers, as_floats
from ..sets.layout import ThetaLayout
from .noise import NoiseModel

__all__ = ["AdditiveSimulator", "SummedSignal"]


@runtime_checkable
class SummedSignal(Protocol):
    """A component signal that also knows a fast way to add many up."""

    def __call__(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``."""
        ...

    def total(self, components: Tensor, mask: Tensor) -> Tensor:
        """Sum ``(B, T)`` of the active components ``(B, Kmax, D)``."""
        ...


class AdditiveSimulator:
    r"""Simulator x(theta) for signals that add up.

    Args:
        component_signal: Maps components ``(..., D)`` to signals ``(..., T)``, torch
            tensors or NumPy arrays of any real dtype. If it has a method
            ``total(components, mask)``, that is used for sums.
        noise: A noise model, for example :class:`~sbi_slotflow.WhiteNoise`.
        layout: Layout of theta, ``prior.layout``.
        chunk_size: Most rows handled at once; bounds the memory.

    Calling the simulator returns data of shape ``(..., T)`` for theta ``(..., E)``.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``chunk_size`` is less than one.
    """

    def __init__(
        self,
        component_signal: Callable[[Tensor], Tensor],
        noise: NoiseModel,
        layout: ThetaLayout,
        chunk_size: int = 128,
    ) -> None:
        if not callable(component_signal):
            raise TypeError(
                "component_signal must be a function of components, got "
                f"{type(component_signal).__name__}."
            )
        if not isinstance(layout, ThetaLayout):
            raise TypeError(
                f"layout must be a prior's layout, got {type(layout).__name__}."
            )
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.component_signal = component_signal
        self.noise = noise
        self.layout = layout
        self.chunk_size = chunk_size

    def __call__(
        self, theta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Simulate data.

        Args:
            theta: Rows of shape ``(..., E)``.
            generator: Source of the noise; torch's global generator if None (which is
                what sbi's ``simulate_for_sbi(..., seed=...)`` seeds in every worker).

        Returns:
            Data of shape ``(..., T)``, dtype and device of ``theta``.

        Raises:
            TypeError: If theta is not a floating-point tensor.
            ValueError: If theta is malformed.
        """

        def draw(rows: Tensor) -> Tensor:
            signal = self._signal(rows)
            shared = self.layout.unpack(rows).shared
            return self.noise.sample(signal, shared, generator).add_(signal)

        return self._in_chunks(draw, theta)

    def signal(self, theta: Tensor) -> Tensor:
        """Return the noise-free signals ``(..., T)`` of theta ``(..., E)``."""
        return self._in_chunks(self._signal, theta)

    def component_signals(self, theta: Tensor) -> Tensor:
        """Return each component's signal, zero where there is none.

        Args:
            theta: Rows of shape ``(..., E)``.

        Returns:
            Signals of shape ``(..., Kmax, T)``.
        """
        self.layout.validate(theta)
        parts = self.layout.unpack(theta)
        signals = self._each(parts.components)
        return torch.where(parts.mask.unsqueeze(-1), signals, signals.new_zeros(()))

    def log_likelihood(self, theta: Tensor, x: Numbers) -> Tensor:
        """Evaluate log p(x | theta) exactly.

        Args:
            theta: Rows of shape ``(..., E)``.
            x: Data ``(T,)`` or of a shape ``(..., T)`` that broadcasts with theta's
                batch shape.

        Returns:
            Float64 log-likelihoods of the broadcast batch shape. Float32 would resolve
            a long record's log-likelihood only to about 1e-3.

        Raises:
            TypeError: If theta is not a floating-point tensor or x holds no numbers.
            ValueError: If theta is malformed or x has NaN, Inf or the wrong length.
        """
        self.layout.validate(theta)
        x = self.checked_data(x)
        batch = np.broadcast_shapes(theta.shape[:-1], x.shape[:-1])
        rows = theta.double().expand(*batch, -1).reshape(-1, self.layout.size)
        data = x.double().expand(*batch, -1)
        data = data.reshape(-1, data.shape[-1]) if x.ndim > 1 else data
        values = []
        for start in range(0, len(rows), self.chunk_size):
            stop = start + self.chunk_size
            part = rows[start:stop]
            signal = self._signal(part)
            here = data[start:stop] if x.ndim > 1 else x.double()
            if here.shape[-1] != signal.shape[-1]:
                raise ValueError(
                    f"x must have {signal.shape[-1]} entries on its last axis, got "
                    f"{here.shape[-1]}."
                )
            shared = self.layout.unpack(part).shared
            values.append(self.noise_log_prob(here - signal, signal, shared))
        if not values:
            return rows.new_zeros(batch)
        return torch.cat(values).reshape(batch)

    def checked_data(self, x: Numbers) -> Tensor:
        """Return data as a floating-point tensor.

        Raises:
            TypeError: If x holds no real numbers.
            ValueError: If x has no axis, NaN or Inf.
        """
        x = as_floats(x, "x")
        if x.ndim < 1:
            raise ValueError("x must have at least one axis, got a scalar.")
        if not torch.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or Inf.")
        return x

    def noise_log_prob(
        self, residual: Tensor, signal: Tensor, shared: Tensor
    ) -> Tensor:
        """Log density of residuals; override it for noise that follows the signal.

        Args:
            residual: Data less signals, shape ``(B, T)``.
            signal: Signals, shape ``(B, T)``.
            shared: Shared parameters, shape ``(B, S)``.
        """
        return self.noise.log_prob(residual, shared)

    def _signal(self, rows: Tensor) -> Tensor:
        parts = self.layout.unpack(rows)
        if isinstance(self.component_signal, SummedSignal):
            return self.component_signal.total(parts.components, parts.mask)
        active = parts.components[parts.mask]
        # Of no components the length of a signal is all that is asked.
        some = active if len(active) else parts.components.new_zeros(1, active.shape[1])
        signals = self._each(some)[: len(active)]
        owner = parts.mask.nonzero()[:, 0]
        total = signals.new_zeros(len(rows), signals.shape[-1])
        return total.index_add(0, owner, signals)

    def _each(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``, in their dtype."""
        signals = as_floats(self.component_signal(components), "component_signal")
        if signals.shape[:-1] != components.shape[:-1] or not signals.ndim:
            raise ValueError(
                "component_signal must map components of shape "
                f"{tuple(components.shape)} to signals of shape "
                f"{(*components.shape[:-1], 'T')}, got {tuple(signals.shape)}."
            )
        return signals.to(components)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        self.layout.validate(theta)
        rows = theta.reshape(-1, self.layout.size)
        out = theta.new_empty(0)
        for start in range(0, max(1, len(rows)), self.chunk_size):
            part = function(rows[start : start + self.chunk_size])
            if start == 0:
                out = part.new_empty(len(rows), part.shape[-1])
            out[start : start + len(part)] = part
        return out.reshape(*theta.shape[:-1], out.shape[-1])
