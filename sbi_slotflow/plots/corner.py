"""Marginals of the parameters, jointly given one cardinality or for each source."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from ..metrics.labels import ReferencePoints
from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout
from .checks import checked_row, checked_samples, thinned
from .corner_panels import Column, draw_corner
from .style import FONT, REFERENCE, SHADES, SMALL, TRUTH, Figure

__all__ = ["plot_corner"]

_MOST_DRAWS = 10_000
# Fewer draws are left in canonical order.
_FEWEST_TO_MATCH = 50


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
    known = (*layout.component_names, *layout.shared_names)
    periods = layout.periods if periods is None else periods
    unknown = sorted({*(names or ()), *(units or ()), *periods} - set(known))
    if unknown:
        raise ValueError(f"unknown parameter(s) {unknown}; there are {list(known)}.")
    samples = checked_samples(samples, layout)
    cardinality = layout.cardinality(samples)
    k = int(cardinality.mode().values) if k is None else k
    frame = _Frame(_given(samples, layout, k, "sample"), layout, k, periods, match)
    other = None
    if reference is not None:
        rows = checked_samples(reference, layout, "reference")
        other = _given(rows, layout, k, "row of the reference")
    truth = None if true_theta is None else checked_row(true_theta, layout)
    columns = frame.columns(other, truth, names, units or {})
    if not columns:
        raise ValueError(f"nothing to plot: K = {k} and no shared parameter.")
    shown = None if other is None else labels
    title = f"Posterior given K = {k} ({len(frame.rows):,} draws)"
    return _corner(columns, title, shown)


class _Frame:
    """Reads rows of k components as named columns, in a way that the samples fix."""

    def __init__(
        self,
        rows: Tensor,
        layout: ThetaLayout,
        k: int,
        periods: Mapping[str, float],
        match: bool,
    ) -> None:
        self.rows, self.layout, self.k = rows, layout, k
        self._shared_periods = [periods.get(n, math.inf) for n in layout.shared_names]
        self._periods = [periods.get(n, math.inf) for n in layout.component_names]
        shared, components = self._parts(rows)
        self._shared_centre = circular_mean(shared, self._shared_periods)
        self._points: ReferencePoints | None = None
        self._centre = circular_mean(components, self._periods)
        varies = k > 0 and bool((components.std(0, correction=0) > 0).all())
        if match and varies and len(rows) >= _FEWEST_TO_MATCH:
            found = ReferencePoints.of(components, self._periods, layout.order_by)
            if (found.scale > 0).all():
                self._points, self._centre = found, found.centre

    def columns(
        self,
        reference: Tensor | None,
        truth: Tensor | None,
        names: Sequence[str] | None,
        units: Mapping[str, str],
    ) -> list[Column]:
        """The parameters to show, with draws, truth and reference."""
        own = self._vectors(self.rows)
        other = None if reference is None else self._vectors(reference)
        true: list[float | None] = [None] * own.shape[-1]
        if truth is not None:
            true = self._truth(truth, own)
        columns = []
        for index, (name, number) in enumerate(self._entries()):
            if names is not None and name not in names:
                continue
            unit = f"\n({units[name]})" if name in units else ""
            against = None if other is None else other[:, index].numpy()
            values = own[:, index].numpy()
            columns.append(
                Column(f"{name}{number}{unit}", values, true[index], against)
            )
        return columns

    def _entries(self) -> list[tuple[str, str]]:
        components = [
            (name, f" {slot}")
            for slot in range(1, self.k + 1)
            for name in self.layout.component_names
        ]
        return components + [(name, "") for name in self.layout.shared_names]

    def _vectors(self, rows: Tensor) -> Tensor:
        """Components, then shared parameters, shape ``(S, C)``."""
        shared, components = self._parts(rows)
        shared = near(shared, self._shared_centre, self._shared_periods)
        if self._points is not None:
            components = self._points.label(components)
        components = near(components, self._centre, self._periods)
        return torch.cat([components.flatten(1), shared], dim=-1)

    def _truth(self, truth: Tensor, own: Tensor) -> list[float | None]:
        row = self.layout.canonical(truth).unsqueeze(0)
        same = int(self.layout.cardinality(row)) == self.k
        values: list[float | None] = [*self._vectors(row)[0].tolist()]
        num = self.k * len(self.layout.component_names)
        if not same:
            values[:num] = [None] * num
        # On the turn of the circle on which the draws are.
        turns = self._periods * self.k + self._shared_periods
        middle = own.median(0).values.tolist()
        for i, period in enumerate(turns):
            value = values[i]
            if value is not None and math.isfinite(period):
                values[i] = value + period * round((middle[i] - value) / period)
        return values

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.layout.unpack(self.layout.canonical(rows).double())
        return parts.shared, parts.components[:, : self.k]


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
    draw_corner(figure, grid, columns, small)
    edge = left / width
    figure.text(edge, 1 - 0.12 / height, title, fontsize=FONT + 1, va="top")
    handles: list[Artist] = []
    if num > 1:
        of = "" if labels is None else f"{labels[0]}, "
        handles = [
            Patch(color=shade, label=of + f"{share:.0%}".replace("%", " %"))
            for share, shade in reversed(SHADES.items())
        ]
    if labels is not None:
        handles.append(Line2D([], [], color=REFERENCE, label=labels[1]))
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
