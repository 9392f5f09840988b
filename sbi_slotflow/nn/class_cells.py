r"""Cells of several classes, one class after the other.

.. math::
    \underbrace{0, \ldots, L_a - 1}_{\text{class } a},
    \underbrace{L_a, \ldots, L_a + L_b - 1}_{\text{class } b}, \ldots

A cell says of which class its component is, a set of cells how many there are of each.
Sets are feasible if each class has a number of components that its prior allows, and
those of one class keep its least separation.

Example:
    >>> axis = ClassAxis.of([CellAxis(0, 4), CellAxis(0, 3)], torch.zeros(2, 2))
    >>> axis.class_of(torch.tensor([0, 3, 4])).tolist()
    [0, 0, 1]

See Also:
    :mod:`sbi_slotflow.nn.classes`, coordinates and densities in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .cells import CellAxis, CellGrid

__all__ = ["ClassAxis", "axis_from_spec"]

# Slack in comparisons of positions, in cells.
_TOLERANCE = 1e-6

Weights = tuple[Any, ...]


@dataclass(frozen=True)
class ClassAxis(CellAxis):
    """Axes, or grids, of several classes, one after the other.

    Attributes:
        parameter: Zero; locations are those of the classes.
        num_cells: Number of cells of all classes.
        axes: The axis of each class.
        ways: Of each (K_1..K_C), the factor exp of
            ``MultiClassPrior.log_counts``, in nested tuples.
    """

    axes: tuple[CellAxis, ...] = ()
    ways: Weights = ()

    @classmethod
    def of(cls, axes: Sequence[CellAxis], log_counts: Tensor) -> "ClassAxis":
        """Join axes.

        Raises:
            ValueError: If some classes have one location and others two.
        """
        if len({len(axis.parameters) for axis in axes}) != 1:
            raise ValueError(
                "classes must all have one location, or all two, got "
                f"{[len(axis.parameters) for axis in axes]}."
            )
        ways = cast(Weights, _tuples(log_counts.exp().tolist()))
        return cls(0, sum(axis.num_cells for axis in axes), 0.0, tuple(axes), ways)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First cell of each class, and the end of the last."""
        ends = [0]
        for axis in self.axes:
            ends.append(ends[-1] + axis.num_cells)
        return tuple(ends)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Place of the locations behind a component's class."""
        return tuple(range(1, 1 + len(self.axes[0].parameters)))

    def class_of(self, cells: Tensor) -> Tensor:
        """Class, int64, of each cell."""
        inner = torch.tensor(self.offsets[1:-1], device=cells.device)
        return torch.bucketize(cells.contiguous(), inner, right=True)

    def first_of(self, cells: Tensor) -> Tensor:
        """First cell of the class of each cell."""
        return torch.tensor(self.offsets, device=cells.device)[self.class_of(cells)]

    def middles(self, cells: Tensor) -> Tensor:
        """Locations ``(..., P)`` of the middles of cells, on their class's axis."""
        own = cells - self.first_of(cells)
        return self._by_class(cells, [axis.middles(own) for axis in self.axes])

    def steps(self, reach: int) -> list[tuple[int, int]]:
        """Rows and columns from a cell to those that a chain looks at closely."""
        return self.axes[0].steps(reach)

    def stepped(self, cells: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cells that are steps away in the same class, and whether they exist."""
        first = self.first_of(cells).unsqueeze(-1)
        own = cells - first.squeeze(-1)
        found = [
            axis.stepped(own.clamp(max=axis.num_cells - 1), steps) for axis in self.axes
        ]
        there = self._by_class(cells, [cell for cell, _ in found])
        inside = self._by_class(cells, [good for _, good in found])
        return there + first, inside

    def earliest(self, starts: Tensor) -> Tensor:
        """Least positions ``(N, K)`` that cells which start there allow."""
        shift = self._shifts(starts)
        return (starts - shift).cummax(-1).values + shift

    def upper(self, ends: Tensor, mask: Tensor) -> Tensor:
        """Bounds U_k ``(N, K)`` of cells that end there; inactive ones mean nothing."""
        # The end of a class is not the start of the next.
        shift = self._shifts(ends - 1e-9)
        ends = (ends - shift).masked_fill(~mask, torch.inf)
        return ends.flip(-1).cummin(-1).values.flip(-1) + shift

    def lower(self, starts: Tensor, before: Tensor) -> Tensor:
        """Lower bounds of components, given the positions before them."""
        label = self.class_of(starts)
        last = self.class_of(before.clamp(min=0.0))
        apart = self._separations(starts)[label]
        apart = torch.where((label == last) & (before > -torch.inf), apart, 0.0)
        return torch.maximum(starts, before + apart)

    def held(self, cells: Tensor) -> Tensor:
        """How many of the first k components are of the class of the k-th one."""
        label = self.class_of(cells)
        same = label.unsqueeze(-1) == label.unsqueeze(-2)
        return same.tril().sum(-1)

    def feasible(
        self,
        earliest: Tensor,
        left: Tensor,
        edges: Tensor,
        before: Tensor | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Tell which cells a component may take; see :meth:`CellAxis.feasible`.

        Each class must end with a number of components that its prior allows: ``held``
        are of the class of the cell ``before``. Where ``held`` is None, nothing is
        asked of the numbers.
        """
        least = self.lower(edges[:, :-1], earliest.unsqueeze(-1))
        good = least < edges[:, 1:] - _TOLERANCE
        if held is None or before is None:
            return good
        rules = _rules(self.ways)
        every = torch.arange(self.num_cells, device=edges.device)
        label, last = self.class_of(every), self.class_of(before.clamp(min=0))
        last = torch.where(before < 0, len(self.axes), last)
        again = label == last.unsqueeze(-1)
        # Of the class that is left, and those that are passed over.
        leave = rules.passed.to(label.device)[last.unsqueeze(-1), label]
        most = rules.ends.shape[1] - 1
        allowed = rules.allowed.to(label.device)
        enough = (allowed[last, held.clamp(max=most)] & (held <= most)).unsqueeze(-1)
        taken = 1 + torch.where(again, held.unsqueeze(-1), 0)
        there = label, taken.clamp(max=most), left.unsqueeze(-1)
        ends = rules.ends.to(label.device)[there] & (taken <= most)
        # What must still stand in this class needs room.
        must = rules.must.to(label.device)[there]
        apart = self._separations(edges)[label]
        last_end = torch.tensor(self.offsets[1:]).to(edges)[label]
        room = (must == 0) | (least + apart * must < last_end)
        return good & room & ends & (again | (leave & enough))

    def _separations(self, like: Tensor) -> Tensor:
        return torch.tensor([axis.separation for axis in self.axes]).to(like)

    def _shifts(self, positions: Tensor) -> Tensor:
        """Least distances from the first of each row, within classes, summed up."""
        label = self.class_of(positions.clamp(min=0.0))
        label = label.clamp(max=len(self.axes) - 1)
        same = label[..., 1:] == label[..., :-1]
        steps = self._separations(positions)[label[..., 1:]]
        steps = torch.where(same, steps, 0.0)
        return torch.nn.functional.pad(steps, (1, 0)).cumsum(-1)

    def _by_class(self, cells: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The value of each cell's own class."""
        label = self.class_of(cells)
        shape = (*label.shape, *[1] * (values[0].ndim - label.ndim))
        found = values[0]
        for c, value in enumerate(values[1:], 1):
            found = torch.where(label.reshape(shape) == c, value, found)
        return found


def axis_from_spec(spec: Mapping[str, Any]) -> CellAxis:
    """Rebuild an axis, a grid or those of classes from the fields that a file holds."""
    if "axes" in spec:
        axes = tuple(axis_from_spec(part) for part in spec["axes"])
        return ClassAxis(**{**spec, "axes": axes, "ways": _tuples(spec["ways"])})
    return CellGrid(**spec) if "rows" in spec else CellAxis(**spec)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


class _Rules(NamedTuple):
    """Which numbers of components classes may have, C of them, at most M each."""

    # Whether a class may have so many; of no class, C, always, (C + 1, M + 1)
    allowed: Tensor
    # Whether classes after one (C: before the first) and before another may have none
    passed: Tensor  # (C + 1, C)
    # Whether so many of a class may stand, with so many of it and those behind it to
    # come, (C, M + 1, K + 1)
    ends: Tensor
    # How many of those to come the class must have itself at least, same shape
    must: Tensor


@lru_cache(maxsize=32)
def _rules(ways: Weights) -> _Rules:
    """What follows from the numbers that a prior allows."""
    table = torch.tensor(ways, dtype=torch.float64) > 0
    num, most, total = table.ndim, max(table.shape) - 1, sum(table.shape) - table.ndim
    allowed = torch.zeros(num + 1, most + 1, dtype=torch.bool)
    allowed[num] = True
    for c in range(num):
        own = table.movedim(c, 0).flatten(1).any(-1)
        allowed[c, : len(own)] = own
    passed = torch.zeros(num + 1, num, dtype=torch.bool)
    for last in range(num + 1):
        first = 0 if last == num else last + 1
        for c in range(first, num):
            passed[last, c] = bool(allowed[first:c, 0].all())
    # Totals that classes from c on may have.
    reach = torch.zeros(num + 1, total + 1, dtype=torch.bool)
    reach[num, 0] = True
    for c in range(num - 1, -1, -1):
        for k in allowed[c].nonzero().flatten().tolist():
            reach[c, k:] |= reach[c + 1, : total + 1 - k]
    ends = torch.zeros(num, most + 1, total + 1, dtype=torch.bool)
    must = torch.zeros(num, most + 1, total + 1, dtype=torch.int64)
    for c in range(num):
        counts = allowed[c].nonzero().flatten().tolist()
        for held, left in product(range(most + 1), range(total + 1)):
            more = [k - held for k in counts if 0 <= k - held <= left]
            more = [m for m in more if reach[c + 1, left - m]]
            ends[c, held, left] = bool(more)
            must[c, held, left] = min(more, default=0)
    return _Rules(allowed, passed, ends, must)
