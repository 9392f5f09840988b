"""Checks of what the figures are given, and thinning of draws."""

import math

import numpy as np
from torch import Tensor

from ..sets.layout import ThetaLayout


def checked_samples(
    samples: Tensor, layout: ThetaLayout, name: str = "samples"
) -> Tensor:
    """Theta rows, shape ``(S, E)``, on the CPU."""
    layout.validate(samples, name)
    if samples.ndim != 2 or not len(samples):
        raise ValueError(
            f"{name} must have shape (S, {layout.size}) with S >= 1, got "
            f"{tuple(samples.shape)}."
        )
    return samples.detach().cpu()


def checked_row(theta: Tensor, layout: ThetaLayout) -> Tensor:
    """One theta row, shape ``(E,)``."""
    layout.validate(theta, "true_theta")
    if theta.numel() != layout.size:
        raise ValueError(f"true_theta must be one row, got {tuple(theta.shape)}.")
    return theta.detach().cpu().reshape(-1)


def checked_data(x: Tensor) -> np.ndarray:
    """One observation, shape ``(T,)``."""
    if x.ndim not in (1, 2) or x.numel() != x.shape[-1]:
        raise ValueError(
            f"x must be one observation, (T,) or (1, T), got {tuple(x.shape)}."
        )
    return x.detach().cpu().reshape(-1).numpy()


def thinned(samples: Tensor, most: int) -> Tensor:
    """At most that many rows, evenly spaced."""
    return samples[:: math.ceil(len(samples) / most)]
