"""The figure of :class:`~sbi_slotflow.calibration.Misspecification`."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..plots.figure import Figure
from ..plots.style import DATA, POSTERIOR, TRUTH, dress, legend_above

if TYPE_CHECKING:
    from .misspecification import Misspecification

__all__ = ["plot_misspecification"]

_MOST_LINES = 20


def plot_misspecification(check: "Misspecification") -> Figure:
    """Plot the scores of observations and of training data."""
    figure = Figure(figsize=(5.0, 3.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    values = np.concatenate([check.usual, check.scores])
    edges = np.linspace(values.min(), values.max() + 1e-6, 41)
    axes.hist(check.usual, edges.tolist(), density=True, color=DATA, alpha=0.6)
    handles: list[Artist] = [Patch(color=DATA, alpha=0.6, label="training data")]
    if len(check.scores) > _MOST_LINES:
        style = {"histtype": "step", "lw": 1.6, "color": POSTERIOR}
        axes.hist(check.scores, edges.tolist(), density=True, **style)
        handles.append(Line2D([], [], color=POSTERIOR, lw=1.6, label="x"))
    else:
        for score in check.scores:
            axes.axvline(score, color=TRUTH, lw=1.5)
        handles.append(Line2D([], [], color=TRUTH, lw=1.5, label="x"))
    legend_above(figure, handles)
    dress(axes, "distance from neighbours (standard deviations)", "density")
    return figure
