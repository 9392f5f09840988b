"""Cards of the weights that come with the package.

A card says how a set of weights was trained and what was measured of it. It is written
by ``python -m benchmarks.model_cards cards``.
"""

import json
from importlib.resources import files
from typing import Any

__all__ = ["available_weights", "check_name", "model_card"]


def available_weights() -> tuple[str, ...]:
    """Names of the sets of weights in this installation."""
    folder = files("sbi_slotflow") / "weights"
    names = {entry.name for entry in folder.iterdir()}
    cards = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return tuple(sorted(name for name in cards if f"{name}.safetensors" in names))


def model_card(name: str) -> dict[str, Any]:
    """Return how a set of weights was trained and what was measured of it.

    Args:
        name: See :func:`~sbi_slotflow.load_pretrained`.

    Raises:
        ValueError: If there are no such weights.
    """
    check_name(name)
    card = files("sbi_slotflow") / "weights" / f"{name}.json"
    return json.loads(card.read_text())


def check_name(name: str) -> None:
    """Raise ValueError unless there are weights of this name."""
    names = available_weights()
    if name not in names:
        raise ValueError(f"name must be one of {list(names)}, got {name!r}.")
