"""Whose line a warning should point to."""

import inspect
from pathlib import Path
from types import FrameType

__all__ = ["caller_stacklevel"]

_PACKAGE = str(Path(__file__).parent)


def caller_stacklevel() -> int:
    """Return the ``stacklevel`` at which ``warnings.warn`` names the user's line.

    It is that of the first frame outside of the package, seen from the function that
    asks.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(frame: FrameType) -> bool:
    """Whether it runs the package, or ``torch.no_grad`` around a function of it."""
    if frame.f_globals.get("__name__") == "torch.utils._contextlib":
        return True
    return frame.f_code.co_filename.startswith(_PACKAGE)
