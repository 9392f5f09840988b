"""Figures of ranks: their ECDF less the diagonal, in its simultaneous band."""

import math
from collections.abc import Collection, Mapping

import numpy as np

from ..plots.figure import Figure
from ..plots.style import POSTERIOR, SHADES, TRUTH, dress
from .uniformity import Array, ecdf_band

__all__ = ["plot_ecdf_differences"]

_COLUMNS = 3


def plot_ecdf_differences(
    values: Mapping[str, Array],
    level: float,
    x_label: str,
    failures: Collection[str],
) -> Figure:
    """Draw a panel for each set of numbers that should be uniform.

    The line of what failed is vermilion.

    Args:
        values: Numbers in [0, 1] by name, each ``(n,)``.
        level: Level of a panel's p-value; half of it is the band's, see
            :func:`~sbi_slotflow.calibration.rank_p_value`.
        x_label: What the numbers are.
        failures: Names of those that failed.
    """
    rows, columns = -(-len(values) // _COLUMNS), min(len(values), _COLUMNS)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.0 * rows + 0.3))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(values) :]:
        axes.set_visible(False)
    for i, (axes, (name, u)) in enumerate(
        zip(panels.flat, values.items(), strict=False)
    ):
        num = len(u)
        points, lower, upper = ecdf_band(num, 0.5 * level)
        axes.fill_between(
            points, lower - points, upper - points, step="post", color=SHADES[0.9], lw=0
        )
        grid = np.concatenate([[0.0], np.sort(u), [1.0]])
        ecdf = np.concatenate([np.arange(num + 1), [num]]) / num
        axes.step(
            grid,
            ecdf - grid,
            where="post",
            lw=1.2,
            color=TRUTH if name in failures else POSTERIOR,
        )
        axes.axhline(0.0, color="black", lw=0.6)
        last_row = i + columns >= len(values)
        dress(
            axes,
            x_label if last_row else "",
            "ECDF difference" if i % columns == 0 else "",
            f"{name} (n = {num})",
        )
        bound = 1.15 * max(
            math.sqrt(1 / num), np.abs(ecdf - grid).max(), _widest(points, lower, upper)
        )
        axes.set_ylim(-bound, bound)
        axes.set_xlim(0, 1)
    return figure


def _widest(points: Array, lower: Array, upper: Array) -> float:
    return float(np.maximum(upper - points, points - lower).max())
