r"""Tries: random observations, and samplers that may be wrong without a word.

Paper: none.

Question: Over observations of many kinds (from the prior, pairs that hide one another,
loud, faint, and of no set that the prior knows), does a sampler or `refine` ever give a
wrong p(K | x) without a warning?

Protocol: Each try draws a kind of observation and of noise at random. (1) `bumps`:
pulses of known width and normal height in 64 samples, K = 0..2, sigma log-uniform in
0.1..1; from the prior, two that are closer than they are wide, with an offset of up to
5 sigma, with one sample that is off by 20 sigma. p(K | x) is summed over a grid of
1,600 places, and of all their pairs. By `rjmcmc.collapsed`, and by `refine` with 1,000
draws of a network that has seen 2,000 simulations, by weights and by SMC. (2) `pairs`
of sinusoids (`tiny`), 0.01 to 0.3 Hz apart, A/sigma log-uniform in 2 to 1e4: the
collapsed sampler against importance sampling at each K, where that is reliable for all
K that either finds. (3) `shifted`: SMC and weights on the linear-Gaussian problem from
the posterior of an x that is off by up to 3 sigma in each entry, under 0.5 to 3 times
the noise, against the closed form. "Silent" is an error of more than 0.1 in total
variation where `converged`, or `is_reliable`, is true.

Losses: a chain that has a hundred effective draws knows a probability to 0.05: in about
one of a thousand such tries it is off by more than 0.1 by chance.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Normal

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    VariableKPrior,
    WhiteNoise,
    metrics,
    problems,
    refine,
    rjmcmc,
)
from sbi_slotflow.plots.style import POSTERIOR, SMALL, dress
from sbi_slotflow.posterior.base import Posterior
from sbi_slotflow.problems import Trace
from sbi_slotflow.problems.base import uniform
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.distribution import SetDistribution

from ..common import TEST, evidences_by_importance, one, trained
from ..experiment import Budget, Claim
from ..intervals import share_interval
from ..store import Cache

_TIMES = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
_WRONG = 0.1
# Of the normal heights of bumps.
_MEAN = 0.5


@dataclass(frozen=True)
class Size:
    """Tries of each kind; simulations of the network of bumps; places, draws."""

    num_bumps: int
    num_refined: int
    num_pairs: int
    num_shifted: int
    num_simulations: int
    num_places: int
    num_draws: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(1, 1, 1, 1, 128, 50, 60),
    "quick": Size(60, 20, 60, 20, 2_000, 1_600, 1_000),
    "full": Size(300, 200, 300, 200, 2_000, 1_600, 2_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("tries", budget, seed)
    network, _ = trained(bumps(0.3), cache, "bumps", size.num_simulations, seed)
    tries: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
        "bumps": (size.num_bumps, lambda i: _bumps(i, size, seed)),
        "refined": (size.num_refined, lambda i: _refined(i, size, seed, network)),
        "pairs": (size.num_pairs, lambda i: _pair(i, size, seed)),
        "shifted": (size.num_shifted, lambda i: _shifted(i, size, seed)),
    }
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether one was given is recorded
        for name, (num, measure) in tries.items():
            rows = [
                cache.get(f"{name}-{i}", lambda i=i, m=measure: xr.Dataset(m(i)))
                for i in range(num)
            ]
            joined = xr.concat(rows, name)
            found.append(joined.rename({n: f"{name}_{n}" for n in joined}))
    merged = xr.merge(found)
    assert isinstance(merged, xr.Dataset)
    return merged


def bumps(sigma: float) -> Trace:
    """Pulses of known width and normal height."""

    def bump(components: Tensor) -> Tensor:
        time, height = components.unsqueeze(-1).unbind(-2)
        return height * torch.exp(-0.5 * ((_TIMES.to(time) - time) / 0.03) ** 2)

    height = Normal(torch.tensor([_MEAN]), torch.tensor([1.0]))
    prior = VariableKPrior(
        MultipleIndependent([uniform(0.0, 1.0), height], validate_args=False),
        [1.0, 1.0, 1.0],
        component_names=("time", "height"),
    )
    simulator = AdditiveSimulator(bump, WhiteNoise(sigma), prior.layout)
    return Trace("bumps", prior, simulator, 32, linear=("height",))


def quadrature(x: Tensor, sigma: float, num: int) -> Tensor:
    """p(K | x) of :func:`bumps`, K = 0..2, heights integrated out in closed form."""
    places = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    columns = torch.stack([places, torch.ones_like(places)], -1)
    basis = bumps(sigma).simulator.component_signal(columns)
    gram, inner = basis @ basis.T / sigma**2, basis @ x.double() / sigma**2
    own = gram.diagonal()
    # Heights less their mean, of prior N(0, 1): residuals are x less mean signals.
    shift = inner - _MEAN * own
    misfit = _MEAN * inner - 0.5 * _MEAN**2 * own
    alone = misfit + 0.5 * shift.square() / (1 + own) - 0.5 * (1 + own).log()
    first = inner[:, None] - _MEAN * (own[:, None] + gram)
    second = first.T
    a, b = 1 + own[:, None], 1 + own[None, :]
    det = a * b - gram.square()
    solved = (
        b * first.square() + a * second.square() - 2 * gram * first * second
    ) / det
    both = misfit[:, None] + misfit[None, :] - _MEAN**2 * gram
    both = both + 0.5 * solved - 0.5 * det.log()
    means = [torch.zeros(()).double(), alone.logsumexp(0) - math.log(num)]
    means.append(both.flatten().logsumexp(0) - 2 * math.log(num))
    return torch.stack(means).softmax(0)


def _observed(i: int, seed: int) -> tuple[Tensor, float]:
    """An observation of bumps of one of four kinds, and its noise level."""
    generator = generator_for(seed, TEST, 1, i)
    u = torch.rand(4, generator=generator, dtype=torch.float64)
    sigma = float(0.1 * 10 ** u[0])
    problem = bumps(sigma)
    theta = problem.prior.sample((1,), generator)
    if i % 4 == 1:  # closer than they are wide
        heights = 1 + torch.randn(2, generator=generator).abs()
        place = 0.1 + 0.7 * float(u[1])
        gap = 0.06 * float(u[2])
        theta = torch.tensor([[2.0, place, heights[0], place + gap, heights[1]]])
    x = problem.simulator(theta, generator)[0]
    if i % 4 == 2:
        x = x + 10 * (u[1] - 0.5) * sigma
    if i % 4 == 3:
        x[int(64 * u[1])] += 20 * sigma
    return x.float(), sigma


def _bumps(i: int, size: Size, seed: int) -> dict[str, Any]:
    x, sigma = _observed(i, seed)
    draws = rjmcmc.collapsed(
        bumps(sigma), x, seed=i, num_draws=size.num_draws // 2, thin=5, burn_in=500
    )
    far = metrics.total_variation(
        draws.cardinality().probs, quadrature(x, sigma, size.num_places)
    )
    return {"variation": float(far), "told": not draws.converged}


def _refined(i: int, size: Size, seed: int, network: SlotPosterior) -> dict[str, Any]:
    x, sigma = _observed(10_000 + i, seed)
    exact = quadrature(x, sigma, size.num_places)
    likelihood = bumps(sigma).log_likelihood
    return _both_ways(network, likelihood, x, exact, size, generator_for(seed, 2, i))


def _both_ways(
    posterior: Posterior,
    likelihood: Any,
    x: Tensor,
    exact: Tensor,
    size: Size,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Errors of weights and of particles, and whether they were told."""
    found: dict[str, Any] = {}
    methods: dict[str, Any] = {"weights": "importance", "smc": "smc"}
    if size.num_draws < 1_000:  # an untrained network's particles take minutes
        methods["smc"] = "importance"
    for name, method in methods.items():
        try:
            answer = refine(
                posterior,
                likelihood,
                x,
                size.num_draws,
                method=method,
                generator=generator,
            )
        except ValueError:  # no draw has a positive weight: it was told
            found |= {f"variation_{name}": math.nan, f"told_{name}": True}
            continue
        result = one(answer)
        far = metrics.total_variation(result.cardinality().probs, exact)
        found |= {f"variation_{name}": float(far)}
        found |= {f"told_{name}": not result.is_reliable}
    return found


def _pair(i: int, size: Size, seed: int) -> dict[str, Any]:
    problem = problems.sinusoids("tiny", sigma=(1e-5, 1.0))
    generator = generator_for(seed, TEST, 3, i)
    u = torch.rand(6, generator=generator).double()
    place, gap = 0.6 + 1.0 * u[0], 0.01 * 30 ** u[1]
    ratio = 2 * 5_000 ** u[4]
    amplitude = torch.tensor([1.0, 0.3 + 0.7 * float(u[5])]).double()
    phase, frequency = 2 * math.pi * u[2:4], torch.stack([place, place + gap])
    lines = torch.stack([amplitude, phase, frequency], -1)
    x = problem.simulator.component_signal(lines).sum(0)
    x = x + torch.randn(len(x), generator=generator).double() / ratio
    draws = rjmcmc.collapsed(problem, x, seed=i, num_draws=2 * size.num_draws)
    log_p, reliable = evidences_by_importance(problem, x)
    exact = log_p.softmax(0)
    found = draws.cardinality().probs.double()
    needed = (exact > 1e-3) | (found > 1e-3)  # what is not reliable is too small
    known = bool(reliable[needed].all())
    far = metrics.total_variation(found, exact)
    return {
        "variation": float(far) if known else math.nan,
        "told": not draws.converged,
    }


class _OfAnotherX(Posterior):
    """A posterior that answers for x + shift, whatever the x."""

    def __init__(self, posterior: Posterior, shift: Tensor) -> None:
        self.posterior, self.shift = posterior, shift
        self.prior = posterior.prior

    @property
    def event_shape(self) -> torch.Size:
        return self.posterior.event_shape

    def given(self, x: Tensor) -> SetDistribution:
        return self.posterior.given(x + self.shift)


def _shifted(i: int, size: Size, seed: int) -> dict[str, Any]:
    problem = problems.linear_gaussian()
    generator = generator_for(seed, TEST, 4, i)
    theta = problem.prior.sample((1,), generator)
    x = problem.simulator(theta, generator)[0]
    factor = 0.5 * 6 ** float(torch.rand((), generator=generator))
    reach = 3 * problem.sigma * float(torch.rand((), generator=generator))
    shift = reach * (2 * torch.rand(x.shape, generator=generator) - 1)
    posterior = replace(problem, sigma=factor * problem.sigma).exact_posterior()
    exact = problem.exact_posterior().cardinality(x).probs.double()
    return _both_ways(
        _OfAnotherX(posterior, shift),
        problem.log_likelihood,
        x,
        exact.flatten(),
        size,
        generator,
    )


# Each kind of try with the columns of its answers.
_KINDS = {
    "bumps, collapsed": ("bumps_variation", "bumps_told"),
    "bumps, weights": ("refined_variation_weights", "refined_told_weights"),
    "bumps, SMC": ("refined_variation_smc", "refined_told_smc"),
    "pairs, collapsed": ("pairs_variation", "pairs_told"),
    "shifted, weights": ("shifted_variation_weights", "shifted_told_weights"),
    "shifted, SMC": ("shifted_variation_smc", "shifted_told_smc"),
}


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (far, told) in enumerate(_KINDS.values()):
        values, flagged = dataset[far].values, dataset[told].values.astype(bool)
        place = i + np.linspace(-0.3, 0.3, len(values))
        axes.plot(place[flagged], values[flagged], "x", color="0.6")
        axes.plot(place[~flagged], values[~flagged], ".", color=POSTERIOR)
    axes.axhline(_WRONG, lw=0.7, color="0.3")
    axes.set_xticks(range(len(_KINDS)), list(_KINDS), rotation=15, fontsize=SMALL)
    dress(axes, "", "TV of p(K | x) from exact", "crosses: with a warning")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found, tries, silent = [], 0, 0
    for name, (far, told) in _KINDS.items():
        values, flagged = dataset[far].values, dataset[told].values.astype(bool)
        known = np.isfinite(values) | flagged
        wrong = int(((values > _WRONG) & ~flagged).sum())
        good = values[~flagged & np.isfinite(values)]
        tries, silent = tries + int(known.sum()), silent + wrong
        found.append(
            Claim(
                f"{name}: wrong by more than {_WRONG} without a warning",
                wrong / max(1, int(known.sum())),
                share_interval(wrong, int(known.sum())) if known.any() else None,
                target="<= 0",
                note=f"{wrong} of {int(known.sum())}; {int(flagged.sum())} with a "
                "warning."
                + (
                    f" Of the others, off by {good.mean():.3f} in the mean, "
                    f"{good.max():.3f} at most."
                    if len(good)
                    else ""
                ),
            )
        )
    found.append(
        Claim(
            "silent wrong answers, all kinds",
            silent,
            target="<= 0",
            note=f"Of {tries}.",
        )
    )
    return found
