r"""The location axis, its cells, and where an ordered component may lie.

A location t with prior distribution function F has the position :math:`y = L F(t)` on
an axis of length L, which is divided into L cells. Cell i lies about
:math:`i + \tfrac12`, but its edges :math:`b_i, b_{i+1}` belong to the observation: an
encoder sets them where it sees no component, so that no component lies on an edge.

Given the cells :math:`a_1 \le \ldots \le a_K` of K components in ascending order, a
least separation d and the position before, component k lies in

.. math::
    \max(b_{a_k},\; y_{k-1} + d) \le y_k \le U_k, \qquad
    U_K = b_{a_K + 1}, \quad U_k = \min(b_{a_k + 1},\; U_{k+1} - d)

which is empty for no component as long as the cells are feasible.

Example:
    >>> axis = CellAxis(parameter=0, num_cells=4)
    >>> edges = torch.arange(5.0).expand(1, -1)
    >>> axis.cells(torch.tensor([[0.2, 3.5]]), edges).tolist()
    [[0, 3]]

See Also:
    :mod:`.cell_chain`, which says how probable each cell is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CellAxis", "OccupiedCells", "unique_rows"]

# Slack in comparisons of positions, in cells.
_TOLERANCE = 1e-6
_LARGEST_CODE = 2**62


class OccupiedCells(NamedTuple):
    """S sets of cells, one cell for each component."""

    owner: Tensor  # Observation of each set, (S,)
    cells: Tensor  # Cells in ascending order, zero where inactive, (S, Kmax)
    starts: Tensor  # Where they start, same shape
    ends: Tensor  # Where they end, same shape
    mask: Tensor  # Active components, same shape

    @classmethod
    def among(
        cls, edges: Tensor, owner: Tensor, cells: Tensor, mask: Tensor
    ) -> "OccupiedCells":
        """Look up where cells start and end among edges ``(B, L + 1)``."""
        starts, ends = (edges[owner.unsqueeze(-1), cells + i] for i in (0, 1))
        return cls(owner, cells, starts, ends, mask)

    def part(self, rows: Tensor | slice, size: int | None = None) -> "OccupiedCells":
        """Some of the sets, and of their first components."""
        columns = (part[rows, :size] for part in self[1:])
        return OccupiedCells(self.owner[rows], *columns)


@dataclass(frozen=True)
class CellAxis:
    """The location axis.

    Attributes:
        parameter: Index of the location among a component's parameters.
        num_cells: Number L of cells.
        separation: Least distance d of two components, in cells.
    """

    parameter: int
    num_cells: int
    separation: float = 0.0

    def cells(self, position: Tensor, edges: Tensor) -> Tensor:
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
        """Tell which cells ``(N, L)`` among edges ``(N, L + 1)`` a component may take.

        The one before is at ``earliest`` ``(N,)`` or later, -inf for none, and ``left``
        ``(N,)`` are still to come after this one.
        """
        least = self.lower(edges[:, :-1], earliest.unsqueeze(-1))
        room = least + self.separation * left.unsqueeze(-1) < self.num_cells
        return (least < edges[:, 1:] - _TOLERANCE) & room

    def _shift(self, like: Tensor) -> Tensor:
        return self.separation * torch.arange(like.shape[-1]).to(like)


def unique_rows(*columns: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Find the distinct rows of some columns, in ascending order.

    Each row becomes one integer, which is faster than ``torch.unique(dim=0)``.
    """
    which, size = torch.zeros_like(columns[0], dtype=torch.int64), 1
    if not len(which):
        return columns, which
    for column in columns:
        low, high = (end.item() for end in column.aminmax())
        if low == high:
            continue
        if column.is_floating_point():
            values, column = torch.unique(column, return_inverse=True)
            low, high = 0, len(values) - 1
        span = int(high - low) + 1
        if size * span > _LARGEST_CODE:
            values, which = torch.unique(which, return_inverse=True)
            size = len(values)
        which, size = which * span + (column - low), size * span
    values, which = torch.unique(which, return_inverse=True)
    # Any row of each kind stands for it.
    rows = torch.arange(len(which), device=which.device)
    sample = torch.zeros_like(values).scatter(0, which, rows)
    return tuple(column[sample] for column in columns), which
