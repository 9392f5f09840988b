"""Samplers that a problem brings along: a reference, a proposal without network.

Which moves and which algebra they use is the problem's own; see the hooks ``collapsed``
and ``laplace_proposal`` of :class:`~sbi_slotflow.problems.Problem`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..posterior.chains import CollapsedDraws
from ..problems import Problem

__all__ = ["collapsed", "laplace_proposal"]


def collapsed(problem: Problem, x: Tensor, **options: Any) -> CollapsedDraws:
    """Draw from the exact posterior p(K, Theta, shared | x).

    Args:
        problem: A problem with a sampler of its own,
            ``problems.sinusoids(...)`` for one.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        options: ``seed``, ``num_chains``, ``num_draws`` (kept from each chain),
            ``thin`` (moves between two draws), ``burn_in`` (moves thrown away first).

    Returns:
        Float64 draws, shape ``(num_chains, num_draws, E)``.

    Raises:
        ImportError: If numba is missing (``pip install sbi-slotflow[rjmcmc]``).
        TypeError: If the problem has no such sampler.
        ValueError: If x is malformed or a number is not positive.
    """
    return _checked(problem).collapsed(x, **options)


def laplace_proposal(
    problem: Problem,
    x: Tensor,
    cardinalities: Sequence[int] | None = None,
    seed: int = 0,
) -> Any:
    """Fit an approximate posterior to one observation, without a network.

    Args:
        problem: A problem that has one, ``problems.sinusoids(...)``.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        cardinalities: Cardinalities to consider; all that the prior allows if None.
        seed: Seed of the pilot draws.

    Returns:
        A posterior that can be sampled, evaluated and refined.

    Raises:
        TypeError: If the problem has none.
        ValueError: If x is malformed or a cardinality impossible.
    """
    return _checked(problem).laplace_proposal(x, cardinalities=cardinalities, seed=seed)


def _checked(problem: Problem) -> Problem:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}.")
    return problem
