"""The figure of :class:`~sbi_slotflow.calibration.Residuals`."""

from typing import TYPE_CHECKING

import numpy as np

from ..plots.figure import Figure
from ..plots.style import POSTERIOR, SHADES, dress

if TYPE_CHECKING:
    from .residuals import Residuals

__all__ = ["plot_residuals"]


def plot_residuals(check: "Residuals") -> Figure:
    """Plot the residuals' spectrum and autocorrelation, a row for each stream."""
    num = len(check.streams)
    figure = Figure(figsize=(8.0, 2.5 * num + 0.3))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(num, 2, squeeze=False)
    for i, ((left, right), stream) in enumerate(
        zip(panels, check.streams, strict=True)
    ):
        label = "" if num == 1 else f", stream {i + 1}"
        left.fill_between(
            stream.frequency, *stream.spectrum_range, color=SHADES[0.9], lw=0
        )
        left.plot(stream.frequency, stream.spectrum, "o-", color=POSTERIOR, ms=3, lw=1)
        left.axhline(1.0, color="black", lw=0.6)
        last = i == num - 1
        x_label = "frequency (cycles per sample)" if last else ""
        dress(left, x_label, "power / noise", f"spectrum{label}")
        lags = np.arange(1, len(stream.autocorrelation) + 1)
        low, high = stream.autocorrelation_range
        right.vlines(lags, low, high, color=SHADES[0.9], lw=9)
        right.plot(lags, stream.autocorrelation, "o", color=POSTERIOR, ms=4)
        right.axhline(0.0, color="black", lw=0.6)
        right.set_xticks(lags)
        right.set_xlim(0.4, len(lags) + 0.6)
        dress(right, "lag (samples)" if last else "", "autocorrelation", label[2:])
    return figure
