r"""Where a component may be born, and how much it would explain there.

See Also:
    :mod:`sbi_slotflow.problems.collapsed`, whose births are drawn from the grid.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .marginal_likelihood import Target

__all__ = ["Grid"]

# Most numbers in the signals of the grid, and most cells of it.
_MOST_NUMBERS, _MOST_CELLS = 2**23, 2**12
# Of births: shares of the prior, of the tempered and of the full evidence.
_SHARES, _TEMPER = (0.2, 0.3, 0.5), 0.3


class Grid:
    r"""Cells of the unit cube, and what a component in each of them explains.

    With amplitudes turned so that their working prior is N(mu, 1) and their Gram
    matrix diagonal, Lambda, a component in a cell multiplies the marginal likelihood of
    a residual r, others held, by the product over m of

    .. math::
        (1 + \Lambda / \sigma^2)^{-1/2} \exp\left(
        \frac{(b^T r / \sigma^2 + \mu)^2}{2 (1 + \Lambda / \sigma^2)}
        - \frac{\mu^2}{2} \right)
    """

    def __init__(self, target: "Target") -> None:
        self.coordinates = target.coordinates
        parts = [self._of_class(target, c) for c in range(len(target.form.members))]
        shapes, powers, bases, means = zip(*parts, strict=True)
        self.shapes = torch.stack(shapes)
        sizes = self.shapes.prod(-1)
        self.label = torch.arange(len(parts)).repeat_interleave(sizes)
        self.starts = sizes.cumsum(0) - sizes
        # Prior of a cell: that of its class, over the class's cells.
        self.log_size = -sizes.double().log()[self.label] - math.log(len(parts))
        self.power, self.mean = torch.cat(powers), torch.cat(means)
        self.basis = torch.cat(bases)
        self.strides = self.shapes.flip(-1).cumprod(-1).flip(-1) // self.shapes

    def _of_class(self, target: "Target", c: int) -> tuple[Tensor, ...]:
        """Cells ``(N,)`` each way, and what a component in each could explain."""
        free, working = self.coordinates.free[c], target.working
        resolution = target.resolution[c][free]
        numbers = len(target.x) * working.size
        most = max(16, min(_MOST_CELLS, _MOST_NUMBERS // numbers))
        wanted = (1 / resolution).ceil()
        while wanted.prod() > most:
            largest = wanted.argmax()
            wanted[largest] = (0.9 * wanted[largest]).floor()
        shape = torch.ones(len(free), dtype=torch.long)
        shape[free] = wanted.long()
        axes = [(torch.arange(int(n)).double() + 0.5) / n for n in wanted]
        centres = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        basis = target.signals(self.coordinates.of_class(centres, c))
        root = torch.linalg.cholesky(torch.linalg.inv(working.precisions[c]))
        basis = root.mT @ basis
        power, turn = torch.linalg.eigh(basis @ basis.mT)
        basis = (turn.mT @ basis).flatten(0, 1)
        mean = torch.linalg.solve(root, working.means[c]) @ turn
        return shape, power, basis, mean

    def log_weights(
        self, residual: Tensor, sigma: Tensor, room: Tensor | None = None
    ) -> Tensor:
        """Log probabilities ``(C, G)`` of the cells given residuals ``(C, T)``.

        Only of classes that have ``room`` (C, classes), where any has.
        """
        weight = sigma.reciprocal().square()[:, None, None]
        inner = (residual @ self.basis.T).reshape(len(residual), *self.power.shape)
        precision = 1 + self.power * weight
        gain = (inner * weight + self.mean).square() / precision - self.mean.square()
        gain = 0.5 * (gain - precision.log()).sum(-1)
        size = self.log_size.expand_as(gain)
        if room is not None:
            there = (room | ~room.any(-1, keepdim=True))[:, self.label]
            size = torch.where(there, self.log_size, -math.inf)
            size = size - size.logsumexp(-1, keepdim=True)
            gain = gain + size
        parts = torch.stack(
            [
                size,
                (_TEMPER * gain).log_softmax(-1),
                gain.log_softmax(-1),
            ]
        )
        shares = torch.tensor(_SHARES, dtype=torch.float64).log()
        return (parts + shares[:, None, None]).logsumexp(0)

    def centre(self, cell: Tensor) -> Tensor:
        """Coordinates ``(C, N)`` of the middle of cells ``(C,)``."""
        return self._at(cell, 0.5)

    def draw(self, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw coordinates ``(C, N)``."""
        cell = torch.multinomial(log_weights.exp(), 1, generator=generator).squeeze(1)
        inside = torch.rand(
            *(len(cell), self.coordinates.size),
            generator=generator,
            dtype=torch.float64,
        )
        return self._at(cell, inside)

    def log_prob(self, log_weights: Tensor, u: Tensor) -> Tensor:
        """Log density ``(C,)`` of coordinates ``(C, N)``."""
        label = self.coordinates.label(u)
        shape = self.shapes[label]
        index = torch.minimum((u * shape).long().clamp(min=0), shape - 1)
        cell = self.starts[label] + (index * self.strides[label]).sum(-1)
        value = log_weights.gather(1, cell.unsqueeze(1)).squeeze(1)
        return value + shape.log().sum(-1)

    def _at(self, cell: Tensor, inside: Tensor | float) -> Tensor:
        """Coordinates ``(C, N)`` at a fraction of cells ``(C,)`` each way."""
        label = self.label[cell]
        own, shape = (cell - self.starts[label]).unsqueeze(-1), self.shapes[label]
        u = (own // self.strides[label] % shape + inside) / shape
        for c in range(len(self.shapes)) if self.coordinates.first else ():
            rows = label == c
            first = self.coordinates.first
            num = int(self.coordinates.free[c].sum())
            u[rows] = self.coordinates.of_class(u[rows][:, first : first + num], c)
        return u
