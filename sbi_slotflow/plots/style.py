"""Colours, fonts and dress that the figures share, and thinning of draws.

Colours are Okabe and Ito's, which colour-blind readers tell apart: data are grey, the
posterior is blue, the truth is vermilion.
"""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure
from matplotlib.lines import Line2D
from torch import Tensor

__all__ = []

DATA, POSTERIOR, TRUTH = "#7f7f7f", "#0072b2", "#d55e00"
REFERENCE = "#000000"
# Sources, in turn; neighbours differ in lightness too.
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#7a5195")
SHADES = {0.9: "#a6cee3", 0.5: "#4a9bca"}  # probability enclosed: colour
FONT, SMALL = 9, 8
_DPI = 80


class Figure(_Figure):
    """A ``matplotlib.figure.Figure`` with a picture for notebooks.

    matplotlib teaches notebooks to draw figures when pyplot makes one. The library's
    figures are none of pyplot's, so they bring their picture along.
    """

    def _repr_png_(self) -> bytes:
        """The figure as PNG: what IPython shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()


def dress(axes: Axes, x_label: str, y_label: str, title: str = "") -> None:
    """Label axes and remove the upper and right spines."""
    axes.set_xlabel(x_label, fontsize=FONT)
    axes.set_ylabel(y_label, fontsize=FONT)
    title = title[:1].upper() + title[1:]
    axes.set_title(title, fontsize=FONT, loc="left")
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(figure: _Figure, handles: Sequence[Artist], **style: Any) -> None:
    """Put a legend in one row above all axes, which needs a constrained layout."""
    style = {"loc": "outside upper center", "fontsize": FONT, **style}
    figure.legend(handles=list(handles), ncols=len(handles), frameon=False, **style)


def truth_line() -> Artist:
    """The truth in a legend."""
    return Line2D([], [], color=TRUTH, linestyle="--", label="truth")


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The interval, wider at either end by a share of its length."""
    margin = share * (high - low)
    return low - margin, high + margin


def thinned(samples: Tensor, most: int) -> Tensor:
    """At most that many rows, evenly spaced."""
    return samples[:: math.ceil(len(samples) / most)]
