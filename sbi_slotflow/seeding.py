"""Explicit randomness for code that only knows torch's global generator."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

__all__ = ["draw_seed", "forked_rng", "generator_for"]

_SEED_RANGE = 2**63 - 1
# The global generator is one for all threads.
_LOCK = RLock()


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw an integer seed from a generator (torch's global one if None)."""
    device = "cpu" if generator is None else generator.device
    return int(
        torch.randint(_SEED_RANGE, (), generator=generator, device=device).item()
    )


@contextmanager
def forked_rng(generator: torch.Generator | None) -> Iterator[None]:
    """Let code that draws from torch's global generator draw from ``generator``.

    The global state is put back afterwards. Other threads that want the same wait. With
    ``None`` nothing changes: the code draws from the global generator, as torch's
    distributions do.
    """
    if generator is None:
        yield
        return
    seed = draw_seed(generator)
    with _LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def generator_for(
    seed: int, *stream: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Make the generator of one numbered stream of a seed.

    Streams of one seed are independent: the pair is hashed, so stream 1 of seed 0 and
    stream 0 of seed 1 differ. Used to give every training step its own randomness.

    Raises:
        ValueError: If a number is negative.
    """
    if min(seed, *stream, 0) < 0:
        raise ValueError(
            f"seed and stream must not be negative, got {(seed, *stream)}."
        )
    state = 0x9E3779B97F4A7C15
    for number in (seed, *stream):
        # splitmix64 (Steele, Lea, Flood 2014), one round per number
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator(device=device).manual_seed(state & _SEED_RANGE)
