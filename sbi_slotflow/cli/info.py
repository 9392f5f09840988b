"""``sbi-slotflow info``: what the models that come with the package are."""
# ruff: noqa: T201

from typing import Any

from ..pretrained.cards import available_weights, model_card
from .errors import InputError

__all__ = ["info"]


def info(name: str | None) -> None:
    """Print the names of the models, or the card of one.

    Args:
        name: A model's name; None lists them.

    Raises:
        InputError: If there is no such model.
    """
    names = available_weights()
    if name is None:
        for known in names:
            card = model_card(known)
            measured = card["measured"]["K accuracy"]
            print(
                f"{known:20} for {card['problem']}; K right in "
                f"{100 * measured['accuracy']:.1f} % of {measured['n']:,} signals"
            )
        return
    if name not in names:
        raise InputError(f"expected a model of {', '.join(names)}; got {name!r}")
    _print_entries(model_card(name))


def _print_entries(entries: dict[str, Any], indent: int = 0) -> None:
    """Print a card as an indented list, each measured number on one line."""
    for key, value in entries.items():
        start = f"{' ' * indent}{key}:"
        if isinstance(value, dict) and {"mean", "error"} <= set(value):
            rest = ", ".join(
                f"{name} {_shown(value[name])}"
                for name in ("median", "min", "max", "n")
                if name in value
            )
            mean, error = _shown(value["mean"]), _shown(value["error"])
            print(f"{start} {mean} +- {error} ({rest})")
        elif isinstance(value, dict):
            print(start)
            _print_entries(value, indent + 2)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(start)
            for entry in value:
                pairs = ", ".join(f"{k} {_shown(v)}" for k, v in entry.items())
                print(f"{' ' * indent}  - {pairs}")
        elif isinstance(value, list):
            print(f"{start} {' to '.join(map(_shown, value))}")
        else:
            print(f"{start} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
