r"""Where components are, as numbers between 0 and 1 that a chain can step in.

Coordinates u are the fractions of a component's nonlinear parameters under its prior's
marginals, so that the prior of independent ones is uniform. Of several classes the
first coordinate says which class a component is of, and those that a class has not
stay at one half: no step moves either.

See Also:
    :mod:`sbi_slotflow.problems.collapsed`, whose chains move in them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sets.marginals import Marginals
from .linear import ClassForm, LinearForm

__all__ = ["Coordinates"]

_UNUSED = 0.5


class Coordinates:
    """Coordinates ``(..., N)`` of the nonlinear parameters of components.

    Args:
        form: In what components are linear.
        marginals: Marginals of a component's parameters, of each class in turn.

    Attributes:
        free: Which coordinates may move, of each class, bool ``(C, N)``.
        circular: Which of them are around a circle, bool ``(C, N)``.
    """

    def __init__(self, form: LinearForm, marginals: Sequence[Marginals]) -> None:
        self.form = form
        self.forms = form.members
        self.marginals = [
            [own[i] for i in part.others]
            for part, own in zip(self.forms, marginals, strict=True)
        ]
        # Of several classes the first coordinate is the class.
        self.first = int(isinstance(form, ClassForm))
        self.size = self.first + max(len(own) for own in self.marginals)
        self.free = torch.zeros(len(self.forms), self.size, dtype=torch.bool)
        self.circular = self.free.clone()
        for c, (part, own) in enumerate(zip(self.forms, self.marginals, strict=True)):
            self.free[c, self.first : self.first + len(own)] = True
            for d, (i, marginal) in enumerate(zip(part.others, own, strict=True)):
                period = part.layout.component_periods[i]
                width = marginal.bounds[1] - marginal.bounds[0]
                around = math.isfinite(period) and math.isclose(width, period)
                self.circular[c, self.first + d] = around

    def label(self, u: Tensor) -> Tensor:
        """The class of components at coordinates ``(..., N)``, int64."""
        if not self.first:
            return torch.zeros_like(u[..., 0], dtype=torch.int64)
        label = (u[..., 0] * len(self.forms)).long()
        return label.clamp(0, len(self.forms) - 1)

    def of(self, table: Tensor, u: Tensor) -> Tensor:
        """What a table ``(C, ...)`` has for the classes at u ``(..., N)``."""
        return table[self.label(u)] if self.first else table[0]

    def of_class(self, own: Tensor, label: int) -> Tensor:
        """Coordinates ``(..., N)`` of a class's own ``(..., N_c)``."""
        if not self.first:
            return own
        ends = own.new_full((*own.shape[:-1], self.size - own.shape[-1]), _UNUSED)
        ends[..., 0] = (label + 0.5) / len(self.forms)
        return torch.cat([ends[..., :1], own, ends[..., 1:]], -1)

    def place(self, u: Tensor) -> Tensor:
        """Nonlinear parameters of coordinates ``(..., N)``."""
        if not self.first:
            return self._place(0, u)
        label, found = self.label(u), torch.zeros_like(u)
        found[..., 0] = label.to(u)
        for c, own in enumerate(self.marginals):
            rows = label == c
            there = self._place(c, u[rows][..., 1 : 1 + len(own)])
            found[..., 1 : 1 + len(own)][rows] = there
        return found

    def fractions(self, nonlinear: Tensor) -> Tensor:
        """The inverse of :meth:`place`."""
        if not self.first:
            return self._fractions(0, nonlinear)
        found = torch.full_like(nonlinear, _UNUSED)
        found[..., 0] = (nonlinear[..., 0] + 0.5) / len(self.forms)
        for c, own in enumerate(self.marginals):
            rows = nonlinear[..., 0] == c
            there = self._fractions(c, nonlinear[rows][..., 1 : 1 + len(own)])
            found[..., 1 : 1 + len(own)][rows] = there
        return found

    def log_density(self, nonlinear: Tensor) -> Tensor:
        """Log density of nonlinear parameters under their marginals, ``(...)``."""
        if not self.first:
            return self._log_density(0, nonlinear)
        total = torch.zeros_like(nonlinear[..., 0])
        for c, own in enumerate(self.marginals):
            rows = nonlinear[..., 0] == c
            total[rows] = self._log_density(c, nonlinear[rows][..., 1 : 1 + len(own)])
        return total

    def _place(self, c: int, u: Tensor) -> Tensor:
        columns = zip(self.marginals[c], u.unbind(-1), strict=True)
        return torch.stack([m.quantile(value) for m, value in columns], -1)

    def _fractions(self, c: int, nonlinear: Tensor) -> Tensor:
        columns = zip(self.marginals[c], nonlinear.unbind(-1), strict=True)
        return torch.stack([m.fraction(value) for m, value in columns], -1)

    def _log_density(self, c: int, nonlinear: Tensor) -> Tensor:
        total = torch.zeros_like(nonlinear[..., 0])
        for m, value in zip(self.marginals[c], nonlinear.unbind(-1), strict=True):
            total = total + m.log_density(value)
        return total
