"""What users pass, as tensors and numbers: one place, so that all doors are alike.

Example:
    >>> import numpy as np
    >>> from sbi_slotflow.sets.checks import as_cardinality, as_floats, as_shape
    >>> as_floats(np.array([1, 2], dtype=">i2"), "x")
    tensor([1., 2.], dtype=torch.float64)
    >>> as_shape(3), as_cardinality(np.int64(2), 5)
    (torch.Size([3]), 2)
"""

import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import draw_seed, forked_rng

if TYPE_CHECKING:
    from .layout import ThetaLayout

__all__ = [
    "Numbers",
    "Shape",
    "as_cardinality",
    "as_count",
    "as_floats",
    "as_observation",
    "as_probabilities",
    "as_row",
    "as_rows",
    "as_shape",
    "as_weights",
    "check_finite",
    "warn_user",
    "warn_without_slots",
]

Numbers: TypeAlias = Tensor | ArrayLike
"""Tensors, numpy arrays, numbers, sequences, pandas objects."""
Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
"""An integer, or a sequence of integers."""

_PACKAGE = str(Path(__file__).parents[1])
# Rows from which a fault of all of them is no chance.
_MANY = 20
# What probabilities may miss of 1.
_ROUNDING = 1e-4


def as_floats(value: Numbers, name: str) -> Tensor:
    """Turn numbers into a floating-point tensor.

    Single and double precision stay as they are; half precision becomes single, and
    integers become double precision. Masked entries become NaN. An array's own index,
    byte order and strides do not matter.

    Args:
        value: The numbers.
        name: What to call them in messages.

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If rows have different lengths.
    """
    tensor = value if isinstance(value, Tensor) else _from_array(value, name)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}.")
    if not tensor.is_floating_point():
        return tensor.double()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _from_array(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"{name} must hold real numbers, got {type(value).__name__} of "
            f"{array.dtype}."
        )
    small = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return torch.from_numpy(array.astype(np.float32 if small else np.float64))


def as_shape(shape: Shape, name: str = "sample_shape") -> torch.Size:
    """Turn an integer or a sequence of integers, none negative, into a shape."""
    entries: list[Any] = list(shape) if np.ndim(shape) else [shape]  # pyright: ignore[reportArgumentType, reportCallIssue]
    sizes = [_index(entry) for entry in entries]
    integers = [size for size in sizes if size is not None]
    if len(integers) < len(sizes):
        raise TypeError(f"{name} must be an integer or a tuple of them, got {shape!r}.")
    if min(integers, default=0) < 0:
        raise ValueError(f"{name} must not be negative, got {shape!r}.")
    return torch.Size(integers)


def as_cardinality(k: SupportsIndex | None, most: int) -> int | None:
    """Check a number of components in 0..most; None stays None."""
    if k is None:
        return None
    size = _index(k)
    message = f"k must be an integer in 0..{most}, got {k!r}."
    if size is None:
        raise TypeError(message)
    if not 0 <= size <= most:
        raise ValueError(message)
    return size


def as_count(value: SupportsIndex, name: str, least: int = 1) -> int:
    """Check a whole number of at least ``least``."""
    size = _index(value)
    if size is None:
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}.")
    return size


def as_rows(samples: Tensor, layout: "ThetaLayout", name: str = "samples") -> Tensor:
    """Check theta rows ``(S, E)``, at least one; returns them on the CPU."""
    layout.validate(samples, name)
    if samples.ndim != 2 or not len(samples):
        raise ValueError(
            f"{name} must have shape (S, {layout.size}) with S >= 1, got "
            f"{tuple(samples.shape)}."
        )
    return samples.detach().cpu()


def simulate(
    simulator: Callable[..., Numbers],
    theta: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw float32 data ``(B, *event)`` of rows ``(B, E)``, by any simulator.

    One that takes a ``generator`` gets it; for any other, torch's and NumPy's global
    generators are seeded from it, and put back afterwards.

    Raises:
        TypeError, ValueError: If the simulator returns something else.
    """
    if generator is None:
        x = simulator(theta)
    elif _takes_generator(simulator):
        x = simulator(theta, generator=generator)
    else:
        state = np.random.get_state()  # noqa: NPY002
        try:
            with forked_rng(generator):
                np.random.seed(draw_seed(None) % 2**32)  # noqa: NPY002
                x = simulator(theta)
        finally:
            np.random.set_state(state)  # noqa: NPY002
    x = as_floats(x, "the simulator's x").float()
    if x.ndim < 2 or len(x) != len(theta):
        raise ValueError(
            f"the simulator's x must have shape ({len(theta)}, *event) for theta of "
            f"shape {tuple(theta.shape)}, got {tuple(x.shape)}."
        )
    return x


def _takes_generator(simulator: Callable[..., Numbers]) -> bool:
    try:
        return "generator" in inspect.signature(simulator).parameters
    except (TypeError, ValueError):  # one that Python knows nothing of
        return False


def as_row(theta: Tensor, layout: "ThetaLayout", name: str = "true_theta") -> Tensor:
    """Check one theta row, ``(E,)`` or ``(1, E)``; returns it as ``(1, E)``."""
    layout.validate(theta, name)
    if theta.numel() != layout.size:
        raise ValueError(f"{name} must be one row, got {tuple(theta.shape)}.")
    return theta.detach().cpu().reshape(1, -1)


def as_observation(x: Tensor, length: int | None = None) -> Tensor:
    """Check one finite signal, ``(T,)`` or ``(1, T)``; returns it as ``(1, T)``.

    Of a known number of entries, one of any shape will do.
    """
    size = x.shape[-1] if length is None and x.ndim else length
    shaped = length is not None or (x.ndim in (1, 2) and x.shape[-1] == size)
    if not x.ndim or not shaped or x.numel() != size:
        of = "" if length is None else f" of length {length}"
        raise ValueError(f"x must be one observation{of}, got shape {tuple(x.shape)}.")
    check_finite(x)
    return x.detach().cpu().reshape(1, -1)


def as_probabilities(value: Numbers | Categorical, name: str) -> Tensor:
    """Check probabilities ``(..., C)``; returns them in float64 on the CPU."""
    value = value.probs if isinstance(value, Categorical) else value
    probs = as_floats(value, name).detach().cpu().double()
    total = probs.sum(-1, keepdim=True)
    # Written so that NaN fails too.
    good = (probs >= 0).all(-1) & ((total - 1).abs() < _ROUNDING).all(-1)
    if not good.all():
        raise ValueError(
            f"{name} must be probabilities that add up to 1, got "
            f"{probs[~good][0].tolist()}."
        )
    return probs / total


def as_weights(weights: Tensor, num: int, name: str = "weights") -> Tensor:
    """Check weights ``(num,)``; returns them in float64 on the CPU, adding up to 1."""
    if weights.shape != (num,):
        raise ValueError(
            f"{name} must have shape ({num},), got {tuple(weights.shape)}."
        )
    weights = weights.detach().cpu().double()
    if not ((weights >= 0).all() and 0 < weights.sum() < torch.inf):
        raise ValueError(f"{name} must be finite, not negative and not all zero.")
    return weights / weights.sum()


def check_finite(values: Tensor, name: str = "x") -> None:
    """Raise ValueError if an entry is NaN or infinite."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} must be finite: NaN or Inf in {bad} entries.")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the user's line: the first frame outside of the package.

    ``torch.no_grad`` around a function of the package belongs to it.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and (
        frame.f_code.co_filename.startswith(_PACKAGE)
        or frame.f_globals.get("__name__") == "torch.utils._contextlib"
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_without_slots(theta: Tensor) -> None:
    """Warn if no row of many has a whole number of components.

    That is what the draws of a density estimator without slots look like; sbi's
    rejection sampling asks whether they are in the prior's support, and never ends.
    """
    k = theta.reshape(-1, theta.shape[-1])[:, 0]
    if len(k) >= _MANY and (k != k.round()).all():
        warn_user(
            f"not one of {len(k)} theta rows starts with a whole number K. A density "
            "estimator without slots, as sbi's NPE(prior) trains by default, cannot "
            "draw sets: use SlotNPE(prior), or "
            "NPE(prior, density_estimator=slot_nn(problem))."
        )


def _index(value: Any) -> int | None:
    """An integer of any kind as Python's; None if it is none, or a truth value."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
