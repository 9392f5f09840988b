r"""Parts of cells that several components share.

The posterior of two components in one cell is a curved ridge, or has several modes:
the loud one may be on either side of the weak one, and where they nearly coincide
their amplitudes may be exchanged. No single Gaussian describes that. A shared cell is
therefore divided into n parts of equal width, and each way in which its components may
stand in them is weighed by its evidence,

.. math::
    q(\Theta | a, x, K) = \eta\, q_a(\Theta) + (1 - \eta)\, q(b | a, x, K)\,
        q_b(\Theta), \qquad
    q(b | a, x, K) = (1 - \delta) \frac{Z_b}{\sum_{b'} Z_{b'}} + \frac{\delta}{\#b}

where q_b is the density about the mode found within the parts b, and q_a the one about
the mode found in whole cells: where that mode is sharp, a parabola that was fitted at
the edge of a part may miss it. The parts divide the cells, so that a set stands in one
b, and all densities are exact.

Example:
    >>> cells = torch.tensor([[3, 3, 5]])
    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> starts = cells.double()
    >>> sets = OccupiedCells(torch.zeros(1).long(), cells, starts, starts + 1, mask)
    >>> num_divisions(sets).tolist()
    [6]
    >>> parts = divided(sets, CellAxis(0, 8))
    >>> len(parts.code)  # 6 with both in one part, 15 with each in its own
    21

See Also:
    :mod:`.cell_sets`, which weighs them.
"""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import CellAxis, OccupiedCells

__all__ = ["CellParts", "divided", "num_divisions", "part_codes"]

# Parts of a cell by the number of a set's components that share theirs: few enough
# ways (21, 20, at most 36, at most 32) for all to be fitted. With more, none.
_DIVISIONS = (1, 1, 6, 4, 3, 2)


class CellParts(NamedTuple):
    """Ways in which the components of some sets stand in parts of shared cells."""

    of: Tensor  # The set of each of P ways, (P,)
    code: Tensor  # The parts, as the digits of a number, (P,)
    starts: Tensor  # Where they start, (P, Kmax)
    ends: Tensor  # Where they end, same shape


def num_divisions(sets: OccupiedCells) -> Tensor:
    """Into how many parts the shared cells of S sets are divided, shape ``(S,)``."""
    counts = _shared(sets).sum(-1)
    table = torch.tensor(_DIVISIONS).to(counts)
    known = counts < len(_DIVISIONS)
    return torch.where(known, table[torch.where(known, counts, 0)], 1)


def divided(sets: OccupiedCells, axis: CellAxis) -> CellParts:
    """All ways in which the components of S sets may stand in parts of their cells."""
    shared = _shared(sets)
    none = sets.cells.new_zeros(0)
    found = [CellParts(none, none, sets.starts[:0], sets.ends[:0])]
    for s, num in enumerate(num_divisions(sets).tolist()):
        which = shared[s].nonzero().squeeze(-1)
        if num == 1:
            which = which[:0]
        digits = _ways(tuple(sets.cells[s, which].tolist()), num).to(which)
        width = (sets.ends[s] - sets.starts[s]) / num
        starts = sets.starts[s].repeat(len(digits), 1)
        ends = sets.ends[s].repeat(len(digits), 1)
        starts[:, which] = sets.starts[s, which] + width[which] * digits
        ends[:, which] = starts[:, which] + width[which]
        of = which.new_full((len(digits),), s)
        found.append(CellParts(of, _code(digits, which.new_tensor(num)), starts, ends))
    parts = CellParts(*map(torch.cat, zip(*found, strict=True)))
    mask = sets.mask[parts.of]
    room = axis.earliest(parts.starts) < axis.upper(parts.ends, mask)
    there = (room | ~mask).all(-1)
    return CellParts(*(column[there] for column in parts))


def part_codes(sets: OccupiedCells, position: Tensor) -> Tensor:
    """Codes ``(S,)`` of the parts in which components at positions ``(S, K)`` stand."""
    shared, num = _shared(sets), num_divisions(sets)
    share = (position - sets.starts) / (sets.ends - sets.starts)
    digits = (share * num.unsqueeze(-1)).long()
    digits = torch.minimum(digits.clamp(min=0), num.unsqueeze(-1) - 1)
    # Digits of components that share no cell are not counted.
    place = shared.long().cumsum(-1) - 1
    power = num.unsqueeze(-1) ** place.clamp(min=0)
    return torch.where(shared, digits * power, 0).sum(-1)


def _shared(sets: OccupiedCells) -> Tensor:
    """Which components share their cell with another, shape ``(S, Kmax)``."""
    same = (sets.cells[:, 1:] == sets.cells[:, :-1]) & sets.mask[:, 1:]
    none = same.new_zeros(len(same), 1)
    return torch.cat([same, none], -1) | torch.cat([none, same], -1)


def _code(digits: Tensor, num: Tensor) -> Tensor:
    """Numbers with such digits in the base ``num``, the first one the least."""
    return (digits * num ** torch.arange(digits.shape[-1]).to(digits)).sum(-1)


@cache
def _ways(cells: tuple[int, ...], num: int) -> Tensor:
    """Parts ``(P, m)`` that ascend within each cell."""
    if not cells:
        return torch.zeros(1, 0, dtype=torch.int64)
    every = torch.cartesian_prod(*[torch.arange(num)] * len(cells))
    every = every.reshape(-1, len(cells))
    same = torch.tensor([a == b for a, b in pairwise(cells)])
    return every[((every.diff(dim=-1) >= 0) | ~same).all(-1)]
