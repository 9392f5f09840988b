"""Circular samples, such as phases."""

import math

import torch
from torch import Tensor


def unwrap(values: Tensor, period: float) -> Tensor:
    r"""Shift circular values by whole periods to within half a period of their mean.

    The circular mean is the angle of :math:`\sum_i e^{2\pi i v_i / P}`, taken in
    [0, P). Medians and quantiles of the shifted values are circular ones, as long as
    the values don't fill the circle.

    Args:
        values: Values of any shape.
        period: The period P.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: If the period is not positive.
    """
    if not period > 0:
        raise ValueError(f"period must be positive, got {period}.")
    angles = values.double() * (2 * math.pi / period)
    mean = torch.atan2(angles.sin().mean(), angles.cos().mean())
    mean = mean.remainder(2 * math.pi) * (period / (2 * math.pi))
    centred = (values - mean + period / 2).remainder(period) - period / 2
    return (centred + mean).to(values.dtype)
