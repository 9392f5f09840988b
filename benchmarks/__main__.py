"""The benchmark suite: ``python -m benchmarks list | run | figures | report``.

Examples::

    python -m benchmarks list
    python -m benchmarks run --budget smoke            # all, seconds each
    python -m benchmarks run cardinality widths        # quick is the default
    python -m benchmarks figures                       # into benchmarks/figures
    python -m benchmarks report                        # writes benchmarks/REPORT.md

A run that was stopped goes on where it was; what is done is not done again unless
``--again``. Experiments of a training of their own take several seeds, now or later
(``run classes --seed 1 2``), and keep what they find together.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .experiment import BUDGET_NAMES, discover, load
from .report import write_report
from .store import Cache, Result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the experiments")
    run = commands.add_parser("run", help="run experiments")
    run.add_argument("names", nargs="*", metavar="NAME", help="all if none is given")
    run.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="one after the other"
    )
    run.add_argument("--again", action="store_true", help="run what is done, too")
    figures = commands.add_parser("figures", help="draw the figures of what was run")
    figures.add_argument(
        "names", nargs="*", metavar="NAME", help="all if none is given"
    )
    report = commands.add_parser("report", help="write benchmarks/REPORT.md")
    for command in (run, figures, report):
        command.add_argument("--budget", choices=BUDGET_NAMES, default="quick")
        command.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.command == "list":
        for name in discover():
            experiment = load(name)
            print(f"{name:<20} {experiment.title} ({experiment.about('Paper')})")
        return 0
    if args.command == "report":
        print(write_report(args.budget, args.out))
        return 0
    known = discover()
    if unknown := sorted(set(args.names) - set(known)):
        print(f"no experiment {unknown}; there are {known}", file=sys.stderr)
        return 2
    if args.command == "run":
        _run(args, known)
    else:
        _draw(args, known)
    return 0


def _draw(args: argparse.Namespace, known: list[str]) -> None:
    for name in args.names or known:
        result = Result(load(name), args.budget, args.out)
        if result.path.exists():
            result.draw()
            print(result.figure)
        else:
            print(f"{name}: not run at the budget {args.budget}")


def _run(args: argparse.Namespace, known: list[str]) -> None:
    warnings.simplefilter("default")
    bar = tqdm(args.names or known, desc=args.budget, unit="experiment")
    for name in bar:
        bar.set_postfix_str(name)
        for seed in args.seed:
            _run_seed(args, name, seed)


def _run_seed(args: argparse.Namespace, name: str, seed: int) -> None:
    result = Result(load(name), args.budget, args.out)
    if result.done(seed) and not args.again:
        tqdm.write(f"{name}, seed {seed}: done before; --again runs it again")
        return
    cache = Cache(name, args.budget, seed)
    if args.again:
        cache.clear()
    experiment = result.experiment
    cache.belongs_to({**experiment.budget(args.budget), "weights": experiment.weights})
    result.measure(seed)
    facts = result.facts()
    met = [claim["met"] for claim in facts["claims"] if claim["met"] is not None]
    tqdm.write(
        f"{name}: {len(facts['claims'])} claims, {sum(met)} of {len(met)} targets "
        f"met, {result.path}"
    )


if __name__ == "__main__":
    sys.exit(main())
