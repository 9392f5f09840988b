"""``sbi-slotflow infer``: from a file of signals to a file of posteriors."""
# ruff: noqa: T201

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..sets.layout import ThetaLayout
from .answers import Settings, answer, check_refinable
from .errors import InputError
from .figures import figure_paths, write_figures
from .models import Model, load_model
from .report import print_cardinality
from .results_file import MARK, aside, check_apart, check_out, write_tree
from .signal_files import SignalFile, SignalFileError, open_signals, split_name
from .stream import infer_many, parts_folder, read_checked
from .trees import signal_tree

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["infer"]

_SAMPLES_OF_ONE, _SAMPLES_OF_MANY = 4_000, 1_000


def infer(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
        args: What :func:`~sbi_slotflow.cli.arguments.parse` returns.

    Raises:
        InputError: If the usage or the input is at fault.
    """
    _check_outputs(args)
    signals = _open(args.signals, args.row)
    many = len(signals.shape) == 2 and args.row is None
    if many and args.plot:
        raise InputError(
            f"--plot takes one signal; {signals.name} holds {signals.shape[0]}: choose "
            "one with --row"
        )
    model = load_model(args.model, args.problem)
    if signals.shape[-1] != model.num_data:
        raise InputError(
            f"expected signals of {model.num_data} samples for {model.name}, shape "
            f"({model.num_data},) or (N, {model.num_data}); got shape {signals.shape}"
        )
    if args.refine:
        check_refinable(model)
    attrs: dict[str, Any] = {**MARK, "model": model.name, "model_sha256": model.sha256}
    if args.row is not None:
        attrs["row"] = args.row
        row = signals.read(args.row, args.row + 1)[0]
        signals = SignalFile(f"row {args.row} of {signals.name}", row.shape, row)
    attrs |= {"signals": args.signals, "signals_sha256": read_checked(signals)}
    default = _SAMPLES_OF_MANY if many else _SAMPLES_OF_ONE
    settings = Settings(args.num_samples or default, args.seed, args.refine)
    if many:
        _many(model, signals, settings, attrs, args)
    else:
        attrs |= {"seed": str(args.seed), "refined": int(args.refine)}
        _one(model, signals, settings, attrs, args)


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError if anything would be overwritten that is not ours."""
    figures = list(figure_paths(args.out).values()) if args.plot else []
    tables = [] if args.catalogue is None else [args.catalogue]
    inputs = [args.model, (args.problem or "").rpartition(":")[0]]
    read = [split_name(args.signals)[0], *(Path(name) for name in inputs if name)]
    read = [path for path in read if path.exists()]
    check_apart([args.out, parts_folder(args.out), *tables, *figures], read)
    check_out(args.out, "--out")
    for path in tables:
        check_out(path, "--catalogue", (".csv",))
    for path in figures:
        check_out(path, "--plot", (".png",))


def _open(path: str, row: int | None) -> SignalFile:
    expected = "expected an array (T,) or (N, T) of floating-point numbers"
    try:
        signals = open_signals(path)
    except SignalFileError as error:
        raise InputError(f"{error}; {expected}") from error
    if len(signals.shape) not in (1, 2) or 0 in signals.shape:
        raise InputError(f"{expected}; {path} has shape {signals.shape}")
    if row is not None and len(signals.shape) == 1:
        raise InputError(
            f"--row goes with an array (N, T); {path} has shape {signals.shape}"
        )
    if row is not None and row >= signals.shape[0]:
        raise InputError(
            f"expected --row to be in 0..{signals.shape[0] - 1} for {path}; got {row}"
        )
    return signals


def _one(
    model: Model,
    signals: SignalFile,
    settings: Settings,
    attrs: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    x = torch.from_numpy(signals.read(0, 1))
    answers = answer(model, x, settings)
    numbers = {name: float(v[0]) for name, v in answers.statistics.items()}
    if not args.quiet:
        print_cardinality(answers.probs[0])
        _print_catalogue(answers.catalogues[0], model.posterior.prior.layout)
    if numbers.get("training_p_value", 1.0) < 1e-3:
        _warn(
            "the signal is unlike the training data (p = "
            f"{numbers['training_p_value']:.1g}); do not trust this posterior"
        )
    if settings.refine and not numbers["pareto_k"] <= 0.7:
        _warn(
            f"k-hat is {numbers['pareto_k']:.2f}, above 0.7: the refined posterior "
            "cannot be relied on"
        )
    tree = signal_tree(model, x, answers, settings, attrs)
    written = []
    if args.plot:
        written += write_figures(model, x, answers, args.out)
    if args.catalogue is not None:
        with aside(args.catalogue) as new:
            answers.catalogues[0].to_dataframe().to_csv(new, index=False)
        written.append(args.catalogue)
    write_tree(tree, args.out)
    if not args.quiet:
        _print_written([args.out, *written])


def _many(
    model: Model,
    signals: SignalFile,
    settings: Settings,
    attrs: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    summary = infer_many(
        model, signals, settings, args.out, args.catalogue, attrs, args.quiet
    )
    num = signals.shape[0]
    if summary.foreign:
        _warn(
            f"{summary.foreign} of {num:,} signals are unlike the training data "
            "(training_p_value < 0.001); do not trust their posteriors"
        )
    if summary.unreliable:
        _warn(
            f"{summary.unreliable} of {num:,} refined posteriors have pareto_k above "
            "0.7 and cannot be relied on"
        )
    if not args.quiet:
        counts = ", ".join(f"K = {k}: {n:,}" for k, n in summary.most_probable.items())
        print(f"{num:,} signals; the most probable {counts}")
        written = [] if args.catalogue is None else [args.catalogue]
        _print_written([args.out, *written])


def _print_catalogue(catalogue: "Dataset", layout: ThetaLayout) -> None:
    """Print sources with medians and 90 % intervals."""
    table = catalogue.to_dataframe()
    if table.empty:
        print("\nno sources")
        return
    print("\nsources: probability to exist, median and 90 % interval of each parameter")
    header = "".join(f"{name:>34}" for name in layout.component_names)
    print(f"  {'':<4}{'existence':>9}{header}")
    for number, row in table.iterrows():
        cells = "".join(
            f"{row[name]:>12.6g} [{row[f'{name}_low']:>9.6g}, "
            f"{row[f'{name}_high']:>8.6g}]"
            for name in layout.component_names
        )
        print(f"  {number!s:<4}{row['existence']:>9.3f}{cells}")
    unlisted = catalogue.attrs["expected_unlisted"]
    if unlisted > 0.05:
        print(f"  and {unlisted:.2f} components expected that are in no listed source")


def _print_written(paths: list[Path]) -> None:
    print("\nwrote " + ", ".join(map(str, paths)))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
