r"""Sequential Monte Carlo from an approximate posterior to the exact one.

Particles pass through the targets

.. math::
    \pi_\beta(\theta) \propto q''(\theta)^{1 - \beta}\, [p(\theta)\, p(x|\theta)]^\beta,
    \qquad q'' = (1 - \delta)\, q' + \delta\, p

from beta = 0 to 1 (Del Moral et al. 2006), q' being the proposal of :mod:`.importance`.
Each step is as long as 80 % of the particles stay effective, but no longer than doubles
beta: a component that q misses shows in no weight, and is found while beta is small
and births are cheap. Then the particles are resampled, and moved for as long as the
mean weight of the next step still grows: particles that lag behind their target make
the evidence too small. The small share of the prior lets moves reach every set.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ..component_proposals import (
    ComponentProposal,
    PriorComponents,
    slot_mixtures,
)
from ..nn.charts import Chart, WhiteningChart
from ..posterior import SlotPosterior
from ..psis import pareto_smoothed
from ..seeding import forked_rng
from .importance import Proposal, WithExtraComponent
from .moves import (
    EXCHANGES,
    DifferenceMove,
    ExchangeMove,
    Move,
    Population,
    metropolis,
)
from .refine import LogLikelihood, RefinedPosterior, checked_log_likelihood

__all__ = ["temper"]

_EFFECTIVE_SHARE = 0.8
_FIRST_STEP = 0.01
_PRIOR_SHARE = 0.01
_SWEEPS, _MOST_SWEEPS = 2, 20
_DRIFT = 2.0
_LAST_SWEEPS = 5
_MAX_STEPS = 200


@torch.no_grad()
def temper(
    posterior: Proposal,
    log_likelihood: LogLikelihood,
    x: Tensor,
    num_samples: int,
    defensive: float,
    generator: torch.Generator | None,
) -> RefinedPosterior:
    """Run SMC for one observation ``(T,)``; see :func:`refine`.

    Raises:
        ValueError: If no particle has a positive weight.
    """
    prior, one = posterior.prior, x.unsqueeze(0)
    proposal = WithExtraComponent(posterior, defensive)

    def evaluate(theta: Tensor, beta: float = 0.0) -> Population:
        log_prior = prior.log_prob(theta).double()
        log_p = torch.full_like(log_prior, -math.inf)
        inside = torch.isfinite(log_prior)
        if inside.any():
            values = checked_log_likelihood(log_likelihood, theta[inside], one)
            log_p[inside] = log_prior[inside] + values
        if beta == 1.0:  # q has no part in the last target, and costs most
            return Population(theta, log_p, log_p)
        log_q = proposal.log_prob(theta.to(dtype).unsqueeze(1), one)[:, 0]
        log_q = torch.logaddexp(
            log_q + math.log1p(-_PRIOR_SHARE), log_prior + math.log(_PRIOR_SHARE)
        )
        # Outside the prior's support both vanish.
        return Population(theta, torch.where(inside, log_q, -math.inf), log_p)

    start = _start(proposal, one, num_samples, generator)
    dtype = start.dtype
    population = evaluate(start.double())
    moves = _moves(posterior, x)
    beta, steps, log_evidence, variance, worst = 0.0, 0, 0.0, 0.0, -math.inf
    rates: dict[str, list[float]] = {move.name: [] for move in moves}
    while beta < 1:
        step, log_weights = _step(population, beta)
        mean = _log_mean(log_weights)
        if not math.isfinite(mean):
            raise ValueError("no draw has a positive prior density and likelihood.")
        log_evidence += mean
        variance += float((log_weights - mean).exp().var()) / num_samples
        worst = max(worst, pareto_smoothed(log_weights).pareto_k)
        beta, steps = beta + step, steps + 1
        if 1 - beta < 1e-9 or steps == _MAX_STEPS:
            beta = 1.0
        population = population.rows(_resample(log_weights, generator))
        least, before = _LAST_SWEEPS if beta == 1.0 else _SWEEPS, math.inf
        for sweep in range(1, _MOST_SWEEPS + 1):
            for move in moves:
                population, rate = metropolis(
                    population, move, beta, partial(evaluate, beta=beta), generator
                )
                rates[move.name].append(rate)
            if sweep >= least:
                ahead = _log_mean(_step(population, beta)[1])
                # The mean weight's own error is at most 1 / sqrt(N).
                if ahead - before < _DRIFT / math.sqrt(num_samples):
                    break
                before = ahead
    diagnostics = {name: sum(r) / max(1, len(r)) for name, r in rates.items()}
    return RefinedPosterior(
        prior.layout,
        population.theta.unsqueeze(0),
        x,
        log_evidence=log_evidence,
        log_evidence_error=math.sqrt(variance),
        pareto_k=worst,
        diagnostics={"steps": float(steps), **diagnostics},
    )


def _start(
    proposal: WithExtraComponent,
    x: Tensor,
    num: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw from q''."""
    theta = proposal.sample(num, x, generator)[:, 0]
    with forked_rng(generator):
        chosen = torch.rand(num) < _PRIOR_SHARE
        broad = proposal.prior.sample(torch.Size((num,))).to(theta)
    return torch.where(chosen.unsqueeze(-1), broad, theta)


def _moves(posterior: Proposal, x: Tensor) -> list[Move]:
    prior = posterior.prior
    chart: Chart = WhiteningChart(prior.component_marginals)
    components: ComponentProposal = PriorComponents(prior.component)
    if isinstance(posterior, SlotPosterior):
        chart = posterior.posterior_estimator.chart
        # One slot more than q thinks there are components.
        most = int(posterior.cardinality(x).probs.argmax())
        mixtures = slot_mixtures(posterior, x, defensive_share=0.3)
        components = mixtures[min(most, len(mixtures) - 1)]
    shared = WhiteningChart(prior.shared_marginals) if prior.shared_marginals else None
    differences = [
        DifferenceMove(prior.layout, chart, shared, "set"),
        DifferenceMove(prior.layout, chart, shared, "component"),
    ]
    if shared is not None:
        differences.append(DifferenceMove(prior.layout, chart, shared, "shared"))
    exchanges = [ExchangeMove(prior.layout, name, components) for name in EXCHANGES]
    return [*differences, *exchanges]


def _step(population: Population, beta: float) -> tuple[float, Tensor]:
    """Longest step that leaves enough particles effective, and its log weights."""
    gain = population.log_p - population.log_q
    gain = torch.where(torch.isfinite(population.log_q), gain, -math.inf)
    most = min(1 - beta, max(beta, _FIRST_STEP))

    def effective(step: float) -> float:
        weights = (step * gain).softmax(-1)
        return float(1 / weights.square().sum()) / len(gain)

    if most <= 0:
        return 0.0, torch.zeros_like(gain)
    low, high = 0.0, most
    if effective(most) >= _EFFECTIVE_SHARE:
        low = most
    while high - low > 1e-3 * high and high > 1e-6:
        middle = 0.5 * (low + high)
        if effective(middle) >= _EFFECTIVE_SHARE:
            low = middle
        else:
            high = middle
    step = max(low, 1e-6)
    return step, step * gain


def _log_mean(log_weights: Tensor) -> float:
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


def _resample(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Systematic resampling, indices ``(N,)``."""
    num = len(log_weights)
    edges = log_weights.double().softmax(-1).cumsum(0)
    start = torch.rand((), dtype=torch.float64, generator=generator)
    points = (torch.arange(num) + start) / num * edges[-1]
    return torch.searchsorted(edges, points).clamp(max=num - 1)
