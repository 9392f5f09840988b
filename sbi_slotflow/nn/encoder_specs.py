"""Encoders that can be rebuilt from a saved file."""

from typing import Any, cast

from torch import nn

from .encoders import DualStreamEncoder, MLPEncoder
from .token_encoder import TokenEncoder

__all__ = ["ENCODERS", "encoder_from_spec", "encoder_spec"]

ENCODERS: dict[str, type[nn.Module]] = {
    encoder.kind: encoder for encoder in (DualStreamEncoder, MLPEncoder, TokenEncoder)
}
"""The package's encoders by name."""


def encoder_spec(encoder: nn.Module) -> dict[str, Any] | None:
    """Describe an encoder of this package; None for a module of the user's own."""
    # A subclass may compute something else.
    if type(encoder) not in ENCODERS.values():
        return None
    return cast(dict[str, Any], encoder.spec)


def encoder_from_spec(spec: dict[str, Any]) -> nn.Module:
    """Rebuild an encoder from its ``spec``.

    Raises:
        ValueError: If the kind is unknown.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in ENCODERS:
        raise ValueError(
            f"encoder kind must be one of {sorted(ENCODERS)}, got {kind!r}."
        )
    return ENCODERS[kind](**options)
