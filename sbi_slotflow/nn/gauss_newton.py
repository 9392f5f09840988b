r"""Gauss-Newton: the posterior's peak and curvature near given anchors.

The minimum of

.. math::
    \tfrac{T}{2} \log \Vert x - \sum_k s(\theta(w_k)) \Vert^2
        + \tfrac12 \sum_k \Vert w_k \Vert^2

in coordinates w of about unit range, whose square stands for a prior, is found by
damped Gauss-Newton steps (Levenberg-Marquardt). The noise level from the residual turns
the curvature there into a Gaussian approximation of p(w | x), all components together.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["FittedPeak", "NormalEquations", "SignalFit", "fit_peak"]

_LEAST_DAMPING, _MOST_DAMPING = 1e-4, 1e8


class NormalEquations(NamedTuple):
    """Least squares of N sets, linearised.

    Attributes:
        residual: Sum of squared residuals, shape ``(N,)``.
        gradient: Minus the gradient of half of it, shape ``(N, K D)``.
        curvature: Its Gauss-Newton curvature, shape ``(N, K D, K D)``; zero for
            components that are not there.
    """

    residual: Tensor
    gradient: Tensor
    curvature: Tensor


@runtime_checkable
class SignalFit(Protocol):
    """What Gauss-Newton asks of a signal that is a sum of components."""

    def start(
        self, data: Tensor, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor
    ) -> Tensor:
        """Estimate components ``(N, K, D)`` with locations in intervals ``(N, K)``."""
        ...

    def normal_equations(
        self, data: Tensor, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        """Linearise about components ``(N, K, D)``."""
        ...


class FittedPeak(NamedTuple):
    """A Gaussian approximation of the posterior of N sets.

    Attributes:
        mode: Coordinates of the peak, shape ``(N, K, D)``.
        precision: Curvature, shape ``(N, K D, K D)``, positive definite.
        variance: Mean squared residual, shape ``(N,)``.
    """

    mode: Tensor
    precision: Tensor
    variance: Tensor


@torch.no_grad()
def fit_peak(
    fit: SignalFit,
    to_components: Callable[[Tensor], Tensor],
    data: Tensor,
    owner: Tensor,
    start: Tensor,
    mask: Tensor,
    num_steps: int,
    limit: Tensor,
) -> FittedPeak:
    """Take Gauss-Newton steps from a start.

    Args:
        fit: The signal.
        to_components: Maps coordinates ``(N, K, D)`` to components, one by one.
        data: Observations, shape ``(B, T)``.
        owner: Observation of each set, shape ``(N,)``.
        start: Coordinates to start from, shape ``(N, K, D)``, float64.
        mask: Active components, shape ``(N, K)``.
        num_steps: Number of steps.
        limit: Largest absolute values of the D coordinates.
    """
    num_data, size = data.shape[-1], start.shape[-2] * start.shape[-1]
    identity = torch.eye(size).to(start)
    w = start

    def linearise(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        components, jacobian = _with_jacobian(to_components, w)
        equations = fit.normal_equations(data, owner, components, mask)
        variance = equations.residual.clamp(min=1e-12) / num_data
        blocks = torch.zeros(len(w), size, size).to(w)
        # One block for each component, on the diagonal.
        diagonal = blocks.view(len(w), *2 * w.shape[-2:]).diagonal(dim1=1, dim2=3)
        diagonal.copy_(jacobian.permute(0, 2, 3, 1))
        scaled = blocks / variance[:, None, None]
        pull = (scaled.mT @ equations.gradient.unsqueeze(-1)).squeeze(-1) - w.flatten(1)
        precision = blocks.mT @ equations.curvature @ scaled + identity
        cost = 0.5 * num_data * variance.log() + 0.5 * w.square().sum((-2, -1))
        return cost, pull, precision, variance

    cost, pull, precision, variance = linearise(w)
    damping = torch.full_like(cost, 1e-2)
    for _ in range(num_steps):
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        damped = precision + torch.diag_embed(damping.unsqueeze(-1) * diagonal)
        step = torch.linalg.solve(damped, pull).reshape(w.shape)
        tried = w + step * mask.unsqueeze(-1)
        tried = torch.maximum(torch.minimum(tried, limit), -limit)
        new_cost, new_pull, new_precision, new_variance = linearise(tried)
        better = new_cost < cost
        w = torch.where(better[:, None, None], tried, w)
        cost = torch.where(better, new_cost, cost)
        pull = torch.where(better[:, None], new_pull, pull)
        precision = torch.where(better[:, None, None], new_precision, precision)
        variance = torch.where(better, new_variance, variance)
        damping = torch.where(better, 0.1 * damping, 10 * damping)
        damping = damping.clamp(_LEAST_DAMPING, _MOST_DAMPING)
    return FittedPeak(w, precision, variance)


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
