r"""Rows that hold components of several classes, spectral lines and bursts for one.

.. math::
    \theta = [K_a, K_b, \ldots, s_1 \ldots s_S,
        \text{components of } a, \text{components of } b, \ldots]

Each class keeps its own parameters, its largest cardinality and its canonical order.
All that reads rows through a layout sees one set of K = K_a + K_b + ... components with
one more parameter in front: the number of the component's class. Parameters follow in
the order of their class, but with the class's ``order_by`` parameter first, and zeros
fill up those of a class that has fewer.

Example:
    >>> line = ThetaLayout(2, ("amplitude", "frequency"), order_by=1)
    >>> burst = ThetaLayout(1, ("time",))
    >>> layout = ClassLayout.of({"line": line, "burst": burst})
    >>> layout.names[:4]
    ['K_line', 'K_burst', 'line.amplitude_1', 'line.frequency_1']
    >>> row = torch.tensor([1.0, 1.0, 3.0, 0.2, 0.0, 0.0, 7.0])
    >>> layout.unpack(row).components[:2].tolist()  # class, place, the rest
    [[0.0, 0.20000000298023224, 3.0], [1.0, 7.0, 0.0]]
    >>> layout.view(row, "burst").tolist()
    [1.0, 7.0]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from .layout import ThetaLayout, ThetaParts
from .marginals import Marginals

__all__ = ["ClassLayout", "ClassMarginals", "layout_from_spec"]


@dataclass(frozen=True)
class ClassLayout(ThetaLayout):
    """Sizes, names and order of rows of several classes; made by :meth:`of`.

    Attributes:
        classes: Name and layout of each class, which have no shared parameters.
    """

    classes: tuple[tuple[str, ThetaLayout], ...] = ()

    @classmethod
    def of(
        cls,
        classes: Mapping[str, ThetaLayout],
        shared_names: Sequence[str] = (),
        periods: Mapping[str, float] | None = None,
    ) -> "ClassLayout":
        """Join the layouts of classes.

        Args:
            classes: Layouts by the class's name, in the order of their blocks.
            shared_names: Names of the parameters that all components share.
            periods: Periods of circular shared parameters by name.

        Raises:
            ValueError: If there is no class, a name is empty or not unique, or a
                layout has shared parameters of its own.
        """
        if not classes:
            raise ValueError("classes must name at least one class.")
        if unknown := sorted(set(periods or {}) - set(shared_names)):
            raise ValueError(
                f"periods must name shared parameters of {tuple(shared_names)} (those "
                f"of a class are its own), got {unknown}."
            )
        for name, layout in classes.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"classes must have names, got {name!r}.")
            if layout.num_shared:
                raise ValueError(
                    f"class {name!r} must have no shared parameters of its own, got "
                    f"{layout.shared_names}: pass them as shared=... for all."
                )
        width = max(layout.num_component_params for layout in classes.values())
        return cls(
            sum(layout.max_cardinality for layout in classes.values()),
            ("(class)", "(place)", *(f"({d})" for d in range(2, width + 1))),
            tuple(shared_names),
            1,
            dict(periods or {}),
            tuple(classes.items()),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"shared_names must differ from all other names, got {twice} twice."
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return tuple(name for name, _ in self.classes)

    @property
    def size(self) -> int:
        """Length E of a theta row."""
        return len(self.classes) + self.num_shared + sum(self._widths)

    @property
    def names(self) -> list[str]:
        """A name for every entry of a row, components numbered from 1."""
        components = [
            f"{name}.{entry}"
            for name, layout in self.classes
            for entry in layout.names[1:]
        ]
        counts = [f"K_{name}" for name in self.class_names]
        return [*counts, *self.shared_names, *components]

    @property
    def component_periods(self) -> tuple[float, ...]:
        """Infinite: which parameter is circular depends on the class."""
        return (math.inf,) * self.num_component_params

    def of_class(self, name: str) -> ThetaLayout:
        """The layout of one class.

        Raises:
            ValueError: If there is no such class.
        """
        known = dict(self.classes)
        if name not in known:
            raise ValueError(
                f"of must be one of the classes {self.class_names}, got {name!r}."
            )
        return known[name]

    def counts(self, theta: Tensor) -> Tensor:
        """Cardinalities of the classes, int64, shape ``(..., C)``."""
        self._check_length(theta)
        return theta[..., : len(self.classes)].round().to(torch.int64)

    def kind(self, theta: Tensor) -> Tensor:
        """A number ``(...)`` for the cardinalities of all classes together."""
        code = torch.zeros_like(theta[..., 0], dtype=torch.int64)
        for count, (_, layout) in zip(
            self.counts(theta).unbind(-1), self.classes, strict=True
        ):
            code = code * (layout.max_cardinality + 1) + count
        return code

    def view(self, theta: Tensor, name: str) -> Tensor:
        """Rows of one class in its own layout, shape ``(..., E_c)``.

        Raises:
            ValueError: If there is no such class or the last axis is not E long.
        """
        self.of_class(name)
        return self.views(theta)[self.class_names.index(name)]

    def views(self, theta: Tensor) -> list[Tensor]:
        """Rows of every class in its own layout; see :meth:`view`."""
        self._check_length(theta)
        ends = [len(self.classes) + self.num_shared]
        for width in self._widths:
            ends.append(ends[-1] + width)
        return [
            torch.cat([theta[..., c : c + 1], theta[..., low:high]], -1)
            for c, (low, high) in enumerate(pairwise(ends))
        ]

    def joined(self, rows: Sequence[Tensor], shared: Tensor | None = None) -> Tensor:
        """Rows of the classes' own rows, each ``(..., E_c)``; undoes :meth:`views`."""
        shared = rows[0][..., :0] if shared is None else shared.to(rows[0])
        counts = [row[..., :1] for row in rows]
        return torch.cat([*counts, shared, *(row[..., 1:] for row in rows)], -1)

    def to_class(self, components: Tensor, index: int) -> Tensor:
        """Parameters ``(..., D_c)`` of components of class ``index``."""
        return components[..., self.columns_of(index)]

    def columns_of(self, index: int) -> list[int]:
        """Where a component has the parameters of class ``index``, in their order."""
        return [1 + d for d in self._columns(index)]

    def from_class(self, components: Tensor, index: int) -> Tensor:
        """Components ``(..., D)`` of parameters ``(..., D_c)`` of class ``index``."""
        columns, missing = self._columns(index), self.num_component_params - 1
        missing -= len(columns)
        inverse = torch.tensor(columns).argsort().tolist()
        label = torch.full_like(components[..., :1], float(index))
        rest = components.new_zeros(*components.shape[:-1], missing)
        return torch.cat([label, components[..., inverse], rest], -1)

    def unpack(self, theta: Tensor) -> ThetaParts:
        """Take rows ``(..., E)`` apart: components of all classes, class by class."""
        shared = theta[..., len(self.classes) :][..., : self.num_shared]
        found, masks = [], []
        for c, (row, (_, layout)) in enumerate(
            zip(self.views(theta), self.classes, strict=True)
        ):
            parts = layout.unpack(row)
            components = self.from_class(parts.components, c)
            found.append(torch.where(parts.mask.unsqueeze(-1), components, 0.0))
            masks.append(parts.mask)
        active = torch.cat(masks, -1)
        order = (~active).byte().argsort(dim=-1, stable=True).unsqueeze(-1)
        components = torch.cat(found, -2)
        components = components.gather(-2, order.expand_as(components))
        cardinality = self.counts(theta).sum(-1)
        return ThetaParts(cardinality, shared, components, self.mask(cardinality))

    def pack(
        self, cardinality: Tensor, components: Tensor, shared: Tensor | None = None
    ) -> Tensor:
        """Build rows of components ``(..., Kmax, D)`` in any order.

        A row with more components of a class than it may have keeps their number, and
        is not well formed.

        Raises:
            ValueError: If a shape does not fit the layout or K is out of range.
        """
        base = super().pack(cardinality, components, shared)
        shared, flat = base[..., 1 : 1 + self.num_shared], base[..., self._start :]
        components = flat.unflatten(-1, (self.max_cardinality, -1))
        label, active = components[..., 0].round(), self.mask(cardinality)
        rows = []
        for c, (_, layout) in enumerate(self.classes):
            own = active & (label == c)
            order = (~own).byte().argsort(dim=-1, stable=True)
            order = order[..., : layout.max_cardinality].unsqueeze(-1)
            count, here = own.sum(-1), self.to_class(components, c)
            here = here.gather(-2, order.expand(*order.shape[:-1], here.shape[-1]))
            there = layout.mask(count).unsqueeze(-1)
            here = torch.where(there, here, here.new_zeros(())).flatten(-2)
            rows.append(torch.cat([count.unsqueeze(-1).to(here), here], -1))
        return self.joined(rows, shared)

    def is_well_formed(self, theta: Tensor) -> Tensor:
        """Tell which rows are finite, have possible counts and zero padding."""
        good = torch.isfinite(theta).all(-1)
        for row, (_, layout) in zip(self.views(theta), self.classes, strict=True):
            good = good & layout.is_well_formed(row)
        return good

    @property
    def num_counts(self) -> int:
        """Number C of entries that are cardinalities."""
        return len(self.classes)

    @property
    def _widths(self) -> list[int]:
        """Entries of each class's components."""
        return [layout.size - 1 for _, layout in self.classes]

    @property
    def _start(self) -> int:
        """Where components begin in a row of one class as long as all of them."""
        return 1 + self.num_shared

    def _columns(self, index: int) -> list[int]:
        """Places of a class's parameters behind the class's number."""
        layout = self.classes[index][1]
        num, first = layout.num_component_params, layout.order_by
        order = [first, *(d for d in range(num) if d != first)]
        return [order.index(d) for d in range(num)]

    def _has_cardinality(self, theta: Tensor) -> Tensor:
        good = torch.ones_like(theta[..., 0], dtype=torch.bool)
        for row, (_, layout) in zip(self.views(theta), self.classes, strict=True):
            good = good & layout._has_cardinality(row)
        return good

    def _entries(self) -> str:
        blocks = [
            f"{layout.max_cardinality} of {name!r} with {layout.num_component_params}"
            for name, layout in self.classes
        ]
        counts = ", ".join(f"K_{name}" for name in self.class_names)
        return f"{counts}, {self.num_shared} shared, {', '.join(blocks)}"

    def _cardinalities(self) -> str:
        known = ", ".join(
            f"K_{name} in 0..{layout.max_cardinality}" for name, layout in self.classes
        )
        return f"integer cardinalities {known} as its first entries"


class ClassMarginals(Marginals):
    """Marginals of components whose first entry is their class.

    Args:
        layout: The layout of all classes.
        classes: Marginals of each class.
    """

    def __init__(self, layout: ClassLayout, classes: Sequence[Marginals]) -> None:
        super().__init__(())
        self.layout, self.classes = layout, tuple(classes)

    def __len__(self) -> int:
        """Number D of entries of a component."""
        return self.layout.num_component_params

    @property
    def extreme(self) -> bool:
        """Whether a scale's square leaves the range of single precision."""
        return any(marginals.extreme for marginals in self.classes)

    @property
    def closed(self) -> bool:
        """Whether all have a closed form."""
        return all(marginals.closed for marginals in self.classes)

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the marginals."""
        layout = asdict(self.layout)
        return {"layout": layout, "classes": [m.spec for m in self.classes]}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "ClassMarginals":
        """Rebuild marginals from :attr:`spec`, whatever else it holds."""
        layout = cast(ClassLayout, layout_from_spec(spec["layout"]))
        return cls(layout, [Marginals.from_spec(part) for part in spec["classes"]])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to their class's variables, the class as it is."""
        y, log_det = torch.zeros_like(x), torch.zeros_like(x[..., 0])
        for c, marginals in enumerate(self.classes):
            own = self.layout.to_class(x, c)
            there = x[..., 0] == c
            own = torch.where(there.unsqueeze(-1), own, marginals.middle(own))
            u, slope = marginals.forward(own)
            u = self.layout.from_class(u, c)
            y = torch.where(there.unsqueeze(-1), u, y)
            log_det = torch.where(there, slope, log_det)
        return y, log_det

    def inverse(self, y: Tensor) -> Tensor:
        """Map variables back to components; see :meth:`forward`."""
        return self._each(y, lambda marginals, own: marginals.inverse(own))

    def clamp(self, values: Tensor) -> Tensor:
        """Move values ``(..., D)`` into their class's bounds; see the base."""
        return self._each(values, lambda marginals, own: marginals.clamp(own))

    def contains(self, values: Tensor) -> Tensor:
        """Tell which components ``(..., D)`` lie within their class's bounds."""
        inside = torch.zeros(values.shape[:-1], dtype=torch.bool, device=values.device)
        for c, marginals in enumerate(self.classes):
            own = marginals.contains(self.layout.to_class(values, c))
            inside = torch.where(values[..., 0] == c, own, inside)
        return inside

    def middle(self, like: Tensor) -> Tensor:
        """A component of the first class, in the middle of its support."""
        return self.layout.from_class(self.classes[0].middle(like), 0)

    def _each(self, values: Tensor, function: Any) -> Tensor:
        """A map of each class's parameters, applied where the class is."""
        found = values
        for c, marginals in enumerate(self.classes):
            own = function(marginals, self.layout.to_class(values, c))
            there = (values[..., 0] == c).unsqueeze(-1)
            found = torch.where(there, self.layout.from_class(own, c), found)
        return found


def layout_from_spec(spec: Mapping[str, Any]) -> ThetaLayout:
    """Rebuild a layout from the fields that a file holds."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in spec.items()
    }
    if "classes" not in fields:
        return ThetaLayout(**fields)
    classes = {name: layout_from_spec(own) for name, own in fields["classes"]}
    return ClassLayout.of(classes, fields["shared_names"], fields.get("periods"))
