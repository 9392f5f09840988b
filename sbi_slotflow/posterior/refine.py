r"""Exact posteriors from approximate ones, given a likelihood.

Draws of an approximate posterior q are weighted by

.. math::
    w = \frac{p(\theta)\, p(x | \theta)}{q'(\theta | x)}

where all three are densities of the set. The weighted draws follow the exact posterior,
their mean weight is the evidence p(x), and the tail of the weights, k-hat, tells
whether to believe either. Where it does not, ``method="smc"`` moves the draws;
``"auto"`` weighs first, and moves where weights are not to be believed.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..sets.checks import Numbers, as_count, warn_user
from ..sets.prior import VariableKPrior, check_covered
from .base import Posterior
from .draws import (
    FEWEST_EFFECTIVE,
    LARGEST_K_HAT,
    RefinedPosterior,
    UnreliableWeights,
)
from .importance import (
    EvenedSets,
    LogLikelihood,
    WithExtraComponent,
    likelihood_of,
)
from .smc import FEWEST_PARTICLES, temper
from .weights import pareto_smoothed, worst_pareto_k

__all__ = ["refine"]

# Share of the weight from which a cardinality has a k-hat of its own.
_LEAST_SHARE = 1e-3

Method = Literal["importance", "smc", "auto"]


def refine(
    posterior: Posterior,
    log_likelihood: LogLikelihood,
    x: Numbers | None = None,
    num_samples: int = 10_000,
    *,
    method: Method = "importance",
    defensive: float = 0.1,
    prior: VariableKPrior | None = None,
    generator: torch.Generator | None = None,
) -> RefinedPosterior | list[RefinedPosterior]:
    """Turn an approximate posterior into the exact one.

    Args:
        posterior: The approximate posterior, with its prior.
        log_likelihood: Maps rows ``(..., E)`` and observations ``(..., *event)`` that
            broadcast to log p(x | theta) ``(...)``; a problem's own, for one. If it has
            a method ``given(x)``, that is called once, and returns a function of theta.
        x: One observation, or a batch; the posterior's default x if None.
        num_samples: Draws for each observation.
        method: ``"importance"`` weights draws of the posterior; ``"smc"`` moves them
            through tempered targets, for posteriors that miss something; ``"auto"``
            weights, and moves those of the observations whose weights cannot be relied
            on.
        defensive: Share of draws that look beyond the posterior, with one more
            component from the prior. A missing component shows in the weights if one of
            them comes near it: more samples see narrower ones. In another such share
            the cardinality is drawn evenly among the possible ones.
        prior: Another prior over the same layout, within the support of the
            posterior's own, to refine under; the posterior's own if None.
        generator: Source of randomness; torch's global generator if None.

    Returns:
        The refined posterior, or a list of B of them for a batch.

    Raises:
        ValueError: If an argument is out of range, the likelihood returns NaN or the
            wrong shape, no draw has a positive weight, or the prior allows sets that
            the posterior's own excludes.

    Warns:
        UnreliableWeights: If k-hat exceeds 0.7 or fewer than 100 draws are effective.
    """
    if method not in (known := list(get_args(Method))):
        raise ValueError(f"method must be one of {known}, got {method!r}.")
    num_samples = as_count(num_samples, "num_samples")
    if method != "importance" and num_samples < FEWEST_PARTICLES:
        raise ValueError(
            f'num_samples must be at least {FEWEST_PARTICLES} for method="{method}", '
            f"got {num_samples}."
        )
    if not 0 <= defensive < 1:
        raise ValueError(f"defensive must lie in [0, 1), got {defensive}.")
    if not posterior.has_density:
        raise NotImplementedError(
            f"{type(posterior).__name__} has no density, and cannot be refined."
        )
    if prior is not None:
        check_covered(prior, posterior.prior)
    batch = posterior.observations(x)
    settings = num_samples, defensive, prior or posterior.prior, generator
    results: list[RefinedPosterior | None] = [None] * len(batch)
    if method != "smc":
        weighed = _weigh(posterior, log_likelihood, batch, *settings)
        keep = method == "importance"
        results = [one if keep or one.is_reliable else None for one in weighed]
    found = [
        temper(posterior, log_likelihood, one, *settings) if result is None else result
        for one, result in zip(batch, results, strict=True)
    ]
    for result in found:
        if not result.is_reliable:
            warn_user(_complaint(result, method), UnreliableWeights)
    return found[0] if len(batch) == 1 else found


def _weigh(
    posterior: Posterior,
    log_likelihood: LogLikelihood,
    x: Tensor,
    num_samples: int,
    defensive: float,
    prior: VariableKPrior,
    generator: torch.Generator | None,
) -> list[RefinedPosterior]:
    likelihood = likelihood_of(log_likelihood, x)

    def log_target(theta: Tensor) -> Tensor:
        return prior.log_prob(theta).double() + likelihood(theta)

    with torch.no_grad():
        sets = EvenedSets(posterior.given(x), defensive)
        proposal = WithExtraComponent(sets, prior, defensive, log_target)
        theta, counted = proposal.sample(num_samples, generator)
        log_q, log_p = proposal.log_prob(theta), log_target(theta)
    # A draw of density zero under q was put out of its support by rounding.
    possible = counted & torch.isfinite(log_p) & torch.isfinite(log_q)
    log_weights = torch.where(possible, log_p - log_q, -torch.inf)
    results = []
    for b, raw in enumerate(log_weights.unbind(1)):
        smoothed = pareto_smoothed(raw)
        k = prior.layout.cardinality(theta[:, b])
        pareto_k = worst_pareto_k(raw, k, smoothed, _LEAST_SHARE)
        mean = raw.logsumexp(0) - math.log(num_samples)
        relative = (raw - mean).exp().std() / math.sqrt(num_samples)
        results.append(
            RefinedPosterior(
                prior.layout,
                theta[:, b].unsqueeze(0),
                x[b],
                smoothed.log_weights.unsqueeze(0),
                log_evidence=float(mean),
                log_evidence_error=float(relative),
                pareto_k=pareto_k,
            )
        )
    return results


def _complaint(result: RefinedPosterior, method: Method) -> str:
    wrong = []
    if not result.pareto_k <= LARGEST_K_HAT:
        wrong.append(f"k-hat = {result.pareto_k:.2f} (should be below {LARGEST_K_HAT})")
    if not result.ess >= FEWEST_EFFECTIVE:
        wrong.append(
            f"{result.ess:.0f} of {len(result.rows)} draws are effective (should be "
            f"above {FEWEST_EFFECTIVE})"
        )
    if result.convergence is not None and not result.converged:
        worst = result.convergence.worst_rhat
        wrong.append(f"populations differ, with an R-hat of up to {worst:.2f}")
    if not result.settled:
        wrong.append("particles still remember where they started")
    advice = 'Try method="smc", more samples, or a posterior that fits better.'
    if method != "importance":
        advice = (
            "A posterior that fits better helps; where components are linear in some "
            "parameters and noise is Gaussian, rjmcmc.collapsed needs none."
        )
    return f"the result cannot be relied on: {', '.join(wrong)}. {advice}"
