r"""Samplers that a problem brings along, and the exact posterior of one K.

Moves and algebra are the problem's own; see the hooks ``collapsed`` and
``laplace_proposal`` of :class:`~sbi_slotflow.problems.Problem`.

:func:`fixed_k` weights the draws of a Laplace proposal at one K by

.. math::
    \frac{p(\Theta, \sigma | K)\, p(x | \Theta, \sigma)}
         {q(\Theta, \sigma | K)},

whose mean is p(x | K). This is the reference for widths where one mode rules, and for
evidences.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..posterior import refine
from ..posterior.base import Posterior
from ..posterior.draws import ChainDraws, RefinedPosterior
from ..problems.base import Problem
from ..seeding import generator_for
from ..sets.checks import as_count, as_floats
from ..sets.prior import check_independent

__all__ = ["collapsed", "fixed_k", "laplace_proposal"]

# Draws of a posterior that chains start from.
_STARTS = 64


def collapsed(
    problem: Problem,
    x: Tensor,
    *,
    start: Posterior | Tensor | None = None,
    **options: Any,
) -> ChainDraws:
    """Draw from the exact posterior p(K, Theta, shared | x).

    Args:
        problem: A problem with a sampler of its own,
            ``problems.sinusoids(...)`` for one.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        start: Where chains begin: draws of an approximate posterior, a trained network
            for one, or theta rows ``(n, E)``, taken in turn. Fits to x if None. What
            the chains converge to does not depend on it; how soon they do may. Outside
            of sinusoids only places are taken: amplitudes are drawn by the data, and
            rows where the prior rules those out give way to draws of the prior.
        options: ``seed``, ``num_chains``, ``num_draws`` (kept from each chain),
            ``thin`` (moves between two draws), ``burn_in`` (moves thrown away first),
            ``num_levels`` (temperatures). Defaults are 4, 5,000, 20, 40,000 and 1 (8
            where that does not converge) for sinusoids, of which a move takes
            microseconds; 8, 500, 10, 2,000 and 6 for other problems, of which a move
            of all chains takes milliseconds.

    Returns:
        Float64 draws, shape ``(num_chains, num_draws, E)``.

    Raises:
        ImportError: If numba is missing (``pip install sbi-slotflow[rjmcmc]``).
        TypeError: If the problem has no such sampler.
        ValueError: If x is malformed, a number is not positive, or a row of ``start``
            lies outside the prior's support.
    """
    problem = _checked(problem, "rjmcmc.collapsed")
    if start is not None:
        options["start"] = _starts(problem, x, start, options.get("seed", 0))
    return problem.collapsed(x, **options)


def _starts(
    problem: Problem, x: Tensor, start: Posterior | Tensor, seed: int
) -> Tensor:
    """Theta rows ``(n, E)`` inside the prior's support."""
    if isinstance(start, Posterior):
        generator = generator_for(as_count(seed, "seed", 0), 1)
        x = as_floats(x, "x").reshape(-1)
        rows = start.sample(
            (_STARTS,), x, generator=generator, show_progress_bars=False
        )
        inside = torch.isfinite(problem.prior.log_prob(rows))
        if inside.any():  # rounding takes some draws out
            return rows[inside]
    else:
        rows = as_floats(start, "start")
        problem.layout.validate(rows)
        rows = rows.reshape(-1, rows.shape[-1])
        if not len(rows):
            raise ValueError("start must have at least one row, got none.")
        inside = torch.isfinite(problem.prior.log_prob(rows))
    if not inside.all():
        raise ValueError(
            "start must lie inside the prior's support, got "
            f"{int((~inside).sum())} of {len(rows)} rows outside."
        )
    return rows


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
    problem = _checked(problem, "rjmcmc.laplace_proposal")
    return problem.laplace_proposal(x, cardinalities=cardinalities, seed=seed)


def fixed_k(
    problem: Problem,
    x: Tensor,
    k: int,
    *,
    num_samples: int = 20_000,
    seed: int = 0,
) -> RefinedPosterior:
    """Draw from p(Theta, sigma | x, K).

    Args:
        problem: A problem with a Laplace proposal.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        k: The cardinality.
        num_samples: Number of weighted draws.
        seed: Seed.

    Returns:
        Weighted draws; ``log_evidence`` is log p(x | K), without p(K).

    Raises:
        TypeError, ValueError: See :func:`laplace_proposal`; or if the prior excludes k.

    Warns:
        UnreliableWeights: If k-hat exceeds 0.7 or too few draws are effective, as where
            a component is too weak to have one mode.
    """
    problem = _checked(problem, "rjmcmc.fixed_k")
    if len(problem.prior.members) > 1:
        raise TypeError(
            "rjmcmc.fixed_k has no Laplace proposal for components of several classes, "
            f"as those of {problem.name!r}."
        )
    weights = torch.zeros(problem.prior.max_cardinality + 1)
    if not 0 <= k < len(weights) or problem.prior.cardinality_probs[k] == 0:
        raise ValueError(f"k must be a cardinality that the prior allows, got {k!r}.")
    weights[k] = 1.0
    given_k = replace(problem, prior=problem.prior.with_cardinality(weights))
    proposal = given_k.laplace_proposal(x, seed=seed)
    result = refine(
        proposal,
        proposal.log_likelihood,
        x.reshape(-1),
        num_samples,
        defensive=0.0,
        generator=torch.Generator().manual_seed(seed),
    )
    assert isinstance(result, RefinedPosterior)
    return result


def _checked(problem: Problem, what: str) -> Problem:
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}.")
    check_independent(problem.prior, what)
    return problem
