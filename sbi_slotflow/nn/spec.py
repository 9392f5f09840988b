r"""Parts of a network by name, so that files can rebuild them.

A part (an encoder, a front end, a transform, a least-squares fit) that a file can
describe has a ``kind``, a ``spec`` of plain JSON that names it, and is registered::

    @register("front end")
    class TraceTokens(nn.Module):
        kind = "trace"

Its class is called with the spec's other entries, unless it has a ``from_spec``. A
subclass is no registered part: it may compute something else.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any, Literal, TypeVar

import torch
from torch.distributions import Distribution

from ..sets.classes import layout_from_spec
from ..sets.laws import describe_distribution
from ..sets.layout import ThetaLayout

__all__ = [
    "EstimatorSpec",
    "Matching",
    "build",
    "describe",
    "register",
    "single_precision",
]

Part = TypeVar("Part", bound=type)

_PARTS: dict[str, dict[str, Any]] = {}
# Packages whose import registers the parts that come with the library.
_PROVIDERS = ("sbi_slotflow.nn", "sbi_slotflow.problems")


def register(role: str) -> Callable[[Part], Part]:
    """Decorate a class as a part with a role, ``"encoder"`` for one."""

    def add(part: Part) -> Part:
        _PARTS.setdefault(role, {})[part.kind] = part  # pyright: ignore
        return part

    return add


def describe(role: str, part: object) -> dict[str, Any] | None:
    """Return the spec of a registered part; None for one of the user's own."""
    if type(part) in _PARTS.get(role, {}).values():
        return part.spec  # pyright: ignore[reportAttributeAccessIssue]
    return None


def build(role: str, spec: Mapping[str, Any]) -> Any:
    """Rebuild a part from its spec."""
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in _PARTS.get(role, {}):
        for provider in _PROVIDERS:
            import_module(provider)
    known = _PARTS.get(role, {})
    if kind not in known:
        raise ValueError(f"{role} kind must be one of {sorted(known)}, got {kind!r}.")
    part = known[kind]
    return part.from_spec(spec) if hasattr(part, "from_spec") else part(**options)


Matching = Literal["hungarian", "permanent", "ordered"]


@dataclass(frozen=True)
class EstimatorSpec:
    """Everything that rebuilds an estimator but its weights."""

    layout: ThetaLayout
    num_data: int  # Numbers in one x
    cardinality_weights: tuple[float, ...]  # Training prior p(K), K = 0..Kmax
    chart: dict[str, Any]  # Spec of the components' chart
    shared_chart: dict[str, Any] | None  # That of the shared parameters; None without
    encoder: dict[str, Any] | None  # None for a module of the user's own
    shared_head: bool = True  # Else draws come from their prior
    # Whether sigma is read from what Gauss-Newton steps leave
    noise_from_fit: bool = False
    # Index of the noise level among the shared parameters; None if it is none of them
    noise_index: int | None = None
    # Whether the shared parameters are drawn given the components of a population
    sees_components: bool = False
    event_shape: tuple[int, ...] | None = None  # Shape of one x; None for (num_data,)
    # Numbers by which the space that fits look at is known; None for that of the data
    white_space: tuple[float, ...] | None = None
    flow: dict[str, Any] = field(default_factory=dict)  # Options of ConditionalFlow
    # Their kind and options, see slots_from_spec
    slots: dict[str, Any] = field(default_factory=dict)
    matching: Matching = "hungarian"
    # Over components (the paper), instead of the set's likelihood
    mean_flow_loss: bool = False
    # Cardinality, flow and shared terms
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def event(self) -> torch.Size:
        """Shape of one x."""
        return torch.Size(self.event_shape or (self.num_data,))

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON would give it back: lists for tuples.

        Raises:
            ValueError: If a prior's distribution is of a class of the user's own.
        """
        entries = _lists(asdict(self))
        if not self.sees_components:  # as files were before there were populations
            del entries["sees_components"]
        # Whether a parameter is circular is the prior's to say; nothing here needs it.
        for layout in (entries["layout"], *_class_layouts(entries["layout"])):
            del layout["periods"]
        return entries

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> "EstimatorSpec":
        """Rebuild a spec from :meth:`to_json`.

        Raises:
            ValueError: If an entry is missing, unknown or malformed.
        """
        try:
            names = {f.name for f in fields(cls)}
            # Older files do not name it: nothing then read it.
            younger = ("noise_index", "event_shape", "white_space")
            absent = {**dict.fromkeys(younger), "sees_components": False}
            entries = {**absent, **entries}
            if set(entries) != names:
                raise ValueError(f"unexpected fields {sorted(set(entries) ^ names)}")
            changes = {
                "layout": layout_from_spec(entries["layout"]),
                "cardinality_weights": tuple(entries["cardinality_weights"]),
                "loss_weights": tuple(entries["loss_weights"]),
                **{
                    name: entries[name] and tuple(entries[name])
                    for name in ("event_shape", "white_space")
                },
            }
            return cls(**{**entries, **changes})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"no readable estimator spec: {error}.") from error


def _class_layouts(layout: dict[str, Any]) -> list[dict[str, Any]]:
    return [own for _, own in layout.get("classes", [])]


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(entry) for entry in value]
    # Only a distribution of the user's own is not described yet: it is refused here.
    return describe_distribution(value) if isinstance(value, Distribution) else value


@contextmanager
def single_precision() -> Iterator[None]:
    """Build modules in float32; torch's default, one for all threads, is put back."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
