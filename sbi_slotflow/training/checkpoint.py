"""The state of a training run in one file, from which it resumes exactly."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..storage import check_tensors_replaceable, read_tensors, write_tensors

__all__ = [
    "TrainingState",
    "check_state_replaceable",
    "load_state",
    "optimizer_tensors",
    "restore_optimizer",
    "save_state",
]

_FORMAT = "sbi_slotflow.TrainingState"
_VERSION = 1


@dataclass
class TrainingState:
    """What a run needs to go on.

    Attributes:
        tensors: Weights, averaged weights and the optimizer's moments, by name.
        progress: Step, schedule, sums and history; plain JSON.
        settings: The run's settings, which a resumed run must repeat.
    """

    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    settings: dict[str, Any]


def save_state(path: str | os.PathLike[str], state: TrainingState) -> None:
    """Write a state atomically: a kill at any moment leaves a whole file."""
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "progress": state.progress,
        "settings": state.settings,
    }
    write_tensors(path, state.tensors, meta)


def check_state_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if a file is there that is no state of a run."""
    check_tensors_replaceable(path, _FORMAT)


def load_state(path: str | os.PathLike[str]) -> TrainingState:
    """Read a state.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or holds something else.
    """
    tensors, meta = read_tensors(path, _FORMAT, _VERSION)
    return TrainingState(tensors, meta["progress"], meta["settings"])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """List an optimizer's per-parameter state by name."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` listed."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
