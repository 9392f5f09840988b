r"""Numbers that every theta row has, whatever its K and its labels.

``sbi.diagnostics.run_sbc`` ranks one number of a draw at a time. The functions made
here reduce a theta row to a number that exists for every K, so that rows of different
dimension can be ranked together::

    run_sbc(thetas, xs, posterior, reduce_fns=reduce_fns(prior.layout))
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..seeding import generator_for
from ..sets.layout import ThetaLayout

__all__ = [
    "CountInBand",
    "JitteredCardinality",
    "Lowest",
    "Reduction",
    "SharedParameter",
    "TotalPower",
    "reduce_fns",
]


class Reduction:
    """Base: a number of each row, ``(N, E)`` to ``(N,)``.

    Attributes:
        layout: Layout of theta.
        name: What the number is.
    """

    def __init__(self, layout: ThetaLayout, seed: int = 0, name: str = "K") -> None:
        self.layout = layout
        self.name = name
        self._generator = generator_for(seed)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        raise NotImplementedError

    def _jitter(self, theta: Tensor) -> Tensor:
        """A number in [0, 1) for each row, new ones at every call."""
        return torch.rand(len(theta), generator=self._generator)


class JitteredCardinality(Reduction):
    """K plus a uniform number in [0, 1): where K's would tie, ranks are random.

    Args:
        layout: Layout of theta.
        seed: Seed of the jitter.
    """

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        return self.layout.cardinality(theta) + self._jitter(theta)


class _OfParameter(Reduction):
    """Base: a number of one component parameter.

    Rows with K = 0 come below all others, in random order.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter.
        seed: Seed of the order among rows that would tie.

    Raises:
        ValueError: If there is no such parameter.
    """

    _name: ClassVar[str]

    def __init__(self, layout: ThetaLayout, parameter: str, seed: int = 0) -> None:
        if parameter not in layout.component_names:
            raise ValueError(
                f"parameter must be one of {list(layout.component_names)}, got "
                f"{parameter!r}."
            )
        super().__init__(layout, seed, self._name.format(parameter))
        self._index = layout.component_names.index(parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        parts = self.layout.unpack(theta)
        return self._number(parts.components[..., self._index], parts.mask, theta)

    def _number(self, values: Tensor, mask: Tensor, theta: Tensor) -> Tensor:
        raise NotImplementedError


class TotalPower(_OfParameter):
    r"""Sum of squares of one component parameter, :math:`\sum_k \theta_{k,d}^2`."""

    _name = "power of {}"

    def _number(self, values: Tensor, mask: Tensor, theta: Tensor) -> Tensor:
        power = torch.where(mask, values.double().square(), 0.0).sum(-1)
        return torch.where(mask.any(-1), power, self._jitter(theta) - 1.0)


class Lowest(_OfParameter):
    """Smallest value of one component parameter."""

    _name = "lowest {}"

    def _number(self, values: Tensor, mask: Tensor, theta: Tensor) -> Tensor:
        least = torch.where(mask, values, torch.inf).amin(-1)
        lowest = torch.finfo(values.dtype).min
        below = lowest * (0.5 + 0.5 * self._jitter(theta))
        return torch.where(mask.any(-1), least, below)


class CountInBand(_OfParameter):
    """Number of components with a parameter in [low, high), jittered like K.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter, the frequency say.
        low: Lower end of the band.
        high: Upper end of the band.
        seed: Seed of the jitter.
    """

    _name = "number with {} in a band"

    def __init__(
        self,
        layout: ThetaLayout,
        parameter: str,
        low: float,
        high: float,
        seed: int = 0,
    ) -> None:
        super().__init__(layout, parameter, seed)
        self.low, self.high = low, high

    def _number(self, values: Tensor, mask: Tensor, theta: Tensor) -> Tensor:
        inside = mask & (values >= self.low) & (values < self.high)
        return inside.sum(-1) + self._jitter(theta)


class SharedParameter(Reduction):
    """One shared parameter.

    Args:
        layout: Layout of theta.
        parameter: Name of the parameter.
    """

    def __init__(self, layout: ThetaLayout, parameter: str) -> None:
        super().__init__(layout, name=parameter)
        self._index = layout.shared_names.index(parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        return self.layout.unpack(theta).shared[..., self._index]


def reduce_fns(
    layout: ThetaLayout,
    power: str | None = None,
    band: tuple[float, float] | None = None,
) -> list[Reduction]:
    """Make a list of reductions for ``run_sbc``.

    Args:
        layout: Layout of theta.
        power: Parameter whose total power is ranked; the first one if None.
        band: Band of the ``order_by`` parameter in which components are counted; none
            if None.

    Returns:
        Jittered K, total power, lowest ``order_by`` parameter, number in the band, and
        each shared parameter, in this order.
    """
    order = layout.component_names[layout.order_by]
    functions: list[Reduction] = [
        JitteredCardinality(layout),
        TotalPower(layout, power or layout.component_names[0]),
        Lowest(layout, order),
    ]
    if band is not None:
        functions.append(CountInBand(layout, order, *band))
    functions += [SharedParameter(layout, name) for name in layout.shared_names]
    return functions
