"""Where results are kept: one JSON file a run, and parts of long ones.

The file holds the dataset, rounded, the claims that follow from it, and how it was
made. Figures are drawn from it when wanted. ``Cache`` lets a long experiment be
stopped: each part (a signal, a training) is a JSON file of its own, with all digits,
keyed by experiment, budget, seed and part, in a folder that git ignores.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from sbi_slotflow.seeding import forked_rng, generator_for

from .experiment import Budget, Claim, Experiment

__all__ = [
    "RESULTS",
    "Cache",
    "Result",
    "along_seeds",
    "concatenated",
    "decoded",
    "encoded",
    "machine",
    "plain",
    "versions",
    "write_json",
]

_HERE = Path(__file__).parent
RESULTS = _HERE / "results"
SMOKE = _HERE / "smoke"
FIGURES = _HERE / "figures"
_PARTS = _HERE / ".cache"
# Significant digits of what is kept, by its type.
_DIGITS = {"float32": 6, "float64": 9}
_PACKAGES = ("torch", "sbi", "numpy", "scipy", "xarray", "eryn", "dynesty")


class Cache:
    """Parts of one run that are done, on disk.

    Args:
        experiment: Name of the experiment.
        budget: Its budget; ``"smoke"`` keeps nothing.
        seed: Its seed.
    """

    def __init__(self, experiment: str, budget: Budget, seed: int) -> None:
        self._keep = budget != "smoke"
        self._folder = _PARTS / f"{experiment}.{budget}.{seed}"

    def get(self, part: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """Return a part, computed now or by a run that was stopped.

        Args:
            part: Name of the part, fit for a file.
            compute: Computes it.
        """
        path = self._folder / f"{part}.json"
        if self._keep and path.exists():
            return decoded(json.loads(path.read_text()))
        dataset = compute()
        if self._keep:
            write_json(encoded(dataset), path)
        return dataset

    def path(self, part: str, suffix: str) -> Path | None:
        """A file for a part that keeps its own state; None if nothing is kept."""
        if not self._keep:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{part}{suffix}"

    def clear(self) -> None:
        """Forget all parts."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def belongs_to(self, means: dict[str, Any]) -> None:
        """Forget parts of a budget that meant something else than it does now.

        Args:
            means: What the budget means.
        """
        path = self.path("budget", ".txt")
        if path is not None:
            text = json.dumps(plain(means))
            if path.exists() and path.read_text() != text:
                self.clear()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


class Result:
    """The file of one experiment at one budget, and its figure.

    Args:
        experiment: The experiment.
        budget: Its budget.
        folder: Folder of both; if None the committed one of results and an ignored one
            of figures, of ``"smoke"`` an ignored one of both.
    """

    def __init__(
        self, experiment: Experiment, budget: Budget, folder: Path | None = None
    ) -> None:
        self.experiment = experiment
        self.budget: Budget = budget
        if budget == "smoke":
            folder = folder or SMOKE
        stem = f"{experiment.name}.{budget}"
        self.path = (folder or RESULTS) / f"{stem}.json"
        self.figure = (folder or FIGURES) / f"{stem}.png"

    def done(self, seed: int) -> bool:
        """Whether it is there, with that seed, budget and weights as they are now."""
        return self.is_current() and str(seed) in self._runs()

    def is_current(self) -> bool:
        """Whether it is there, of budget and weights as they are now."""
        if not self.path.exists():
            return False
        means = plain(self.experiment.budget(self.budget))
        facts = self.facts()
        same = facts["budget means"] == means
        same = same and self.experiment.adds_seeds == ("seeds" in facts)
        return same and self.is_of_shipped_weights()

    def _runs(self) -> dict[str, Any]:
        """What is known of the run of each seed, by the seed."""
        facts = self.facts()
        return facts.get("seeds", {str(facts["seed"]): {}})

    def is_of_shipped_weights(self) -> bool:
        """Whether the weights that were used, if any, are those shipped now."""
        return self.facts().get("weights", {}) == self.experiment.weights

    def facts(self) -> dict[str, Any]:
        """The file's content."""
        return json.loads(self.path.read_text())

    def read(self) -> xr.Dataset:
        """The dataset."""
        return decoded(self.facts()["dataset"])

    def claims(self) -> list[Claim]:
        """The claims that are kept."""
        return [
            Claim(**{**kept, "interval": kept["interval"] and tuple(kept["interval"])})
            for kept in self.facts()["claims"]
        ]

    def measure(self, seed: int) -> None:
        """Run the experiment and keep what it found.

        Args:
            seed: Seed of all that is random.
        """
        adds = self.experiment.adds_seeds
        if not (adds and self.is_current()):
            self.path.unlink(missing_ok=True)
        started = time.perf_counter()
        with forked_rng(generator_for(seed)):
            dataset = self.experiment.run(self.budget, seed)
        seconds = time.perf_counter() - started
        run = {
            "seconds of this run (parts done before not counted)": round(seconds, 1),
            "machine": machine(),
            "versions": versions(),
        }
        seeds = {str(seed): run}
        if adds:
            dataset = dataset.expand_dims(seed=[seed])
            if self.path.exists():
                before = self.read()
                before = before.sel(seed=before.seed != seed)
                dataset = along_seeds([before, dataset])
                seeds = self._runs() | seeds
        text = " ".join(sorted(seeds, key=int))
        facts = {
            "experiment": self.experiment.name,
            "command": f"python -m benchmarks run {self.experiment.name} "
            f"--budget {self.budget} --seed {text}",
            "budget": self.budget,
            "budget means": self.experiment.budget(self.budget),
            "seed": min(map(int, seeds)),
            "weights": self.experiment.weights,
            **run,
            **({"seeds": seeds} if adds else {}),
        }
        self._conclude(facts, encoded(dataset, rounded=True))

    def conclude(self) -> None:
        """Make the claims anew from the dataset that is kept."""
        facts = self.facts()
        self._conclude(facts, facts["dataset"])

    def draw(self) -> None:
        """Draw the figure from the dataset that is kept."""
        with forked_rng(generator_for(self.facts()["seed"])):
            figure = self.experiment.plot(self.read())
        self.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.figure, dpi="figure", metadata={"Software": None})

    def _conclude(self, facts: dict[str, Any], dataset: dict[str, Any]) -> None:
        with forked_rng(generator_for(facts["seed"])):
            claims = [c.to_json() for c in self.experiment.claims(decoded(dataset))]
        kept = {k: v for k, v in facts.items() if k != "dataset"}
        write_json(plain({**kept, "claims": claims}) | {"dataset": dataset}, self.path)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads used by torch": torch.get_num_threads(),
        "memory, GiB": round(pages / 2**30),
        "accelerator": accelerator,
    }


def versions() -> dict[str, str]:
    """Versions of Python, this package and those that matter."""
    found = {"python": platform.python_version(), "sbi-slotflow": "source"}
    for name in ("sbi-slotflow", *_PACKAGES):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # run from source, or an extra left out
            continue
    return found


def concatenated(
    parts: Sequence[xr.Dataset], along: str | xr.Variable, **options: Any
) -> xr.Dataset:
    """Join datasets along a new or an old dimension."""
    joined = xr.concat(parts, along, **options)
    assert isinstance(joined, xr.Dataset)
    return joined


def along_seeds(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join datasets along their dimension ``seed``, in its order.

    Of some things seeds have different numbers: gaps are filled with NaN.
    """
    parts = [part for part in parts if part.sizes["seed"]]
    names = {dim for part in parts for dim in part.dims} - {"seed"}
    most = {dim: max(part.sizes.get(dim, 0) for part in parts) for dim in names}
    padded = []
    for part in parts:
        short = {d: (0, n - part.sizes[d]) for d, n in most.items() if d in part.dims}
        short = {d: ends for d, ends in short.items() if ends[1]}
        padded.append(part.pad(short) if short else part)
    joined = concatenated(padded, "seed")
    return joined.sortby("seed")


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def encoded(dataset: xr.Dataset, *, rounded: bool = False) -> dict[str, Any]:
    """A dataset as JSON values: dimensions, type, shape and flat values of each array.

    Args:
        dataset: The dataset.
        rounded: Keep six digits of single and nine of double precision, not all.
    """

    def value(number: Any, digits: int | None) -> Any:
        if not isinstance(number, float):
            return number
        if not math.isfinite(number):
            return None if math.isnan(number) else str(number)
        return number if digits is None else float(f"{number:.{digits}g}")

    def array(variable: xr.DataArray) -> dict[str, Any]:
        kind = variable.dtype
        digits = _DIGITS.get(kind.name) if rounded else None
        return {
            "dims": list(variable.dims),
            "dtype": "str" if kind.kind == "U" else kind.name,
            "shape": list(variable.shape),
            "values": [value(n, digits) for n in variable.values.ravel().tolist()],
        }

    return {
        "coords": {str(n): array(v) for n, v in dataset.coords.items()},
        "data": {str(n): array(v) for n, v in dataset.data_vars.items()},
    }


def decoded(kept: dict[str, Any]) -> xr.Dataset:
    """The dataset of what :func:`encoded` gave."""

    def array(part: dict[str, Any]) -> tuple[list[str], np.ndarray]:
        values = np.array(part["values"], dtype=part["dtype"])
        return part["dims"], values.reshape(part["shape"])

    data, coords = (
        {name: array(part) for name, part in kept[kind].items()}
        for kind in ("data", "coords")
    )
    return xr.Dataset(data, coords)


def write_json(value: Any, path: Path) -> None:
    """Write JSON, lists of numbers in one line; what was there stays until the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(_text(value) + "\n")
    scratch.replace(path)


def _text(value: Any, margin: str = "") -> str:
    inner = margin + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(k)}: {_text(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        lines = [inner + _text(v, inner) for v in value]
        return "[\n" + ",\n".join(lines) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """JSON without NaN, numpy scalars or needless digits."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
