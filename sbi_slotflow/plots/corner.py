"""Marginals of the parameters, jointly given one cardinality or for each source."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..catalogue import fit_sources
from ..metrics.comparison import Frame
from ..sets.checks import as_row, as_rows
from ..sets.circular import circular_mean, near
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout
from .style import (
    FONT,
    REFERENCE,
    SHADES,
    SMALL,
    TRUTH,
    Figure,
    legend_above,
    padded,
    thinned,
    truth_line,
)

__all__ = ["Column", "draw_corner", "plot_corner", "plot_source_corners"]

_NUM_CELLS = 40


@dataclass(frozen=True)
class Column:
    """One parameter of a corner plot."""

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
    figure: Figure,
    columns: list[Column],
    corner: tuple[float, float],
    size: float,
    small: bool = False,
) -> None:
    """Draw the panels on and below the diagonal of a square grid.

    Its lower left corner and the size of a panel are in inches.
    """
    num = len(columns)
    place = [*corner, *(begin + num * size for begin in corner)]
    sides = np.asarray(place) / np.tile(figure.get_size_inches(), 2)
    ends = dict(zip(("left", "bottom", "right", "top"), sides.tolist(), strict=True))
    grid = figure.add_gridspec(num, num, wspace=0.08, hspace=0.08, **ends)
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
    cells = np.arange(_NUM_CELLS + 4) - 1.5  # two more on either side
    centres = [low + (high - low) / _NUM_CELLS * cells for low, high in box]
    density = _density(across.values, up.values, box)
    if density.max() > 0:
        levels = np.unique([*_thresholds(density), 1.001 * density.max()])
        colours = list(SHADES.values())[-(len(levels) - 1) :]
        axes.contourf(*centres, density.T, levels=levels, colors=colours)
    if across.reference is not None and up.reference is not None:
        density = _density(across.reference, up.reference, box)
        if density.max() > 0:
            style = {"levels": np.unique(_thresholds(density)), "colors": REFERENCE}
            axes.contour(*centres, density.T, linewidths=0.9, **style)
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


def _corner_ticks(axes: Axes, bottom: bool, left: bool, num_ticks: int) -> None:
    for axis, shown in ((axes.xaxis, bottom), (axes.yaxis, left)):
        ticks = MaxNLocator(num_ticks, prune="both") if shown else NullLocator()
        axis.set_major_locator(ticks)
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
    style |= {"multialignment": "center", "fontsize": SMALL}
    shift = (0, -distance) if below else (-distance, 0)
    coords = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(label, (0.5, 0.0) if below else (0.0, 0.5), shift, **coords, **style)


_MOST_DRAWS = 10_000
# Of a source: fewest draws to show, and inches.
_FEWEST_DRAWS = 20
_PANEL, _LEFT, _BOTTOM, _TOP = 0.85, 1.05, 0.85, 0.35


def plot_corner(
    samples: Tensor,
    layout: ThetaLayout,
    k: int | None = None,
    true_theta: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    match: bool = True,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    periods: Mapping[str, float] | None = None,
    labels: tuple[str, str] = ("posterior", "reference"),
) -> Figure:
    """Plot all one- and two-dimensional marginals given one cardinality.

    The contours enclose 50 % and 90 % of the draws. Components come first, then the
    shared parameters. They are matched: each draw's components are assigned to
    :class:`~sbi_slotflow.metrics.ReferencePoints` of the samples, so that a component
    keeps its number where canonical order would swap two that are close. At most
    10,000 draws are used, evenly spaced.

    Args:
        samples: Theta rows, shape ``(S, E)``; those with another cardinality are left
            out.
        layout: Layout of theta.
        k: The cardinality; the most frequent one among the samples if None.
        true_theta: The true row if known, shape ``(E,)`` or ``(1, E)``. Its components
            are marked only if there are k of them, its shared parameters always.
        reference: Theta rows of another posterior, drawn as black lines.
        match: Whether to match components; else they stand in canonical order, as they
            do where a parameter does not vary or there are fewer than 50 draws.
        names: Component and shared parameters to show, as the layout names them; all if
            None. Restrict them where there are many components.
        units: Units of parameters by name, for the labels.
        periods: Periods of circular parameters by name; the layout's if None. These
            are plotted around their circular mean, see
            :func:`~sbi_slotflow.sets.circular.unwrap`, so that a peak at the seam stays
            whole.
        labels: What to call the samples and the reference in the legend.

    Raises:
        TypeError: If samples, reference or ``true_theta`` is not a floating-point
            tensor.
        ValueError: If a shape does not fit, a name is unknown, no sample (or row of the
            reference) has cardinality k, or there is nothing to plot (K = 0 without
            shared parameters).
    """
    _check_one_class(layout)
    periods = layout.periods if periods is None else periods
    _check_names(layout, names or (), units or (), periods)
    samples = as_rows(samples, layout)
    cardinality = layout.cardinality(samples)
    k = int(cardinality.mode().values) if k is None else k
    rows = _given(samples, layout, k, "sample")
    frame = Frame(rows, layout, k, periods, match)
    other = None
    if reference is not None:
        other = as_rows(reference, layout, "reference")
        other = frame.labelled(_given(other, layout, k, "row of the reference"))
    own = frame.labelled(rows)
    true: list[float | None] = [None] * len(frame.names)
    if true_theta is not None:
        row = as_row(true_theta, layout)
        same = int(layout.cardinality(row)) == k
        # On the turn of the circle on which the draws are.
        turns = [periods.get(name, math.inf) for name, _ in frame.names]
        values = near(frame.labelled(row)[0], own.median(0).values, turns).tolist()
        pairs = zip(frame.names, values, strict=True)
        true = [v if same or not number else None for (_, number), v in pairs]
    columns = _columns(frame.names, own, true, units or {}, other)
    pairs = list(zip(columns, frame.names, strict=True))
    pairs = pairs[layout.num_shared :] + pairs[: layout.num_shared]
    columns = [c for c, (name, _) in pairs if names is None or name in names]
    if not columns:
        raise ValueError(f"nothing to plot: K = {k} and no shared parameter.")
    shown = None if other is None else labels
    title = f"Posterior given K = {k} ({len(rows):,} draws)"
    return _corner(columns, title, shown)


def plot_source_corners(
    samples: Tensor,
    layout: ThetaLayout,
    true_theta: Tensor | None = None,
    *,
    min_probability: float = 0.1,
    columns: int = 2,
    units: Mapping[str, str] | None = None,
) -> Figure:
    """Plot the parameters of each source, given that it is there.

    Sources are those of :func:`~sbi_slotflow.catalogue.fit_sources`, found in draws of
    all cardinalities; their titles tell their existence probabilities. At most 10,000
    draws are used, evenly spaced.

    Args:
        samples: Theta rows, shape ``(S, E)``.
        layout: Layout of theta.
        true_theta: The true row if known. Its components are marked in the sources that
            they belong to.
        min_probability: Sources that are less probable are left out.
        columns: Sources in a row.
        units: Units of parameters by name, for the labels.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, a number is out of range, or there is no
            source.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    _check_one_class(layout)
    _check_names(layout, units or {})
    samples = thinned(as_rows(samples, layout), _MOST_DRAWS)
    sources = fit_sources(samples, layout, min_probability=min_probability)
    owner = sources.assign(samples)
    shown = ((owner >= 0).sum(0) >= _FEWEST_DRAWS).nonzero().flatten().tolist()
    if not shown:
        raise ValueError("nothing to plot: the samples have no source.")
    components = layout.unpack(layout.canonical(samples)).components
    truth = None
    if true_theta is not None:
        row = as_row(true_theta, layout)
        true_owner = sources.assign(row)[0]
        true_components = layout.unpack(layout.canonical(row)).components[0].double()
        truth = [true_components[j] if j >= 0 else None for j in true_owner.tolist()]
    size, periods = layout.num_component_params, layout.component_periods
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = columns * (_LEFT + size * _PANEL) + 0.25
    height = rows * (_BOTTOM + size * _PANEL + _TOP) + 0.35
    figure = Figure(figsize=(width, height))
    for number, i in enumerate(shown):
        there = owner[:, i] >= 0
        values = components[there, owner[there, i]].double()
        values = near(values, circular_mean(values, periods), periods)
        true: list[float | None] = [None] * size
        if truth is not None and (found := truth[i]) is not None:
            true = [*near(found, values.median(0).values, periods).tolist()]
        named = [(name, 0) for name in layout.component_names]
        left = (number % columns) * (_LEFT + size * _PANEL) + _LEFT
        top = height - 0.35 - (number // columns) * (_BOTTOM + size * _PANEL + _TOP)
        top -= _TOP
        drawn = _columns(named, values, true, units or {})
        draw_corner(figure, drawn, (left, top - size * _PANEL), _PANEL)
        title = f"Source {i + 1}: there with probability {there.double().mean():.2f}"
        figure.text(
            left / width, (top + 0.08) / height, title, fontsize=FONT, va="bottom"
        )
    handles = _shades() + ([] if truth is None else [truth_line()])
    legend_above(figure, handles, loc="upper right", borderpad=0.2, fontsize=SMALL)
    return figure


def _columns(
    names: Iterable[tuple[str, int]],
    values: Tensor,
    truth: Sequence[float | None],
    units: Mapping[str, str],
    reference: Tensor | None = None,
) -> list[Column]:
    """Columns of ``(S, C)`` values; names are numbered from 1, 0 is no number."""
    return [
        Column(
            (f"{name} {number}" if number else name)
            + (f"\n({units[name]})" if name in units else ""),
            values[:, i].numpy(),
            truth[i],
            None if reference is None else reference[:, i].numpy(),
        )
        for i, (name, number) in enumerate(names)
    ]


def _given(rows: Tensor, layout: ThetaLayout, k: int, name: str) -> Tensor:
    chosen = rows[layout.cardinality(rows) == k]
    if not len(chosen):
        raise ValueError(f"no {name} has cardinality {k}.")
    return thinned(chosen, _MOST_DRAWS)


def _corner(
    columns: list[Column], title: str, labels: tuple[str, str] | None
) -> Figure:
    num = len(columns)
    size = min(1.6, max(0.6, 7.4 / num))  # inches a panel
    small = size < 0.7
    left, bottom, top = (1.25, 1.1, 0.75) if small else (1.05, 0.95, 0.75)
    width, height = left + num * size + 0.35, bottom + num * size + top
    width = max(width, 3.9)
    figure = Figure(figsize=(width, height))
    draw_corner(figure, columns, (left, bottom), size, small)
    edge = left / width
    figure.text(edge, 1 - 0.12 / height, title, fontsize=FONT + 1, va="top")
    handles: list[Artist] = []
    if num > 1:
        handles = _shades()
        for handle in handles:
            of = "" if labels is None else f"{labels[0]}, "
            handle.set_label(f"{of}{handle.get_label()}")
    if labels is not None:
        handles.append(Line2D([], [], color=REFERENCE, label=labels[1]))
    if any(column.truth is not None for column in columns):
        handles.append(truth_line())
    if handles:
        place = {"bbox_to_anchor": (edge, 1 - 0.36 / height), "loc": "upper left"}
        place |= {"borderpad": 0, "borderaxespad": 0, "fontsize": SMALL}
        legend_above(figure, handles, **place)
    return figure


def _check_one_class(layout: ThetaLayout) -> None:
    """Raise ValueError where components have classes: a corner has one."""
    if isinstance(layout, ClassLayout):
        name = layout.class_names[0]
        raise ValueError(
            f"a corner plot shows one class of {layout.class_names}: pass "
            f"layout.view(samples, {name!r}) and layout.of_class({name!r})."
        )


def _check_names(layout: ThetaLayout, *named: Iterable[str]) -> None:
    known = (*layout.component_names, *layout.shared_names)
    if unknown := sorted(set().union(*named) - set(known)):
        raise ValueError(f"unknown parameter(s) {unknown}; there are {list(known)}.")


def _shades() -> list[Artist]:
    """Legend of the contours."""
    return [
        Patch(color=shade, label=f"{share:.0%}".replace("%", " %"))
        for share, shade in reversed(SHADES.items())
    ]
