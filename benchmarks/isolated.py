"""Functions in a process of their own, so that its peak memory is theirs."""

import resource
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

__all__ = ["isolated", "peak_memory"]

_Result = TypeVar("_Result")


def peak_memory() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def isolated(function: Callable[..., _Result], *args: Any) -> tuple[_Result, float]:
    """Call a function of a module in a fresh process.

    Args:
        function: The function; it and its arguments must be picklable.
        args: Its arguments.

    Returns:
        What it returns, and the process's peak memory in MiB, which holds the imported
        packages too.
    """
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_call, (function, args))


def _call(function: Callable[..., _Result], args: tuple) -> tuple[_Result, float]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return function(*args), peak_memory()
