"""Figures of trans-dimensional posteriors.

Every function returns a ``matplotlib.figure.Figure`` of its own, to save with
``figure.savefig(path)``. None shows it, none touches pyplot or ``rcParams``.

Colours are Okabe and Ito's, which colour-blind readers tell apart: data are grey, the
posterior is blue, the truth is vermilion.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.distributions import Categorical

from .layout import ThetaLayout
from .problems import Problem

__all__ = [
    "plot_cardinality",
    "plot_corner",
    "plot_reconstruction",
    "plot_spectrum",
    "unwrap",
]

_DATA, _POSTERIOR, _TRUTH = "#7f7f7f", "#0072b2", "#d55e00"
_SHADES = {0.9: "#a6cee3", 0.5: "#4a9bca"}  # probability enclosed: colour
_FONT, _SMALL = 9, 8
_MOST_DRAWS = 1_000
_ZERO_PADDING = 8
_NUM_BANDS = 300
_NUM_CELLS = 40


def plot_reconstruction(
    problem: Problem,
    samples: Tensor,
    x: Tensor,
    true_theta: Tensor | None = None,
    *,
    max_points: int = 200,
) -> Figure:
    """Plot data and the posterior of the noise-free signal, a panel for each stream.

    The band holds 90 % of the draws' signals at each sample, all cardinalities
    together; the line is their median. At most 1,000 draws are used, evenly spaced.

    Args:
        problem: A problem. Its attribute ``grids``, if there is one, splits x into
            streams and gives their times in seconds; else x is one stream of samples.
        samples: Theta rows, shape ``(S, E)``.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        true_theta: The true row if known, shape ``(E,)`` or ``(1, E)``.
        max_points: Longer streams are cut to this many samples, and their titles say
            so.

    Returns:
        A figure with one axes a stream.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, or samples are empty or malformed.
    """
    samples = _checked_samples(samples, problem.layout)
    data = _checked_data(x)
    signals = problem.simulator.signal(_thinned(samples, _MOST_DRAWS))
    if signals.shape[-1] != len(data):
        raise ValueError(f"x must have {signals.shape[-1]} entries, got {len(data)}.")
    low, median, high = np.quantile(signals.cpu().numpy(), [0.05, 0.5, 0.95], axis=0)
    truth = None
    if true_theta is not None:
        row = _checked_row(true_theta, problem.layout)
        truth = problem.simulator.signal(row).cpu().numpy()

    streams = _streams(problem, len(data))
    figure = Figure(figsize=(8.0, 0.6 + 2.4 * len(streams)), layout="constrained")
    rows = figure.subplots(len(streams), 1, squeeze=False)[:, 0]
    for axes, stream in zip(rows, streams, strict=True):
        part = slice(stream.start, stream.start + min(stream.num_samples, max_points))
        times = stream.times[: part.stop - part.start]
        axes.plot(times, data[part], ".", color=_DATA, markersize=4)
        axes.fill_between(times, low[part], high[part], color=_SHADES[0.9], linewidth=0)
        axes.plot(times, median[part], color=_POSTERIOR, linewidth=1.3)
        if truth is not None:
            axes.plot(times, truth[part], "--", color=_TRUTH, linewidth=1.1)
        axes.set_xlim(*_padded(times[0], times[-1], 0.01))
        title = stream.title
        if len(times) < stream.num_samples:
            title = f"{title}, first {len(times):,} of {stream.num_samples:,} samples"
        _dress(axes, stream.axis_label, "signal", title)
    handles: list[Artist] = [
        Line2D([], [], color=_DATA, marker=".", linestyle="", label="data"),
        Line2D([], [], color=_POSTERIOR, label="posterior median"),
        Patch(color=_SHADES[0.9], label="90 % band"),
    ]
    if truth is not None:
        handles.append(Line2D([], [], color=_TRUTH, linestyle="--", label="truth"))
    _legend_above(figure, handles)
    return figure


def plot_spectrum(
    problem: Problem,
    samples: Tensor,
    x: Tensor,
    true_theta: Tensor | None = None,
    *,
    frequency: str = "frequency",
    amplitude: str = "amplitude",
) -> Figure:
    r"""Plot the first stream's spectrum with the posterior of frequency and amplitude.

    The lower panel holds the amplitude spectrum

    .. math::
        \hat{A}(f) = \tfrac{2}{N} \left| \sum_n x_n e^{-2\pi i f t_n} \right|

    in which a sinusoid peaks near its amplitude, and the draws' (frequency, amplitude)
    pairs. The upper panel holds the expected number of components per Hz, which needs
    no labels and integrates to E[K | x]. All cardinalities are taken together. Of
    the pairs those of at most 1,000 draws are shown, evenly spaced.

    Args:
        problem: A problem with time ``grids`` and a component parameter in Hz.
        samples: Theta rows, shape ``(S, E)``.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        true_theta: The true row if known, shape ``(E,)`` or ``(1, E)``.
        frequency: Name of the component parameter that is a frequency in Hz.
        amplitude: Name of the component parameter that is an amplitude.

    Returns:
        A figure with two axes.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If the problem has no time grids or no such parameter, a shape does
            not fit, or samples are empty or malformed.
    """
    layout = problem.layout
    samples = _checked_samples(samples, layout)
    data = _checked_data(x)
    if getattr(problem, "grids", None) is None:
        raise ValueError(
            "plot_spectrum needs a problem with time grids (attribute grids), got "
            f"{problem.name!r}."
        )
    index = _component_index(layout, frequency), _component_index(layout, amplitude)
    stream = _streams(problem, len(data))[0]
    grid, spectrum = _amplitude_spectrum(data[: stream.num_samples], stream.rate)
    band = _band(problem, index[0], grid[-1])
    drawn = _active(layout, samples)[:, index].numpy()
    shown = (grid >= band[0]) & (grid <= band[1])

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2]}
    )
    edges = np.linspace(*band, _NUM_BANDS + 1)
    per_hertz = 1 / (len(samples) * (edges[1] - edges[0]))
    counts = np.histogram(drawn[:, 0], edges)[0] * per_hertz
    upper.stairs(counts, edges, fill=True, color=_POSTERIOR)
    upper.set_ylim(0, 1.08 * counts.max() if len(drawn) else 1.0)
    lower.plot(grid[shown], spectrum[shown], color=_DATA, linewidth=1.1)
    handles: list[Artist] = [Line2D([], [], color=_DATA, label="spectrum of the data")]
    if len(drawn):
        # Whole rows are left out: every n-th point may belong to the same component.
        points = _active(layout, _thinned(samples, _MOST_DRAWS))[:, index].numpy()
        lower.plot(*points.T, ".", color=_POSTERIOR, markersize=3, alpha=0.25, mew=0)
        handles.append(
            Line2D([], [], color=_POSTERIOR, marker=".", ls="", label="posterior draws")
        )
    if true_theta is not None:
        true = _active(layout, _checked_row(true_theta, layout)[None])[:, index].numpy()
        for axes in (upper, lower):
            for value in true[:, 0]:
                axes.axvline(value, color=_TRUTH, linestyle="--", linewidth=1, zorder=0)
        if len(true):
            style = {"marker": "+", "ms": 11, "mew": 1.8, "ls": "", "color": _TRUTH}
            lower.plot(*true.T, **style)
            handles.append(Line2D([], [], label="truth", **style))
    lower.set_xlim(*band)
    lower.set_ylim(bottom=0)
    _dress(upper, "", "components per Hz")
    _dress(lower, "frequency (Hz)", "amplitude", f"Spectrum of {stream.title}")
    _legend_above(figure, handles)
    return figure


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
            circular mean, see :func:`unwrap`, so that a peak at the seam stays whole.

    Returns:
        A figure with n (n + 1) / 2 axes for n parameters.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, a name is unknown, no sample has
            cardinality k, or there is nothing to plot (K = 0 without shared
            parameters).
    """
    samples = layout.canonical(_checked_samples(samples, layout))
    cardinality = layout.cardinality(samples)
    k = int(cardinality.mode().values) if k is None else k
    chosen = samples[cardinality == k]
    if not len(chosen):
        raise ValueError(f"no sample has cardinality {k}.")
    truth = None
    if true_theta is not None:
        truth = layout.canonical(_checked_row(true_theta, layout))
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
        fontsize=_FONT + 1,
        va="top",
    )
    handles: list[Artist] = []
    if num > 1:
        handles = [
            Patch(color=shade, label=f"{share:.0%}".replace("%", " %"))
            for share, shade in reversed(_SHADES.items())
        ]
    if any(column.truth is not None for column in columns):
        handles.append(Line2D([], [], color=_TRUTH, linestyle="--", label="truth"))
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(edge, 1 - 0.36 / height),
            ncols=len(handles),
            frameon=False,
            fontsize=_SMALL,
            borderpad=0,
            borderaxespad=0,
        )
    return figure


def plot_cardinality(
    cardinality: Categorical | Tensor | Sequence[float],
    true_cardinality: int | None = None,
) -> Figure:
    """Plot p(K | x) as bars.

    Args:
        cardinality: What ``posterior.cardinality(x)`` returns, or the probabilities of
            K = 0..Kmax, shape ``(Kmax + 1,)``.
        true_cardinality: The true K if known; a triangle marks it.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If the probabilities are not a vector of non-negative numbers that
            add up to 1, or the true K is out of range.
    """
    if isinstance(cardinality, Categorical):
        cardinality = cardinality.probs
    probs = torch.as_tensor(cardinality).detach().cpu().double().numpy()
    if probs.ndim != 1 or not len(probs):
        raise ValueError(
            "cardinality must hold the probabilities of one observation, shape "
            f"(Kmax + 1,), got shape {probs.shape}."
        )
    if not (probs >= 0).all() or abs(probs.sum() - 1) > 1e-3:
        raise ValueError(
            "cardinality must hold probabilities that add up to 1, got "
            f"{probs.tolist()}."
        )
    if true_cardinality is not None and not 0 <= true_cardinality < len(probs):
        raise ValueError(
            f"true_cardinality must lie in 0..{len(probs) - 1}, got {true_cardinality}."
        )
    figure = Figure(figsize=(max(3.2, 1.6 + 0.5 * len(probs)), 3.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    bars = axes.bar(np.arange(len(probs)), probs, width=0.7, color=_POSTERIOR)
    labels = [f"{p:.2f}" if p >= 0.005 else "" for p in probs]
    axes.bar_label(bars, labels, padding=2, fontsize=_SMALL)
    highest = probs.max()
    if true_cardinality is not None:
        where = (true_cardinality, probs[true_cardinality] + 0.13 * highest)
        style = {"marker": "v", "ms": 7, "ls": "", "color": _TRUTH}
        axes.plot(*where, **style)
        _legend_above(figure, [Line2D([], [], label="truth", **style)])
    axes.set_xticks(np.arange(len(probs)))
    axes.set_ylim(0, 1.2 * highest)
    _dress(axes, "number of components K", "p(K | x)")
    return figure


def unwrap(values: Tensor, period: float) -> Tensor:
    r"""Shift circular values by whole periods to within half a period of their mean.

    The circular mean is the angle of :math:`\sum_i e^{2\pi i v_i / P}`, taken in
    [0, P). Medians and quantiles of the shifted values are circular ones, as long as
    the values don't fill the circle.

    Args:
        values: Values of any shape.
        period: The period P.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: If the period is not positive.
    """
    if not period > 0:
        raise ValueError(f"period must be positive, got {period}.")
    angles = values.double() * (2 * math.pi / period)
    mean = torch.atan2(angles.sin().mean(), angles.cos().mean())
    mean = mean.remainder(2 * math.pi) * (period / (2 * math.pi))
    centred = (values - mean + period / 2).remainder(period) - period / 2
    return (centred + mean).to(values.dtype)


@dataclass(frozen=True)
class _Stream:
    """A contiguous part of x with its times."""

    start: int
    times: np.ndarray
    rate: float
    title: str
    axis_label: str

    @property
    def num_samples(self) -> int:
        return len(self.times)


def _streams(problem: Problem, num_data: int) -> list[_Stream]:
    grids = getattr(problem, "grids", None)
    if grids is None:
        return [_Stream(0, np.arange(num_data), 1.0, "", "sample")]
    total = sum(grid.num_samples for grid in grids)
    if total != num_data:
        raise ValueError(f"x must have {total} entries, got {num_data}.")
    streams, start = [], 0
    for number, grid in enumerate(grids, 1):
        title = f"stream {number} ({grid.duration:g} s at {grid.rate:g} Hz)"
        streams.append(_Stream(start, grid.times.numpy(), grid.rate, title, "time (s)"))
        start += grid.num_samples
    return streams


def _amplitude_spectrum(data: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    padded = _ZERO_PADDING * len(data)
    spectrum = np.abs(np.fft.rfft(data, padded)) * 2 / len(data)
    return np.fft.rfftfreq(padded, 1 / rate), spectrum


def _band(problem: Problem, index: int, nyquist: float) -> tuple[float, float]:
    """The prior's range of the frequency and a margin, within 0..Nyquist."""
    low, high = problem.prior.component_marginals[index].bounds
    if not math.isfinite(high - low):
        return 0.0, nyquist
    low, high = _padded(low, high, 0.1)
    return max(0.0, low), min(nyquist, high)


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
        return _padded(low, high, 0.15)

    @property
    def limits(self) -> tuple[float, float]:
        """The range, widened to show the truth."""
        low, high = self.range
        if self.truth is None or low <= self.truth <= high:
            return low, high
        return _padded(min(low, self.truth), max(high, self.truth), 0.05)


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
    axes.stairs(counts, edges, fill=True, color=_SHADES[0.5])
    axes.set_ylim(0, 1.1 * max(1, counts.max()))
    if column.truth is not None:
        axes.axvline(column.truth, color=_TRUTH, linestyle="--", linewidth=1.1)


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
            colors=list(_SHADES.values())[-(len(levels) - 1) :],
        )
    for line, value in ((axes.axvline, across.truth), (axes.axhline, up.truth)):
        if value is not None:
            line(value, color=_TRUTH, linestyle="--", linewidth=0.9)


def _thresholds(density: np.ndarray) -> list[float]:
    """Densities above which lie the shares of probability in ``_SHADES``."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    last = len(ordered) - 1
    return [float(ordered[min(last, np.searchsorted(mass, s))]) for s in _SHADES]


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
    axes.tick_params(labelsize=_SMALL - 1, length=2.5, width=0.6, pad=2)
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
        fontsize=_SMALL,
        **style,
    )


def _dress(axes: Axes, x_label: str, y_label: str, title: str = "") -> None:
    axes.set_xlabel(x_label, fontsize=_FONT)
    axes.set_ylabel(y_label, fontsize=_FONT)
    title = title[:1].upper() + title[1:]
    axes.set_title(title, fontsize=_FONT, loc="left")
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=_FONT,
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = share * (high - low)
    return low - margin, high + margin


def _thinned(samples: Tensor, most: int) -> Tensor:
    return samples[:: math.ceil(len(samples) / most)]


def _active(layout: ThetaLayout, samples: Tensor) -> Tensor:
    """All components of all rows, shape ``(n, D)``."""
    parts = layout.unpack(samples)
    return parts.components[parts.mask]


def _component_index(layout: ThetaLayout, name: str) -> int:
    if name not in layout.component_names:
        raise ValueError(
            f"no component parameter {name!r}; there are "
            f"{list(layout.component_names)}."
        )
    return layout.component_names.index(name)


def _checked_samples(samples: Tensor, layout: ThetaLayout) -> Tensor:
    layout.validate(samples, "samples")
    if samples.ndim != 2 or not len(samples):
        raise ValueError(
            f"samples must have shape (S, {layout.size}) with S >= 1, got "
            f"{tuple(samples.shape)}."
        )
    return samples.detach().cpu()


def _checked_row(theta: Tensor, layout: ThetaLayout) -> Tensor:
    """One theta row, shape ``(E,)``."""
    layout.validate(theta, "true_theta")
    if theta.numel() != layout.size:
        raise ValueError(f"true_theta must be one row, got {tuple(theta.shape)}.")
    return theta.detach().cpu().reshape(-1)


def _checked_data(x: Tensor) -> np.ndarray:
    """One observation, shape ``(T,)``."""
    if x.ndim not in (1, 2) or x.numel() != x.shape[-1]:
        raise ValueError(
            f"x must be one observation, (T,) or (1, T), got {tuple(x.shape)}."
        )
    return x.detach().cpu().reshape(-1).numpy()
