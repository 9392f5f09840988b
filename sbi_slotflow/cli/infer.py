"""``sbi-slotflow infer``: from a file of signals to a file of posteriors."""
# ruff: noqa: T201

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plots import plot_cardinality, plot_corner, plot_reconstruction, plot_spectrum
from ..problems import Problem
from .answers import Answers, Settings, answer, check_refinable
from .arguments import InputError
from .models import Model, load_model
from .report import (
    print_cardinality,
    print_parameters,
    print_reconstruction,
    print_written,
    warn,
)
from .results_file import (
    MARK,
    aside,
    check_apart,
    check_out,
    write_figure,
    write_tree,
)
from .signal_files import SignalFile, SignalFileError, open_signals, split_name
from .stream import infer_many, parts_folder, read_checked
from .trees import signal_tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["analyse", "figure_paths", "infer", "open_checked"]

_SAMPLES_OF_ONE, _SAMPLES_OF_MANY = 4_000, 1_000


def infer(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
        args: What :func:`~sbi_slotflow.cli.arguments.parse` returns.

    Raises:
        InputError: If the usage or the input is at fault.
    """
    _check_outputs(args)
    signals = open_checked(args.signals, args.row)
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
        analyse(
            model,
            torch.from_numpy(signals.read(0, 1)),
            settings,
            attrs,
            args.out,
            figures=figure_paths(args.out) if args.plot else None,
            catalogue=args.catalogue,
            quiet=args.quiet,
        )


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


def open_checked(path: str, row: int | None = None) -> SignalFile:
    """Open a file of signals (T,) or (N, T), of which a row may be chosen.

    Raises:
        InputError: If there is no such file, array or row.
    """
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


def analyse(
    model: Model,
    x: Tensor,
    settings: Settings,
    attrs: dict[str, Any],
    out: Path,
    *,
    figures: Mapping[str, Path] | None = None,
    catalogue: Path | None = None,
    true_theta: Tensor | None = None,
    quiet: bool = False,
) -> None:
    """Analyse one signal: print what is found, write the result.

    Args:
        model: The model.
        x: The signal, shape ``(1, T)``.
        settings: How to analyse it.
        attrs: Attributes of the result.
        out: The result, ``.nc`` or ``.zarr``.
        figures: Where to write figures, by name (see :func:`figure_paths`).
        catalogue: Where to write the sources as a table.
        true_theta: The true row if known, shape ``(E,)``.
        quiet: Whether to print warnings only.
    """
    answers = answer(model, x, settings, true_theta=true_theta)
    rows, layout = answers.draws[0], model.posterior.prior.layout
    numbers = {name: float(v[0]) for name, v in answers.statistics.items()}
    if not quiet:
        units = {} if model.problem is None else model.problem.units
        known = None if true_theta is None else int(layout.cardinality(true_theta))
        print_cardinality(answers.probs[0], known)
        print_parameters(rows, answers.catalogues[0], layout, units, true_theta)
        if model.problem is not None:
            print_reconstruction(model.problem, rows, x, true_theta)
    if numbers.get("training_p_value", 1.0) < 1e-3:
        warn(
            "the signal is unlike the training data (p = "
            f"{numbers['training_p_value']:.1g}); do not trust this posterior"
        )
    if settings.refine and not numbers["pareto_k"] <= 0.7:
        warn(
            f"k-hat is {numbers['pareto_k']:.2f}, above 0.7: the refined posterior "
            "cannot be relied on"
        )
    tree = signal_tree(model, x, answers, settings, attrs, true_theta)
    written = _write_figures(model, x, answers, figures or {}, true_theta)
    if catalogue is not None:
        with aside(catalogue) as new:
            answers.catalogues[0].to_dataframe().to_csv(new, index=False)
        written.append(catalogue)
    write_tree(tree, out)
    if not quiet:
        print_written([out, *written])


def figure_paths(out: Path) -> dict[str, Path]:
    """Where the figures of a result lie, by name."""
    names = ("cardinality", "reconstruction", "spectrum", "corner")
    return {name: out.with_suffix(f".{name}.png") for name in names}


def _write_figures(
    model: Model,
    x: Tensor,
    answers: Answers,
    paths: Mapping[str, Path],
    true_theta: Tensor | None,
) -> list[Path]:
    """Write those figures of a signal that are wanted and make sense."""
    problem, rows = model.problem, answers.draws[0]
    layout = model.posterior.prior.layout
    k = int(layout.cardinality(rows).mode().values)
    true_k = None if true_theta is None else int(layout.cardinality(true_theta))
    units = None if problem is None else problem.units
    make: dict[str, Callable[[], Figure]] = {
        "cardinality": lambda: plot_cardinality(answers.probs[0], true_k)
    }
    if problem is not None:
        signal = (problem, rows, x, true_theta)
        if hasattr(problem.simulator, "signal"):
            make["reconstruction"] = lambda: plot_reconstruction(*signal)
        if type(problem).plot_spectrum is not Problem.plot_spectrum:
            make["spectrum"] = lambda: plot_spectrum(*signal)
    if k or layout.num_shared:
        make["corner"] = lambda: plot_corner(rows, layout, k, true_theta, units=units)
    paths = {name: path for name, path in paths.items() if name in make}
    for name, path in paths.items():
        write_figure(make[name](), path)
    return list(paths.values())


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
        warn(
            f"{summary.foreign} of {num:,} signals are unlike the training data "
            "(training_p_value < 0.001); do not trust their posteriors"
        )
    if summary.unreliable:
        warn(
            f"{summary.unreliable} of {num:,} refined posteriors have pareto_k above "
            "0.7 and cannot be relied on"
        )
    if not args.quiet:
        counts = ", ".join(f"K = {k}: {n:,}" for k, n in summary.most_probable.items())
        print(f"{num:,} signals; the most probable {counts}")
        written = [] if args.catalogue is None else [args.catalogue]
        print_written([args.out, *written])
