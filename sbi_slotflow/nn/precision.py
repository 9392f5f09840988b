"""Networks are of single precision, whatever torch's default is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["single_precision"]


@contextmanager
def single_precision() -> Iterator[None]:
    """Build modules in float32; torch's default, one for all threads, is put back."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
