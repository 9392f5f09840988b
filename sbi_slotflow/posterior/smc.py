r"""Sequential Monte Carlo from an approximate posterior to the exact one.

Particles pass through the targets

.. math::
    \pi_\beta(\theta) \propto q''(\theta)^{1 - \beta}\, [p(\theta)\, p(x|\theta)]^\beta,
    \qquad q'' = (1 - \delta)\, q' + \delta\, p

from beta = 0 to 1 (Del Moral et al. 2006), q' being the proposal of :mod:`.importance`.
Where 0.2 % of the draws are effective under the posterior, one step leads there: moves
at beta = 1 need no q, which is what costs. Otherwise each step is as long as 80 % of
the particles stay effective, but no longer than doubles beta: a component that q misses
shows in no weight, and is found while beta is small and births are cheap. Then the
particles are resampled, and moved for as long as the mean weight of the next step still
grows (particles that lag behind their target make the evidence too small), at the end
until what their cardinality and density keep of where they started is below the noise
of as many particles. The small share of the prior lets moves reach every set.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from ..nn.charts import WhiteningChart
from ..seeding import forked_rng
from ..sets.layout import ThetaLayout
from .base import Posterior
from .component_proposals import PooledComponents
from .draws import RefinedPosterior
from .importance import LogLikelihood, WithExtraComponent, likelihood_of
from .moves import (
    EXCHANGES,
    DifferenceMove,
    ExchangeMove,
    Move,
    Moving,
    Population,
    metropolis,
)
from .weights import pareto_smoothed, systematic

__all__ = ["temper"]

_EFFECTIVE_SHARE = 0.8
# Share that must stay effective to go to the posterior at once.
_ENOUGH_SHARE = 0.002
_FIRST_STEP = 0.01
_PRIOR_SHARE = 0.01
_SWEEPS, _MOST_SWEEPS = 2, 25
_DRIFT = 2.0
_LAST_SWEEPS, _MEMORY, _LITTLE = 10, 0.1, 0.05
# k-hat below which weights have a finite variance.
_FINITE_VARIANCE = 0.5
_MAX_STEPS = 200


@torch.no_grad()
def temper(
    posterior: Posterior,
    log_likelihood: LogLikelihood,
    x: Tensor,
    num_samples: int,
    defensive: float,
    generator: torch.Generator | None,
) -> RefinedPosterior:
    """Run SMC for one observation ``(*event)``; see :func:`refine`."""
    prior, likelihood = posterior.prior, likelihood_of(log_likelihood, x)

    def log_target(theta: Tensor) -> Tensor:
        log_p = prior.log_prob(theta).double()
        inside = torch.isfinite(log_p)
        if inside.any():
            log_p[inside] += likelihood(theta[inside])
        return log_p

    proposal = WithExtraComponent(
        posterior.given(x.unsqueeze(0)),
        prior,
        defensive,
        lambda theta: log_target(theta[:, 0]).unsqueeze(1),
    )

    def evaluate(theta: Tensor, beta: float = 0.0) -> Population:
        log_p = log_target(theta)
        if beta == 1.0:  # q has no part in the last target, and costs most
            return Population(theta, log_p, log_p)
        log_prior = prior.log_prob(theta).double()
        log_q = proposal.log_prob(theta.to(dtype).unsqueeze(1))[:, 0]
        log_q = torch.logaddexp(
            log_q + math.log1p(-_PRIOR_SHARE), log_prior + math.log(_PRIOR_SHARE)
        )
        # Outside the prior's support both vanish.
        inside = torch.isfinite(log_prior)
        return Population(theta, torch.where(inside, log_q, -math.inf), log_p)

    # Draws from q'', and which of them count.
    start, counted = (part[:, 0] for part in proposal.sample(num_samples, generator))
    with forked_rng(generator):
        chosen = torch.rand(num_samples) < _PRIOR_SHARE
        broad = prior.sample(torch.Size((num_samples,))).to(start)
    dtype = start.dtype
    population = evaluate(torch.where(chosen.unsqueeze(-1), broad, start).double())
    log_q = torch.where(counted | chosen, population.log_q, math.inf)
    population = population._replace(log_q=log_q)
    moves = _moves(posterior)
    beta, steps, sweeps = 0.0, 0, 0
    log_evidence, variance, worst = 0.0, 0.0, -math.inf
    rates: dict[str, list[float]] = {move.name: [] for move in moves}
    while beta < 1:
        step, log_weights = _step(population, beta)
        mean = _log_mean(log_weights)
        if not math.isfinite(mean):
            raise ValueError("no draw has a positive prior density and likelihood.")
        log_evidence += mean
        variance += float((log_weights - mean).exp().var()) / num_samples
        log_weights, pareto_k = pareto_smoothed(log_weights)
        worst = max(worst, pareto_k)
        beta, steps = beta + step, steps + 1
        if 1 - beta < 1e-9 or steps == _MAX_STEPS:
            beta = 1.0
        index = systematic(log_weights.softmax(-1), num_samples, generator)
        population = population.rows(index)
        settled: Callable[[Population], bool] = _Drift(beta)
        if beta == 1.0:
            # Errors of good weights are random, and small before anything is moved.
            share = _effective_share(log_weights) if pareto_k < _FINITE_VARIANCE else 0
            memory = max(_MEMORY, math.sqrt(share))
            settled = _Forgetting(prior.layout, population, memory)
        for _ in range(_MOST_SWEEPS):
            sweeps += 1
            for move in moves:
                population, rate = metropolis(
                    population, move, beta, partial(evaluate, beta=beta), generator
                )
                rates[move.name].append(rate)
            if settled(population):
                break
    diagnostics = {name: sum(r) / max(1, len(r)) for name, r in rates.items()}
    return RefinedPosterior(
        prior.layout,
        population.theta.unsqueeze(0),
        x,
        log_evidence=log_evidence,
        log_evidence_error=math.sqrt(variance),
        pareto_k=worst,
        diagnostics={"steps": float(steps), "sweeps": float(sweeps), **diagnostics},
    )


class _Drift:
    """Whether the mean weight of the next step has stopped growing."""

    def __init__(self, beta: float) -> None:
        self.beta, self.before, self.sweeps = beta, math.inf, 0

    def __call__(self, population: Population) -> bool:
        self.sweeps += 1
        if self.sweeps < _SWEEPS:
            return False
        before, ahead = self.before, _log_mean(_step(population, self.beta)[1])
        self.before = ahead
        # The mean weight's own error is at most 1 / sqrt(N).
        return ahead - before < _DRIFT / math.sqrt(len(population.theta))


class _Forgetting:
    """Whether particles have forgotten the errors of where they started.

    A start of N' effective particles errs by 1 / sqrt(N'), and sweeps that keep a share
    m of what it was leave m of that: no more than the noise of N particles if
    m <= sqrt(N' / N).
    """

    def __init__(
        self, layout: ThetaLayout, population: Population, memory: float
    ) -> None:
        self.layout, self.memory, self.sweeps = layout, memory, 0
        self.start = self._numbers(population)

    def __call__(self, population: Population) -> bool:
        self.sweeps += 1
        now = self._numbers(population)
        shared = (self.start * now).mean(-1).abs()
        # Of a cardinality that hardly varies nothing needs to be forgotten.
        spread = now.square().mean(-1).clamp(min=_LITTLE)
        little = bool((shared < self.memory * spread).all())
        return little and self.sweeps >= _LAST_SWEEPS

    def _numbers(self, population: Population) -> Tensor:
        """Cardinality and log density of the particles less their means, ``(2, N)``."""
        k = self.layout.cardinality(population.theta)
        numbers = torch.stack([k.double(), population.log_p])
        return numbers - numbers.mean(-1, keepdim=True)


def _moves(posterior: Posterior) -> list[Move]:
    prior, chart = posterior.prior, posterior.chart
    shared = WhiteningChart(prior.shared_marginals) if prior.shared_marginals else None
    differences = [
        DifferenceMove(prior.layout, chart, shared, moving)
        for moving in get_args(Moving)
        if moving != "shared" or shared is not None
    ]

    def pooled(theta: Tensor) -> PooledComponents:
        return PooledComponents(theta, prior, chart=chart)

    exchanges = {n: ExchangeMove(prior.layout, n, pooled) for n in EXCHANGES}
    moves: list[Move] = [*differences, *exchanges.values()]
    extra = chart.extra_moves(prior.layout)
    if extra:
        moves.remove(exchanges["split or merge"])  # of any two, which rarely fit
    return moves + extra


def _step(population: Population, beta: float) -> tuple[float, Tensor]:
    """Longest step that leaves enough particles effective, and its log weights."""
    gain = population.log_p - population.log_q
    gain = torch.where(torch.isfinite(population.log_q), gain, -math.inf)
    most = 1 - beta
    if most <= 0:
        return 0.0, torch.zeros_like(gain)
    if _effective_share(pareto_smoothed(most * gain).log_weights) >= _ENOUGH_SHARE:
        return most, most * gain
    most = min(most, max(beta, _FIRST_STEP))
    low, high = 0.0, most
    if _effective_share(most * gain) >= _EFFECTIVE_SHARE:
        low = most
    while high - low > 1e-3 * high and high > 1e-6:
        middle = 0.5 * (low + high)
        if _effective_share(middle * gain) >= _EFFECTIVE_SHARE:
            low = middle
        else:
            high = middle
    step = max(low, 1e-6)
    return step, step * gain


def _effective_share(log_weights: Tensor) -> float:
    weights = log_weights.softmax(-1)
    return float(1 / weights.square().sum()) / len(weights)


def _log_mean(log_weights: Tensor) -> float:
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))
