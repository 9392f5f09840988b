"""Corner plots of the sources of a catalogue, one for each."""

import math
from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from ..catalogue import fit_sources
from ..sets.circular import unwrap
from ..sets.layout import ThetaLayout
from .checks import checked_row, checked_samples, thinned
from .corner_panels import Column, draw_corner
from .style import FONT, SHADES, SMALL, TRUTH, Figure

__all__ = ["plot_source_corners"]

_MOST_DRAWS = 10_000
_FEWEST_DRAWS = 20
_PANEL, _LEFT, _BOTTOM, _TOP = 0.85, 1.05, 0.85, 0.35  # inches


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

    Returns:
        A figure with D (D + 1) / 2 axes for each source of at least 20 draws.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, a number is out of range, or there is no
            source.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    samples = thinned(checked_samples(samples, layout), _MOST_DRAWS)
    sources = fit_sources(samples, layout, min_probability=min_probability)
    owner = sources.assign(samples)
    shown = ((owner >= 0).sum(0) >= _FEWEST_DRAWS).nonzero().flatten().tolist()
    if not shown:
        raise ValueError("nothing to plot: the samples have no source.")
    components = layout.unpack(layout.canonical(samples)).components
    truth = None
    if true_theta is not None:
        row = checked_row(true_theta, layout).unsqueeze(0)
        true_owner = sources.assign(row)[0]
        true_components = layout.unpack(layout.canonical(row)).components[0]
        truth = [true_components[j] if j >= 0 else None for j in true_owner.tolist()]
    size = layout.num_component_params
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = columns * (_LEFT + size * _PANEL) + 0.25
    height = rows * (_BOTTOM + size * _PANEL + _TOP) + 0.35
    figure = Figure(figsize=(width, height))
    for number, i in enumerate(shown):
        there = owner[:, i] >= 0
        values = components[there, owner[there, i]]
        true = None if truth is None else truth[i]
        parameters = _columns(values, true, layout, units or {})
        left = (number % columns) * (_LEFT + size * _PANEL) + _LEFT
        top = height - 0.35 - (number // columns) * (_BOTTOM + size * _PANEL + _TOP)
        top -= _TOP
        grid = figure.add_gridspec(
            size,
            size,
            left=left / width,
            right=(left + size * _PANEL) / width,
            bottom=(top - size * _PANEL) / height,
            top=top / height,
            wspace=0.08,
            hspace=0.08,
        )
        draw_corner(figure, grid, parameters, small=False)
        title = f"Source {i + 1}: there with probability {there.double().mean():.2f}"
        figure.text(
            left / width, (top + 0.08) / height, title, fontsize=FONT, va="bottom"
        )
    handles: list[Artist] = [
        Patch(color=shade, label=f"{share:.0%}".replace("%", " %"))
        for share, shade in reversed(SHADES.items())
    ]
    if truth is not None:
        handles.append(Line2D([], [], color=TRUTH, linestyle="--", label="truth"))
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL,
        borderpad=0.2,
    )
    return figure


def _columns(
    values: Tensor,
    truth: Tensor | None,
    layout: ThetaLayout,
    units: Mapping[str, str],
) -> list[Column]:
    columns = []
    for d, name in enumerate(layout.component_names):
        draws, period = values[:, d].double(), layout.component_periods[d]
        true = None if truth is None else float(truth[d])
        if math.isfinite(period):
            draws = unwrap(draws, period)
            if true is not None:
                true += period * round((float(draws.median()) - true) / period)
        label = f"{name}\n({units[name]})" if name in units else name
        columns.append(Column(label, draws.numpy(), true))
    return columns
