"""The command line, ``sbi-slotflow``: posteriors of signals in files.

``sbi-slotflow infer`` analyses signals with shipped weights or a model of the user's,
``sbi-slotflow info`` tells what the shipped weights are. ``--help`` says the rest.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["InputError", "at_least", "exit_status", "main", "script"]


class InputError(Exception):
    """Bad usage or bad input; the message says what was expected and what came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns what :func:`exit_status` does."""
    args = _parse(argv)

    def work() -> None:
        # Late: --help need not wait for torch and sbi.
        if args.command == "info":
            from .report import print_model

            print_model(args.model)
        else:
            from .infer import infer

            infer(args)

    return exit_status(work, "the same command goes on")


def exit_status(work: Callable[[], None], advice: str) -> int:
    """Do what a command does, and return its exit status.

    0 when done, 2 if the usage or the input is at fault, or a file in the way, which
    one line on stderr explains, 130 if interrupted, with advice. What nobody foresaw is
    raised, and Python exits with 1.
    """
    try:
        work()
    except (InputError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {advice}", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def script() -> None:
    """Run as a program of its own."""
    # The network's matrices are small: threads that wait for each other cost more than
    # they gain, several times more on a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())


_EXIT = """\
exit status:
  0    done
  1    unexpected error, with a traceback
  2    bad usage or bad input: one line says what was expected and what came
  130  interrupted
"""

_INFER = """\
SIGNALS is one array of floating-point numbers. An array (T,) is one signal, and the
result is an ArviZ tree: draws, predictive draws, p(K | x) and a catalogue of sources.
An array (N, T) is N signals, read a few at a time; the result has the same groups with
a leading dimension `observation`. Until it is whole, its parts lie in OUT.parts: the
same command takes an interrupted run up again. OUT itself appears in one piece. It
replaces an earlier result of this program, and nothing else.
"""

_INFER_EXAMPLES = """\
examples:
  sbi-slotflow infer signal.npy --model sinusoids-paper --out result.nc --plot
  sbi-slotflow infer night.h5:flux --model sinusoids-crowded --out night.zarr --refine
  sbi-slotflow infer x.npy --model mine.safetensors --problem mine.py:problem \\
      --out result.nc --catalogue sources.csv

"""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="sbi-slotflow",
        description="How many components are in a signal, and their parameters.",
        epilog=_EXIT,
        **style,
    )
    parser.add_argument("--version", action="version", version=version("sbi-slotflow"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    infer = commands.add_parser(
        "infer",
        help="infer the posterior of signals in a file",
        description=_INFER,
        epilog=_INFER_EXAMPLES + _EXIT,
        **style,
    )
    _add_options(infer.add_argument)
    info = commands.add_parser(
        "info",
        help="tell how a model was trained and how good it is",
        description="Print the card of a model that comes with the package.",
        epilog=_EXIT,
        **style,
    )
    info.add_argument("model", nargs="?", help="its name; lists the models if left out")
    return parser.parse_args(argv)


def _add_options(add: Callable[..., Any]) -> None:
    add(
        "signals",
        metavar="SIGNALS",
        help="file.npy, file.h5:dataset or folder.zarr:array; the name after the colon "
        "may be left out where there is one array",
    )
    named = "a model of `sbi-slotflow info`, or a file that SlotDensityEstimator.save"
    add("--model", required=True, help=f"{named} wrote")
    add(
        "--problem",
        metavar="FILE.py:NAME",
        help="for a model file: the Problem or VariableKPrior that it was trained "
        "for, in a Python file of yours, which is run; or the name of a model of "
        "`sbi-slotflow info`, for its problem",
    )
    add("--out", required=True, type=Path, help="result to write, .nc or .zarr")
    row = "analyse signal I of an array (N, T) alone, counted from 0"
    add("--row", type=at_least(0), metavar="I", help=row)
    num = "draws from each posterior (4,000 of one signal, 1,000 each of many)"
    add("--num-samples", type=at_least(1), metavar="S", help=num)
    add("--seed", type=at_least(0), default=0, help="seed of the draws (0)")
    add(
        "--refine",
        action="store_true",
        help="make the posterior exact by importance sampling with the problem's "
        "likelihood, of at least 10,000 draws, resampled to S; k-hat in the result "
        "says whether to believe it. Slow for many signals",
    )
    table = "write the sources as a table"
    add("--catalogue", type=Path, metavar="FILE.csv", help=table)
    plot = "of one signal, write figures beside OUT (result.corner.png, ...)"
    add("--plot", action="store_true", help=plot)
    add("--quiet", action="store_true", help="print errors only, and no progress bar")


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of ``argparse``: integers from ``least`` on."""

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return number

    return parsed
