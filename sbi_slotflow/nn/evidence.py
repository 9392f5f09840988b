r"""Evidence of a set of cells: the likelihood's integral over its cells.

With the Laplace approximation above the cells (:mod:`.modes`), h its height,

.. math::
    \log Z = h + \tfrac12 \log\det \Sigma
        + \log \int_{\text{cells}} \mathcal{N}(w; m, \Sigma)\, dw

up to a constant of each observation and K. The last term is the Gaussian's mass inside
the cells and the prior's bounds. It is estimated by sequential importance sampling
(Genz 1992): each coordinate is drawn from its truncated Gaussian given those before,
and the masses of the truncations multiply. The points are the same for every set.

See Also:
    :mod:`.cell_sets`, which weighs sets of cells by Z.
"""

import math

import torch
from torch import Tensor

from .cells import OccupiedCells
from .local_transform import LocalTransform
from .modes import Modes

__all__ = ["log_evidence"]

# Points that the mass of a Gaussian between ends is averaged over, and their seed.
_NUM_POINTS, _SEED = 16, 0
_TINY, _ALMOST_ONE = 1e-300, 1 - 1e-16


def log_evidence(modes: Modes, sets: OccupiedCells, chart: LocalTransform) -> Tensor:
    """Evaluate log Z, shape ``(S,)``, float64.

    Args:
        modes: The modes above S sets of cells.
        sets: The sets.
        chart: Local coordinates.
    """
    mask = sets.mask
    width, size = modes.mode.shape[-1], int(mask.sum(-1).max()) if len(mask) else 0
    upper, middle = chart.axis.upper(sets.ends, mask), sets.cells + 0.5
    num = len(mask), _NUM_POINTS
    engine = torch.quasirandom.SobolEngine(
        max(1, size * width), scramble=True, seed=_SEED
    )
    levels = engine.draw(_NUM_POINTS, dtype=torch.float64).to(modes.mode)
    noise = modes.mode.new_zeros(*num, size * width)
    log_mass = modes.mode.new_zeros(num)
    before = torch.full_like(log_mass, -torch.inf)
    bottom, top = chart.ends()
    for k in range(size):
        active = mask[:, k, None]
        for d in range(width):
            j = k * width + d
            row = modes.factor[:, j]
            centre = modes.mode[:, k, d, None]
            if j:
                centre = centre + (noise[..., :j] @ row[:, :j, None]).squeeze(-1)
            low, high = (end[d].expand(num).to(noise) for end in (bottom, top))
            if not d:
                least = chart.axis.lower(sets.starts[:, k, None].expand(num), before)
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
    scales = modes.factor.diagonal(dim1=-2, dim2=-1).log().unflatten(-1, (-1, width))
    volume = torch.where(mask.unsqueeze(-1), scales, 0.0).sum((-2, -1))
    return modes.height + volume + log_mass.logsumexp(-1) - math.log(_NUM_POINTS)


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
