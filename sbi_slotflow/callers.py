"""Whose line a warning should point to."""

import inspect
from pathlib import Path

__all__ = ["caller_stacklevel"]

_PACKAGE = str(Path(__file__).parent)


def caller_stacklevel() -> int:
    """Return the ``stacklevel`` at which ``warnings.warn`` names the user's line.

    It is that of the first frame outside of the package, seen from the function that
    asks.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
