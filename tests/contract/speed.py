"""Times two versions of the package against each other, in one process.

``python tests/contract/speed.py --old PATH --new PATH`` takes two source trees. They do
the same work on the same data, in turn, and a second import of the old one with them:
the ratio old / old of identical code shows what the measurement itself is good for. A
new / old inside its spread says nothing. Seconds are those of the process (CPU time):
beside other jobs, elapsed times of identical code differed by up to a factor of three.
Each repetition has signals of its own, so that nothing remembered of those before
helps. Ratios are printed as median (least, largest).
"""

# ruff: noqa: T201

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "sbi_slotflow"
STEPS = 10  # of training
SIGNALS = 40  # whose p(K given x) is one repetition: one takes milliseconds

Work = Callable[[int], Any]


@dataclass
class Tree:
    """One version: its modules are in ``sys.modules`` only while it is active.

    Attributes:
        path: Folder that holds the package.
        steps_option: What ``slot_nn`` calls the number of Gauss-Newton steps.
    """

    path: Path
    steps_option: str
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Import the package from this tree."""
        assert not _loaded()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.path))
        try:
            package = import_module(NAME)
            assert Path(str(package.__file__)).is_relative_to(self.path), package
            yield package
        finally:
            sys.path.remove(str(self.path))
            self.modules = {name: sys.modules.pop(name) for name in _loaded()}


def _loaded() -> list[str]:
    return [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]


def seeded(seed: int) -> torch.Generator:
    """Return a generator of this seed."""
    return torch.Generator().manual_seed(seed)


def signals(tree: Tree, num: int) -> Tensor:
    """Draw signals of ten sinusoids each, shape ``(num, SIGNALS, T)``."""
    with tree.active() as package:
        problem = package.problems.sinusoids("paper")
        given_k = problem.prior.with_cardinality([0.0] * 10 + [1.0])
        theta = given_k.sample((num, SIGNALS), generator=seeded(1))
        return problem.simulator(theta, seeded(2))


def tasks(tree: Tree, x: Tensor) -> dict[str, Work]:
    """Return what is timed; each is given the number of the repetition."""
    with tree.active() as package:
        paper = package.problems.sinusoids("paper")
        tiny = package.problems.sinusoids("tiny")
        posterior = package.load_pretrained("sinusoids-paper")

    def train(steps: int) -> Work:
        def run(i: int) -> None:
            build = package.slot_nn(tiny, **{tree.steps_option: steps})
            trainer = package.SlotNPE(tiny.prior, build, show_progress_bars=False)
            trainer.train_online(
                tiny.simulator, num_simulations=STEPS * 128, num_validation=8, seed=i
            )

        return run

    return {
        "10,000 samples, K = 10": lambda i: posterior.sample(
            (10_000,), x[i, 0], k=10, generator=seeded(i)
        ),
        f"p(K given x), {SIGNALS} signals": lambda i: [
            posterior.cardinality(one).probs for one in x[i]
        ],
        "refine, 10,000 draws": lambda i: posterior.refine(
            paper.log_likelihood, x[i, 0], 10_000, generator=seeded(i)
        ),
        f"{STEPS} training steps": train(0),
        f"{STEPS} training steps, Gauss-Newton": train(3),
    }


def seconds(tree: Tree, work: Work, i: int) -> float:
    """Return the CPU time of one repetition."""
    with tree.active(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        work(i)
        return time.process_time() - start


def main() -> None:
    """Time all tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="a source tree")
    parser.add_argument("--new", type=Path, required=True, help="another")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--only", default="", help="only tasks whose name holds this")
    for name in ("old", "new"):
        parser.add_argument(
            f"--{name}-steps",
            default="refine_slots",
            help="what its slot_nn calls the number of Gauss-Newton steps",
        )
    options = parser.parse_args()
    torch.set_num_threads(1)
    old, again = (Tree(options.old.resolve(), options.old_steps) for _ in range(2))
    new = Tree(options.new.resolve(), options.new_steps)
    arms = (old, again, new)
    # The first repetition only warms up.
    x = signals(old, options.repetitions + 1)
    works = [tasks(tree, x) for tree in arms]
    print(f"{'':<34}{'old (s)':>9}{'new (s)':>9}   {'new / old':<21}old / old")
    for name in works[0]:
        if options.only not in name:
            continue
        times: list[list[float]] = [[] for _ in arms]
        for i in range(options.repetitions + 1):
            for place in range(len(arms)):
                j = (place + i) % len(arms)
                times[j].append(seconds(arms[j], works[j][name], i))
        first, second, last = (part[1:] for part in times)
        print(
            f"{name:<34}{statistics.median(first):>9.4f}"
            f"{statistics.median(last):>9.4f}   {_ratio(last, first):<21}"
            f"{_ratio(second, first)}",
            flush=True,
        )


def _ratio(times: list[float], base: list[float]) -> str:
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"


if __name__ == "__main__":
    main()
