r"""Gauss-Newton: the posterior's mode and curvature above given cells.

The minimum of

.. math::
    \tfrac{T}{2} \log \Vert x - \sum_k s(\theta(w_k)) \Vert^2
        + \tfrac12 \sum_k \Vert w_k \Vert^2

in coordinates w of about unit range, whose square stands for a prior, is found by
damped Gauss-Newton steps (Levenberg-Marquardt). The noise level from the residual turns
the curvature there into a Gaussian approximation of p(w | x), all components together.
Where the noise's variance v is known, :math:`\Vert \cdot \Vert^2 / 2 v` takes the
place of the first term.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["FittedMode", "LeastSquares", "NormalEquations", "SignalFit", "fit_mode"]

_LEAST_DAMPING, _MOST_DAMPING = 1e-4, 1e8
# Least variance of the residual, as a share of the data's and of the signal's power: it
# keeps deviations of w above 1e-6, so that curvatures can be inverted.
_LEAST_VARIANCE = 1e-12
# Nats that another step promises where a fit counts as converged, and how often those
# that have not are given as many steps again.
_CONVERGED, _MORE_ROUNDS = 0.05, 3


class NormalEquations(NamedTuple):
    """Least squares of N sets, linearised."""

    residual: Tensor  # Sum of squared residuals, (N,)
    gradient: Tensor  # Minus the gradient of half of it, (N, K D)
    curvature: Tensor  # Gauss-Newton curvature, (N, K D, K D); zero where inactive


class LeastSquares(Protocol):
    """Least squares of given observations, by signals that are sums of components.

    It may remember sums of the data; nothing else does.
    """

    @property
    def data(self) -> Tensor:
        """The observations, shape ``(B, T)``."""
        ...

    @property
    def variance(self) -> float | None:
        """Variance of the noise in them, if it is known."""
        ...

    @property
    def counts(self) -> Tensor | None:
        """How many numbers of each observation are data, ``(B,)``; None if all are."""
        ...

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        """Estimate components ``(N, K, D)``, float64, with locations in intervals.

        ``owner`` ``(N,)`` is the observation of each set, ``low`` and ``high``
        ``(N, K)`` are the ends (of two locations ``(N, K, 2)``), and ``mask``
        ``(N, K)`` tells its active components.
        """
        ...

    def normal_equations(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        """Linearise the sum of components ``(N, K, D)`` about their present values.

        See :meth:`start` for ``owner`` and ``mask``.
        """
        ...


@runtime_checkable
class SignalFit(Protocol):
    """What Gauss-Newton asks of a signal that is a sum of components."""

    def given(self, data: Tensor) -> LeastSquares:
        """The least squares of observations ``(B, T)``."""
        ...


class FittedMode(NamedTuple):
    """A Gaussian approximation of the posterior of N sets."""

    mode: Tensor  # Coordinates of the mode, (N, K, D)
    # The gradient that is left there, (N, K D): of coordinates at their bounds,
    # or of a fit that has not converged
    gradient: Tensor
    precision: Tensor  # Curvature, (N, K D, K D), positive definite
    variance: Tensor  # Mean squared residual, (N,)
    misfit: Tensor  # Minus the log likelihood, but for a constant, (N,)
    decrement: Tensor  # Nats that another step promises within the bounds, (N,)


class _State(NamedTuple):
    """Where the fits of N sets are."""

    w: Tensor
    cost: Tensor
    gradient: Tensor
    precision: Tensor
    variance: Tensor
    misfit: Tensor
    damping: Tensor

    def rows(self, index: Tensor) -> "_State":
        return _State(*(part[index] for part in self))


@torch.no_grad()
def fit_mode(
    fit: LeastSquares,
    to_components: Callable[[Tensor, Tensor], Tensor],
    owner: Tensor,
    start: Tensor,
    mask: Tensor,
    num_steps: int,
    bounds: tuple[Tensor, Tensor],
) -> FittedMode:
    """Take Gauss-Newton steps from a start.

    Sets that have not converged after ``num_steps`` get up to four times as many.
    """
    size = start.shape[-2] * start.shape[-1]
    counts = start.new_full((len(fit.data),), fit.data.shape[-1])
    if fit.counts is not None:
        counts = fit.counts.to(start)
    identity = torch.eye(size).to(start)
    low, high = (end.to(start).expand_as(start) for end in bounds)
    power = fit.data.double().square().mean(-1)
    inactive = ~mask.repeat_interleave(start.shape[-1], dim=-1)

    def linearise(
        w: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        components, jacobian = _with_jacobian(lambda w: to_components(w, index), w)
        equations = fit.normal_equations(owner[index], components, mask[index])
        blocks = torch.zeros(len(w), components[0].numel(), size).to(w)
        # One block for each component, on the diagonal.
        sizes = components.shape[-2:] + w.shape[-2:]
        diagonal = blocks.view(len(w), *sizes).diagonal(dim1=1, dim2=3)
        diagonal.copy_(jacobian.permute(0, 2, 3, 1))
        curvature = blocks.mT @ equations.curvature @ blocks
        # Where the data are zero, what a unit of w adds to the signal is the scale.
        unit = curvature.diagonal(dim1=-2, dim2=-1).amax(-1)
        least = _LEAST_VARIANCE * (power[owner[index]] + unit)
        # Nothing has a scale where no component explains data that are zero.
        least = least.clamp(min=torch.finfo(least.dtype).tiny)
        num_data = counts[owner[index]]
        variance = torch.maximum(equations.residual / num_data, least)
        if fit.variance is None:
            noise, misfit = variance, 0.5 * num_data * variance.log()
        else:
            # However little it is, curvatures can be inverted.
            noise = least.clamp(min=fit.variance)
            misfit = 0.5 * equations.residual / noise
        scaled = blocks / noise[:, None, None]
        gradient = (scaled.mT @ equations.gradient.unsqueeze(-1)).squeeze(
            -1
        ) - w.flatten(1)
        precision = curvature / noise[:, None, None] + identity
        cost = misfit + 0.5 * w.square().sum((-2, -1))
        return cost, gradient, precision, variance, misfit

    def free(state: _State, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pull and precision of what is not held at its bound."""
        w = state.w.flatten(1)
        held = (w >= high[index].flatten(1)) & (state.gradient > 0)
        held |= (w <= low[index].flatten(1)) & (state.gradient < 0)
        held |= inactive[index]
        both = held.unsqueeze(-1) | held.unsqueeze(-2)
        precision = torch.where(both, identity, state.precision)
        return torch.where(held, 0.0, state.gradient), precision

    def step(state: _State, index: Tensor) -> _State:
        gradient, precision = free(state, index)
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        damped = precision + torch.diag_embed(state.damping.unsqueeze(-1) * diagonal)
        tried = state.w + torch.linalg.solve(damped, gradient).reshape(state.w.shape)
        tried = torch.maximum(torch.minimum(tried, high[index]), low[index])
        new = _State(tried, *linearise(tried, index), 0.1 * state.damping)
        old = state._replace(damping=10 * state.damping)
        better = new.cost < state.cost
        kept = _State(
            *(
                torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)
                for a, b in zip(new, old, strict=True)
            )
        )
        return kept._replace(damping=kept.damping.clamp(_LEAST_DAMPING, _MOST_DAMPING))

    def promise(state: _State, index: Tensor) -> Tensor:
        gradient, precision = free(state, index)
        return 0.5 * (gradient * torch.linalg.solve(precision, gradient)).sum(-1)

    every = torch.arange(len(start), device=start.device)
    start = torch.maximum(torch.minimum(start, high), low)
    start = torch.where(mask.unsqueeze(-1), start, 0.0)
    damping = torch.full((len(start),), 1e-2).to(start)
    state = _State(start, *linearise(start, every), damping)
    for _ in range(num_steps):
        state = step(state, every)
    decrement = promise(state, every)
    for _ in range(_MORE_ROUNDS if num_steps else 0):
        left = (decrement > _CONVERGED).nonzero().squeeze(-1)
        if not len(left):
            break
        some = state.rows(left)
        for _ in range(num_steps):
            some = step(some, left)
        for part, moved in zip(state, some, strict=True):
            part[left] = moved
        decrement[left] = promise(some, left)
    return FittedMode(
        state.w,
        state.gradient,
        state.precision,
        state.variance,
        state.misfit,
        decrement,
    )


def _with_jacobian(
    function: Callable[[Tensor], Tensor], w: Tensor
) -> tuple[Tensor, Tensor]:
    """Components ``(N, K, D)`` and their derivatives ``(N, K, D, D)``."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        components = function(w)
        rows = [
            torch.autograd.grad(components[..., d].sum(), w, retain_graph=True)[0]
            for d in range(components.shape[-1])
        ]
    return components.detach(), torch.stack(rows, -2)
