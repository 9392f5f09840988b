"""The command line, ``sbi-slotflow``: posteriors of signals in files.

``sbi-slotflow infer`` analyses signals with shipped weights or a model of the user's,
``sbi-slotflow info`` tells what the shipped weights are. ``--help`` says the rest.
"""

import os
import sys
from collections.abc import Sequence

from .arguments import InputError, parse

__all__ = ["main", "script"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 when done, 2 if the usage or the input is at fault, which one
        line on stderr explains, 130 if interrupted. What nobody foresaw is raised, and
        Python exits with 1.
    """
    args = parse(argv)
    try:
        # Late: --help need not wait for torch and sbi.
        if args.command == "info":
            from .report import print_model

            print_model(args.model)
        else:
            from .infer import infer

            infer(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def script() -> None:
    """Run as a program of its own."""
    # The network's matrices are small: threads that wait for each other cost more than
    # they gain, several times more on a busy machine. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
