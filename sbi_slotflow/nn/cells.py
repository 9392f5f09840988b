r"""The location axis or grid, its cells, and where an ordered component may lie.

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

Two locations span a grid of R rows and C columns (:class:`CellGrid`). Its cells are
numbered row by row, and the position of a component at column v and row u is

.. math::
    y = C \lfloor u \rfloor + v

so that cells stand along one axis of length R C again; where in its row a component
lies is one more coordinate.

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

__all__ = ["CellAxis", "CellGrid", "OccupiedCells", "unique_rows"]

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

    @property
    def parameters(self) -> tuple[int, ...]:
        """Indices of the P locations among a component's parameters."""
        return (self.parameter,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cells along each location."""
        return (self.num_cells,)

    def position(self, places: Tensor) -> Tensor:
        """Positions ``(...)`` of locations ``(..., P)`` in cells."""
        return places[..., 0]

    def middles(self, cells: Tensor) -> Tensor:
        """Locations ``(..., P)`` of the middles of cells ``(...)`` of width one."""
        return (cells + 0.5).unsqueeze(-1)

    def spans(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Ends of each location, as shares of its axis, of cells from start to end."""
        return [(starts / self.num_cells, ends / self.num_cells)]

    def steps(self, reach: int) -> list[tuple[int, int]]:
        """Rows and columns from a cell to those that a chain looks at closely."""
        return [(0, step) for step in range(reach)]

    def stepped(self, cells: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cells ``(..., S)`` that are steps ``(S, 2)`` away, and whether they exist."""
        cells = cells.unsqueeze(-1) + steps[:, 1]
        return cells.clamp(0, self.num_cells - 1), cells < self.num_cells

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

    def held(self, cells: Tensor) -> Tensor:
        """What :meth:`feasible` must know of cells ``(N, k)`` so far: here, nothing."""
        return torch.zeros_like(cells)

    def feasible(
        self,
        earliest: Tensor,
        left: Tensor,
        edges: Tensor,
        before: Tensor | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Tell which cells ``(N, L)`` among edges ``(N, L + 1)`` a component may take.

        The one before is at ``earliest`` ``(N,)`` or later, -inf for none, and ``left``
        ``(N,)`` are still to come after this one. Its cell ``before``, -1 for none,
        and the last of :meth:`held` matter where there are classes.
        """
        least = self.lower(edges[:, :-1], earliest.unsqueeze(-1))
        room = least + self.separation * left.unsqueeze(-1) < self.num_cells
        return (least < edges[:, 1:] - _TOLERANCE) & room

    def _shift(self, like: Tensor) -> Tensor:
        return self.separation * torch.arange(like.shape[-1]).to(like)


@dataclass(frozen=True)
class CellGrid(CellAxis):
    """Two locations, on a grid of cells of equal size.

    Attributes:
        parameter: Index of the location along a row.
        num_cells: Number R C of cells.
        separation: Zero: a least distance in two dimensions is none along the axis.
        across: Index of the location across the rows.
        rows: Number R of rows.
    """

    across: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        if self.num_cells % self.rows:
            raise ValueError(
                f"num_cells must be a multiple of the {self.rows} rows, got "
                f"{self.num_cells}."
            )
        if self.separation:
            raise ValueError(f"separation must be 0 on a grid, got {self.separation}.")

    @property
    def columns(self) -> int:
        """Number C of columns."""
        return self.num_cells // self.rows

    @property
    def parameters(self) -> tuple[int, ...]:
        """Indices of the locations along and across rows."""
        return self.parameter, self.across

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of columns and rows."""
        return self.columns, self.rows

    def position(self, places: Tensor) -> Tensor:
        """Positions ``(...)`` of columns and rows ``(..., 2)``; see the module."""
        column, row = places.unbind(-1)
        # The end of a row is not the start of the next.
        column = column.clamp(0.0, self.columns - _TOLERANCE)
        return self.columns * row.floor().clamp(0, self.rows - 1) + column

    def middles(self, cells: Tensor) -> Tensor:
        """Columns and rows ``(..., 2)`` of the middles of cells ``(...)``."""
        row = cells.div(self.columns, rounding_mode="floor")
        return torch.stack([cells - self.columns * row, row], -1) + 0.5

    def spans(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Ends of columns and rows; see :meth:`CellAxis.spans`."""
        row = cells.div(self.columns, rounding_mode="floor").to(starts)
        along = ((end - self.columns * row) / self.columns for end in (starts, ends))
        low, high = along
        return [(low, high), (row / self.rows, (row + 1) / self.rows)]

    def steps(self, reach: int) -> list[tuple[int, int]]:
        """Rows and columns to the cells about one that are not before it."""
        far = reach // 2
        along = [(0, column) for column in range(far)]
        near = range(1 - far, far)
        return along + [(row, column) for row in range(1, far) for column in near]

    def stepped(self, cells: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cells that are steps away, and whether they are on the grid."""
        row = cells.div(self.columns, rounding_mode="floor")
        column = (cells - self.columns * row).unsqueeze(-1) + steps[:, 1]
        row = row.unsqueeze(-1) + steps[:, 0]
        inside = (row < self.rows) & (column >= 0) & (column < self.columns)
        cells = row * self.columns + column
        return cells.clamp(0, self.num_cells - 1), inside


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
