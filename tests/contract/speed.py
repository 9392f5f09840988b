"""Times two versions of the package against each other, in one process.

``python tests/contract/speed.py --old PATH --new PATH`` takes two source trees. Both
do the same work on the same data, in turn: old, new, new, old, ... Each repetition has
a signal of its own, so that nothing remembered of the one before helps. It prints the
seconds of each and the ratio new / old of the pairs: median, least, largest.
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
    """Draw signals of ten sinusoids each."""
    with tree.active() as package:
        problem = package.problems.sinusoids("paper")
        theta = problem.prior.sample((40 * num,), generator=seeded(1))
        return problem.simulator(theta[theta[:, 0] == 10][:num], seeded(2))


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
            (10_000,), x[i], k=10, generator=seeded(i)
        ),
        "p(K given x)": lambda i: posterior.cardinality(x[i]).probs,
        "refine, 10,000 draws": lambda i: posterior.refine(
            paper.log_likelihood, x[i], 10_000, generator=seeded(i)
        ),
        f"{STEPS} training steps": train(0),
        f"{STEPS} training steps, Gauss-Newton": train(3),
    }


def seconds(tree: Tree, work: Work, i: int) -> float:
    """Time one repetition."""
    with tree.active(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        work(i)
        return time.perf_counter() - start


def main() -> None:
    """Time all tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="a source tree")
    parser.add_argument("--new", type=Path, required=True, help="another")
    parser.add_argument("--repetitions", type=int, default=10)
    for name in ("old", "new"):
        parser.add_argument(
            f"--{name}-steps",
            default="refine_slots",
            help="what its slot_nn calls the number of Gauss-Newton steps",
        )
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = Tree(options.old.resolve(), options.old_steps)
    new = Tree(options.new.resolve(), options.new_steps)
    # The first signal only warms up.
    x = signals(old, options.repetitions + 1)
    works = [tasks(tree, x) for tree in (old, new)]
    print(f"{'':<36}{'old (s)':>10}{'new (s)':>10}   new / old (least, largest)")
    for name in works[0]:
        pairs = list(zip((old, new), (work[name] for work in works), strict=True))
        times: list[list[float]] = [[], []]
        for i in range(options.repetitions + 1):
            for j in (0, 1) if i % 2 else (1, 0):
                times[j].append(seconds(*pairs[j], i))
        before, after = (part[1:] for part in times)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        print(
            f"{name:<36}{statistics.median(before):>10.4f}"
            f"{statistics.median(after):>10.4f}   {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}, {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
