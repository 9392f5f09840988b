r"""Coordinates and densities of components of several classes.

Local coordinates of all classes have one length: locations, angles, others, and the
class. A class with fewer coordinates has zeros there, which nothing draws and no
density counts. Gauss-Newton steps then fit components of all classes at once, and
evidence weighs a line against a burst.

See Also:
    :mod:`.class_cells`, the cells that components of classes stand in;
    :mod:`sbi_slotflow.sets.classes`, how rows hold classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..sets.classes import ClassLayout, ClassMarginals, layout_from_spec
from ..sets.separation import log_separation_constant
from .cells import CellAxis
from .charts import Chart, chart_from_spec
from .class_cells import ClassAxis
from .flows import RowContext
from .local import LocalDensity, LocalTransform
from .spec import register

__all__ = [
    "ClassChart",
    "ClassDensity",
    "ClassTransform",
    "local_density",
    "local_transform",
]

# Stands for infinity, which has no gradient.
_OPEN = 1e6


@register("chart")
class ClassChart(Chart):
    """The chart of each class, for components whose first entry is the class.

    Args:
        layout: The layout of all classes.
        charts: A chart for each class.
    """

    kind: ClassVar[str] = "classes"

    def __init__(self, layout: ClassLayout, charts: Sequence[Chart]) -> None:
        parts = [chart.marginals for chart in charts]
        super().__init__(ClassMarginals(layout, parts))
        self.layout, self.charts = layout, list(charts)
        self.is_density = all(chart.is_density for chart in charts)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the chart."""
        layout = asdict(self.layout)
        charts = [chart.spec for chart in self.charts]
        return {"kind": self.kind, "layout": layout, "charts": charts}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "ClassChart":
        """Rebuild a chart from :attr:`spec`."""
        layout = cast(ClassLayout, layout_from_spec(spec["layout"]))
        return cls(layout, [chart_from_spec(part) for part in spec["charts"]])

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates, the class as it is; see the base."""
        u, log_det = torch.zeros_like(components), torch.zeros_like(components[..., 0])
        for c, chart in enumerate(self.charts):
            there = components[..., 0] == c
            own = self.layout.to_class(components, c)
            own = torch.where(there.unsqueeze(-1), own, chart.some_point(own))
            value, slope = chart.forward(own)
            value = self.layout.from_class(value, c)
            u = torch.where(there.unsqueeze(-1), value, u)
            log_det = torch.where(there, slope, log_det)
        return u, log_det

    def inverse(self, u: Tensor) -> Tensor:
        """Map coordinates to components; see the base."""
        found = torch.zeros_like(u)
        for c, chart in enumerate(self.charts):
            own = chart.inverse(self.layout.to_class(u, c))
            there = (u[..., 0].round() == c).unsqueeze(-1)
            found = torch.where(there, self.layout.from_class(own, c), found)
        return found

    def some_point(self, like: Tensor) -> Tensor:
        """A component of the first class, in the middle of its support."""
        return self.layout.from_class(self.charts[0].some_point(like), 0)


class ClassTransform(LocalTransform):
    """Local coordinates (locations, angles, others, class) of components.

    Args:
        chart: The classes' charts.
        axis: The classes' axes.
    """

    def __init__(self, chart: ClassChart, axis: ClassAxis) -> None:
        self.axis, self.layout = axis, chart.layout
        pairs = zip(chart.charts, axis.axes, strict=True)
        self.members = [LocalTransform(*pair) for pair in pairs]
        self._points = chart.charts
        first = self.members[0]
        self.num_places = first.num_places
        self.num_circular = max(member.num_circular for member in self.members)
        rest = [m.num_features - m.num_places - m.num_circular for m in self.members]
        self._width = self.num_places + self.num_circular + max(rest) + 1
        # Where the coordinates of each class stand among those of all.
        start = self.num_places + self.num_circular
        self.columns = [
            [
                *range(self.num_places + member.num_circular),
                *range(start, start + others),
            ]
            for member, others in zip(self.members, rest, strict=True)
        ]
        ways = torch.tensor(axis.ways, dtype=torch.float64)
        self._log_ways = ways.log()

    @property
    def num_features(self) -> int:
        """Number D of coordinates."""
        return self._width

    def coordinates(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; see :meth:`LocalTransform.coordinates`."""
        components = components.double()
        shape = *components.shape[:-1], self._width
        found, log_det = components.new_zeros(shape), components.new_zeros(shape[:-1])
        for c, member in enumerate(self.members):
            there = components[..., 0] == c
            own = self.layout.to_class(components, c)
            point = self._points[c].some_point(own)
            own, slope = member.coordinates(
                torch.where(there.unsqueeze(-1), own, point)
            )
            wide = self._wide(own, c)
            wide[..., -1] = c
            found = torch.where(there.unsqueeze(-1), wide, found)
            log_det = torch.where(there, slope, log_det)
        return found, log_det

    def components(self, coordinates: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`; values may leave the support."""
        label, found = coordinates[..., -1:].round(), None
        for c, member in enumerate(self.members):
            own = member.components(coordinates[..., self.columns[c]])
            own = self.layout.from_class(own, c)
            found = own if found is None else torch.where(label == c, own, found)
        assert found is not None
        return found

    def off_centre(self, coordinates: Tensor) -> Tensor:
        """Coordinates a little off the middle of discs; see the base."""
        label, found = coordinates[..., -1].round(), coordinates
        for c, member in enumerate(self.members):
            own = member.off_centre(coordinates[..., self.columns[c]])
            there = (label == c).unsqueeze(-1)
            wide = torch.where(there, self._wide(own, c), found)
            found = torch.cat([wide[..., :-1], coordinates[..., -1:]], -1)
        return found

    def position(self, coordinates: Tensor) -> Tensor:
        """Positions ``(...)`` of :meth:`coordinates` on the axis of all classes."""
        label, found = coordinates[..., -1].round(), None
        for c, member in enumerate(self.members):
            own = member.position(coordinates[..., self.columns[c]])
            # The end of one class is not the start of the next.
            own = own.clamp(0.0, member.axis.num_cells - 1e-6) + self.axis.offsets[c]
            found = own if found is None else torch.where(label == c, own, found)
        assert found is not None
        return found

    def absolute(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Coordinates of those relative to cells; see the base."""
        return self._labelled(super().absolute(w, anchors, centre), anchors, 1.0)

    def relative(self, w: Tensor, anchors: Tensor, centre: Tensor) -> Tensor:
        """Inverse of :meth:`absolute`; angles in [-pi, pi)."""
        return self._labelled(super().relative(w, anchors, centre), anchors, -1.0)

    def log_prior(
        self, w: Tensor, centre: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log prior densities, and their gradients; see the base."""
        label = self.axis.class_of(cells)
        value, slope = torch.zeros_like(w[..., 0]), torch.zeros_like(w)
        for c, member in enumerate(self.members):
            columns, there = self.columns[c], label == c
            own, steep = member.log_prior(
                w[..., columns], centre[..., : member.num_circular], cells
            )
            value = torch.where(there, own, value)
            slope = torch.where(there.unsqueeze(-1), self._wide(steep, c), slope)
        return value, slope

    @property
    def log_constant(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Zero: :meth:`log_weight` has the classes' own."""
        return 0.0

    def log_weight(self, cells: Tensor, mask: Tensor) -> Tensor:
        """What the prior of sets knows beside :meth:`log_prior`, ``(S,)``."""
        label = torch.where(mask, self.axis.class_of(cells), -1)
        counts = [(label == c).sum(-1) for c in range(len(self.members))]
        value = self._log_ways.to(cells.device)[tuple(counts)]
        for count, member in zip(counts, self.members, strict=True):
            axis = member.axis
            apart = log_separation_constant(
                count, axis.separation, float(axis.num_cells)
            )
            value = value + count * member.log_constant - apart
        return value

    def num_coordinates(self, cells: Tensor, mask: Tensor) -> Tensor:
        """How many coordinates components have together, ``(S,)``."""
        sizes = torch.tensor([m.num_features for m in self.members])
        return torch.where(mask, sizes[self.axis.class_of(cells)], 0).sum(-1)

    def ends(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest coordinates; see the base."""
        none = cells.new_zeros(())
        pairs = [member.ends(none) for member in self.members]
        low = [self._wide(low, c, -_OPEN) for c, (low, _) in enumerate(pairs)]
        high = [self._wide(high, c, _OPEN) for c, (_, high) in enumerate(pairs)]
        label = self.axis.class_of(cells)
        return tuple(torch.stack(each).to(cells.device)[label] for each in (low, high))  # pyright: ignore[reportReturnType]

    def farthest(self, cells: Tensor) -> Tensor:
        """Largest absolute coordinates that a fit may end at; see the base."""
        none = cells.new_zeros(())
        far = [self._wide(m.farthest(none), c) for c, m in enumerate(self.members)]
        return torch.stack(far).to(cells.device)[self.axis.class_of(cells)]

    def interval(
        self, cells: Tensor, starts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The class, and ends of the locations, of cells; see the base."""
        first = self.axis.first_of(cells)
        label = self.axis.class_of(cells).to(starts).unsqueeze(-1)
        low, high = None, None
        for c, member in enumerate(self.members):
            own = (cells - first).clamp(max=member.axis.num_cells - 1)
            near, far = member.interval(own, starts - first, ends - first)
            there = label == c
            low = near if low is None else torch.where(there, near, low)
            high = far if high is None else torch.where(there, far, high)
        assert low is not None
        assert high is not None
        return torch.cat([label, low], -1), torch.cat([label, high], -1)

    def _labelled(self, w: Tensor, cells: Tensor, sign: float) -> Tensor:
        label = sign * self.axis.class_of(cells).to(w)
        return torch.cat([w[..., :-1], w[..., -1:] + label.unsqueeze(-1)], -1)

    def _wide(self, own: Tensor, index: int, fill: float = 0.0) -> Tensor:
        """Coordinates of all classes, of those of class ``index``."""
        found = own.new_full((*own.shape[:-1], self._width), fill)
        found[..., self.columns[index]] = own
        return found


class ClassDensity(nn.Module):
    """A local density for each class.

    Args:
        transform: The classes' local coordinates.
        context_features: Length of a context.
        own_features: Length of what each row sees besides.
        options: Further options of the :class:`.flows.ConditionalFlow`.
    """

    def __init__(
        self,
        transform: ClassTransform,
        context_features: int,
        own_features: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.parts = nn.ModuleList(
            LocalDensity(len(columns), context_features, own_features, **options)
            for columns in transform.columns
        )

    def log_prob(
        self,
        w: Tensor,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
        cells: Tensor,
    ) -> Tensor:
        """Evaluate the log density of N rows; see :class:`.local.LocalDensity`."""
        found = torch.zeros(len(w), device=w.device)
        for rows, columns, part in self._each(cells):
            given = self._given(rows, columns, mean, factor, ends, context)
            value = part.log_prob(w[rows][:, columns], *given, cells[rows])
            found = found.index_copy(0, rows, value.to(found))
        return found

    @torch.no_grad()
    def sample(
        self,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
        cells: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw coordinates ``(N, D)`` and the z ``(N, D)`` behind them."""
        w, z = torch.zeros_like(mean), torch.zeros_like(mean)
        for rows, columns, part in self._each(cells):
            given = self._given(rows, columns, mean, factor, ends, context)
            drawn = part.sample(*given, cells[rows], generator)
            place = rows.unsqueeze(-1), torch.tensor(columns, device=rows.device)
            w[place], z[place] = drawn
        return w, z

    def _each(self, cells: Tensor) -> list[tuple[Tensor, list[int], LocalDensity]]:
        label = self.transform.axis.class_of(cells)  # pyright: ignore[reportAttributeAccessIssue]
        found = []
        for c, columns in enumerate(self.transform.columns):
            rows = (label == c).nonzero().squeeze(-1)
            if len(rows):
                found.append((rows, columns, cast(LocalDensity, self.parts[c])))
        return found

    @staticmethod
    def _given(
        rows: Tensor,
        columns: list[int],
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], RowContext]:
        """What the density of one class depends on."""
        low, high = (end[rows][:, columns] for end in ends)
        own = None if context.own is None else context.own[rows]
        seen = RowContext(context.values, context.which[rows], own)
        square = factor[rows][:, columns][..., columns]
        return mean[rows][:, columns], square, (low, high), seen


def local_transform(chart: Chart, axis: CellAxis) -> LocalTransform:
    """Local coordinates of components of one class, or of several."""
    if isinstance(axis, ClassAxis):
        if not isinstance(chart, ClassChart):
            raise ValueError(
                "chart must be the problem's own where components have classes, got "
                f"the {chart.kind!r} chart."
            )
        return ClassTransform(chart, axis)
    return LocalTransform(chart, axis)


def local_density(
    transform: LocalTransform, context: int, own: int, options: Mapping[str, Any]
) -> LocalDensity | ClassDensity:
    """The density in a cell of components of one class, or of several."""
    if isinstance(transform, ClassTransform):
        return ClassDensity(transform, context, own, **options)
    return LocalDensity(transform.num_features, context, own, **options)
