"""The figure of :class:`~sbi_slotflow.calibration.CardinalityReliability`."""

from typing import TYPE_CHECKING

import numpy as np

from ..plots.figure import Figure
from ..plots.style import DATA, POSTERIOR, SMALL, dress

if TYPE_CHECKING:
    from .cardinality import CardinalityReliability

__all__ = ["plot_reliability"]

_MOST_LABELLED = 12


def plot_reliability(check: "CardinalityReliability") -> Figure:
    """Plot the reliability diagram and the confusion matrix."""
    figure = Figure(figsize=(8.0, 3.6))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    bins = check.bins
    left.plot([0, 1], [0, 1], color="black", lw=0.6)
    left.vlines(bins.predicted, bins.low, bins.high, color=DATA, lw=6, alpha=0.4)
    left.plot(bins.predicted, bins.observed, "o-", color=POSTERIOR, ms=4, lw=1.2)
    left.set_xlim(0, 1)
    left.set_ylim(-0.02, 1.02)
    left.set_aspect("equal")
    error = check.scores["calibration error"]
    title = f"calibration error {error['value']:.3f} (if right {error['expected']:.3f})"
    dress(left, "predicted q(K | x)", "observed share", title)
    share = check.confusion / check.confusion.sum(-1, keepdims=True).clip(1)
    right.imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower")
    size = len(share)
    if size <= _MOST_LABELLED:
        for true, predicted in np.ndindex(size, size):
            value = share[true, predicted]
            if value >= 0.005:
                colour = "white" if value > 0.5 else "black"
                right.text(
                    predicted, true, f"{value:.2f}".removeprefix("0"), ha="center",
                    va="center", fontsize=SMALL if size < 8 else 7, color=colour,
                )  # fmt: skip
    right.set_xticks(range(size))
    right.set_yticks(range(size))
    title = f"most probable K is right in {100 * check.accuracy:.1f} %"
    dress(right, "most probable K", "true K", title)
    return figure
