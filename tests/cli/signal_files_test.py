"""Signals are read alike from every kind of file, a few at a time."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from sbi_slotflow.cli import InputError
from sbi_slotflow.cli.signal_files import open_signals

MANY = np.random.default_rng(0).normal(size=(7, 20))


def npy(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def hdf5(path: Path, array: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array)
    return str(path)


def hdf5_group(path: Path, array: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("night/flux", data=array)
        file.create_dataset("night/time", data=np.arange(5.0))
    return f"{path}:night/flux"


def zarr_array(path: Path, array: np.ndarray) -> str:
    zarr.save_array(str(path), array)  # pyright: ignore[reportArgumentType]
    return str(path)


def zarr_group(path: Path, array: np.ndarray) -> str:
    group = zarr.open_group(path, mode="w")
    group.create_array("flux", data=array)
    group.create_array("time", data=np.arange(5.0))
    return f"{path}:flux"


KINDS = [
    (npy, "x.npy"),
    (hdf5, "x.h5"),
    (hdf5_group, "x.hdf5"),
    (zarr_array, "x.zarr"),
    (zarr_group, "x.zarr"),
]


@pytest.mark.parametrize(("save", "name"), KINDS)
@pytest.mark.parametrize("array", [MANY, MANY[0], MANY.astype(">f4"), MANY.T.copy().T])
def test_what_is_read_is_what_was_saved(
    save: Callable[[Path, np.ndarray], str],
    name: str,
    array: np.ndarray,
    tmp_path: Path,
) -> None:
    signals = open_signals(save(tmp_path / name, array))
    assert signals.shape == array.shape
    rows = np.atleast_2d(array).astype(np.float32)
    start, stop = (0, 1) if array.ndim == 1 else (2, 5)
    found = signals.read(start, stop)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows[start:stop])
    found[:] = 0  # a copy: neither the file nor what is read next changes
    np.testing.assert_array_equal(signals.read(start, stop), rows[start:stop])


def test_a_npy_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    signals = open_signals(npy(tmp_path / "x.npy", MANY))
    assert isinstance(signals._array, np.memmap)


def test_a_colon_in_a_name_of_a_file_is_no_array(tmp_path: Path) -> None:
    assert open_signals(npy(tmp_path / "a:b.npy", MANY)).shape == MANY.shape


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    for name in ("x.npy", "x.h5", "x.h5:flux", "x.zarr:flux"):
        with pytest.raises(InputError, match="there is no file"):
            open_signals(tmp_path / name)
