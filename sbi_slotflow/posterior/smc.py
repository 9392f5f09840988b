r"""Sequential Monte Carlo from an approximate posterior to the exact one.

Particles pass through the targets

.. math::
    \pi_\beta(\theta) \propto q''(\theta)^{1 - \beta}\, [p(\theta)\, p(x|\theta)]^\beta,
    \qquad q'' = (1 - \delta)\, q' + \delta\, p

from beta = 0 to 1 (Del Moral et al. 2006), q' being the proposal of :mod:`.importance`.
Where 1 % of the draws, and no fewer than 25, are effective under the posterior, with a
k-hat below 0.7, one step leads there: moves at beta = 1 need no q, which is what costs.
Otherwise each step is as long as 80 % of the particles stay effective, but no longer
than doubles beta: a component that q misses shows in no weight, and is found while beta
is small and births are cheap. Then the particles are resampled, and moved for as long
as the mean weight of the next step still grows (particles that lag behind their target
make the evidence too small), at the end until what their cardinality and density keep
of where they started is a tenth, and as long again, which makes it a hundredth; where a
hundred sweeps do not lead to the first, the result says that it cannot be relied on.
The small share of the prior lets moves reach every set.

Four populations of a quarter of the particles do so independently, and are weighed by
their evidences. What they disagree in is what no weight of a single one can show: modes
that it lost on the way. Their spread is the stated error if that is larger than the one
of the weights, and they are compared as chains are (:mod:`.convergence`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..nn.charts import WhiteningChart
from ..seeding import forked_rng
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior
from .base import Posterior
from .component_proposals import ComponentProposal, pooled_components
from .convergence import convergence_of
from .draws import LARGEST_K_HAT, RefinedPosterior
from .importance import (
    EvenedSets,
    LogLikelihood,
    WithExtraComponent,
    likelihood_of,
)
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
_ENOUGH_SHARE, _FEWEST = 0.01, 25
_POPULATIONS = 4
# Of all populations together.
FEWEST_PARTICLES = 40
_FIRST_STEP = 0.01
_PRIOR_SHARE = 0.01
_SWEEPS, _MOST_SWEEPS = 2, 25
_DRIFT = 2.0
# At the posterior itself, where sweeps need no q.
_LAST_SWEEPS, _MOST_LAST_SWEEPS, _MEMORY, _LITTLE = 10, 100, 0.1, 0.05
_MAX_STEPS = 200
_BAR: dict[str, Any] = {"unit": "sweep", "delay": 2, "mininterval": 1, "leave": False}


@torch.no_grad()
def temper(
    posterior: Posterior,
    log_likelihood: LogLikelihood,
    x: Tensor,
    num_samples: int,
    defensive: float,
    prior: VariableKPrior,
    generator: torch.Generator | None,
) -> RefinedPosterior:
    """Run SMC for one observation ``(*event)``; see :func:`refine`."""
    bridge = _Bridge(posterior, log_likelihood, x, defensive, prior, generator)
    size = math.ceil(num_samples / _POPULATIONS)
    with tqdm(desc="Moving particles", **_BAR) as bar:
        runs = []
        for i in range(1, _POPULATIONS + 1):
            text = f"population {i} of {_POPULATIONS}, beta"

            def told(beta: float, text: str = text) -> None:
                bar.set_postfix_str(f"{text} {beta:.2g}", refresh=False)
                bar.update()

            runs.append(bridge.run(size, told))
    log_z = torch.tensor([run.log_evidence for run in runs], dtype=torch.float64)
    log_evidence = _log_mean(log_z)
    relative = (log_z - log_evidence).exp()
    variances = torch.tensor([run.variance for run in runs], dtype=torch.float64)
    stated = float((variances * relative.square()).sum()) / _POPULATIONS**2
    error = max(stated, float(relative.var()) / _POPULATIONS)
    theta = torch.stack([run.population.theta for run in runs])
    log_p = torch.stack([run.population.log_p for run in runs])
    rates = {
        name: sum(sum(run.rates[name]) for run in runs)
        / max(1, sum(len(run.rates[name]) for run in runs))
        for name in runs[0].rates
    }
    return RefinedPosterior(
        prior.layout,
        theta,
        x,
        log_z.unsqueeze(-1).expand(-1, size),
        log_evidence=log_evidence,
        log_evidence_error=math.sqrt(error),
        pareto_k=max(run.pareto_k for run in runs),
        diagnostics={
            "steps": sum(run.steps for run in runs) / _POPULATIONS,
            "sweeps": sum(run.sweeps for run in runs) / _POPULATIONS,
            "least_effective": min(run.least_effective for run in runs),
            "spread_log_evidence": float(log_z.std()),
            "settled": sum(run.settled for run in runs) / _POPULATIONS,
            **rates,
        },
        convergence=convergence_of(prior, theta, log_p, independent=True),
    )


class _Run(NamedTuple):
    """One population at the posterior, and how it got there."""

    population: Population
    log_evidence: float
    variance: float
    pareto_k: float
    least_effective: float
    steps: int
    sweeps: int
    settled: bool
    rates: dict[str, list[float]]


class _Bridge:
    """From a posterior's proposal q'' to the exact posterior of one observation."""

    def __init__(
        self,
        posterior: Posterior,
        log_likelihood: LogLikelihood,
        x: Tensor,
        defensive: float,
        prior: VariableKPrior,
        generator: torch.Generator | None,
    ) -> None:
        self.prior, self.generator = prior, generator
        self.likelihood = likelihood_of(log_likelihood, x)
        self.proposal = WithExtraComponent(
            EvenedSets(posterior.given(x.unsqueeze(0)), defensive),
            self.prior,
            defensive,
            lambda theta: self._log_target(theta[:, 0]).unsqueeze(1),
        )
        self.moves = _moves(posterior, prior)
        self.dtype = torch.get_default_dtype()

    def run(self, num: int, told: Callable[[float], None]) -> _Run:
        """Take one population of ``num`` particles to the posterior.

        ``told`` is called with beta after each sweep.
        """
        population = self._start(num)
        beta, steps, sweeps, done = 0.0, 0, 0, False
        log_evidence, variance, worst = 0.0, 0.0, -math.inf
        least = float(num)
        rates: dict[str, list[float]] = {move.name: [] for move in self.moves}
        while beta < 1:
            step, log_weights = _step(population, beta)
            mean = _log_mean(log_weights)
            if not math.isfinite(mean):
                raise ValueError("no draw has a positive prior density and likelihood.")
            log_evidence += mean
            variance += float((log_weights - mean).exp().var()) / num
            log_weights, pareto_k = pareto_smoothed(log_weights)
            share = _effective_share(log_weights)
            worst, least = max(worst, pareto_k), min(least, share * num)
            beta, steps = beta + step, steps + 1
            if 1 - beta < 1e-9 or steps == _MAX_STEPS:
                beta = 1.0
            index = systematic(log_weights.softmax(-1), num, self.generator)
            population = population.rows(index)
            settled: Callable[[Population], bool] = _Drift(beta)
            if beta == 1.0:
                settled = _Forgetting(self.prior.layout, population)
            most = _MOST_LAST_SWEEPS if beta == 1.0 else _MOST_SWEEPS
            count, last, done = 0, most, False
            while count < last:
                count, sweeps = count + 1, sweeps + 1
                for move in self.moves:
                    evaluate = partial(self._evaluate, beta=beta)
                    population, rate = metropolis(
                        population, move, beta, evaluate, self.generator
                    )
                    rates[move.name].append(rate)
                told(beta)
                if not done and (done := settled(population)):
                    # What few particles seem to have forgotten they may have not.
                    last = 2 * count if beta == 1.0 else count
        return _Run(
            population, log_evidence, variance, worst, least, steps, sweeps, done, rates
        )

    def _start(self, num: int) -> Population:
        """Draws from q''; those that do not count have weight zero."""
        draws = self.proposal.sample(num, self.generator)
        start, counted = (part[:, 0] for part in draws)
        with forked_rng(self.generator):
            chosen = torch.rand(num) < _PRIOR_SHARE
            broad = self.prior.sample(torch.Size((num,))).to(start)
        self.dtype = start.dtype
        theta = torch.where(chosen.unsqueeze(-1), broad, start).double()
        population = self._evaluate(theta)
        log_q = torch.where(counted | chosen, population.log_q, math.inf)
        return population._replace(log_q=log_q)

    def _evaluate(self, theta: Tensor, beta: float = 0.0) -> Population:
        log_p = self._log_target(theta)
        if beta == 1.0:  # q has no part in the last target, and costs most
            return Population(theta, log_p, log_p)
        log_prior = self.prior.log_prob(theta).double()
        log_q = self.proposal.log_prob(theta.to(self.dtype).unsqueeze(1))[:, 0]
        log_q = torch.logaddexp(
            log_q + math.log1p(-_PRIOR_SHARE), log_prior + math.log(_PRIOR_SHARE)
        )
        # Outside the prior's support both vanish.
        inside = torch.isfinite(log_prior)
        return Population(theta, torch.where(inside, log_q, -math.inf), log_p)

    def _log_target(self, theta: Tensor) -> Tensor:
        log_p = self.prior.log_prob(theta).double()
        inside = torch.isfinite(log_p)
        if inside.any():
            log_p[inside] += self.likelihood(theta[inside])
        return log_p


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
    """Whether particles have forgotten where they started.

    What weights said of the start may err, and sweeps that keep a share m of what it
    was leave m of that error.
    """

    def __init__(self, layout: ThetaLayout, population: Population) -> None:
        self.layout, self.sweeps = layout, 0
        # A few particles seem to remember some of it by chance.
        self.memory = max(_MEMORY, 2 / math.sqrt(len(population.theta)))
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


def _moves(posterior: Posterior, prior: VariableKPrior) -> list[Move]:
    chart = posterior.chart
    shared = WhiteningChart(prior.shared_marginals) if prior.shared_marginals else None
    differences = [
        DifferenceMove(prior.layout, chart, shared, moving)
        for moving in get_args(Moving)
        if moving != "shared" or shared is not None
    ]

    def pooled(theta: Tensor) -> ComponentProposal:
        return pooled_components(theta, prior, chart)

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
    enough = max(_ENOUGH_SHARE, _FEWEST / len(gain))
    smoothed = pareto_smoothed(most * gain)
    share = _effective_share(smoothed.log_weights)
    good = smoothed.pareto_k <= LARGEST_K_HAT
    if good and share >= min(enough, _EFFECTIVE_SHARE):
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
