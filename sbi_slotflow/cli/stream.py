"""Many signals: analysed in batches, whose answers are kept until all are there."""

import hashlib
import json
import os
import sys
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .answers import Settings, answer
from .arguments import InputError
from .models import Model
from .results_file import ASIDE, join_csv, join_parts, read_part, write_tree
from .signal_files import SignalFile
from .trees import batch_tree

__all__ = ["BATCH", "Summary", "infer_many", "parts_folder", "read_checked"]

BATCH = 16
"""Signals in a batch. Draws depend on it, as each batch has a random stream."""

# The file that marks a folder as a run's, and its format.
_RUN, _FORMAT = "run.json", "sbi_slotflow.UnfinishedRun"


@dataclass(frozen=True)
class Summary:
    """What to tell of many signals.

    Attributes:
        most_probable: How many signals have each K as the most probable one.
        foreign: Signals that are unlike the training data (p < 0.001).
        unreliable: Signals whose weights cannot be relied on (k-hat > 0.7).
    """

    most_probable: dict[int, int]
    foreign: int
    unreliable: int


def read_checked(signals: SignalFile) -> str:
    """Read all signals once, and return the SHA-256 of their float32 values.

    Raises:
        InputError: If any is not finite.
    """
    num = 1 if len(signals.shape) == 1 else signals.shape[0]
    digest, bad = hashlib.sha256(), []
    for start in range(0, num, BATCH):
        batch = signals.read(start, min(start + BATCH, num))
        digest.update(batch.tobytes())
        bad += (start + np.flatnonzero(~np.isfinite(batch).all(1))).tolist()
    if bad:
        first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"expected finite numbers; {len(bad)} of {num} signals in {signals.name} "
            f"have entries that are NaN, infinite or too large for float32: {first}"
        )
    return digest.hexdigest()


def infer_many(
    model: Model,
    signals: SignalFile,
    settings: Settings,
    out: Path,
    catalogue: Path | None,
    attrs: dict[str, Any],
    quiet: bool,
) -> Summary:
    """Analyse many signals and write one result.

    The answers of each batch lie in ``OUT.parts`` until all are there, so that a run
    can be taken up again.

    Args:
        model: The model.
        signals: The file, of shape ``(N, T)``, checked by :func:`read_checked`.
        settings: How to analyse them.
        out: The result, ``.nc`` or ``.zarr``.
        catalogue: A table of all sources, if wanted.
        attrs: Attributes of the result; they identify the run.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If the parts are those of another run.
    """
    num = signals.shape[0]
    folder = parts_folder(out)
    _open_run(folder, {**attrs, **asdict(settings), "num": num, "batch": BATCH})
    starts = range(0, num, BATCH)
    parts = [folder / f"{start:09}.nc" for start in starts]
    done = sum(
        min(BATCH, num - s) for s, p in zip(starts, parts, strict=True) if p.exists()
    )
    with tqdm(
        total=num,
        initial=done,
        unit="signal",
        desc="Signals",
        file=sys.stderr,
        disable=quiet,
    ) as bar:
        for start, part in zip(starts, parts, strict=True):
            if part.exists():
                continue
            stop = min(start + BATCH, num)
            x = torch.from_numpy(signals.read(start, stop))
            answers = answer(model, x, settings, start // BATCH)
            write_tree(batch_tree(model, answers, start, attrs), part)
            bar.update(stop - start)
    summary = _summary(parts)
    join_parts(parts, out)
    if catalogue is not None:
        join_csv(parts, catalogue)
    _close_run(folder, parts)
    return summary


def parts_folder(out: Path) -> Path:
    """Folder of the parts of an unfinished result."""
    return out.with_name(f"{out.name}.parts")


def _open_run(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run's parts, or check that it is this run's.

    Raises:
        InputError: If it belongs to another run, or to none: such a folder is left
            alone.
    """
    settings = {"format": _FORMAT, "version": version("sbi-slotflow"), **settings}
    if not os.path.lexists(folder):
        # The folder appears with its mark inside: one without is none of ours.
        new = folder.with_name(f"{ASIDE}{uuid.uuid4().hex}")
        new.mkdir()
        (new / _RUN).write_text(json.dumps(settings, indent=1))
        new.rename(folder)
        return
    old: Any = None
    with suppress(OSError, ValueError):
        old = json.loads((folder / _RUN).read_text())
    if not isinstance(old, dict) or old.get("format") != _FORMAT:
        raise InputError(
            f"{folder} is no folder of an unfinished run, so it is left alone: move it "
            "away, or give another --out"
        )
    differ = [
        f"{key} was {_short(old.get(key))}, now {_short(value)}"
        for key, value in settings.items()
        if old.get(key) != value
    ]
    if differ:
        raise InputError(
            f"{folder} holds an unfinished run of other settings "
            f"({'; '.join(differ)}): repeat them, delete it, or give another --out"
        )


def _close_run(folder: Path, parts: list[Path]) -> None:
    """Remove what the run put into its folder, and the folder if that was all."""
    for path in [*parts, *folder.glob(f"{ASIDE}*"), folder / _RUN]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # files of somebody else lie in it
        folder.rmdir()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."


def _summary(parts: list[Path]) -> Summary:
    counts: Counter[int] = Counter()
    foreign = unreliable = 0
    for part in parts:
        groups = read_part(part).children
        probs = groups["cardinality"].to_dataset()["probability"].values
        counts.update(probs.argmax(-1).tolist())
        stats = groups["sample_stats"].to_dataset()
        if "training_p_value" in stats:
            foreign += int((stats["training_p_value"].values < 1e-3).sum())
        if "pareto_k" in stats:
            unreliable += int((~(stats["pareto_k"].values <= 0.7)).sum())
    return Summary(dict(sorted(counts.items())), foreign, unreliable)
