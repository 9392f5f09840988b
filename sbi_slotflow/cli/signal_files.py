"""Files of signals, ``.npy``, HDF5 and Zarr, of which a few are read at a time."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from . import InputError

__all__ = ["SignalFile", "open_signals", "split_name"]

_EXPECTED = "expected an array (T,) or (N, T) of floating-point numbers"
_AT_ONCE = 16  # signals that are checked at a time

_HDF5 = (".h5", ".hdf5", ".hdf", ".nc")
_ZARR = ".zarr"


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

    def checked(self) -> str:
        """Read all signals once, and return the SHA-256 of their float32 values.

        Raises InputError if one is not finite.
        """
        num = 1 if len(self.shape) == 1 else self.shape[0]
        digest, bad = hashlib.sha256(), []
        for start in range(0, num, _AT_ONCE):
            batch = self.read(start, min(start + _AT_ONCE, num))
            digest.update(batch.tobytes())
            bad += (start + np.flatnonzero(~np.isfinite(batch).all(1))).tolist()
        if bad:
            first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise InputError(
                f"expected finite numbers; {len(bad)} of {num} signals in {self.name} "
                f"have entries that are NaN, infinite or too large for float32: {first}"
            )
        return digest.hexdigest()


def open_signals(path: str | Path, row: int | None = None) -> SignalFile:
    """Open a file of signals (T,) or (N, T), of which a row may be chosen."""
    file, inner = split_name(str(path))
    if not file.exists():
        raise _fault(f"there is no file {path}")
    readers = {**dict.fromkeys(_HDF5, _hdf5), _ZARR: _zarr}
    try:
        array = readers.get(file.suffix, _npy)(file, inner)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise _fault(f"cannot read {path}: {reason}") from error
    if not np.issubdtype(array.dtype, np.floating):
        raise _fault(f"{path} has dtype {array.dtype}")
    shape = tuple(array.shape)
    if len(shape) not in (1, 2) or 0 in shape:
        raise InputError(f"{_EXPECTED}; {path} has shape {shape}")
    if row is not None and len(shape) == 1:
        raise InputError(f"--row goes with an array (N, T); {path} has shape {shape}")
    if row is not None and row >= shape[0]:
        raise InputError(
            f"expected --row to be in 0..{shape[0] - 1} for {path}; got {row}"
        )
    # HDF5's arrays of rank one are read here: h5py does not index with None.
    array = np.asarray(array) if len(shape) == 1 else array
    signals = SignalFile(str(path), shape, array)
    if row is None:
        return signals
    chosen = signals.read(row, row + 1)[0]
    return SignalFile(f"row {row} of {path}", chosen.shape, chosen)


def _fault(message: str) -> InputError:
    return InputError(f"{message}; {_EXPECTED}")


def split_name(path: str) -> tuple[Path, str | None]:
    """Separate the file from the name of an array in it, if there is one."""
    for suffix in (*_HDF5, _ZARR):
        file, colon, inner = path.rpartition(f"{suffix}:")
        if colon:
            return Path(file + suffix), inner
    return Path(path), None


def _npy(path: Path, _: str | None) -> np.ndarray:
    try:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            if "empty" not in str(error):
                raise
            array = np.load(path, allow_pickle=False)  # an array without entries
    except (ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise _fault(f"{path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray):
        raise _fault(f"{path} is an archive of several arrays")
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
        raise _fault(
            f"{path} is a Zarr store, which needs `pip install sbi-slotflow[zarr]`"
        ) from error
    try:
        node = zarr.open(path, mode="r")
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise _fault(f"{path} is no Zarr store") from error
    if isinstance(node, zarr.Array):
        return _chosen(path, name, {name or "": node})
    return _chosen(path, name, dict(node.arrays()))


def _chosen(path: Path, name: str | None, arrays: dict[str, Any]) -> Any:
    names = ", ".join(sorted(arrays)) or "none"
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name is None:
        raise _fault(
            f"{path} holds {len(arrays)} arrays ({names}): name one, {path}:NAME"
        )
    if name.strip("/") not in arrays:
        raise _fault(f"{path} holds no array {name}, but {names}")
    return arrays[name.strip("/")]
