"""Components that sit somewhere in a trace: what a simulator of your own needs.

:class:`Trace` tells the network that the ``order_by`` parameter is a place in x, so
that its slots can be anchored there.
"""

from dataclasses import dataclass
from typing import Any

from ..nn.cells import CellAxis
from ..nn.token_encoder import TokenEncoder, TraceTokens
from .base import Problem
from .least_squares import AdditiveFit

__all__ = ["Trace"]


@dataclass(frozen=True)
class Trace(Problem):
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

    Raises:
        ValueError: If ``cells`` does not divide T, or the place is not uniform.
    """

    cells: int = 64

    def __post_init__(self) -> None:
        if self.cells < 1 or self.num_data % self.cells:
            raise ValueError(
                f"cells must divide the {self.num_data} samples of the trace, got "
                f"{self.cells}."
            )
        order_by = self.layout.order_by
        place = self.prior.component_marginals[order_by]
        if not place.is_uniform:
            raise ValueError(
                "prior must be uniform in its order_by parameter "
                f"{self.component_names[order_by]!r}, which is the place in the trace, "
                f"got {place.family}."
            )

    def build_token_encoder(self, **options: Any) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell.

        Args:
            options: Options of the encoder.
        """
        return TokenEncoder(TraceTokens(self.num_data, self.cells), **options)

    def location_axis(self) -> CellAxis:
        """The place, in cells that hold the same number of samples."""
        order_by = self.layout.order_by
        low, high = self.prior.component_marginals[order_by].bounds
        separation = self.prior.min_separation or 0.0
        return CellAxis(order_by, self.cells, separation * self.cells / (high - low))

    def build_fit(self) -> AdditiveFit:
        """Return the least squares of the component signal, for ``refine_slots``.

        The signal must be smooth in the component's parameters.
        """
        return AdditiveFit(
            self.simulator.component_signal,
            self.prior.component_marginals,
            self.layout.order_by,
        )
