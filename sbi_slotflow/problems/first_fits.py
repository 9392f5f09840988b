"""Fits of 0 to Kmax components to one observation, where collapsed chains begin.

See Also:
    :mod:`sbi_slotflow.problems.collapsed`, the chains.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .marginal_likelihood import State, Target, orthogonal

__all__ = ["Fit", "pursuit"]

_POLISH = 8


class Fit(NamedTuple):
    """A state of one chain, and its Bayesian information criterion."""

    state: State
    criterion: float


def pursuit(target: Target) -> list[Fit]:
    """Fit 0 to Kmax components, one after the other.

    Each is put where it explains most of the residual, then all take Gauss-Newton
    steps with the amplitudes eliminated (variable projection).
    """
    state = target.empty(1, _shared(target, target.x.unsqueeze(0)))
    residual, fits = target.solve(state).residual, []
    state = state._replace(shared=_shared(target, residual))
    most, num = target.layout.max_cardinality, len(target.x)
    least = 1e-24 * target.x.square().sum()
    for k in range(most + 1):
        if k > 0:
            sigma = target.noise.scale(state.shared)
            weights = target.grid.log_weights(residual, sigma, target.room(state))
            cell = target.grid.centre(weights.argmax(-1))
            mask, u = state.mask.clone(), state.u.clone()
            mask[:, k - 1], u[:, k - 1] = True, cell
            moved = torch.tensor([[k - 1]])
            state = target.updated(state, mask, u, state.shared, moved)
            state, residual = _polished(target, state)
        size = k * target.layout.num_component_params
        energy = residual.square().sum().clamp(min=least)
        criterion = num * energy.log() + size * math.log(num)
        fits.append(Fit(state, float(criterion)))
    return fits


def _polished(target: Target, state: State) -> tuple[State, Tensor]:
    """Take Gauss-Newton steps of all components of one chain."""
    slots = state.mask.nonzero()[:, 1]
    residual, damping = target.solve(state).residual, 1e-3
    for _ in range(_POLISH):
        state = state._replace(shared=_shared(target, residual))
        solution = target.solve(state)
        residual = solution.residual
        slopes = target.derivatives(state.u[0, slots], solution.mean[0, slots])
        slopes = orthogonal(
            slopes.flatten(0, 1)[None], state.basis[0, slots].flatten(0, 1)[None]
        )[0]
        curvature = slopes @ slopes.mT
        diagonal = torch.diagonal(curvature)
        diagonal = diagonal + 1e-12 * diagonal.max()
        root = torch.linalg.cholesky_ex(curvature + torch.diag(damping * diagonal))[0]
        gradient = (slopes @ residual[0]).unsqueeze(-1)
        step = torch.cholesky_solve(gradient, root)
        u = state.u.clone()
        moved = (u[0, slots] + step.reshape(len(slots), -1)).clamp(1e-6, 1 - 1e-6)
        u[0, slots] = torch.where(torch.isfinite(moved), moved, u[0, slots])
        new = target.updated(state, state.mask, u, state.shared, slots.unsqueeze(0))
        after = target.solve(new).residual
        if after.square().sum() < residual.square().sum():
            state, residual, damping = new, after, 0.1 * damping
        else:
            damping = 10 * damping
    return state._replace(shared=_shared(target, residual)), residual


def _shared(target: Target, residual: Tensor) -> Tensor:
    """Shared parameters with the level of a residual ``(1, T)``, inside the prior."""
    noise, marginals = target.noise, target.prior.shared_marginals
    shared = target.whitening.usual.clone()
    middle = torch.tensor(0.5, dtype=torch.float64)
    for i in target.background.indices:
        shared[:, i] = marginals[i].quantile(middle)
    if noise.sigma is None:
        ends = torch.tensor([1e-3, 1 - 1e-3], dtype=torch.float64)
        low, high = marginals[noise.shared_index].quantile(ends).tolist()
        level = residual.square().mean(-1).sqrt().clamp(low, high)
        shared[:, noise.shared_index] = level
    return shared
