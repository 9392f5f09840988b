r"""The location axis, its cells, and where an ordered component may lie.

A location t with prior distribution function F has the position :math:`y = L F(t)` on
an axis of length L. L cells part it; the anchor a of a component is its cell. Cell i
lies about :math:`i + \tfrac12`, but its edges :math:`b_i, b_{i+1}` are the
observation's own: an encoder sets them where it sees no component, so that a component
is not torn between two cells.

Given the anchors of K components in ascending order, a least separation d and the
position before, component k lies in

.. math::
    \max(b_{a_k},\; y_{k-1} + d) \le y_k \le U_k, \qquad
    U_K = b_{a_K + 1}, \quad U_k = \min(b_{a_k + 1},\; U_{k+1} - d)

which is empty for no component as long as the anchors are feasible.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CellAxis"]

# Slack in comparisons of positions, in cells.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CellAxis:
    """The location axis.

    Attributes:
        parameter: Index of the location among a component's parameters.
        num_anchors: Number L of cells.
        separation: Least distance d of two components, in cells.
    """

    parameter: int
    num_anchors: int
    separation: float = 0.0

    def anchors(self, position: Tensor, edges: Tensor) -> Tensor:
        """Cells of positions ``(N, K)`` among edges ``(N, L + 1)``, int64."""
        inner = edges[:, 1:-1].contiguous()
        return torch.searchsorted(inner, position.contiguous(), right=True)

    def earliest(self, starts: Tensor) -> Tensor:
        """Least positions ``(N, K)`` that cells which start there allow."""
        shift = self._shift(starts)
        return (starts - shift).cummax(-1).values + shift

    def upper(self, ends: Tensor, mask: Tensor) -> Tensor:
        """Bounds U_k ``(N, K)`` of cells that end there; inactive ones mean nothing."""
        shift = self._shift(ends)
        ends = (ends - shift).masked_fill(~mask, torch.inf)
        return ends.flip(-1).cummin(-1).values.flip(-1) + shift

    def lower(self, starts: Tensor, before: Tensor) -> Tensor:
        """Lower bounds of components, given the positions before them."""
        return torch.maximum(starts, before + self.separation)

    def feasible(self, earliest: Tensor, left: Tensor, edges: Tensor) -> Tensor:
        """Tell which anchors a component may take.

        Args:
            earliest: Earliest position of the component before, -inf for none, shape
                ``(N,)``.
            left: Components still to come after this one, shape ``(N,)``.
            edges: Edges of the cells, shape ``(N, L + 1)``.

        Returns:
            Shape ``(N, L)``.
        """
        least = self.lower(edges[:, :-1], earliest.unsqueeze(-1))
        room = least + self.separation * left.unsqueeze(-1) < self.num_anchors
        return (least < edges[:, 1:] - _TOLERANCE) & room

    def _shift(self, like: Tensor) -> Tensor:
        return self.separation * torch.arange(like.shape[-1]).to(like)
