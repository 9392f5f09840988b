"""Marginals of the parameters, jointly given one cardinality or for each source."""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from ..catalogue import fit_sources
from ..metrics.labels import Frame
from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout
from .checks import checked_row, checked_samples, thinned
from .corner_panels import Column, draw_corner
from .style import FONT, REFERENCE, SHADES, SMALL, TRUTH, Figure

__all__ = ["plot_corner", "plot_source_corners"]

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

    Returns:
        A figure with n (n + 1) / 2 axes for n parameters.

    Raises:
        TypeError: If samples, reference or ``true_theta`` is not a floating-point
            tensor.
        ValueError: If a shape does not fit, a name is unknown, no sample (or row of the
            reference) has cardinality k, or there is nothing to plot (K = 0 without
            shared parameters).
    """
    periods = layout.periods if periods is None else periods
    _check_names(layout, names or (), units or (), periods)
    samples = checked_samples(samples, layout)
    cardinality = layout.cardinality(samples)
    k = int(cardinality.mode().values) if k is None else k
    rows = _given(samples, layout, k, "sample")
    frame = Frame(rows, layout, k, periods, match)
    other = None
    if reference is not None:
        other = checked_samples(reference, layout, "reference")
        other = _given(other, layout, k, "row of the reference")
    true: list[float | None] = [None] * len(frame.names)
    if true_theta is not None:
        row = checked_row(true_theta, layout).unsqueeze(0)
        same = int(layout.cardinality(row)) == k
        # On the turn of the circle on which the draws are.
        turns = [periods.get(name, math.inf) for name, _ in frame.names]
        middle = frame.labelled(rows).median(0).values
        values = near(frame.labelled(row)[0], middle, turns).tolist()
        pairs = zip(frame.names, values, strict=True)
        true = [v if same or not number else None for (_, number), v in pairs]
    columns = _columns(frame, rows, other, true, names, units or {})
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

    Returns:
        A figure with D (D + 1) / 2 axes for each source of at least 20 draws.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If a shape does not fit, a number is out of range, or there is no
            source.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    _check_names(layout, units or {})
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
        parameters = _source_columns(values, true, layout, units or {})
        left = (number % columns) * (_LEFT + size * _PANEL) + _LEFT
        top = height - 0.35 - (number // columns) * (_BOTTOM + size * _PANEL + _TOP)
        top -= _TOP
        place = (left, top - size * _PANEL, left + size * _PANEL, top)
        draw_corner(figure, _grid(figure, size, place), parameters, small=False)
        title = f"Source {i + 1}: there with probability {there.double().mean():.2f}"
        figure.text(
            left / width, (top + 0.08) / height, title, fontsize=FONT, va="bottom"
        )
    handles = _shades() + ([] if truth is None else [_truth_line()])
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
    frame: Frame,
    rows: Tensor,
    reference: Tensor | None,
    true: list[float | None],
    names: Sequence[str] | None,
    units: Mapping[str, str],
) -> list[Column]:
    """The parameters to show: components, then shared ones."""
    own = frame.labelled(rows).numpy()
    other = None if reference is None else frame.labelled(reference).numpy()
    order = sorted(enumerate(frame.names), key=lambda entry: entry[1][1] == 0)
    return [
        Column(
            (f"{name} {number}" if number else name) + _unit(name, units),
            own[:, index],
            true[index],
            None if other is None else other[:, index],
        )
        for index, (name, number) in order
        if names is None or name in names
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
    place = (left, bottom, left + num * size, bottom + num * size)
    draw_corner(figure, _grid(figure, num, place), columns, small)
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
        handles.append(_truth_line())
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


def _source_columns(
    values: Tensor,
    truth: Tensor | None,
    layout: ThetaLayout,
    units: Mapping[str, str],
) -> list[Column]:
    periods = layout.component_periods
    values = values.double()
    values = near(values, circular_mean(values, periods), periods)
    true: list[float | None] = [None] * len(periods)
    if truth is not None:
        true = [*near(truth.double(), values.median(0).values, periods).tolist()]
    columns = zip(layout.component_names, values.unbind(-1), true, strict=True)
    return [
        Column(name + _unit(name, units), draws.numpy(), value)
        for name, draws, value in columns
    ]


def _check_names(layout: ThetaLayout, *named: Iterable[str]) -> None:
    known = (*layout.component_names, *layout.shared_names)
    if unknown := sorted(set().union(*named) - set(known)):
        raise ValueError(f"unknown parameter(s) {unknown}; there are {list(known)}.")


def _unit(name: str, units: Mapping[str, str]) -> str:
    return f"\n({units[name]})" if name in units else ""


def _grid(
    figure: Figure, num: int, place: tuple[float, float, float, float]
) -> GridSpec:
    """A square grid of panels at (left, bottom, right, top) in inches."""
    width, height = figure.get_size_inches()
    left, bottom, right, top = place
    return figure.add_gridspec(
        num,
        num,
        left=left / width,
        right=right / width,
        bottom=bottom / height,
        top=top / height,
        wspace=0.08,
        hspace=0.08,
    )


def _shades() -> list[Artist]:
    """Legend of the contours."""
    return [
        Patch(color=shade, label=f"{share:.0%}".replace("%", " %"))
        for share, shade in reversed(SHADES.items())
    ]


def _truth_line() -> Line2D:
    return Line2D([], [], color=TRUTH, linestyle="--", label="truth")
