r"""Simulators whose signal is the sum of the components' signals and a background.

.. math::
    x = b(s_1 \ldots s_S) + \sum_{k=1}^{K} s(\theta_k) + \epsilon, \qquad
    \epsilon \sim p(\epsilon | s_1 \ldots s_S)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..sets.checks import Numbers, as_count, as_floats
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout, ThetaParts

__all__ = [
    "AdditiveSimulator",
    "ClassSignal",
    "NoiseAboutSignal",
    "NoiseModel",
    "SummedSignal",
    "WhiteNoise",
    "white_log_prob",
]


class NoiseModel(Protocol):
    """What a simulator needs of its noise; both may depend on shared parameters."""

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal`` (B, T) given ``shared`` (B, S)."""
        ...

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density (...) of residuals (..., T) given ``shared`` (..., S)."""
        ...


@runtime_checkable
class NoiseAboutSignal(Protocol):
    """Noise whose law depends on the signal, counts for one."""

    def log_prob_about(
        self, residual: Tensor, signal: Tensor, shared: Tensor
    ) -> Tensor:
        """Log density (...) of residuals (..., T) about signals (..., T)."""
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

    def whiten(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Independent standard normal variables of noise ``(..., T)``."""
        return residual / self.scale(shared).to(residual).unsqueeze(-1)

    def unit_white(self, signal: Tensor) -> Tensor:
        """Signals ``(..., T)`` as they are: noise is white, of level sigma."""
        return signal

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
    """Log density of residuals ``(..., T)``, -inf where sigma is not positive."""
    sigma = sigma.to(residual)
    norm = residual.shape[-1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    value = -norm - 0.5 * residual.square().sum(-1) / sigma.square()
    return torch.where(sigma > 0, value, value.new_full((), -math.inf))


@runtime_checkable
class SummedSignal(Protocol):
    """A component signal that also knows a fast way to add many up."""

    def __call__(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``."""
        ...

    def total(self, components: Tensor, mask: Tensor) -> Tensor:
        """Sum ``(B, T)`` of the active components ``(B, Kmax, D)``."""
        ...


class ClassSignal:
    """The signals of components whose first entry is their class.

    Args:
        layout: The layout of all classes.
        signals: The signal of each class by its name, which maps the class's own
            parameters ``(..., D_c)`` to ``(..., *event)``.

    Raises:
        TypeError: If it is no mapping of functions.
        ValueError: If its names are not those of the classes.
    """

    def __init__(self, layout: ClassLayout, signals: Any) -> None:
        if not isinstance(signals, Mapping):
            raise TypeError(
                "component_signal must map each class of the layout, "
                f"{layout.class_names}, to its signal, got {type(signals).__name__}."
            )
        if set(signals) != set(layout.class_names):
            raise ValueError(
                "component_signal must have one signal for each class, "
                f"{layout.class_names}, got {tuple(signals)}."
            )
        for name, signal in signals.items():
            if not callable(signal):
                raise TypeError(
                    f"component_signal of {name!r} must be a function of components, "
                    f"got {type(signal).__name__}."
                )
        self.layout = layout
        self.signals = [signals[name] for name in layout.class_names]

    def __call__(self, components: Tensor) -> Tensor:
        """Signals ``(..., *event)`` of components ``(..., D)``."""
        flat = components.reshape(-1, components.shape[-1])
        found, places = [], []
        for c, signal in enumerate(self.signals):
            rows = (flat[:, 0] == c).nonzero().squeeze(-1)
            if len(rows):
                own = self.layout.to_class(flat[rows], c)
                found.append(as_floats(signal(own), "component_signal").to(flat))
                places.append(rows)
        if not found:
            own = self.layout.to_class(flat, 0)
            return as_floats(self.signals[0](own), "component_signal").to(flat)
        if len({value.shape[1:] for value in found}) > 1:
            raise ValueError(
                "component_signal must have one event shape for all classes, got "
                f"{[tuple(value.shape[1:]) for value in found]}."
            )
        order = torch.cat(places).argsort()
        return torch.cat(found)[order].unflatten(0, components.shape[:-1])


class AdditiveSimulator:
    r"""Simulator x(theta) for signals that add up.

    Args:
        component_signal: Maps components ``(..., D)`` to signals ``(..., T)``, or of
            another event shape, images ``(..., H, W)`` for one: torch tensors or NumPy
            arrays of any real dtype. If it has a method ``total(components, mask)``,
            that is used for sums of signals ``(..., T)``. Noise sees the T numbers of
            an event side by side. Where components have classes, a mapping of one
            such function for each.
        noise: A noise model, for example :class:`~sbi_slotflow.WhiteNoise`.
        layout: Layout of theta, ``prior.layout``.
        chunk_size: Most rows handled at once; bounds the memory.
        background: Maps shared parameters ``(..., S)`` to what they add to the signal,
            ``(..., T)``: an offset, a trend, a continuum, a known source. Parameters in
            which it is linear are integrated out where components are fitted.

    Calling the simulator returns data of shape ``(..., T)`` for theta ``(..., E)``.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If ``chunk_size`` is less than one.
    """

    def __init__(
        self,
        component_signal: Callable[[Tensor], Tensor]
        | Mapping[str, Callable[[Tensor], Tensor]],
        noise: NoiseModel,
        layout: ThetaLayout,
        chunk_size: int = 128,
        *,
        background: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if isinstance(layout, ClassLayout):
            component_signal = ClassSignal(layout, component_signal)
        if not callable(component_signal):
            raise TypeError(
                "component_signal must be a function of components, got "
                f"{type(component_signal).__name__}."
            )
        if not isinstance(layout, ThetaLayout):
            raise TypeError(
                f"layout must be a prior's layout, got {type(layout).__name__}."
            )
        if background is not None and not callable(background):
            raise TypeError(
                "background must be a function of shared parameters, got "
                f"{type(background).__name__}."
            )
        read = [*getattr(noise, "depends_on", ()), getattr(noise, "level", None)]
        read = [index for index in read if isinstance(index, int)]
        if read and max(read) >= layout.num_shared:
            raise ValueError(
                f"noise reads shared parameter {max(read)} of the layout, which has "
                f"{layout.num_shared}: give the prior all that level and depends_on "
                "name."
            )
        self.component_signal, self.noise, self.layout = component_signal, noise, layout
        self.background = background
        self.chunk_size = as_count(chunk_size, "chunk_size")
        self._event: torch.Size | None = None

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
        """Return the noise-free signals ``(..., T)`` of theta ``(..., E)``.

        The background is part of them.
        """
        return self._in_chunks(self._signal, theta)

    def component_signals(self, theta: Tensor) -> Tensor:
        """Each component's signal ``(..., Kmax, *event)``, zero where there is none."""
        self.layout.validate(theta)
        parts = self.layout.unpack(theta)
        signals = self.flat_signal(parts.components)
        signals = torch.where(parts.mask.unsqueeze(-1), signals, 0.0)
        return signals.unflatten(-1, self.event_shape)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        if self._event is None:
            width = self.layout.num_component_params
            self.flat_signal(torch.zeros(1, width))
        assert self._event is not None
        return self._event

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
        if len(self.event_shape) > 1:
            x = self._flat_data(x)
        batch = np.broadcast_shapes(theta.shape[:-1], x.shape[:-1])
        rows = theta.double().expand(*batch, -1).reshape(-1, self.layout.size)
        data = x.double().expand(*batch, -1)
        data = data.reshape(-1, data.shape[-1]) if x.ndim > 1 else data
        values = []
        for start in range(0, len(rows), self.chunk_size):
            part = rows[start : start + self.chunk_size]
            signal = self._signal(part)
            here = data[start : start + len(part)] if x.ndim > 1 else x.double()
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

    def _flat_data(self, x: Tensor) -> Tensor:
        """Data ``(..., *event)`` with the numbers of an event side by side."""
        event = self.event_shape
        if x.shape[-len(event) :] != event:
            raise ValueError(
                f"x must have the event shape {tuple(event)} last, got "
                f"{tuple(x.shape)}."
            )
        return x.flatten(-len(event))

    def checked_data(self, x: Numbers) -> Tensor:
        """Return data as a floating-point tensor with an axis, free of NaN and Inf."""
        x = as_floats(x, "x")
        if x.ndim < 1:
            raise ValueError("x must have at least one axis, got a scalar.")
        if not torch.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or Inf.")
        return x

    def noise_log_prob(
        self, residual: Tensor, signal: Tensor, shared: Tensor
    ) -> Tensor:
        """Log density of residuals; override it for noise that follows the signal."""
        if isinstance(self.noise, NoiseAboutSignal):
            return self.noise.log_prob_about(residual, signal, shared)
        return self.noise.log_prob(residual, shared)

    def background_signal(self, shared: Tensor) -> Tensor:
        """What shared parameters ``(..., S)`` add, ``(..., T)``, events side by side.

        Raises:
            TypeError: If the simulator has no background.
            ValueError: If ``background`` returns another shape.
        """
        if self.background is None:
            raise TypeError("this simulator has no background.")
        found = as_floats(self.background(shared), "background")
        lead = shared.ndim - 1
        if found.shape[:lead] != shared.shape[:-1] or found.ndim == lead:
            raise ValueError(
                f"background must map shared parameters {tuple(shared.shape)} to "
                f"signals {(*shared.shape[:-1], 'T')}, got {tuple(found.shape)}."
            )
        return found.to(shared).flatten(lead)

    def _signal(self, rows: Tensor) -> Tensor:
        parts = self.layout.unpack(rows)
        total = self._total(parts)
        if self.background is None:
            return total
        added = self.background_signal(parts.shared)
        if added.shape != total.shape:
            raise ValueError(
                f"background must have the {total.shape[-1]} samples of the component "
                f"signals, got {added.shape[-1]}."
            )
        return total + added

    def _total(self, parts: ThetaParts) -> Tensor:
        """Sum of the components' signals, ``(B, T)``."""
        if isinstance(self.component_signal, SummedSignal):
            return self.component_signal.total(parts.components, parts.mask)
        active = parts.components[parts.mask]
        # Of no components the length of a signal is all that is asked.
        some = active if len(active) else parts.components.new_zeros(1, active.shape[1])
        signals = self.flat_signal(some)[: len(active)]
        owner = parts.mask.nonzero()[:, 0]
        total = signals.new_zeros(len(parts.mask), signals.shape[-1])
        return total.index_add(0, owner, signals)

    def flat_signal(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``, events side by side."""
        signals = as_floats(self.component_signal(components), "component_signal")
        lead = components.ndim - 1
        if signals.shape[:lead] != components.shape[:-1] or signals.ndim == lead:
            raise ValueError(
                "component_signal must map components of shape "
                f"{tuple(components.shape)} to signals of shape "
                f"{(*components.shape[:-1], 'T')}, got {tuple(signals.shape)}."
            )
        self._event = signals.shape[lead:]
        return signals.to(components).flatten(lead)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        self.layout.validate(theta)
        rows = theta.reshape(-1, self.layout.size)
        out = theta.new_empty(0)
        for start in range(0, max(1, len(rows)), self.chunk_size):
            part = function(rows[start : start + self.chunk_size])
            if start == 0:
                out = part.new_empty(len(rows), part.shape[-1])
            out[start : start + len(part)] = part
        event = out.shape[-1:]
        if not isinstance(self.component_signal, SummedSignal):
            event = self.event_shape
        return out.reshape(*theta.shape[:-1], *event)
