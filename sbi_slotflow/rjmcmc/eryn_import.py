"""Import of Eryn, an optional dependency, into today's surroundings.

Eryn 1.2.6 calls ``numpy.in1d``, which numpy 2.4 no longer has, and imports corner and,
through it, ArviZ, whose plots use ``matplotlib.style.core`` without importing it, which
matplotlib 3.11 no longer does by itself. Both names are put back where they are
missing.
"""

import importlib
import warnings
from contextlib import suppress

import numpy as np

__all__ = ["require_eryn"]


def require_eryn() -> None:
    """Make sure that Eryn can be imported.

    Raises:
        ImportError: If it is not installed.
    """
    if not hasattr(np, "in1d"):
        setattr(np, "in1d", np.isin)  # noqa: B010  numpy's stubs know no such name
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")  # the module is deprecated
        importlib.import_module("matplotlib.style.core")
    try:
        importlib.import_module("eryn.ensemble")
    except ImportError as error:
        raise ImportError(
            "Eryn is needed for this sampler: pip install sbi-slotflow[rjmcmc]."
        ) from error
