r"""Components of several classes: charts, cells, tokens and densities, one a class.

The cells of the classes stand one class after the other,

.. math::
    \underbrace{0, \ldots, L_a - 1}_{\text{class } a},
    \underbrace{L_a, \ldots, L_a + L_b - 1}_{\text{class } b}, \ldots

so that a cell says of which class its component is, and a set of cells how many there
are of each. What works on cells then works on all classes together: the chain draws
:math:`q(K_a, K_b, a_1 \ldots a_K | x, K)`, Gauss-Newton steps fit components of all
classes at once, and evidence weighs a line against a burst.

Local coordinates of all classes have one length: locations, angles, others, and the
class. A class with fewer coordinates has zeros there, which nothing draws and no
density counts.

See Also:
    :mod:`sbi_slotflow.sets.classes`, how rows hold classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..sets.classes import ClassLayout, ClassMarginals, layout_from_spec
from ..sets.separation import log_separation_constant
from .cells import CellAxis, CellGrid
from .charts import Chart, chart_from_spec
from .encoders import Encoding, Pool, SelfAttention, encode, mlp
from .flows import RowContext
from .local import LocalDensity, LocalTransform
from .spec import build, register

__all__ = [
    "ClassAxis",
    "ClassChart",
    "ClassDensity",
    "ClassEncoder",
    "ClassTransform",
    "axis_from_spec",
    "local_density",
    "local_transform",
]

# Stands for infinity, which has no gradient.
_OPEN = 1e6
# Slack in comparisons of positions, in cells.
_TOLERANCE = 1e-6

Weights = tuple[Any, ...]


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


@dataclass(frozen=True)
class ClassAxis(CellAxis):
    """Axes, or grids, of several classes, one after the other.

    Attributes:
        parameter: Zero; locations are those of the classes.
        num_cells: Number of cells of all classes.
        axes: The axis of each class.
        ways: Of each (K_1..K_C), the factor exp of
            ``MultiClassPrior.log_counts``, in nested tuples.
    """

    axes: tuple[CellAxis, ...] = ()
    ways: Weights = ()

    @classmethod
    def of(cls, axes: Sequence[CellAxis], log_counts: Tensor) -> "ClassAxis":
        """Join axes.

        Raises:
            ValueError: If some classes have one location and others two.
        """
        if len({len(axis.parameters) for axis in axes}) != 1:
            raise ValueError(
                "classes must all have one location, or all two, got "
                f"{[len(axis.parameters) for axis in axes]}."
            )
        ways = cast(Weights, _tuples(log_counts.exp().tolist()))
        return cls(0, sum(axis.num_cells for axis in axes), 0.0, tuple(axes), ways)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First cell of each class, and the end of the last."""
        ends = [0]
        for axis in self.axes:
            ends.append(ends[-1] + axis.num_cells)
        return tuple(ends)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Place of the locations behind a component's class."""
        return tuple(range(1, 1 + len(self.axes[0].parameters)))

    def class_of(self, cells: Tensor) -> Tensor:
        """Class, int64, of each cell."""
        inner = torch.tensor(self.offsets[1:-1], device=cells.device)
        return torch.bucketize(cells.contiguous(), inner, right=True)

    def first_of(self, cells: Tensor) -> Tensor:
        """First cell of the class of each cell."""
        return torch.tensor(self.offsets, device=cells.device)[self.class_of(cells)]

    def middles(self, cells: Tensor) -> Tensor:
        """Locations ``(..., P)`` of the middles of cells, on their class's axis."""
        own = cells - self.first_of(cells)
        return self._by_class(cells, [axis.middles(own) for axis in self.axes])

    def steps(self, reach: int) -> list[tuple[int, int]]:
        """Rows and columns from a cell to those that a chain looks at closely."""
        return self.axes[0].steps(reach)

    def stepped(self, cells: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cells that are steps away in the same class, and whether they exist."""
        first = self.first_of(cells).unsqueeze(-1)
        own = cells - first.squeeze(-1)
        found = [
            axis.stepped(own.clamp(max=axis.num_cells - 1), steps) for axis in self.axes
        ]
        there = self._by_class(cells, [cell for cell, _ in found])
        inside = self._by_class(cells, [good for _, good in found])
        return there + first, inside

    def earliest(self, starts: Tensor) -> Tensor:
        """Least positions ``(N, K)`` that cells which start there allow."""
        shift = self._shifts(starts)
        return (starts - shift).cummax(-1).values + shift

    def upper(self, ends: Tensor, mask: Tensor) -> Tensor:
        """Bounds U_k ``(N, K)`` of cells that end there; inactive ones mean nothing."""
        # The end of a class is not the start of the next.
        shift = self._shifts(ends - 1e-9)
        ends = (ends - shift).masked_fill(~mask, torch.inf)
        return ends.flip(-1).cummin(-1).values.flip(-1) + shift

    def lower(self, starts: Tensor, before: Tensor) -> Tensor:
        """Lower bounds of components, given the positions before them."""
        label = self.class_of(starts)
        last = self.class_of(before.clamp(min=0.0))
        apart = self._separations(starts)[label]
        apart = torch.where((label == last) & (before > -torch.inf), apart, 0.0)
        return torch.maximum(starts, before + apart)

    def held(self, cells: Tensor) -> Tensor:
        """How many of the first k components are of the class of the k-th one."""
        label = self.class_of(cells)
        same = label.unsqueeze(-1) == label.unsqueeze(-2)
        return same.tril().sum(-1)

    def feasible(
        self,
        earliest: Tensor,
        left: Tensor,
        edges: Tensor,
        before: Tensor | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Tell which cells a component may take; see :meth:`CellAxis.feasible`.

        Each class must end with a number of components that its prior allows: ``held``
        are of the class of the cell ``before``. Where ``held`` is None, nothing is
        asked of the numbers.
        """
        least = self.lower(edges[:, :-1], earliest.unsqueeze(-1))
        good = least < edges[:, 1:] - _TOLERANCE
        if held is None or before is None:
            return good
        rules = _rules(self.ways)
        every = torch.arange(self.num_cells, device=edges.device)
        label, last = self.class_of(every), self.class_of(before.clamp(min=0))
        last = torch.where(before < 0, len(self.axes), last)
        again = label == last.unsqueeze(-1)
        # Of the class that is left, and those that are passed over.
        leave = rules.passed.to(label.device)[last.unsqueeze(-1), label]
        most = rules.ends.shape[1] - 1
        allowed = rules.allowed.to(label.device)
        enough = (allowed[last, held.clamp(max=most)] & (held <= most)).unsqueeze(-1)
        taken = 1 + torch.where(again, held.unsqueeze(-1), 0)
        there = label, taken.clamp(max=most), left.unsqueeze(-1)
        ends = rules.ends.to(label.device)[there] & (taken <= most)
        # What must still stand in this class needs room.
        must = rules.must.to(label.device)[there]
        apart = self._separations(edges)[label]
        last_end = torch.tensor(self.offsets[1:]).to(edges)[label]
        room = (must == 0) | (least + apart * must < last_end)
        return good & room & ends & (again | (leave & enough))

    def _separations(self, like: Tensor) -> Tensor:
        return torch.tensor([axis.separation for axis in self.axes]).to(like)

    def _shifts(self, positions: Tensor) -> Tensor:
        """Least distances from the first of each row, within classes, summed up."""
        label = self.class_of(positions.clamp(min=0.0))
        label = label.clamp(max=len(self.axes) - 1)
        same = label[..., 1:] == label[..., :-1]
        steps = self._separations(positions)[label[..., 1:]]
        steps = torch.where(same, steps, 0.0)
        return torch.nn.functional.pad(steps, (1, 0)).cumsum(-1)

    def _by_class(self, cells: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The value of each cell's own class."""
        label = self.class_of(cells)
        shape = (*label.shape, *[1] * (values[0].ndim - label.ndim))
        found = values[0]
        for c, value in enumerate(values[1:], 1):
            found = torch.where(label.reshape(shape) == c, value, found)
        return found


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


@register("encoder")
class ClassEncoder(nn.Module):
    """Encoders of several classes, whose tokens then look at each other.

    Args:
        members: An encoder for each class that keeps tokens, or its spec.
        hidden_features: Width of pooled embeddings.
        num_heads: Heads of the attention among tokens of all classes.
    """

    kind: ClassVar[str] = "classes"

    def __init__(
        self,
        members: Sequence[nn.Module | dict[str, Any]],
        hidden_features: int = 128,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        parts: list[Any] = [
            build("encoder", part) if isinstance(part, dict) else part
            for part in members
        ]
        self.members = nn.ModuleList(parts)
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "members": [part.spec for part in parts],
            "hidden_features": hidden_features,
            "num_heads": num_heads,
        }
        widths = {part.spec["width"] for part in parts}
        if len(widths) != 1:
            raise ValueError(f"members must have one width, got {sorted(widths)}.")
        width: int = widths.pop()
        self.labels = nn.Parameter(0.1 * torch.randn(len(parts), width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = SelfAttention(width, num_heads, residual=False)
        self.mix = mlp(width, 2 * width, width)
        self.pool = Pool(width)
        pooled = 3 * width + hidden_features * len(parts)
        self.to_context = mlp(pooled, hidden_features, hidden_features)
        self.to_cardinality = mlp(pooled, hidden_features, hidden_features)

    @property
    def reads_records(self) -> bool:
        """Whether x is records of time, value and error."""
        return any(getattr(part, "reads_records", False) for part in self.members)

    def forward(self, x: Tensor) -> Encoding:
        """Embed x ``(B, *event)``."""
        found = [encode(member, x) for member in self.members]
        tokens = torch.cat(
            [
                cast(Tensor, each.tokens) + label
                for each, label in zip(found, self.labels, strict=True)
            ],
            1,
        )
        tokens = tokens + self.attention(self.norms[0](tokens))
        tokens = self.norms[2](tokens + self.mix(self.norms[1](tokens)))
        contexts = [each.context for each in found]
        pooled = torch.cat([self.pool(tokens), *contexts], -1)
        context = self.to_context(pooled)
        shared = torch.cat([context, *(each.shared for each in found)], -1)
        edges = self._edges(found)
        return Encoding(context, self.to_cardinality(pooled), shared, tokens, edges)

    @staticmethod
    def _edges(found: Sequence[Encoding]) -> Tensor | None:
        """Edges of all cells, one class after the other."""
        if all(each.edges is None for each in found):
            return None
        columns, first = [], 0
        for each in found:
            tokens, edges = cast(Tensor, each.tokens), each.edges
            if edges is None:
                edges = torch.arange(tokens.shape[1] + 1.0, dtype=torch.float64)
                edges = edges.to(tokens.device).expand(len(tokens), -1)
            columns.append((edges + first)[:, 1 if columns else 0 :])
            first += tokens.shape[1]
        return torch.cat(columns, -1)


def axis_from_spec(spec: Mapping[str, Any]) -> CellAxis:
    """Rebuild an axis, a grid or those of classes from the fields that a file holds."""
    if "axes" in spec:
        axes = tuple(axis_from_spec(part) for part in spec["axes"])
        return ClassAxis(**{**spec, "axes": axes, "ways": _tuples(spec["ways"])})
    return CellGrid(**spec) if "rows" in spec else CellAxis(**spec)


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


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


class _Rules(NamedTuple):
    """Which numbers of components classes may have, C of them, at most M each."""

    # Whether a class may have so many; of no class, C, always, (C + 1, M + 1)
    allowed: Tensor
    # Whether classes after one (C: before the first) and before another may have none
    passed: Tensor  # (C + 1, C)
    # Whether so many of a class may stand, with so many of it and those behind it to
    # come, (C, M + 1, K + 1)
    ends: Tensor
    # How many of those to come the class must have itself at least, same shape
    must: Tensor


@lru_cache(maxsize=32)
def _rules(ways: Weights) -> _Rules:
    """What follows from the numbers that a prior allows."""
    table = torch.tensor(ways, dtype=torch.float64) > 0
    num, most, total = table.ndim, max(table.shape) - 1, sum(table.shape) - table.ndim
    allowed = torch.zeros(num + 1, most + 1, dtype=torch.bool)
    allowed[num] = True
    for c in range(num):
        own = table.movedim(c, 0).flatten(1).any(-1)
        allowed[c, : len(own)] = own
    passed = torch.zeros(num + 1, num, dtype=torch.bool)
    for last in range(num + 1):
        first = 0 if last == num else last + 1
        for c in range(first, num):
            passed[last, c] = bool(allowed[first:c, 0].all())
    # Totals that classes from c on may have.
    reach = torch.zeros(num + 1, total + 1, dtype=torch.bool)
    reach[num, 0] = True
    for c in range(num - 1, -1, -1):
        for k in allowed[c].nonzero().flatten().tolist():
            reach[c, k:] |= reach[c + 1, : total + 1 - k]
    ends = torch.zeros(num, most + 1, total + 1, dtype=torch.bool)
    must = torch.zeros(num, most + 1, total + 1, dtype=torch.int64)
    for c in range(num):
        counts = allowed[c].nonzero().flatten().tolist()
        for held, left in product(range(most + 1), range(total + 1)):
            more = [k - held for k in counts if 0 <= k - held <= left]
            more = [m for m in more if reach[c + 1, left - m]]
            ends[c, held, left] = bool(more)
            must[c, held, left] = min(more, default=0)
    return _Rules(allowed, passed, ends, must)
