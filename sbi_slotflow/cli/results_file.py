"""Answers as trees of datasets, in files that are joined from parts.

Files are written aside and moved into place. Every file carries a mark by which it is
known again: an attribute of a tree, the metadata of a figure, the columns of a table.
What has no mark is never replaced.
"""

import csv
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5netcdf
import h5py
import numpy as np
import xarray
from torch import Tensor
from xarray import Dataset, DataTree

from ..posterior.datatree import to_datatree
from ..seeding import generator_for
from ..storage import aside, check_replaceable
from . import InputError
from .models import Answers, Model, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GROUPS",
    "MARK",
    "batch_tree",
    "check_apart",
    "check_out",
    "join_csv",
    "join_parts",
    "read_part",
    "replacing",
    "signal_tree",
    "write_figure",
    "write_tree",
]

GROUPS = {
    "cardinality": "observation",
    "posterior": "observation",
    "sample_stats": "observation",
    "catalogue": "source",
}
"""Groups of a result of many signals, and the dimension along which they grow."""

_KNOWN_GROUPS = {
    *GROUPS,
    "observed_data",
    "pit",
    "posterior_given_k",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "constant_data",
}
_ZARR_FILES = {"zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata"}
_TREE = 2  # stream of a seed
_NUM_PREDICTIVE, _NUM_PRIOR = 100, 1_000


def signal_tree(
    model: Model,
    x: Tensor,
    answers: Answers,
    settings: Settings,
    attrs: dict[str, Any],
    true_theta: Tensor | None = None,
) -> DataTree:
    """ArviZ tree of one signal, with the groups ``cardinality`` and ``catalogue``."""
    generator = generator_for(settings.seed, _TREE)
    tree = to_datatree(
        answers.draws,
        model.posterior.prior.layout,
        x=x[0],
        true_theta=true_theta,
        log_prob=answers.log_prob,
        statistics={name: float(v[0]) for name, v in answers.statistics.items()},
        simulator=None if model.problem is None else model.problem.simulator,
        num_predictive=_NUM_PREDICTIVE,
        prior_samples=model.posterior.prior.sample((_NUM_PRIOR,), generator=generator),
        generator=generator,
        model_card=model.posterior.model_card,
        attrs=attrs,
    )
    tree["cardinality"] = DataTree(_cardinality(answers).isel(observation=0, drop=True))
    tree["catalogue"] = DataTree(answers.catalogues[0])
    return tree


def batch_tree(
    model: Model, answers: Answers, start: int, attrs: Mapping[str, Any]
) -> DataTree:
    """Tree of a batch of signals, with a leading dimension ``observation``.

    Sources of all signals follow one another in ``catalogue``, where the variable
    ``observation`` tells whose they are.
    """
    observation = start + np.arange(len(answers.draws))
    # One chain a signal, to name and mask the parameters as everywhere else.
    tree = to_datatree(
        answers.draws,
        model.posterior.prior.layout,
        log_prob=answers.log_prob,
        generator=generator_for(0),
        model_card=model.posterior.model_card,
        attrs=attrs,
    )
    posterior, stats = (
        tree[name]
        .to_dataset()
        .rename(chain="observation")
        .assign_coords(observation=observation)
        .drop_attrs()
        for name in ("posterior", "sample_stats")
    )
    stats = stats.drop_vars(["active"] if "lp" in stats else ["active", "draw"])
    numbers = {k: ("observation", v.numpy()) for k, v in answers.statistics.items()}
    catalogues = [c.drop_vars("source").drop_attrs() for c in answers.catalogues]
    owner = np.repeat(observation, [c.sizes["source"] for c in answers.catalogues])
    groups = {
        "cardinality": _cardinality(answers).assign_coords(observation=observation),
        "posterior": posterior,
        "sample_stats": stats.assign(numbers),
        "catalogue": xarray.concat(catalogues, dim="source").assign(
            observation=("source", owner)
        ),
    }
    result = DataTree.from_dict(groups)
    result.attrs = dict(tree.attrs)
    return result


def _cardinality(answers: Answers) -> Dataset:
    probs = answers.probs.double()
    return Dataset(
        {"probability": (("observation", "cardinality"), probs.numpy())},
        coords={"cardinality": np.arange(probs.shape[-1])},
    )


_SUFFIXES = (".nc", ".zarr")
MARK = {"program": "sbi-slotflow"}
"""Attribute of every tree that is written; figures have it as their software."""


def check_out(path: Path, option: str, suffixes: Sequence[str] = _SUFFIXES) -> None:
    """Raise InputError unless a file can be written there; makes its folder.

    Raises FileExistsError if something lies there that is not ours.
    """
    expected = " or ".join(suffixes)
    if path.suffix not in suffixes:
        raise InputError(f"expected {option} to end in {expected}; got {path}")
    if path.suffix == ".zarr" and find_spec("zarr") is None:
        raise InputError(f"{path} needs `pip install sbi-slotflow[zarr]`")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write to the folder {path.parent}")
    check_replaceable(path, "result", _is_ours)


def check_apart(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise InputError if a file to write is, holds or lies in a file to read.

    Files to write must lie apart from each other, too. Links are followed.
    """
    pairs = [*itertools.product(outputs, inputs), *itertools.combinations(outputs, 2)]
    for first, second in pairs:
        a, b = first.resolve(), second.resolve()
        same = a.exists() and b.exists() and a.samefile(b)
        if same or a == b or a in b.parents or b in a.parents:
            raise InputError(
                f"writing {first} would change {second}: expected another path, got "
                f"{first}"
            )


def _is_ours(path: Path) -> bool:
    """Whether a file or Zarr store carries our mark."""
    if path.is_dir() != (path.suffix == ".zarr"):
        return False
    # What cannot be read as its suffix says is not ours, whatever the reader's reason.
    with suppress(Exception):
        if path.suffix == ".zarr":
            import zarr

            group = zarr.open_group(path, mode="r")
            marked = MARK.items() <= dict(group.attrs).items()
            return marked and _holds_only_its_store(path)
        if path.suffix == ".nc":
            with h5py.File(path) as file:
                marked = all(file.attrs.get(k) == v for k, v in MARK.items())
                return marked and set(file) <= _KNOWN_GROUPS
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as image:
                return image.info.get("Software") == MARK["program"]
        with path.open(newline="") as file:
            names = set(next(csv.reader(file))) - {"observation"}
            found = {n.removesuffix("_low") for n in names if n.endswith("_low")}
            endings = ("", "_mean", "_std", "_low", "_high")
            columns = {name + ending for name in found for ending in endings}
            return bool(found) and names == columns | {"existence", "existence_error"}
    return False


def _holds_only_its_store(path: Path) -> bool:
    """Whether every file of a Zarr folder is metadata or a chunk of a group of ours."""

    def good(file: Path) -> bool:
        parts = file.relative_to(path).parts
        if file.is_dir() and not file.is_symlink():
            return parts[0] in _KNOWN_GROUPS
        # GROUP/ARRAY/, then a chunk's numbers
        numbers = [part.replace(".", "") for part in parts[2:] if part != "c"]
        is_chunk = len(parts) > 2 and all(map(str.isdigit, numbers))
        return is_chunk or file.name in _ZARR_FILES

    return all(map(good, path.rglob("*")))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces an earlier result of ours."""
    with aside(path, "result", _is_ours) as new, warnings.catch_warnings():
        # Zarr 3 warns of what helps xarray to open a store fast.
        warnings.filterwarnings("ignore", "Consolidated metadata")
        yield new


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as new:
        figure.savefig(new, dpi=150, metadata={"Software": MARK["program"]})


def write_tree(tree: DataTree, path: Path) -> None:
    """Write a tree with our mark as NetCDF or Zarr, by the path's ending."""
    tree.attrs |= MARK
    with replacing(path) as new:
        if path.suffix == ".zarr":
            tree.to_zarr(new)
        else:
            tree.to_netcdf(new, engine="h5netcdf")


def read_part(path: Path) -> DataTree:
    """Read a part as a whole."""
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Join the trees of batches to one file, with one of them in memory at a time."""
    with replacing(path) as new:
        if path.suffix == ".zarr":
            _join_zarr(parts, new)
        else:
            _join_netcdf(parts, new)


def join_csv(parts: Sequence[Path], path: Path) -> None:
    """Join the catalogues of batches to one table."""
    with replacing(path) as new, new.open("w", newline="") as file:
        for is_first, name, _, dataset in _pieces(parts):
            if name == "catalogue":
                frame = dataset.to_dataframe()
                frame.insert(0, "observation", frame.pop("observation"))
                frame.to_csv(file, index=False, header=is_first)


def _pieces(parts: Sequence[Path]) -> Iterator[tuple[bool, str, str, Dataset]]:
    """For each part and group: is it the first part, name, growing dimension, data."""
    for part in parts:
        tree = read_part(part)
        for name, dim in GROUPS.items():
            dataset = tree.children[name].to_dataset(inherit=False)
            yield part == parts[0], name, dim, dataset


def _join_zarr(parts: Sequence[Path], path: Path) -> None:
    import zarr

    attrs = read_part(parts[0]).attrs
    Dataset(attrs=attrs).to_zarr(path, mode="w", consolidated=False)
    for is_first, name, dim, dataset in _pieces(parts):
        for variable in dataset.variables.values():
            variable.encoding = {}
        how: dict[str, Any] = {"append_dim": dim}
        if is_first:
            # What the first batch holds is a chunk.
            chunks = {
                key: {"chunks": tuple(max(1, n) for n in variable.shape)}
                for key, variable in dataset.variables.items()
                if variable.ndim
            }
            how = {"mode": "a", "encoding": chunks}
        dataset.to_zarr(path, group=name, consolidated=False, **how)
    zarr.consolidate_metadata(str(path))


def _join_netcdf(parts: Sequence[Path], path: Path) -> None:
    sizes, done = Counter[str](), Counter[str]()
    for _, name, dim, dataset in _pieces(parts):
        sizes[name] += dataset.sizes[dim]
    with h5netcdf.File(path, "w") as file:
        file.attrs.update(read_part(parts[0]).attrs)
        for is_first, name, dim, dataset in _pieces(parts):
            if is_first:
                _create(file, name, dataset, dim, sizes[name])
            place = slice(done[name], done[name] + dataset.sizes[dim])
            done[name] = place.stop
            for key, variable in dataset.variables.items():
                if dim in variable.dims and dataset.sizes[dim]:
                    file[name].variables[key][place] = variable.values


def _create(file: Any, name: str, dataset: Dataset, dim: str, total: int) -> None:
    """Create a group with the variables of a dataset, ``total`` long along ``dim``."""
    group = file.create_group(name)
    group.dimensions = {**dict(dataset.sizes), dim: total}
    for key, variable in dataset.variables.items():
        created = group.create_variable(str(key), variable.dims, variable.dtype)
        created.attrs.update(variable.attrs)
        if dim not in variable.dims:
            created[...] = variable.values
