"""What the command line and the demo print."""
# ruff: noqa: T201

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pretrained import available_weights, model_card
from ..problems import Problem
from ..sets.circular import near, unwrap
from ..sets.layout import ThetaLayout
from . import InputError

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = [
    "print_accuracy",
    "print_cardinality",
    "print_model",
    "print_parameters",
    "print_reconstruction",
    "print_written",
    "warn",
]


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr)


def print_written(paths: list[Path]) -> None:
    """Print where the results are."""
    print("\nwrote " + ", ".join(map(str, paths)))


def print_cardinality(probs: Tensor, true: int | None = None) -> None:
    """Print p(K | x) with the true K marked."""
    print("\np(K | x)")
    for k, p in enumerate(probs.tolist()):
        bar, mark = "#" * round(30 * p), "  truth" if k == true else ""
        print(f"  K = {k}  {p:.3f}  {bar}{mark}".rstrip())


def print_parameters(
    rows: Tensor,
    catalogue: "Dataset",
    layout: ThetaLayout,
    units: Mapping[str, str],
    true_theta: Tensor | None = None,
) -> None:
    """Print medians and 90 % intervals of shared parameters and sources."""
    print("\nmedian, 90 % interval" + ("" if true_theta is None else " and truth"))

    def line(name: str, values: list[float], truth: float | None) -> None:
        unit = f" ({units[name]})" if name in units else ""
        median, low, high = _shown_alike(values)
        true = "" if truth is None else _shown_alike([truth, *values])[0]
        interval = f"{median:>12}  [{low:>11}, {high:>11}]"
        print(f"  {name + unit:<20}{interval}{true:>13}".rstrip())

    shared = layout.unpack(rows).shared.double()
    for i, name in enumerate(layout.shared_names):
        values, period = shared[:, i], layout.periods.get(name, math.inf)
        if math.isfinite(period):
            values = unwrap(values, period)
        levels = torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)
        found = values.quantile(levels)
        truth = None
        if true_theta is not None:
            value = layout.unpack(true_theta.reshape(1, -1)).shared[:, i].double()
            truth = near(value, found[:1], [period]).item()
        line(name, found.tolist(), truth)
    for number, row in enumerate(catalogue.to_dataframe().to_dict("records")):
        print(f"source {number}, there with probability {row['existence']:.3f}")
        for name in layout.component_names:
            values = [row[f"{name}{end}"] for end in ("", "_low", "_high")]
            truth = None if true_theta is None else row[f"true_{name}"]
            line(name, values, None if truth is None or math.isnan(truth) else truth)
    if not len(catalogue["source"]):
        print("no sources")
    unlisted = catalogue.attrs["expected_unlisted"]
    if unlisted > 0.05:
        print(f"and {unlisted:.2f} components expected that are in no listed source")


def _shown_alike(values: list[float]) -> list[str]:
    """Numbers with as many digits as the last two, an interval, are worth."""
    width, size = abs(values[-1] - values[-2]), max(map(abs, values))
    digits = 3
    if width > 0:
        digits += math.floor(math.log10(size)) - math.floor(math.log10(width))
    return [f"{v:#.{min(digits, 9)}g}".rstrip(".") for v in values]


def print_reconstruction(
    problem: Problem, rows: Tensor, x: Tensor, true_theta: Tensor | None = None
) -> None:
    """Print how far the posterior mean of the signal is from the truth, or from x."""
    signal: Any = getattr(problem.simulator, "signal", None)
    if signal is None:
        return
    mean = signal(rows).mean(0)
    if true_theta is None:
        print(f"\nRMS residual of the reconstruction: {_rms(x - mean):.3g}")
        return
    true = signal(true_theta.reshape(1, -1))
    error, size, noise = _rms(mean - true), _rms(true), _rms(x - true)
    relative = "the true signal is zero"
    if size > 0:
        relative = f"{100 * error / size:.1f} % of the true signal's RMS"
    shown = f"{error / noise:.3f} sigma" if noise > 0 else f"{error:.3g}"
    print(f"\nRMS error of the reconstruction: {shown} ({relative})")


def print_accuracy(probs: Tensor, true: Tensor) -> None:
    """Print how often the most probable K is the true one."""
    correct = probs.argmax(-1) == true
    print(
        f"\nK accuracy on {len(true):,} fresh signals: {correct.float().mean():.3f} "
        "(the most probable K against the true one)"
    )


def print_model(name: str | None) -> None:
    """Print the names of the models that come with the package, or the card of one."""
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


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
