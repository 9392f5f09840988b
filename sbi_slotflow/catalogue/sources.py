r"""Sources: what the components of many draws have in common.

A draw of a posterior over sets is described by N sources and a background. Source i is
there with probability :math:`p_i` and, if so, has a component that follows Student's t
with two degrees of freedom about :math:`m_i` (on the circle, where a parameter is
circular) with scales :math:`s_i`: posteriors have tails, which a normal would make
sources of their own. The background is a Poisson process with rate :math:`\lambda`,
uniform over the box of all components. The log likelihood of a draw whose components
are assigned to sources so that source i has component :math:`j(i)` is, up to a
constant,

.. math::
    \sum_i \log\frac{p_i}{1 - p_i} + \log t_2(\theta_{j(i)}; m_i, s_i)
        - \log \lambda b(\theta_{j(i)})

with the sum over the sources that have one. Sources and assignments are improved in
turn until assignments settle (classification EM); Roodaki, Bect and Fleury (2014,
IEEE Trans. Signal Process. 62) fit such a model, with normals, by stochastic EM. It
starts from a reference: the draw of the most probable K that lies closest to the mean
of those draws in canonical order. Then, as long as the components that belong to no
source crowd anywhere, a source is put where they are densest, and all are improved
again.

Draws enter in canonical order, so that the result is blind to labels.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..sets.layout import ThetaLayout

__all__ = ["TAIL", "Sources", "best_matching"]

TAIL = 2.0
"""Degrees of freedom of a source's t."""


@dataclass(frozen=True)
class Sources:
    """Sources of one observation's posterior.

    Attributes:
        layout: Layout of theta.
        existence: Probability p that each source is there, shape ``(N,)``.
        centre: Centres m, shape ``(N, D)``.
        scale: Scales s, shape ``(N, D)``.
        log_background: Log of the background's density of components.
    """

    layout: ThetaLayout
    existence: Tensor
    centre: Tensor
    scale: Tensor
    log_background: float

    def __len__(self) -> int:
        return len(self.existence)

    def assign(self, theta: Tensor) -> Tensor:
        """Find the component of each source.

        A true row is assigned like any draw: if the posterior is right, source i gets a
        true component with the probability ``existence[i]``.

        Args:
            theta: Rows in any order, shape ``(S, E)``.

        Returns:
            Indices of components in canonical order, -1 where a source is not there,
            shape ``(S, N)``.

        Raises:
            TypeError: If theta is not a floating-point tensor.
            ValueError: If rows do not fit the layout.
        """
        self.layout.validate(theta)
        parts = self.layout.unpack(self.layout.canonical(theta.detach().cpu()))
        return self.match(parts.components.double(), parts.mask)

    def match(self, components: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`assign`, for components ``(S, Kmax, D)`` and their mask."""
        size = components.shape[-1]
        shape = (len(components), len(self), components.shape[1])
        squares = components.new_zeros(shape)
        for d, period in enumerate(self.layout.component_periods):
            gaps = components[:, None, :, d] - self.centre[:, None, d]
            if math.isfinite(period):
                gaps = gaps - period * (gaps / period).round()
            squares += (gaps / self.scale[:, None, d]).square()
        odds = self.existence.log() - (-self.existence).log1p()
        peak = odds - self.scale.log().sum(-1) - self.log_background
        peak = peak + math.lgamma(0.5 * (TAIL + size)) - math.lgamma(0.5 * TAIL)
        peak = peak - 0.5 * size * math.log(TAIL * math.pi)
        gains = peak[:, None] - 0.5 * (TAIL + size) * (squares / TAIL).log1p()
        return best_matching(gains.masked_fill(~mask[:, None, :], -math.inf))

    def subset(self, kept: Tensor) -> "Sources":
        """Return some of the sources, by index or mask."""
        return replace(
            self,
            existence=self.existence[kept],
            centre=self.centre[kept],
            scale=self.scale[kept],
        )


def best_matching(gains: Tensor) -> Tensor:
    r"""Match the components of many draws with sources.

    The matching of a draw maximises :math:`\sum_{(i, j) \in M} g_{ij}` over sets M of
    pairs in which no source and no component appears twice. Where the sources that the
    components prefer differ, they are the best matching, and nothing has to be solved:
    that is most draws.

    Args:
        gains: Gains, -inf where there is no component, shape ``(S, N, K)`` (draw,
            source, component).

    Returns:
        Component of each source, -1 for none, int64, shape ``(S, N)``.
    """
    num, num_sources = gains.shape[:2]
    owner = torch.full((num, num_sources), -1)
    if not gains.numel():
        return owner
    value, preferred = gains.max(1)
    wanted = value > 0
    votes = torch.zeros(num, num_sources, dtype=torch.int64)
    votes.scatter_add_(1, preferred, wanted.long())
    simple = (votes <= 1).all(1)
    draw, component = (wanted & simple.unsqueeze(-1)).nonzero(as_tuple=True)
    owner[draw, preferred[draw, component]] = component
    contested = (~simple).nonzero().squeeze(-1)
    positive = gains[contested].clamp(min=0.0).numpy()
    solved = np.full(positive.shape[:2], -1)
    for chosen, matrix in zip(solved, positive, strict=True):
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        chosen[rows] = np.where(matrix[rows, columns] > 0, columns, -1)
    owner[contested] = torch.from_numpy(solved)
    return owner
