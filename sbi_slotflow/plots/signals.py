"""Data and posterior in the time and frequency domains."""

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from ..sets.checks import as_observation, as_row, as_rows
from .style import (
    DATA,
    POSTERIOR,
    SHADES,
    TRUTH,
    Figure,
    dress,
    legend_above,
    padded,
    thinned,
    truth_line,
)

_MOST_DRAWS = 1_000


def plot_reconstruction(
    problem: Any,
    samples: Tensor,
    x: Tensor,
    true_theta: Tensor | None = None,
    *,
    max_points: int | None = None,
) -> Figure:
    """Plot data and the posterior of the noise-free signal, a panel for each stream.

    The band holds 90 % of the draws' signals at each sample, all cardinalities
    together; the line is their median. At most 1,000 draws are used, evenly spaced.

    Args:
        problem: A :class:`~sbi_slotflow.Problem`; its ``streams`` split x and give
            times.
        samples: Theta rows, shape ``(S, E)``.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        true_theta: The true row if known, shape ``(E,)`` or ``(1, E)``.
        max_points: Longer streams are cut to this many samples, and their titles say
            so; those of more than 512 to 200 if None.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, or samples are empty or malformed.
    """
    samples = as_rows(samples, problem.layout)
    data = as_observation(x)[0].numpy()
    signals = problem.simulator.signal(thinned(samples, _MOST_DRAWS))
    if signals.shape[-1] != len(data):
        raise ValueError(f"x must have {signals.shape[-1]} entries, got {len(data)}.")
    low, median, high = np.quantile(signals.cpu().numpy(), [0.05, 0.5, 0.95], axis=0)
    truth = None
    if true_theta is not None:
        row = as_row(true_theta, problem.layout)[0]
        truth = problem.simulator.signal(row).cpu().numpy()

    streams = problem.streams
    figure = Figure(figsize=(8.0, 0.6 + 2.4 * len(streams)), layout="constrained")
    rows = figure.subplots(len(streams), 1, squeeze=False)[:, 0]
    start = 0
    for axes, stream in zip(rows, streams, strict=True):
        most = max_points or (512 if stream.num_samples <= 512 else 200)
        part = slice(start, start + min(stream.num_samples, most))
        start += stream.num_samples
        times = stream.times[: part.stop - part.start]
        axes.plot(times, data[part], ".", color=DATA, markersize=4)
        axes.fill_between(times, low[part], high[part], color=SHADES[0.9], linewidth=0)
        axes.plot(times, median[part], color=POSTERIOR, linewidth=1.3)
        if truth is not None:
            axes.plot(times, truth[part], "--", color=TRUTH, linewidth=1.1)
        axes.set_xlim(*padded(times[0], times[-1], 0.01))
        title = stream.title
        if len(times) < stream.num_samples:
            shown = f"first {len(times):,} of {stream.num_samples:,} samples"
            title = f"{title}, {shown}" if title else shown
        dress(axes, stream.axis_label, "signal", title)
    handles: list[Artist] = [
        Line2D([], [], color=DATA, marker=".", linestyle="", label="data"),
        Line2D([], [], color=POSTERIOR, label="posterior median"),
        Patch(color=SHADES[0.9], label="90 % band"),
    ]
    if truth is not None:
        handles.append(truth_line())
    legend_above(figure, handles)
    return figure


def plot_spectrum(
    problem: Any, samples: Tensor, x: Tensor, true_theta: Tensor | None = None
) -> MatplotlibFigure:
    """Plot the spectrum of x with the posterior of frequency and amplitude.

    The problem must have one, as ``problems.sinusoids(...)`` does; the arguments are
    those of :func:`plot_reconstruction`.
    """
    return problem.plot_spectrum(samples, x, true_theta)
