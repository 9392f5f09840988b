"""Marginals of the parameters given one cardinality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..circular import unwrap
from ..layout import ThetaLayout
from .checks import checked_row, checked_samples
from .style import FONT, SHADES, SMALL, TRUTH, padded

_NUM_CELLS = 40


def plot_corner(
    samples: Tensor,
    layout: ThetaLayout,
    k: int | None = None,
    true_theta: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    periods: Mapping[str, float] | None = None,
) -> Figure:
    """Plot all one- and two-dimensional marginals given one cardinality.

    Components come in canonical order, then the shared parameters. The contours enclose
    50 % and 90 % of the draws.

    Args:
        samples: Theta rows, shape ``(S, E)``; those with another cardinality are left
            out.
        layout: Layout of theta.
        k: The cardinality; the most frequent one among the samples if None.
        true_theta: The true row if known, shape ``(E,)`` or ``(1, E)``. Its components
            are marked only if there are k of them, its shared parameters always.
        names: Component and shared parameters to show, as the layout names them; all if
            None. Restrict them where there are many components.
        units: Units of parameters by name, for the labels.
        periods: Periods of circular parameters by name. These are plotted around their
            circular mean, see :func:`~sbi_slotflow.circular.unwrap`, so that a peak at
            the seam stays whole.

    Returns:
        A figure with n (n + 1) / 2 axes for n parameters.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, a name is unknown, no sample has
            cardinality k, or there is nothing to plot (K = 0 without shared
            parameters).
    """
    samples = layout.canonical(checked_samples(samples, layout))
    cardinality = layout.cardinality(samples)
    k = int(cardinality.mode().values) if k is None else k
    chosen = samples[cardinality == k]
    if not len(chosen):
        raise ValueError(f"no sample has cardinality {k}.")
    truth = None
    if true_theta is not None:
        truth = layout.canonical(checked_row(true_theta, layout))
    columns = _columns(chosen, layout, k, truth, names, units or {}, periods or {})

    num = len(columns)
    size = min(1.6, max(0.6, 11.0 / num))  # inches a panel
    small = size < 0.8
    left, bottom, top = (1.25, 1.1, 0.75) if small else (0.95, 0.95, 0.75)
    width, height = left + num * size + 0.35, bottom + num * size + top
    width = max(width, 3.9)
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        num,
        num,
        left=left / width,
        right=(left + num * size) / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=0.08,
        hspace=0.08,
    )
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
            _corner_ticks(axes, bottom=last and not small, left=first and not small)
            if last:
                _corner_label(axes, column.label, small, below=True)
            if first:
                _corner_label(axes, row.label, small, below=False)
    edge = left / width
    figure.text(
        edge,
        1 - 0.12 / height,
        f"Posterior given K = {k} ({len(chosen):,} draws)",
        fontsize=FONT + 1,
        va="top",
    )
    handles: list[Artist] = []
    if num > 1:
        handles = [
            Patch(color=shade, label=f"{share:.0%}".replace("%", " %"))
            for share, shade in reversed(SHADES.items())
        ]
    if any(column.truth is not None for column in columns):
        handles.append(Line2D([], [], color=TRUTH, linestyle="--", label="truth"))
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(edge, 1 - 0.36 / height),
            ncols=len(handles),
            frameon=False,
            fontsize=SMALL,
            borderpad=0,
            borderaxespad=0,
        )
    return figure


@dataclass(frozen=True)
class _Column:
    """One parameter of a corner plot."""

    label: str
    values: np.ndarray
    truth: float | None

    @property
    def range(self) -> tuple[float, float]:
        """Where the draws are, the outermost percent aside."""
        low, high = np.quantile(self.values, [0.005, 0.995])
        if high - low < 1e-9 * max(1.0, abs(low)):
            return low - 0.5, high + 0.5
        return padded(low, high, 0.15)

    @property
    def limits(self) -> tuple[float, float]:
        """The range, widened to show the truth."""
        low, high = self.range
        if self.truth is None or low <= self.truth <= high:
            return low, high
        return padded(min(low, self.truth), max(high, self.truth), 0.05)


def _columns(
    chosen: Tensor,
    layout: ThetaLayout,
    k: int,
    truth: Tensor | None,
    names: Sequence[str] | None,
    units: Mapping[str, str],
    periods: Mapping[str, float],
) -> list[_Column]:
    known = (*layout.component_names, *layout.shared_names)
    unknown = sorted({*(names or ()), *units, *periods} - set(known))
    if unknown:
        raise ValueError(f"unknown parameter(s) {unknown}; there are {list(known)}.")
    draws = layout.unpack(chosen)
    true = None if truth is None else layout.unpack(truth)
    same = true is not None and int(true.cardinality) == k

    def column(name: str, number: str, values: Tensor, true: Tensor | None) -> _Column:
        if name in periods:
            period = periods[name]
            values = unwrap(values, period)
            if true is not None:
                turns = ((values.median() - true) / period).round()
                true = true + turns * period
        unit = f"\n({units[name]})" if name in units else ""
        label = f"{name}{number}{unit}"
        return _Column(label, values.numpy(), None if true is None else float(true))

    columns = [
        column(
            name,
            f" {slot + 1}",
            draws.components[:, slot, i],
            true.components[slot, i] if true is not None and same else None,
        )
        for slot in range(k)
        for i, name in enumerate(layout.component_names)
        if names is None or name in names
    ]
    columns += [
        column(name, "", draws.shared[:, i], None if true is None else true.shared[i])
        for i, name in enumerate(layout.shared_names)
        if names is None or name in names
    ]
    if not columns:
        raise ValueError(f"nothing to plot: K = {k} and no shared parameter.")
    return columns


def _histogram(axes: Axes, column: _Column) -> None:
    bins = int(np.clip(1.5 * len(column.values) ** (1 / 3), 8, 40))
    low, high = column.range
    inside = max(low, column.values.min()), min(high, column.values.max())
    counts, edges = np.histogram(column.values, bins, inside)
    axes.stairs(counts, edges, fill=True, color=SHADES[0.5])
    axes.set_ylim(0, 1.1 * max(1, counts.max()))
    if column.truth is not None:
        axes.axvline(column.truth, color=TRUTH, linestyle="--", linewidth=1.1)


def _contours(axes: Axes, across: _Column, up: _Column) -> None:
    counts, x_edges, y_edges = np.histogram2d(
        across.values, up.values, _NUM_CELLS, [across.range, up.range]
    )
    # Scott's rule; the range is about 6.7 standard deviations wide.
    width = _NUM_CELLS / 6.7 * len(across.values) ** (-1 / 6)
    density = gaussian_filter(np.pad(counts, 2), width, mode="constant")
    if density.max() > 0:
        levels = np.unique([*_thresholds(density), 1.001 * density.max()])
        axes.contourf(
            _padded_centres(x_edges),
            _padded_centres(y_edges),
            density.T,
            levels=levels,
            colors=list(SHADES.values())[-(len(levels) - 1) :],
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


def _padded_centres(edges: np.ndarray) -> np.ndarray:
    """Centres of the bins, two more on either side."""
    step = edges[1] - edges[0]
    return edges[0] + step * (np.arange(len(edges) + 3) - 1.5)


def _corner_ticks(axes: Axes, *, bottom: bool, left: bool) -> None:
    for axis, shown in ((axes.xaxis, bottom), (axes.yaxis, left)):
        if not shown:
            axis.set_major_locator(NullLocator())
            continue
        axis.set_major_locator(MaxNLocator(3, prune="both"))
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_scientific(False)
        axis.set_major_formatter(formatter)
    axes.tick_params(labelsize=SMALL - 1, length=2.5, width=0.6, pad=2)
    axes.tick_params(axis="x", labelrotation=45)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


def _corner_label(axes: Axes, label: str, small: bool, *, below: bool) -> None:
    """Put a label at a fixed distance; slanted and nearer where panels are small."""
    distance = 4 if small else 34
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
