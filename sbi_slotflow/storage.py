"""Files that are written atomically and replace nothing that the package did not write.

A file of tensors is one safetensors file; its header carries a JSON description.
Reading executes nothing and checks the format before anything is built from it. The
format is also the mark by which a file of ours is known: only such a file, or an empty
one, is replaced.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = [
    "ASIDE",
    "aside",
    "check_replaceable",
    "check_tensors_replaceable",
    "read_tensors",
    "write_atomically",
    "write_tensors",
]

_KEY = "sbi_slotflow"
ASIDE = ".sbi-slotflow."
"""Beginning of the names of files that are being written."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write tensors and their description to one file, atomically."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {_KEY: json.dumps(meta, sort_keys=True)}
    format = meta["format"]
    content = save(plain, metadata=header)
    write_atomically(path, content, format, lambda file: _format(file) == format)


def check_tensors_replaceable(path: str | os.PathLike[str], format: str) -> None:
    """Raise FileExistsError unless :func:`write_tensors` may write to a path."""
    check_replaceable(path, format, lambda file: _format(file) == format)


def _format(path: Path) -> str | None:
    """The format of a file of tensors; None if we did not write it."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[_KEY])["format"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def read_tensors(
    path: str | os.PathLike[str], format: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that :func:`write_tensors` wrote."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is corrupt or no safetensors file: {error}."
        ) from error
    try:
        meta = json.loads(header[_KEY])
        found, number = meta["format"], meta["version"]
        if not isinstance(number, int):
            raise TypeError(f"version {number!r} is no number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by sbi_slotflow.") from error
    if found != format:
        raise ValueError(f"{path} holds {found}, expected {format}.")
    if number > version:
        raise ValueError(
            f"{path} has version {number} of its format; this package reads up to "
            f"{version}."
        )
    return tensors, meta


def check_replaceable(
    path: str | os.PathLike[str], kind: str, is_ours: Callable[[Path], bool]
) -> None:
    """Raise unless a path is free, or holds what the package itself wrote there.

    An empty file may be replaced too: nothing is lost with it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.stat().st_size:
        return
    if not path.exists() or not is_ours(path):
        raise FileExistsError(
            f"{path} exists and is no {kind} that sbi_slotflow wrote, so it is not "
            "overwritten: move it away, or choose another path"
        )


@contextmanager
def aside(
    path: str | os.PathLike[str], kind: str, is_ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yield a path to write to; it replaces ``path`` if all goes well, else goes.

    A reader sees the old content or the new, never a part. What is not ours stays, see
    :func:`check_replaceable`.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{ASIDE}{uuid.uuid4().hex}"
    new, old = target.with_name(name + target.suffix), target.with_name(f"{name}.old")
    try:
        yield new
        check_replaceable(path, kind, is_ours)
        if target.is_dir():  # a Zarr store is a folder, which nothing replaces at once
            os.replace(target, old)
            try:
                os.replace(new, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(new, target)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)


def write_atomically(
    path: str | os.PathLike[str],
    content: bytes,
    kind: str,
    is_ours: Callable[[Path], bool],
) -> None:
    """Write a file :func:`aside`, and to the disk before it replaces another."""
    with aside(path, kind, is_ours) as new, new.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
