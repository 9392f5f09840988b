"""Files of signals, ``.npy``, HDF5 and Zarr, of which a few are read at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

__all__ = ["SignalFile", "SignalFileError", "open_signals", "split_name"]

_HDF5 = (".h5", ".hdf5", ".hdf", ".nc")
_ZARR = ".zarr"


class SignalFileError(ValueError):
    """A file that is missing, unreadable or no array of floating-point numbers."""


@dataclass(frozen=True)
class SignalFile:
    """An array in a file, read when asked for.

    Attributes:
        name: The file, with the name of the array in it.
        shape: ``(T,)`` for one signal, ``(N, T)`` for many.
    """

    name: str
    shape: tuple[int, ...]
    _array: Any

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read signals, float32, shape ``(stop - start, T)``.

        The one signal of an array ``(T,)`` is number 0. What does not fit float32
        becomes infinite.
        """
        part = self._array[None, :] if len(self.shape) == 1 else self._array[start:stop]
        with np.errstate(over="ignore"):
            return np.array(part, dtype=np.float32, order="C")


def open_signals(path: str | Path) -> SignalFile:
    """Open a file of signals."""
    file, inner = split_name(str(path))
    if not file.exists():
        raise SignalFileError(f"there is no file {path}")
    try:
        if file.suffix in _HDF5:
            array = _hdf5(file, inner)
        elif file.suffix == _ZARR:
            array = _zarr(file, inner)
        else:
            array = _npy(file)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise SignalFileError(f"cannot read {path}: {reason}") from error
    if not np.issubdtype(array.dtype, np.floating):
        raise SignalFileError(f"{path} has dtype {array.dtype}")
    # HDF5's arrays of rank one are read here: h5py does not index with None.
    if array.ndim == 1:
        array = np.asarray(array)
    return SignalFile(str(path), tuple(array.shape), array)


def split_name(path: str) -> tuple[Path, str | None]:
    """Separate the file from the name of an array in it, if there is one."""
    for suffix in (*_HDF5, _ZARR):
        file, colon, inner = path.rpartition(f"{suffix}:")
        if colon:
            return Path(file + suffix), inner
    return Path(path), None


def _npy(path: Path) -> np.ndarray:
    try:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            if "empty" not in str(error):
                raise
            array = np.load(path, allow_pickle=False)  # an array without entries
    except (ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise SignalFileError(f"{path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray):
        raise SignalFileError(f"{path} is an archive of several arrays")
    return array


def _hdf5(path: Path, name: str | None) -> Any:
    import h5py

    file = h5py.File(path, "r")
    arrays: dict[str, Any] = {}

    def collect(key: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            arrays[key] = entry

    file.visititems(collect)
    return _chosen(path, name, arrays)


def _zarr(path: Path, name: str | None) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise SignalFileError(
            f"{path} is a Zarr store, which needs `pip install sbi-slotflow[zarr]`"
        ) from error
    try:
        node = zarr.open(path, mode="r")
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise SignalFileError(f"{path} is no Zarr store") from error
    if isinstance(node, zarr.Array):
        return _chosen(path, name, {name or "": node})
    return _chosen(path, name, dict(node.arrays()))


def _chosen(path: Path, name: str | None, arrays: dict[str, Any]) -> Any:
    names = ", ".join(sorted(arrays)) or "none"
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name is None:
        raise SignalFileError(
            f"{path} holds {len(arrays)} arrays ({names}): name one, {path}:NAME"
        )
    if name.strip("/") not in arrays:
        raise SignalFileError(f"{path} holds no array {name}, but {names}")
    return arrays[name.strip("/")]
