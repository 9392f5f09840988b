"""Panels of a corner plot: one- and two-dimensional marginals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from scipy.ndimage import gaussian_filter

from .style import REFERENCE, SHADES, SMALL, TRUTH, padded

__all__ = ["Column", "draw_corner"]

_NUM_CELLS = 40


@dataclass(frozen=True)
class Column:
    """One parameter of a corner plot.

    Attributes:
        label: Label of the axis.
        values: The draws, shape ``(S,)``.
        truth: The true value if known.
        reference: Draws to compare with, shape ``(M,)``, if there are any.
    """

    label: str
    values: np.ndarray
    truth: float | None
    reference: np.ndarray | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Where the draws are, the outermost percent aside."""
        low, high = np.quantile(self.values, [0.005, 0.995])
        if self.reference is not None:
            ends = np.quantile(self.reference, [0.005, 0.995])
            low, high = min(low, ends[0]), max(high, ends[1])
        if high - low <= 1e-9 * abs(low):
            margin = 0.5 * abs(low) or 0.5
            return low - margin, high + margin
        return padded(low, high, 0.15)

    @property
    def limits(self) -> tuple[float, float]:
        """The range, widened to show the truth."""
        low, high = self.range
        if self.truth is None or low <= self.truth <= high:
            return low, high
        return padded(min(low, self.truth), max(high, self.truth), 0.05)


def draw_corner(
    figure: Figure, grid: GridSpec, columns: list[Column], small: bool
) -> None:
    """Draw the panels below the diagonal of a square grid.

    Args:
        figure: The figure.
        grid: Its grid, as many rows and columns as there are parameters.
        columns: The parameters.
        small: Whether panels are too small for ticks.
    """
    num = len(columns)
    for i, row in enumerate(columns):
        for j, column in enumerate(columns[: i + 1]):
            axes = figure.add_subplot(grid[i, j])
            if i == j:
                _histogram(axes, column)
            else:
                _contours(axes, column, row)
                axes.set_ylim(*row.limits)
            axes.set_xlim(*column.limits)
            last, first = i == num - 1, j == 0 < i
            shown = last and not small, first and not small
            _corner_ticks(axes, *shown, num_ticks=3 if num <= 6 else 2)
            if last:
                _corner_label(axes, column.label, small, below=True)
            if first:
                _corner_label(axes, row.label, small, below=False)


def _histogram(axes: Axes, column: Column) -> None:
    bins = int(np.clip(1.5 * len(column.values) ** (1 / 3), 8, 40))
    low, high = column.range
    inside = max(low, column.values.min()), min(high, column.values.max())
    counts, edges = np.histogram(column.values, bins, inside)
    axes.stairs(counts, edges, fill=True, color=SHADES[0.5])
    highest = max(1, counts.max())
    if column.reference is not None:
        inside = max(low, column.reference.min()), min(high, column.reference.max())
        heights, steps = np.histogram(column.reference, bins, inside)
        # As tall as if there were as many draws, in bins as wide.
        scale = len(column.values) / len(column.reference)
        heights = heights * scale * (edges[1] - edges[0]) / (steps[1] - steps[0])
        axes.stairs(heights, steps, color=REFERENCE, linewidth=1.0)
        highest = max(highest, heights.max())
    axes.set_ylim(0, 1.1 * highest)
    if column.truth is not None:
        axes.axvline(column.truth, color=TRUTH, linestyle="--", linewidth=1.1)


def _contours(axes: Axes, across: Column, up: Column) -> None:
    box = across.range, up.range
    centres = [_padded_centres(*ends) for ends in box]
    density = _density(across.values, up.values, box)
    if density.max() > 0:
        levels = np.unique([*_thresholds(density), 1.001 * density.max()])
        colours = list(SHADES.values())[-(len(levels) - 1) :]
        axes.contourf(*centres, density.T, levels=levels, colors=colours)
    if across.reference is not None and up.reference is not None:
        density = _density(across.reference, up.reference, box)
        if density.max() > 0:
            levels = np.unique(_thresholds(density))
            axes.contour(
                *centres, density.T, levels=levels, colors=REFERENCE, linewidths=0.9
            )
    for line, value in ((axes.axvline, across.truth), (axes.axhline, up.truth)):
        if value is not None:
            line(value, color=TRUTH, linestyle="--", linewidth=0.9)


def _thresholds(density: np.ndarray) -> list[float]:
    """Densities above which lie the shares of probability in ``SHADES``."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    last = len(ordered) - 1
    return [float(ordered[min(last, np.searchsorted(mass, s))]) for s in SHADES]


def _density(
    across: np.ndarray, up: np.ndarray, box: tuple[tuple[float, float], ...]
) -> np.ndarray:
    """Smoothed counts in the cells of a box, two more cells on either side."""
    counts = np.histogram2d(across, up, _NUM_CELLS, list(box))[0]
    # Scott's rule; the range is about 6.7 standard deviations wide.
    spread = [
        min(1.0, 6.7 * max(np.std(values), 1e-300) / (high - low))
        for values, (low, high) in zip((across, up), box, strict=True)
    ]
    width = [_NUM_CELLS / 6.7 * len(across) ** (-1 / 6) * share for share in spread]
    return gaussian_filter(np.pad(counts, 2), width, mode="constant")


def _padded_centres(low: float, high: float) -> np.ndarray:
    """Centres of the cells, two more on either side."""
    return low + (high - low) / _NUM_CELLS * (np.arange(_NUM_CELLS + 4) - 1.5)


def _corner_ticks(axes: Axes, bottom: bool, left: bool, num_ticks: int) -> None:
    for axis, shown in ((axes.xaxis, bottom), (axes.yaxis, left)):
        if not shown:
            axis.set_major_locator(NullLocator())
            continue
        axis.set_major_locator(MaxNLocator(num_ticks, prune="both"))
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_scientific(False)
        axis.set_major_formatter(formatter)
    axes.tick_params(labelsize=SMALL - 1, length=2.5, width=0.6, pad=2)
    axes.tick_params(axis="x", labelrotation=45)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


def _corner_label(axes: Axes, label: str, small: bool, *, below: bool) -> None:
    """Put a label at a fixed distance; slanted and nearer where panels are small."""
    distance = 4 if small else 34 if below else 42
    if small:
        label = label.replace("\n", " ")
        style: dict[str, Any] = {"rotation": 45 if below else 0, "ha": "right"}
        style |= {"va": "top" if below else "center", "rotation_mode": "anchor"}
    elif below:
        style = {"ha": "center", "va": "top"}
    else:
        style = {"rotation": 90, "ha": "right", "va": "center"}
    axes.annotate(
        label,
        xy=(0.5, 0.0) if below else (0.0, 0.5),
        xycoords="axes fraction",
        xytext=(0, -distance) if below else (-distance, 0),
        textcoords="offset points",
        multialignment="center",
        fontsize=SMALL,
        **style,
    )
