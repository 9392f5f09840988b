"""Files of tensors with a JSON description, written atomically and safe to read.

A file is one safetensors file; its header carries the description. Reading executes
nothing and checks the format before anything is built from it.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["read_tensors", "write_atomically", "write_tensors"]

_KEY = "sbi_slotflow"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write tensors and their description to one file, atomically.

    Args:
        path: Where to write; parent folders are made.
        tensors: Tensors by name.
        meta: JSON description with ``format`` and ``version``.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {_KEY: json.dumps(meta, sort_keys=True)}
    write_atomically(path, save(plain, metadata=header))


def read_tensors(
    path: str | os.PathLike[str], format: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that :func:`write_tensors` wrote.

    Args:
        path: The file.
        format: The format that the description must name.
        version: The newest version that is understood.

    Returns:
        Tensors by name and the description.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, foreign, or of a newer version.
    """
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


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
