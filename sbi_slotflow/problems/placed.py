"""Problems whose components have a place in x: in a trace, or in an image.

The network then has a token for each cell of the place, and takes Gauss-Newton steps on
the component signal where that is of torch operations, smooth in the component's
parameters.

See Also:
    :mod:`sbi_slotflow.nn.cells`, what a cell is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.func import jvp

from ..nn.cells import CellAxis, CellGrid
from ..nn.encoders import PatchTokens, TokenEncoder, TraceTokens
from ..sets.checks import as_count
from .base import Problem
from .least_squares import AdditiveFit, additive_fit
from .linear import LinearForm
from .simulator import AdditiveSimulator

__all__ = ["Image", "Placed", "Trace"]


class Placed(Problem):
    """What a :class:`Trace` and an :class:`Image` have in common."""

    linear: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.simulator, AdditiveSimulator):
            raise TypeError(
                "simulator must be an AdditiveSimulator, which knows the components' "
                f"signals, got {type(self.simulator).__name__}."
            )
        if isinstance(self.linear, str):
            raise TypeError(
                'linear must be a sequence of names, such as ("height",), got '
                f"{self.linear!r}."
            )
        self.linear_form()  # checks the names
        for index in self.places:
            place = self.prior.component_marginals[index]
            if not place.is_uniform:
                raise ValueError(
                    f"prior must be uniform in {self.component_names[index]!r}, which "
                    f"is a place in x, got {place}."
                )

    @property
    def places(self) -> tuple[int, ...]:
        """Which of a component's parameters are its place."""
        return (self.layout.order_by,)

    def linear_form(self) -> LinearForm | None:
        """Return the signal as linear in :attr:`linear`; None if that is empty."""
        if not self.linear:
            return None
        return LinearForm(self.simulator.component_signal, self.layout, self.linear)

    def build_fit(self) -> AdditiveFit | None:
        """Return the least squares of the component signal, by its derivatives.

        Noise is made white, and a background that is linear in shared parameters is
        fitted along. None if torch cannot differentiate the signal, one of NumPy for
        example, or, with a warning, where noise or background allow no least squares.
        """
        signal = self.simulator.component_signal
        width = self.layout.num_component_params
        middle = self.build_chart().some_point(torch.zeros(width))[None]
        try:
            jvp(signal, (middle,), (torch.ones_like(middle),))
        except (AttributeError, RuntimeError, TypeError):
            return None
        places = self.places
        location = places[0] if len(places) == 1 else places
        return additive_fit(self.simulator, self.prior, location)


@dataclass(frozen=True)
class Trace(Placed):
    """A problem whose components have a place (a time, a position) in a trace.

    The place is the prior's ``order_by`` parameter. Its prior must be uniform from the
    first sample of the trace to the end of the last: cell i of the place is cell i of
    the samples.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: Simulator theta -> x.
        cells: Number of cells of the trace, a divisor of its length T; a few samples
            each, so that a cell seldom holds two components.
        linear: Names of the parameters in which a component's signal is linear (its
            height, a flux): the collapsed sampler integrates them out.

    Raises:
        ValueError: If ``cells`` does not divide T, or the place is not uniform.
    """

    cells: int = 64
    linear: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.simulator.event_shape) != 1:
            raise ValueError(
                "a Trace has signals of shape (..., T), got ones of event shape "
                f"{tuple(self.simulator.event_shape)}."
            )
        as_count(self.cells, "cells")
        if self.num_data % self.cells:
            raise ValueError(
                f"cells must divide the {self.num_data} samples of the trace, got "
                f"{self.cells}."
            )

    def build_token_encoder(self, **options: Any) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell."""
        return TokenEncoder(TraceTokens(self.num_data, self.cells), **options)

    def location_axis(self) -> CellAxis:
        """The place, in cells that hold the same number of samples."""
        order_by = self.layout.order_by
        low, high = self.prior.component_marginals[order_by].bounds
        separation = self.prior.min_separation or 0.0
        return CellAxis(order_by, self.cells, separation * self.cells / (high - low))


@dataclass(frozen=True)
class Image(Placed):
    """A problem whose components have a place in an image.

    x has shape ``(B, H, W)``, or ``(B, channels, H, W)``. The prior must be uniform in
    both places, over the whole image: from the outer edge of its first pixel to that of
    its last, whatever their unit. The canonical order is by one of the two.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows, without a least separation.
        simulator: Simulator theta -> x.
        place: Names of the places along a row (columns, W) and across the rows (H).
        cells: Cells across the rows and along one, divisors of H and W; a few pixels
            each, about the size of a component. One for every four pixels if None.
        linear: Names of the parameters in which a component's signal is linear, its
            flux for one: the collapsed sampler integrates them out.

    Raises:
        TypeError: If the simulator does not add up components' signals.
        ValueError: If ``cells`` does not divide the image, or a place is not uniform.

    Example:
        A blob of width one on an image of 16 x 16 pixels:

        >>> from torch.distributions import Independent, Uniform
        >>> import sbi_slotflow as sf
        >>> def blob(components):
        ...     x, y, flux = components[..., None, None].unbind(-3)
        ...     pixel = torch.arange(16.0) + 0.5
        ...     distance = (pixel - x) ** 2 + (pixel[:, None] - y) ** 2
        ...     return flux * torch.exp(-0.5 * distance)
        >>> low, high = torch.tensor([0.0, 0.0, 5.0]), torch.tensor([16.0, 16.0, 50.0])
        >>> prior = sf.VariableKPrior(
        ...     Independent(Uniform(low, high), 1), [1, 1, 1],
        ...     component_names=("x", "y", "flux"))
        >>> simulator = sf.AdditiveSimulator(blob, sf.WhiteNoise(1.0), prior.layout)
        >>> problem = sf.problems.Image("blobs", prior, simulator, linear=("flux",))
        >>> problem.location_axis().lengths
        (4, 4)
    """

    place: tuple[str, str] = ("x", "y")
    cells: tuple[int, int] | None = None
    linear: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.prior.layout.component_names
        twice = len(set(self.place)) != 2
        if isinstance(self.place, str) or twice or not set(self.place) <= set(names):
            raise ValueError(
                f"place must name two of the component's parameters {names}, along a "
                f"row and across the rows, got {self.place!r}."
            )
        super().__post_init__()
        if len(self.event_shape) not in (2, 3):
            raise ValueError(
                "an Image has signals of shape (..., H, W) or (..., channels, H, W), "
                f"got ones of event shape {tuple(self.event_shape)}."
            )
        if self.prior.min_separation:
            raise ValueError(
                "prior must have no min_separation: cells of an image know none, got "
                f"{self.prior.min_separation}."
            )
        if self.layout.order_by not in self.places:
            raise ValueError(
                f"prior must order components by one of {self.place}, got "
                f"{names[self.layout.order_by]!r}."
            )
        if self.cells is not None and len(self.cells) != 2:
            raise ValueError(f"cells must be two numbers, got {self.cells!r}.")
        for side, num in zip(self.event_shape[-2:], self.grid, strict=True):
            if side % as_count(num, "cells"):
                raise ValueError(
                    f"cells must divide the image of {tuple(self.event_shape[-2:])} "
                    f"pixels, got {self.grid}."
                )

    @property
    def places(self) -> tuple[int, ...]:
        """Indices of the places along and across rows."""
        along, across = (self.component_names.index(name) for name in self.place)
        return along, across

    @property
    def grid(self) -> tuple[int, int]:
        """Cells across the rows and along one."""
        if self.cells is not None:
            return self.cells
        rows, columns = (_near_quarter(side) for side in self.event_shape[-2:])
        return rows, columns

    def build_token_encoder(self, **options: Any) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell."""
        return TokenEncoder(PatchTokens(self.event_shape, self.grid), **options)

    def location_axis(self) -> CellGrid:
        """The grid of cells."""
        (along, across), (rows, columns) = self.places, self.grid
        return CellGrid(along, rows * columns, across=across, rows=rows)


def _near_quarter(side: int) -> int:
    """The divisor of a side that makes cells of about four pixels."""
    divisors = [num for num in range(1, side + 1) if side % num == 0]
    return min(divisors, key=lambda num: (abs(side / num - 4), num))
