r"""The flat row in which sbi carries a set of components.

.. math::
    \theta = [K, s_1 \ldots s_S, \theta_{1,1} \ldots \theta_{1,D}, \ldots,
              \theta_{K_{max},1} \ldots \theta_{K_{max},D}]

``K`` is the cardinality, ``s`` the shared parameters, ``theta_k`` the components.
Entries after the K-th component are padding and hold zeros; which entries are active
follows from ``K`` alone, never from their values. This module is the only one that
indexes into theta.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ThetaLayout", "ThetaParts"]


class ThetaParts(NamedTuple):
    """A batch of theta rows taken apart.

    Attributes:
        cardinality: Number of active components K, int64, shape ``(...)``.
        shared: Shared parameters, shape ``(..., S)``.
        components: Components, padded with zeros, shape ``(..., Kmax, D)``.
        mask: True where a component is active, shape ``(..., Kmax)``.
    """

    cardinality: Tensor
    shared: Tensor
    components: Tensor
    mask: Tensor


@dataclass(frozen=True)
class ThetaLayout:
    """Sizes, names and canonical order of a theta row.

    Attributes:
        max_cardinality: Largest cardinality Kmax.
        component_names: Names of the D parameters of one component.
        shared_names: Names of the S parameters that all components share.
        order_by: Index of the component parameter that defines the canonical order
            (ascending).
        periods: Periods of circular parameters by name. Layouts that differ in nothing
            else are equal: no row is read differently.
    """

    max_cardinality: int
    component_names: tuple[str, ...]
    shared_names: tuple[str, ...] = ()
    order_by: int = 0
    periods: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.max_cardinality < 1:
            raise ValueError(
                f"max_cardinality must be at least 1, got {self.max_cardinality}."
            )
        if not self.component_names:
            raise ValueError("component_names must name at least one parameter.")
        if not 0 <= self.order_by < len(self.component_names):
            raise ValueError(
                f"order_by must index one of the {len(self.component_names)} "
                f"component parameters, got {self.order_by}."
            )
        known = (*self.component_names, *self.shared_names)
        if bad := [name for name in known if not isinstance(name, str) or not name]:
            raise ValueError(f"names must be strings that are not empty, got {bad}.")
        # Entries of a row, and the parameters that tables and files list beside them.
        listed = Counter([*self.names, *self.component_names])
        if twice := [name for name, count in listed.items() if count > 1]:
            raise ValueError(
                f"names must differ from each other, from 'K' and from {known[0]}_1, "
                f"{known[0]}_2, ... for each component, got {twice} twice."
            )
        if unknown := sorted(set(self.periods) - set(known)):
            raise ValueError(f"periods must name parameters of {known}, got {unknown}.")
        for name, period in self.periods.items():
            if not 0 < period < math.inf:
                raise ValueError(
                    f"periods must be positive and finite, got {period} for {name!r}."
                )

    @property
    def num_component_params(self) -> int:
        """Number of parameters D of one component."""
        return len(self.component_names)

    @property
    def num_shared(self) -> int:
        """Number of shared parameters S."""
        return len(self.shared_names)

    @property
    def component_periods(self) -> tuple[float, ...]:
        """Periods of the D component parameters, infinite where not circular."""
        return tuple(self.periods.get(name, math.inf) for name in self.component_names)

    @property
    def shared_periods(self) -> tuple[float, ...]:
        """Periods of the S shared parameters, infinite where not circular."""
        return tuple(self.periods.get(name, math.inf) for name in self.shared_names)

    @property
    def size(self) -> int:
        """Length E of a theta row."""
        return 1 + self.num_shared + self.max_cardinality * self.num_component_params

    @property
    def names(self) -> list[str]:
        """A name for every entry of a row, components numbered from 1."""
        components = [
            f"{name}_{k}"
            for k in range(1, self.max_cardinality + 1)
            for name in self.component_names
        ]
        return ["K", *self.shared_names, *components]

    def mask(self, cardinality: Tensor) -> Tensor:
        """Mark the active components ``(..., Kmax)`` of cardinalities ``(...)``."""
        slots = torch.arange(self.max_cardinality, device=cardinality.device)
        return slots < cardinality.unsqueeze(-1)

    def pack(
        self, cardinality: Tensor, components: Tensor, shared: Tensor | None = None
    ) -> Tensor:
        """Build theta rows; padded components are set to zero.

        Args:
            cardinality: Cardinalities, shape ``(...)``.
            components: Components, shape ``(..., Kmax, D)``; only the first K count.
            shared: Shared parameters, shape ``(..., S)``; may be omitted if S = 0.

        Returns:
            Rows of shape ``(..., E)`` in the dtype of ``components``.

        Raises:
            ValueError: If a shape does not fit the layout or a K is out of range.
        """
        if ((cardinality < 0) | (cardinality > self.max_cardinality)).any():
            raise ValueError(
                f"cardinality must lie in 0..{self.max_cardinality}, got "
                f"{cardinality.min().item():g}..{cardinality.max().item():g}."
            )
        batch = cardinality.shape
        shared = components.new_zeros(*batch, 0) if shared is None else shared
        event = self.max_cardinality, self.num_component_params
        for name, part, shape in (
            ("components", components, (*batch, *event)),
            ("shared", shared, (*batch, self.num_shared)),
        ):
            if part.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, got {tuple(part.shape)}."
                )
        active = self.mask(cardinality).unsqueeze(-1)
        components = torch.where(active, components, components.new_zeros(()))
        parts = cardinality.unsqueeze(-1), shared, components.flatten(-2)
        return torch.cat([part.to(components.dtype) for part in parts], dim=-1)

    def unpack(self, theta: Tensor) -> ThetaParts:
        """Take theta rows ``(..., E)`` apart.

        A cardinality outside 0..Kmax is returned as it stands, see :meth:`validate`.

        Raises:
            ValueError: If the last axis is not E long.
        """
        self._check_length(theta)
        start = 1 + self.num_shared
        shared, flat = theta[..., 1:start], theta[..., start:]
        cardinality = theta[..., 0].round().to(torch.int64)
        event = self.max_cardinality, self.num_component_params
        components = flat.unflatten(-1, event)
        return ThetaParts(cardinality, shared, components, self.mask(cardinality))

    def cardinality(self, theta: Tensor) -> Tensor:
        """Return K of every row, int64, shape ``(...)``."""
        return self.unpack(theta).cardinality

    def kind(self, theta: Tensor) -> Tensor:
        """A number ``(...)`` that rows share whose components can be compared: K."""
        return self.cardinality(theta)

    @property
    def num_counts(self) -> int:
        """Number of entries, at the start of a row, that are cardinalities."""
        return 1

    def is_well_formed(self, theta: Tensor) -> Tensor:
        """Tell which rows are finite, have an integer K in 0..Kmax and zero padding."""
        parts = self.unpack(theta)
        padding = parts.components.ne(0).any(-1) & ~parts.mask
        finite = torch.isfinite(theta).all(-1)
        return self._has_cardinality(theta) & finite & ~padding.any(-1)

    def validate(self, theta: Tensor, name: str = "theta") -> None:
        """Raise unless every row can be read.

        Args:
            theta: Rows of shape ``(..., E)``.
            name: What to call the argument in the message.

        Raises:
            TypeError: If theta is not a floating-point tensor.
            ValueError: If the length is wrong, an entry is NaN or infinite, or a
                cardinality is not an integer in 0..Kmax.
        """
        if not isinstance(theta, Tensor) or not theta.is_floating_point():
            kind = theta.dtype if isinstance(theta, Tensor) else type(theta).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}.")
        self._check_length(theta, name)
        if not torch.isfinite(theta).all():
            bad = int((~torch.isfinite(theta).all(-1)).sum())
            raise ValueError(f"{name} must be finite: NaN or Inf in {bad} row(s).")
        wrong = ~self._has_cardinality(theta)
        if wrong.any():
            first = theta[..., : self.num_counts][wrong].flatten(0, -2)[0].tolist()
            raise ValueError(
                f"{name} must hold {self._cardinalities()}, got "
                f"{', '.join(f'{k:g}' for k in first)}."
            )

    def canonical(self, theta: Tensor) -> Tensor:
        """Sort the active components ascending in the ``order_by`` parameter."""
        parts = self.unpack(theta)
        return self._sorted(parts, parts.components[..., self.order_by])

    def relabel(
        self, theta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Give every row a labelling drawn uniformly from its K! labellings."""
        parts = self.shuffled(theta, generator)
        return self.pack(parts.cardinality, parts.components, parts.shared)

    def shuffled(
        self, theta: Tensor, generator: torch.Generator | None = None
    ) -> ThetaParts:
        """Take rows apart, with their active components in a random order.

        Of all classes: a row itself keeps each class together.
        """
        parts = self.unpack(theta)
        key = torch.rand(parts.mask.shape, generator=generator, device=theta.device)
        return parts._replace(components=_ordered(parts, key))

    def _sorted(self, parts: ThetaParts, key: Tensor) -> Tensor:
        """Rows with their active components ascending in a key ``(..., Kmax)``."""
        return self.pack(parts.cardinality, _ordered(parts, key), parts.shared)

    def _entries(self) -> str:
        return (
            f"K, {self.num_shared} shared, {self.max_cardinality} components of "
            f"{self.num_component_params}"
        )

    def _cardinalities(self) -> str:
        return (
            f"an integer cardinality K in 0..{self.max_cardinality} as its first entry"
        )

    def _has_cardinality(self, theta: Tensor) -> Tensor:
        k = theta[..., 0]
        return (k == k.round()) & (k >= 0) & (k <= self.max_cardinality)

    def _check_length(self, theta: Tensor, name: str = "theta") -> None:
        if theta.ndim < 1 or theta.shape[-1] != self.size:
            raise ValueError(
                f"{name} must have {self.size} entries on its last axis "
                f"({self._entries()}), got shape {tuple(theta.shape)}."
            )


def _ordered(parts: ThetaParts, key: Tensor) -> Tensor:
    """Components, the active ones ascending in a key ``(..., Kmax)``."""
    key = torch.where(parts.mask, key, key.new_full((), torch.inf))
    order = key.argsort(dim=-1, stable=True)
    return parts.components.gather(-2, order.unsqueeze(-1).expand_as(parts.components))
