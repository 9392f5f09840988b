"""What an experiment of the suite is, and how experiments are found.

An experiment is one module in ``benchmarks/experiments``. Its docstring starts with a
title and has lines ``Paper: ...``, ``Question: ...`` and ``Protocol: ...`` (each may go
on, indented or not, until an empty line). It defines

- ``BUDGETS``: what ``smoke``, ``quick`` and ``full`` mean, a mapping to frozen
  dataclasses, in plain sight,
- ``run(budget, seed) -> xarray.Dataset``: the measurement, ``budget`` one of the names,
- ``plot(dataset) -> Figure``: the figure, from the dataset alone,
- ``claims(dataset) -> list[Claim]``: what is compared with what, from it alone,
- ``ADDS_SEEDS = True``, if what runs of several seeds find is kept together, along a
  dimension ``seed``: each run adds its own,
- ``WEIGHTS``, if it uses shipped weights: their presets. What was measured with other
  weights than those is measured again, and marked in the report until then.

Nothing is registered: a file in the folder is an experiment. Names that begin with an
underscore are helpers.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import xarray as xr
from matplotlib.figure import Figure

from sbi_slotflow import model_card

__all__ = ["BUDGET_NAMES", "Budget", "Claim", "Experiment", "discover", "load"]

Budget = Literal["smoke", "quick", "full"]
BUDGET_NAMES: tuple[Budget, ...] = get_args(Budget)
Value = float | str | None

_FOLDER = Path(__file__).parent / "experiments"
# What nobody can do better than: no rivals, and no loss to fall short of.
LIMITS = ("exact", "floor", "Cramér-Rao")
_TARGET = re.compile(r"(<=|>=|<|>)\s*([-+.\deE]+)")


@dataclass(frozen=True)
class Claim:
    """One quantity: ours beside the paper's, the rivals' and our target.

    Attributes:
        quantity: What it is, with its unit.
        ours: What we measured; None if it could not be.
        interval: Its 95 % interval.
        paper: The paper's number.
        source: Where the paper has it, ``"table 2"`` say.
        target: What we want, ``"<= 0.03"`` say.
        met: Whether it is reached; follows from a target that is a bound.
        better: Which way is better; then losses against paper and rivals are listed.
        rivals: Other methods' numbers by name, measured in the same run or published.
        note: What a reader must know to believe the number.
    """

    quantity: str
    ours: Value
    interval: tuple[float, float] | None = None
    paper: Value = None
    source: str = ""
    target: str | None = None
    met: bool | None = None
    better: Literal["lower", "higher"] | None = None
    rivals: Mapping[str, Value] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        bound = _TARGET.fullmatch(self.target or "")
        if self.met is None and bound and isinstance(self.ours, int | float):
            relation, limit = bound[1], float(bound[2])
            object.__setattr__(self, "met", _holds(self.ours, relation, limit))

    def worse_than(self) -> list[str]:
        """Names of those who do better than we, ``"paper"`` among them.

        Limits, as the exact posterior, are not counted.
        """
        if self.better is None or not isinstance(self.ours, int | float):
            return []
        sign = 1.0 if self.better == "lower" else -1.0
        others = {"paper": self.paper, **self.rivals}
        return [
            name
            for name, value in others.items()
            if name not in LIMITS
            and isinstance(value, int | float)
            and sign * value < sign * self.ours
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the claim as JSON values."""
        return {**asdict(self), "rivals": dict(self.rivals)}


@dataclass(frozen=True)
class Experiment:
    """An experiment's module, and what its docstring says.

    Attributes:
        name: Name of the module.
        module: The module.
    """

    name: str
    module: ModuleType

    @property
    def title(self) -> str:
        """First line of the docstring."""
        return (self.module.__doc__ or "").strip().splitlines()[0].rstrip(".")

    def about(self, heading: Literal["Paper", "Question", "Protocol", "Losses"]) -> str:
        """The docstring's paragraph of that heading in one line, or nothing.

        ``Losses`` says why a rival is better or a target is missed.
        """
        text = self.module.__doc__ or ""
        found = re.search(
            rf"^{heading}: (.*?)(?=\n\s*\n|\n[A-Z]\w+: |\Z)", text, re.S | re.M
        )
        return " ".join(found[1].split()) if found else ""

    @property
    def adds_seeds(self) -> bool:
        """Whether runs of several seeds are kept together."""
        return getattr(self.module, "ADDS_SEEDS", False)

    def budget(self, budget: Budget) -> dict[str, Any]:
        """What a budget means here."""
        return asdict(self.module.BUDGETS[budget])

    @property
    def weights(self) -> dict[str, str]:
        """Checksums of the shipped weights that are used, by name."""
        names = (
            f"sinusoids-{preset}" for preset in getattr(self.module, "WEIGHTS", ())
        )
        return {name: model_card(name)["sha256"][:12] for name in names}

    def run(self, budget: Budget, seed: int) -> xr.Dataset:
        """Measure."""
        return self.module.run(budget, seed)

    def plot(self, dataset: xr.Dataset) -> Figure:
        """Draw."""
        return self.module.plot(dataset)

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """Compare."""
        return self.module.claims(dataset)


def discover() -> list[str]:
    """Names of all experiments, sorted."""
    names = (path.stem for path in _FOLDER.glob("*.py"))
    return sorted(name for name in names if not name.startswith("_"))


def load(name: str) -> Experiment:
    """Import an experiment.

    Args:
        name: Name of a module in ``benchmarks/experiments``.

    Raises:
        ValueError: If there is none of that name, or it lacks a part.
    """
    if name not in discover():
        raise ValueError(f"name must be one of {discover()}, got {name!r}.")
    module = import_module(f"{__package__}.experiments.{name}")
    parts = ("BUDGETS", "run", "plot", "claims")
    if missing := [part for part in parts if not hasattr(module, part)]:
        raise ValueError(f"benchmarks/experiments/{name}.py lacks {missing}.")
    return Experiment(name, module)


def _holds(value: float, relation: str, limit: float) -> bool:
    below = value < limit or (value == limit and "=" in relation)
    above = value > limit or (value == limit and "=" in relation)
    return below if relation[0] == "<" else above
