"""``sbi-slotflow infer``: from a file of signals to a file of posteriors.

Many signals are analysed in batches, whose answers are kept until all are there.
"""
# ruff: noqa: T201

import argparse
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..plots import plot_cardinality, plot_corner, plot_reconstruction, plot_spectrum
from ..problems import Problem
from ..storage import ASIDE
from . import InputError
from .models import Answers, Model, Settings, answer, check_refinable, load_model
from .report import (
    print_cardinality,
    print_parameters,
    print_reconstruction,
    print_written,
    warn,
)
from .results_file import (
    MARK,
    batch_tree,
    check_apart,
    check_out,
    join_csv,
    join_parts,
    read_part,
    replacing,
    signal_tree,
    write_figure,
    write_tree,
)
from .signal_files import SignalFile, open_signals, split_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BATCH",
    "analyse",
    "figure_paths",
    "infer",
    "parts_folder",
]


_SAMPLES_OF_ONE, _SAMPLES_OF_MANY = 4_000, 1_000
BATCH = 16
"""Signals in a batch. Draws depend on it, as each batch has a random stream."""

# The file that marks a folder as a run's, and its format.
_RUN, _FORMAT = "run.json", "sbi_slotflow.UnfinishedRun"


def infer(args: argparse.Namespace) -> None:
    """Run the command."""
    _check_outputs(args)
    signals = open_signals(args.signals, args.row)
    many = len(signals.shape) == 2
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
    attrs |= {"signals": args.signals, "signals_sha256": signals.checked()}
    default = _SAMPLES_OF_MANY if many else _SAMPLES_OF_ONE
    settings = Settings(args.num_samples or default, args.seed, args.refine)
    if many:
        _infer_many(model, signals, settings, attrs, args)
    else:
        attrs |= {"seed": str(args.seed), "refined": int(args.refine)}
        figures = figure_paths(args.out) if args.plot else None
        extra = {"catalogue": args.catalogue, "quiet": args.quiet}
        x = torch.from_numpy(signals.read(0, 1))
        analyse(model, x, settings, attrs, args.out, figures=figures, **extra)


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
    """Analyse one signal: print what is found, write the result."""
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
        with replacing(catalogue) as new:
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


def _infer_many(
    model: Model,
    signals: SignalFile,
    settings: Settings,
    attrs: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Analyse many signals and write one result.

    The answers of each batch lie in ``OUT.parts`` until all are there, so that a run
    can be taken up again.
    """
    num, folder = signals.shape[0], parts_folder(args.out)
    _open_run(folder, {**attrs, **asdict(settings), "num": num, "batch": BATCH})
    stops = {s: min(s + BATCH, num) for s in range(0, num, BATCH)}
    parts = {start: folder / f"{start:09}.nc" for start in stops}
    done = sum(stops[start] - start for start, part in parts.items() if part.exists())
    style = {"unit": "signal", "desc": "Signals", "disable": args.quiet}
    with tqdm(total=num, initial=done, file=sys.stderr, **style) as bar:
        for start, part in parts.items():
            if not part.exists():
                x = torch.from_numpy(signals.read(start, stops[start]))
                answers = answer(model, x, settings, start // BATCH)
                write_tree(batch_tree(model, answers, start, attrs), part)
                bar.update(len(x))
    counts, doubts = _counts(parts.values())
    join_parts([*parts.values()], args.out)
    written = [args.out]
    if args.catalogue is not None:
        join_csv([*parts.values()], args.catalogue)
        written.append(args.catalogue)
    _close_run(folder, parts.values())
    if foreign := doubts["foreign"]:
        warn(
            f"{foreign} of {num:,} signals are unlike the training data "
            "(training_p_value < 0.001); do not trust their posteriors"
        )
    if unreliable := doubts["unreliable"]:
        warn(
            f"{unreliable} of {num:,} refined posteriors have pareto_k above 0.7 and "
            "cannot be relied on"
        )
    if not args.quiet:
        most = ", ".join(f"K = {k}: {n:,}" for k, n in sorted(counts.items()))
        print(f"{num:,} signals; the most probable {most}")
        print_written(written)


def parts_folder(out: Path) -> Path:
    """Folder of the parts of an unfinished result."""
    return out.with_name(f"{out.name}.parts")


def _open_run(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run's parts, or check that it is this run's."""
    settings = {"format": _FORMAT, "version": version("sbi-slotflow"), **settings}
    if not os.path.lexists(folder):
        # The folder appears with its mark inside: one without is none of ours.
        new = folder.with_name(f"{ASIDE}{uuid.uuid4().hex}")
        new.mkdir()
        (new / _RUN).write_text(json.dumps(settings, indent=1))
        new.rename(folder)
        return
    old: Any = None
    with suppress(OSError, ValueError):
        old = json.loads((folder / _RUN).read_text())
    if not isinstance(old, dict) or old.get("format") != _FORMAT:
        raise InputError(
            f"{folder} is no folder of an unfinished run, so it is left alone: move it "
            "away, or give another --out"
        )
    differ = [
        f"{key} was {_short(old.get(key))}, now {_short(value)}"
        for key, value in settings.items()
        if old.get(key) != value
    ]
    if differ:
        raise InputError(
            f"{folder} holds an unfinished run of other settings "
            f"({'; '.join(differ)}): repeat them, delete it, or give another --out"
        )


def _close_run(folder: Path, parts: Iterable[Path]) -> None:
    """Remove what the run put into its folder, and the folder if that was all."""
    for path in [*parts, *folder.glob(f"{ASIDE}*"), folder / _RUN]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # files of somebody else lie in it
        folder.rmdir()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."


def _counts(parts: Iterable[Path]) -> tuple[Counter[int], Counter[str]]:
    """How many signals have each K as the most probable one, and are to be doubted."""
    counts, doubts = Counter[int](), Counter[str]()
    for part in parts:
        groups = read_part(part).children
        probs = groups["cardinality"].to_dataset()["probability"].values
        counts.update(probs.argmax(-1).tolist())
        stats = groups["sample_stats"].to_dataset()
        if "training_p_value" in stats:
            doubts["foreign"] += int((stats["training_p_value"].values < 1e-3).sum())
        if "pareto_k" in stats:
            doubts["unreliable"] += int((~(stats["pareto_k"].values <= 0.7)).sum())
    return counts, doubts
