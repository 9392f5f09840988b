"""Evidence of a set of anchors: the likelihood's integral over its cells."""

import math

import torch
from torch import Tensor

from .local_transform import LocalTransform
from .modes import Modes

__all__ = ["log_evidence"]

# Points that the mass of a Gaussian between ends is averaged over, and their seed.
_NUM_POINTS, _SEED = 16, 0
_TINY, _ALMOST_ONE = 1e-300, 1 - 1e-16


def log_evidence(
    peaks: Modes,
    anchors: Tensor,
    starts: Tensor,
    ends: Tensor,
    mask: Tensor,
    chart: LocalTransform,
) -> Tensor:
    r"""Log of the integral of likelihood times prior over each set's cells.

    .. math::
        \log Z = h + \tfrac12 \log\det \Sigma
            + \log \int_{\text{ends}} \mathcal{N}(w; m, \Sigma)\, dw

    up to a constant for each observation and K. h is the height of the peak; the mass
    between the ends is averaged over points that are drawn from the Gaussian there,
    coordinate by coordinate.

    Args:
        peaks: The peaks of S sets.
        anchors: Anchors, shape ``(S, Kmax)``.
        starts: Where their cells start, shape ``(S, Kmax)``.
        ends: Where they end, shape ``(S, Kmax)``.
        mask: Active ones, shape ``(S, Kmax)``.
        chart: Local coordinates.

    Returns:
        Shape ``(S,)``, float64.
    """
    width, size = peaks.mode.shape[-1], int(mask.sum(-1).max()) if len(mask) else 0
    upper, middle = chart.axis.upper(ends, mask), anchors + 0.5
    num = len(mask), _NUM_POINTS
    engine = torch.quasirandom.SobolEngine(
        max(1, size * width), scramble=True, seed=_SEED
    )
    levels = engine.draw(_NUM_POINTS, dtype=torch.float64).to(peaks.mode)
    noise = peaks.mode.new_zeros(*num, size * width)
    log_mass = peaks.mode.new_zeros(num)
    before = torch.full_like(log_mass, -torch.inf)
    bottom, top = chart.ends()
    for k in range(size):
        active = mask[:, k, None]
        for d in range(width):
            j = k * width + d
            row = peaks.factor[:, j]
            centre = peaks.mode[:, k, d, None]
            if j:
                centre = centre + (noise[..., :j] @ row[:, :j, None]).squeeze(-1)
            low, high = (end[d].expand(num).to(noise) for end in (bottom, top))
            if not d:
                least = chart.axis.lower(starts[:, k, None].expand(num), before)
                low, high = (
                    end - middle[:, k, None] for end in (least, upper[:, k, None])
                )
            scale = row[:, j, None]
            z, share = _truncated(
                (low - centre) / scale, (high - centre) / scale, levels[:, j]
            )
            noise[..., j] = torch.where(active, z, 0.0)
            log_mass = log_mass + torch.where(active, share, 0.0)
            if not d:
                place = middle[:, k, None] + centre + scale * z
                before = torch.where(active, place, before)
    scales = peaks.factor.diagonal(dim1=-2, dim2=-1).log().unflatten(-1, (-1, width))
    volume = torch.where(mask.unsqueeze(-1), scales, 0.0).sum((-2, -1))
    return peaks.height + volume + log_mass.logsumexp(-1) - math.log(_NUM_POINTS)


def _truncated(low: Tensor, high: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles of a standard normal variable between ends, and their log mass."""
    # In the lower tail, where masses keep their precision.
    flip = low > 0
    below, above = torch.where(flip, -high, low), torch.where(flip, -low, high)
    first = torch.special.ndtr(below)
    mass = (torch.special.ndtr(above) - first).clamp(min=_TINY)
    z = torch.special.ndtri((first + level * mass).clamp(_TINY, _ALMOST_ONE))
    z = torch.where(flip, -z, z)
    return torch.maximum(torch.minimum(z, high), low), mass.log()
