"""Where results are kept: NetCDF, PNG and JSON of each run, and parts of long ones.

``Cache`` lets a long experiment be stopped: each part (a signal, a training) is a
NetCDF file of its own, keyed by experiment, budget, seed and part, in a folder that git
ignores.
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

import torch
import xarray as xr

from sbi_slotflow.seeding import forked_rng, generator_for

from .experiment import Budget, Experiment

__all__ = ["RESULTS", "Cache", "Result", "concatenated", "machine", "versions"]

_HERE = Path(__file__).parent
RESULTS = _HERE / "results"
SMOKE = _HERE / "smoke"
_PARTS = _HERE / ".cache"
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
        path = self._folder / f"{part}.nc"
        if self._keep and path.exists():
            return _read(path)
        dataset = compute()
        if self._keep:
            _write(dataset, path)
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
        path = self.path("budget", ".json")
        if path is not None:
            text = json.dumps(_plain(means))
            if path.exists() and path.read_text() != text:
                self.clear()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


class Result:
    """The files of one experiment at one budget.

    Args:
        experiment: The experiment.
        budget: Its budget.
        folder: Folder of the files; the committed one if None, of ``"smoke"`` one
            that git ignores.
    """

    def __init__(
        self, experiment: Experiment, budget: Budget, folder: Path | None = None
    ) -> None:
        self.experiment = experiment
        self.budget: Budget = budget
        folder = folder or (SMOKE if budget == "smoke" else RESULTS)
        stem = folder / f"{experiment.name}.{budget}"
        self.data, self.figure, self.facts = (
            stem.parent / f"{stem.name}{suffix}" for suffix in (".nc", ".png", ".json")
        )

    def done(self, seed: int) -> bool:
        """Whether it is there, with that seed, budget and weights as they are now."""
        if not all(f.exists() for f in (self.data, self.figure, self.facts)):
            return False
        facts = self.read_facts()
        means = _plain(self.experiment.budget(self.budget))
        same = facts["seed"] == seed and facts["budget means"] == means
        return same and self.is_of_shipped_weights()

    def is_of_shipped_weights(self) -> bool:
        """Whether the weights that were used, if any, are those shipped now."""
        return self.read_facts().get("weights", {}) == self.experiment.weights

    def read_facts(self) -> dict[str, Any]:
        """The JSON file."""
        return json.loads(self.facts.read_text())

    def read(self) -> xr.Dataset:
        """The dataset."""
        return _read(self.data)

    def measure(self, seed: int) -> None:
        """Run the experiment and keep what it found.

        Args:
            seed: Seed of all that is random.
        """
        self.facts.unlink(missing_ok=True)
        started = time.perf_counter()
        with forked_rng(generator_for(seed)):
            dataset = self.experiment.run(self.budget, seed)
        seconds = time.perf_counter() - started
        _write(dataset, self.data)
        facts = {
            "experiment": self.experiment.name,
            "command": f"python -m benchmarks run {self.experiment.name} "
            f"--budget {self.budget} --seed {seed}",
            "budget": self.budget,
            "budget means": self.experiment.budget(self.budget),
            "seed": seed,
            "weights": self.experiment.weights,
            "seconds of this run (parts done before not counted)": round(seconds, 1),
            "machine": machine(),
            "versions": versions(),
        }
        self._conclude(facts)

    def redraw(self) -> None:
        """Draw the figure and make the claims anew from the dataset that is kept."""
        self._conclude(self.read_facts())

    def _conclude(self, facts: dict[str, Any]) -> None:
        dataset = self.read()
        with forked_rng(generator_for(facts["seed"])):
            claims = [claim.to_json() for claim in self.experiment.claims(dataset)]
            figure = self.experiment.plot(dataset)
        figure.savefig(self.figure, dpi="figure", metadata={"Software": None})
        text = json.dumps(_plain({**facts, "claims": claims}), indent=2)
        self.facts.write_text(text + "\n")


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


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> xr.Dataset:
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        return dataset.load()


def _write(dataset: xr.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {
        name: {"zlib": True, "complevel": 9}
        for name, values in dataset.data_vars.items()
        if values.dtype.kind in "fiub" and values.ndim
    }
    scratch = path.with_suffix(".part")
    dataset.to_netcdf(scratch, engine="h5netcdf", encoding=packed)
    scratch.replace(path)


def _plain(value: Any) -> Any:
    """JSON without NaN, numpy scalars or needless digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
