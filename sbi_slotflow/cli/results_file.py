"""Result files: written aside and moved into place, joined from parts."""

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .trees import GROUPS

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["aside", "check_out", "join_csv", "join_parts", "read_part", "write_tree"]

_SUFFIXES = (".nc", ".zarr")


def check_out(path: Path, option: str, suffixes: Sequence[str] = _SUFFIXES) -> None:
    """Raise InputError unless a file can be written there; makes its folder."""
    expected = " or ".join(suffixes)
    if path.suffix not in suffixes:
        raise InputError(f"expected {option} to end in {expected}; got {path}")
    if path.suffix == ".zarr":
        try:
            import zarr  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{path} needs `pip install sbi-slotflow[zarr]`"
            ) from error
    elif path.is_dir():
        raise InputError(f"expected {option} to be a file; {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write to the folder {path.parent}")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces ``path`` if all goes well, else goes."""
    new = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        with warnings.catch_warnings():
            # Zarr 3 warns of what helps xarray to open a store fast.
            warnings.filterwarnings("ignore", "Consolidated metadata")
            yield new
        if path.is_dir():  # a Zarr store is a folder, which nothing replaces at once
            old = path.with_name(f".{uuid.uuid4().hex}.old")
            os.replace(path, old)
            os.replace(new, path)
            shutil.rmtree(old)
        else:
            os.replace(new, path)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)


def write_tree(tree: "DataTree", path: Path) -> None:
    """Write a tree as NetCDF or Zarr, by the path's ending."""
    with aside(path) as new:
        if path.suffix == ".zarr":
            tree.to_zarr(new)
        else:
            tree.to_netcdf(new, engine="h5netcdf")


def read_part(path: Path) -> "DataTree":
    """Read a part as a whole."""
    import xarray

    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Join the trees of batches to one file, with one of them in memory at a time.

    Args:
        parts: NetCDF files of :func:`~sbi_slotflow.cli.trees.batch_tree`, in order.
        path: The file to write, ``.nc`` or ``.zarr``.
    """
    with aside(path) as new:
        if path.suffix == ".zarr":
            _join_zarr(parts, new)
        else:
            _join_netcdf(parts, new)


def join_csv(parts: Sequence[Path], path: Path) -> None:
    """Join the catalogues of batches to one table."""
    with aside(path) as new, new.open("w", newline="") as file:
        for number, part in enumerate(parts):
            frame = _group(read_part(part), "catalogue").to_dataframe()
            first = frame.pop("observation")
            frame.insert(0, "observation", first)
            frame.to_csv(file, index=False, header=not number)


def _group(tree: "DataTree", name: str) -> "Dataset":
    return tree.children[name].to_dataset(inherit=False)


def _join_zarr(parts: Sequence[Path], path: Path) -> None:
    import xarray

    for number, part in enumerate(parts):
        tree = read_part(part)
        if not number:
            xarray.Dataset(attrs=tree.attrs).to_zarr(path, mode="w", consolidated=False)
        for name, dim in GROUPS.items():
            dataset = _group(tree, name)
            for variable in dataset.variables.values():
                variable.encoding = {}
            if number:
                dataset.to_zarr(path, group=name, append_dim=dim, consolidated=False)
            else:
                chunks = {
                    name: {"chunks": tuple(max(1, n) for n in variable.shape)}
                    for name, variable in dataset.variables.items()
                    if variable.ndim
                }
                dataset.to_zarr(
                    path, group=name, encoding=chunks, mode="a", consolidated=False
                )
    import zarr

    zarr.consolidate_metadata(str(path))


def _join_netcdf(parts: Sequence[Path], path: Path) -> None:
    import h5netcdf

    sizes = dict.fromkeys(GROUPS, 0)
    for part in parts:
        tree = read_part(part)
        for name, dim in GROUPS.items():
            sizes[name] += tree[name].sizes[dim]
    done = dict.fromkeys(GROUPS, 0)
    with h5netcdf.File(path, "w") as file:
        for number, part in enumerate(parts):
            tree = read_part(part)
            if not number:
                file.attrs.update(tree.attrs)
            for name, dim in GROUPS.items():
                dataset = _group(tree, name)
                if not number:
                    _create(file, name, dataset, dim, sizes[name])
                start, num = done[name], dataset.sizes[dim]
                for key, variable in dataset.variables.items():
                    if dim in variable.dims and num:
                        target = file[name].variables[key]
                        target[start : start + num] = variable.values
                done[name] += num


def _create(file: Any, name: str, dataset: "Dataset", dim: str, total: int) -> None:
    """Create a group with the variables of a dataset, ``total`` long along ``dim``."""
    group = file.create_group(name)
    group.dimensions = {**dict(dataset.sizes), dim: total}
    for key, variable in dataset.variables.items():
        created = group.create_variable(str(key), variable.dims, variable.dtype)
        created.attrs.update(variable.attrs)
        if dim not in variable.dims:
            created[...] = variable.values
