r"""Exact posterior and evidence for one given K, by importance sampling.

The draws of :func:`laplace_proposal` at that K are weighted by

.. math::
    \frac{p(\Theta, \sigma | K)\, p(x | \Theta, \sigma)}
         {q(\Theta, \sigma | K)},

and their mean is p(x | K). This is the reference for widths where one mode rules, and
for evidences.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..posterior import refine
from ..posterior.refined import RefinedPosterior
from ..problems import Problem

__all__ = ["fixed_k"]


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
