"""The figure of :class:`~sbi_slotflow.calibration.Coverage`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from ..plots.figure import Figure
from ..plots.style import SMALL, dress

if TYPE_CHECKING:
    from .coverage import Coverage, CoverageCurve

__all__ = ["plot_coverage"]

# Okabe and Ito's colours, then dashes.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":")


def plot_coverage(check: "Coverage") -> Figure:
    """Plot coverage less level, by parameter and by K."""
    figure = Figure(figsize=(8.0, 3.4))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, check.parameters, check)
    dress(left, "probability of the interval", "coverage - probability", "by parameter")
    _draw(right, check.cardinalities, check)
    dress(right, "probability of the interval", "", "by number of components")
    bound = max(
        0.06,
        1.1 * max(np.abs(line.get_ydata()).max() for line in left.lines + right.lines),
    )
    left.set_ylim(-bound, bound)
    return figure


def _draw(axes: Axes, curves: "Mapping[str, CoverageCurve]", check: "Coverage") -> None:
    from .coverage import LEVELS

    axes.axhline(0.0, color="black", lw=0.6)
    many = len(curves) > 4
    for i, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        dashes = _DASHES[i // len(_COLOURS) % len(_DASHES)]
        low, high = check.errors[name]
        if not many or name == "mixed":
            axes.fill_between(
                LEVELS, low - LEVELS, high - LEVELS, color=colour, alpha=0.15, lw=0
            )
        axes.plot(
            LEVELS,
            curve.coverage - LEVELS,
            color=colour,
            ls=dashes,
            lw=2.2 if name == "mixed" else 1.3,
            label=name,
        )
    axes.legend(
        fontsize=SMALL, frameon=False, ncols=2 if len(curves) > 3 else 1, loc="best"
    )
