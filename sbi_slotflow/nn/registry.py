r"""Parts of a network by name, so that files can rebuild them.

A part (an encoder, a front end, a transform, a least-squares fit) that a file can
describe has a ``kind``, a ``spec`` of plain JSON that names it, and is registered::

    @register("front end")
    class TraceTokens(nn.Module):
        kind = "trace"

Its class is called with the spec's other entries, unless it has a ``from_spec``. A
subclass is no registered part: it may compute something else.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

__all__ = ["build", "describe", "register"]

Part = TypeVar("Part", bound=type)

_PARTS: dict[str, dict[str, Any]] = {}
# Packages whose import registers the parts that come with the library.
_PROVIDERS = ("sbi_slotflow.nn", "sbi_slotflow.problems")


def register(role: str) -> Callable[[Part], Part]:
    """Decorate a class as a part that files can name.

    Args:
        role: What the part is, ``"encoder"`` for one.
    """

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
    """Rebuild a part from its spec.

    Args:
        role: What the part is.
        spec: What :func:`describe` returned.

    Raises:
        ValueError: If there is no part of that kind.
    """
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
