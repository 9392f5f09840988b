"""The spectrum of the data with the posterior of frequency and amplitude."""

import math
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from ...catalogue import fit_sources
from ...plots.style import (
    CYCLE,
    DATA,
    POSTERIOR,
    SMALL,
    TRUTH,
    Figure,
    dress,
    legend_above,
    padded,
    thinned,
)
from ...sets.checks import as_observation, as_row, as_rows
from ...sets.layout import ThetaLayout
from ..base import Problem

__all__ = ["plot_spectrum"]

_MOST_DRAWS = 1_000
_ZERO_PADDING = 8
_NUM_BANDS = 300
# Existence above which there is nothing to say.
_SURE = 0.995
# Probabilities that stand below each other at most.
_MOST_LINES = 4
# A component's frequency and amplitude among its parameters.
_PLACE = [2, 0]


def plot_spectrum(
    problem: Problem,
    rate: float,
    samples: Tensor,
    x: Tensor,
    true_theta: Tensor | None = None,
) -> Figure:
    r"""Plot the first stream's spectrum with the posterior of frequency and amplitude.

    The lower panel holds the amplitude spectrum

    .. math::
        \hat{A}(f) = \tfrac{2}{N} \left| \sum_n x_n e^{-2\pi i f t_n} \right|

    in which a sinusoid peaks near its amplitude, and the draws' (frequency, amplitude)
    pairs, each source of :func:`~sbi_slotflow.catalogue.fit_sources` in a colour of its
    own and with a cross for its 90 % intervals. Where a source's existence is less
    certain than 99.5 %, its probability stands above. Draws that belong to no source,
    or to one that spreads over a tenth of the band, are grey. Of the pairs those of at
    most 1,000 draws are shown, evenly spaced.

    The upper panel holds the expected number of components per Hz, which needs no
    labels and integrates to E[K | x]. All cardinalities are taken together.

    ``rate`` is the sampling rate of the first stream; for the rest see
    :func:`sbi_slotflow.plots.plot_spectrum`.
    """
    layout = problem.layout
    samples = as_rows(samples, layout)
    data = as_observation(x)[0].numpy()
    if len(data) != problem.num_data:
        raise ValueError(f"x must have {problem.num_data} entries, got {len(data)}.")
    stream = problem.streams[0]
    grid, spectrum = _amplitude_spectrum(data[: stream.num_samples], rate)
    band = _band(problem, grid[-1])
    drawn = _active(layout, samples)[:, _PLACE].numpy()
    shown = (grid >= band[0]) & (grid <= band[1])

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2]}
    )
    edges = np.linspace(*band, _NUM_BANDS + 1)
    per_hertz = 1 / (len(samples) * (edges[1] - edges[0]))
    counts = np.histogram(drawn[:, 0], edges)[0] * per_hertz
    upper.stairs(counts, edges, fill=True, color=POSTERIOR)
    upper.set_ylim(0, 1.08 * counts.max() if len(drawn) else 1.0)
    lower.set_xlim(*band)
    lower.plot(grid[shown], spectrum[shown], color=DATA, linewidth=1.1)
    handles: list[Artist] = [Line2D([], [], color=DATA, label="spectrum of the data")]
    if len(drawn):
        _draw_sources(lower, layout, samples)
        handles.append(
            Line2D([], [], color=POSTERIOR, marker=".", ls="", label="posterior draws")
        )
    if true_theta is not None:
        true = _active(layout, as_row(true_theta, layout))[:, _PLACE].numpy()
        for axes in (upper, lower):
            for value in true[:, 0]:
                axes.axvline(value, color=TRUTH, linestyle="--", linewidth=1, zorder=0)
        if len(true):
            style = {"marker": "+", "ms": 11, "mew": 1.8, "ls": "", "color": TRUTH}
            lower.plot(*true.T, **style)
            handles.append(Line2D([], [], label="truth", **style))
    lower.set_ylim(0, 1.2 * lower.get_ylim()[1])
    dress(upper, "", "components per Hz")
    dress(lower, "frequency (Hz)", "amplitude", f"Spectrum of {stream.title}")
    legend_above(figure, handles)
    return figure


def _draw_sources(axes: Axes, layout: ThetaLayout, samples: Tensor) -> None:
    """Draw the components of at most 1,000 draws, coloured by source."""
    # Whole rows are left out: every n-th point may belong to the same component.
    rows = layout.canonical(thinned(samples, _MOST_DRAWS))
    sources = fit_sources(samples, layout)
    owner = sources.assign(rows)
    parts = layout.unpack(rows)
    free = parts.mask.clone()
    style: dict[str, Any] = {"marker": ".", "ls": "", "ms": 3, "alpha": 0.25, "mew": 0}
    placed: list[tuple[float, int]] = []
    width = float(np.diff(axes.get_xlim())[0])
    for i in range(len(sources)):
        there = (owner[:, i] >= 0).nonzero().flatten()
        points = parts.components[there, owner[there, i]][:, _PLACE].numpy()
        if not len(points):
            continue
        low, middle, high = np.quantile(points, [0.05, 0.5, 0.95], axis=0)
        if high[0] - low[0] > 0.1 * width:
            continue
        free[there, owner[there, i]] = False
        colour = CYCLE[i % len(CYCLE)]
        axes.plot(*points.T, color=colour, **style)
        reach = np.stack([middle - low, high - middle]).T
        x, y = middle
        axes.errorbar(x, y, reach[1:].T, reach[:1].T, color=colour, elinewidth=1.2)
        probability = float(sources.existence[i])
        if probability < _SURE:
            _write_above(axes, float(sources.centre[i, _PLACE[0]]), probability, placed)
    if placed:
        where: dict[str, Any] = {"xycoords": "axes fraction"}
        where |= {"textcoords": "offset points", "fontsize": SMALL}
        axes.annotate("probability:", (0, 1), xytext=(4, -9), **where)
    loose = parts.components[free][:, _PLACE].numpy()
    if len(loose):
        axes.plot(*loose.T, color=DATA, zorder=1, **style)


def _write_above(
    axes: Axes, place: float, value: float, placed: list[tuple[float, int]]
) -> None:
    """Write a probability above a place, lower where it would hide another."""
    low, high = axes.get_xlim()
    taken = {at for other, at in placed if abs(place - other) < 0.05 * (high - low)}
    level = min(set(range(_MOST_LINES)) - taken, default=0)
    where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center"}
    where |= {"textcoords": "offset points", "fontsize": SMALL}
    text = f"{value:.2f}"
    axes.annotate(text, (place, 1.0), xytext=(0, -9 - 10 * level), **where)
    placed.append((place, level))


def _amplitude_spectrum(data: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    length = _ZERO_PADDING * len(data)
    spectrum = np.abs(np.fft.rfft(data, length)) * 2 / len(data)
    return np.fft.rfftfreq(length, 1 / rate), spectrum


def _band(problem: Problem, nyquist: float) -> tuple[float, float]:
    """The prior's range of the frequency and a margin, within 0..Nyquist."""
    low, high = problem.prior.component_marginals[_PLACE[0]].bounds
    if not math.isfinite(high - low):
        return 0.0, nyquist
    low, high = padded(low, high, 0.1)
    return max(0.0, low), min(nyquist, high)


def _active(layout: ThetaLayout, samples: Tensor) -> Tensor:
    """All components of all rows, shape ``(n, D)``."""
    parts = layout.unpack(samples)
    return parts.components[parts.mask]
