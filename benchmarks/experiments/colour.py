r"""Colour: lines and pulses in noise whose spectrum is not known.

Paper: none; its noise is white.

Question: Where level and slope of the noise's spectrum are unknown, are the components
found as precisely as the noise allows, is no truth excluded, are level and shape right,
and does `refine` make it exact?

Protocol: Problems as a user writes them, with `GaussianNoise(spectrum=function)`:
sinusoids, K = 0..3, in power-law noise of slope 0..2; `faint` ones in the same noise,
K = 0..5, of amplitudes that are log-uniform over a factor of 30; and pulses, K = 0..4,
in noise of correlation 0..0.95 from sample to sample.
Trained by `train_online` with all defaults. Fresh signals from the prior.
Gain: log q(truth) less log p(truth), nats. Coverage: in how many of the signals the
central 90 % of draws hold level and shape. Refined by importance weights of 2,000
draws; "reliable" is a k-hat below 0.7 and 100 effective draws. Exact:
`rjmcmc.collapsed` from draws of the network, where its chains have converged; total
variation of p(K | x) from it. Calibration: `calibration.report` of 300 pairs, which
an exact posterior fails with a probability of at most 5 %.

Losses: Of faint lines, whose number is uncertain, weights are as seldom reliable as in
white noise (`crowded`): a K that few draws have outweighs them. Pulses are as broad in
frequency as the noise's own slope: what whitens a record is estimated beside them, by
up to a few deviations wrong.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sbi.utils import BoxUniform
from torch import Tensor

import sbi_slotflow as sf
from sbi_slotflow import SlotPosterior
from sbi_slotflow.plots.style import POSTERIOR, TRUTH, dress
from sbi_slotflow.problems import Problem
from sbi_slotflow.seeding import generator_for

from ..common import (
    TEST,
    quietly_refined,
    report_claims,
    reported,
    sampled_exactly,
    trained,
    unseen,
)
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache


@dataclass(frozen=True)
class Size:
    """Simulations; signals, those refined, those sampled exactly; draws.

    And pairs of the report.
    """

    num_simulations: int
    num_signals: int
    num_refined: int
    num_exact: int
    num_draws: int
    num_report: int


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 2, 1, 0, 40, 0),
    "quick": Size(16_000, 60, 10, 4, 2_000, 300),
    "full": Size(64_000, 300, 40, 16, 2_000, 1_000),
}


def lines(preset: Any = "tiny", **options: Any) -> Problem:
    """Sinusoids in noise whose spectrum is a power law."""
    frequency = torch.fft.rfftfreq(500, 1 / 25.0).clamp(min=1 / 20)
    noise = sf.GaussianNoise(
        spectrum=lambda shared: frequency ** -shared[..., 1:2], level=0, depends_on=1
    )
    return sf.problems.sinusoids(
        preset,
        grids=sf.problems.Grid(duration=20.0, rate=25.0),
        noise=noise,
        shared=BoxUniform(torch.tensor([0.1, 0.0]), torch.tensor([1.0, 2.0])),
        shared_names=("sigma", "slope"),
        **options,
    )


def faint() -> Problem:
    """The same, and most of them hidden in the noise."""
    return lines("crowded", frequency=(0.5, 2.5), cardinality=[1, 1, 1, 1, 1, 1])


def pulses() -> Problem:
    """Pulses in noise that is correlated from sample to sample."""
    omega = math.tau * torch.fft.rfftfreq(512)
    times = torch.arange(512) / 512

    def pulse(theta: Tensor) -> Tensor:
        time, width, height = theta[..., None].unbind(-2)
        return height * torch.exp(-0.5 * ((times - time) / width) ** 2)

    def correlated(shared: Tensor) -> Tensor:
        rho = shared[..., 1:2]
        return (1 - rho**2) / (1 + rho**2 - 2 * rho * omega.cos())

    low, high = torch.tensor([0.0, 0.006, 0.5]), torch.tensor([1.0, 0.03, 2.0])
    prior = sf.VariableKPrior(
        BoxUniform(low, high),
        cardinality=[1, 1, 1, 1, 1],
        shared=BoxUniform(torch.tensor([0.1, 0.0]), torch.tensor([0.5, 0.95])),
        component_names=("time", "width", "height"),
        shared_names=("sigma", "rho"),
    )
    noise = sf.GaussianNoise(spectrum=correlated, level=0, depends_on=1)
    simulator = sf.AdditiveSimulator(pulse, noise, prior.layout)
    return sf.problems.Trace("pulses", prior, simulator, cells=64)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "lines": lines,
    "faint": faint,
    "pulses": pulses,
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("colour", budget, seed)
    parts, reports = [], []
    for name, make in PROBLEMS.items():
        problem = make()
        posterior, seconds = trained(problem, cache, name, size.num_simulations, seed)
        spent = cache.get(
            f"{name}-seconds", lambda s=seconds: xr.Dataset({"seconds": s})
        )
        theta, x = unseen(problem, size.num_signals, seed)
        found = cache.get(
            f"{name}-network",
            lambda p=problem, q=posterior, t=theta, x=x: _network(p, q, t, x),
        )
        refined = [
            cache.get(
                f"{name}-refined-{i}",
                lambda i=i, p=problem, q=posterior, x=x: _refined(
                    p, q, x[i], size, seed, i
                ),
            )
            for i in range(size.num_refined)
        ]
        parts.append(xr.merge([spent, found, xr.concat(refined, "refined")]))
        report = cache.get(
            f"{name}-report",
            lambda p=problem, q=posterior: reported(q, p, size.num_report, seed),
        )
        reports.append(report)
    # Where a problem has fewer K, the others have no probability; reports have gaps.
    joined = xr.concat(parts, "problem", join="outer", fill_value=0.0)
    assert isinstance(joined, xr.Dataset)
    joined = xr.merge([joined, xr.concat(reports, "problem", join="outer")])
    return joined.assign_coords(problem=list(PROBLEMS))


@torch.no_grad()
def _network(
    problem: Problem, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> xr.Dataset:
    layout = problem.layout
    k, shared = layout.cardinality(theta), layout.unpack(theta).shared
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    log_q = torch.cat(
        [
            posterior.log_prob_batched(t, one)[0]
            for t, one in zip(theta.split(20), x.split(20), strict=True)
        ]
    ).double()
    ranks = []
    for row, single in zip(shared, x, strict=True):
        draws = posterior.sample((200,), x=single, show_progress_bars=False)
        ranks.append((layout.unpack(draws).shared < row).double().mean(0))
    return xr.Dataset(
        {
            "loss": ("signal", -logs.gather(-1, k[:, None])[:, 0].numpy()),
            "gain": ("signal", (log_q - problem.prior.log_prob(theta)).numpy()),
            "rank": (("signal", "parameter"), torch.stack(ranks).numpy()),
        }
    ).assign_coords(parameter=["level", "shape"])


def _refined(
    problem: Problem, posterior: SlotPosterior, x: Tensor, size: Size, seed: int, i: int
) -> xr.Dataset:
    num_k = problem.layout.max_cardinality + 1
    generator = generator_for(seed, TEST, 2, i)
    refined = quietly_refined(posterior, problem, x, size.num_draws, generator)
    probs = {
        "network": posterior.cardinality(x).probs,
        "weighed": refined.cardinality().probs,
        "exact": torch.full((num_k,), torch.nan),
    }
    seconds = math.nan
    if i < size.num_exact:
        exact, seconds = sampled_exactly(posterior, problem, x, seed)
        if exact.converged:
            probs["exact"] = exact.cardinality().probs
    return xr.Dataset(
        {
            "reliable": refined.is_reliable,
            "khat": refined.pareto_k,
            "ess": refined.ess / size.num_draws,
            "exact_seconds": seconds,
            **{f"p_{name}": ("k", p.flatten().numpy()) for name, p in probs.items()},
        },
        {"k": range(num_k)},
    )


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.0, 7.0), layout="constrained")
    panels = figure.subplots(len(PROBLEMS), 3, squeeze=False)
    for row, name in zip(panels, PROBLEMS, strict=True):
        here = dataset.sel(problem=name)
        row[0].hist(here["gain"].values.ravel(), 30, color=POSTERIOR)
        dress(row[0], "log q(truth) - log p(truth), nats", "signals", name)
        for axes, parameter in zip(row[1:], ("level", "shape"), strict=True):
            ranks = here["rank"].sel(parameter=parameter).values.ravel()
            axes.hist(ranks, np.linspace(0, 1, 11), color=POSTERIOR)
            axes.axhline(len(ranks) / 10, color=TRUTH)
            dress(axes, "share of draws below the truth", "signals", parameter)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for name, make in PROBLEMS.items():
        here = dataset.sel(problem=name)
        if make is not faint:  # which is `lines` with other numbers
            text = [
                line for line in inspect.getsource(make).splitlines() if line.strip()
            ]
            found.append(
                Claim(f"{name}: lines of a user's code", len(text), target="<= 30")
            )
        found += [Claim(f"{name}: {c.quantity}", **_rest(c)) for c in _claims(here)]
    return found


def _rest(claim: Claim) -> dict[str, Any]:
    kept = claim.to_json()
    return {key: kept[key] for key in ("ours", "interval", "target", "met", "note")}


def _claims(here: xr.Dataset) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return here[name].values.ravel()

    reliable, gain = values("reliable").astype(bool), values("gain")
    excluded = ~np.isfinite(gain)
    by_seed = here["reliable"].mean("refined").values.ravel()
    found = [
        Claim("CPU seconds of training", round(float(np.mean(values("seconds"))))),
        Claim("-log q(true K)", _mean(values("loss")), mean_interval(values("loss"))),
        Claim(
            "gain over the prior, nats",
            _mean(gain[~excluded]),
            mean_interval(gain[~excluded]),
        ),
        Claim(
            "truths of density zero",
            int(excluded.sum()),
            target="<= 0",
            note=f"Of {len(gain)}.",
        ),
        Claim(
            "refined reliably",
            _mean(reliable),
            share_interval(int(reliable.sum()), len(reliable)),
            target=">= 0.9",
            note=f"By seed: {', '.join(f'{share:.2f}' for share in by_seed)}. Median "
            f"share of effective draws {np.median(values('ess')):.2f}.",
        ),
    ]
    for parameter in ("level", "shape"):
        ranks = here["rank"].sel(parameter=parameter).values.ravel()
        inside = (ranks > 0.05) & (ranks < 0.95)
        found.append(
            Claim(
                f"central 90 % of draws hold the {parameter}",
                _mean(inside),
                share_interval(int(inside.sum()), len(inside)),
            )
        )
    exact = here["p_exact"].transpose(..., "k").values
    for name, label in (("network", "network"), ("weighed", "refined")):
        probs = here[f"p_{name}"].transpose(..., "k").values
        apart = 0.5 * np.abs(probs - exact).sum(-1).ravel()
        converged = np.isfinite(apart)
        tried = int(np.isfinite(values("exact_seconds")).sum())
        if converged.any():
            seconds = np.nanmedian(values("exact_seconds"))
            found.append(
                Claim(
                    f"TV of p(K | x) from exact, {label}",
                    float(apart[converged].mean()),
                    note=f"Of {int(converged.sum())} signals whose exact chains have "
                    f"converged, of {tried}, at most {apart[converged].max():.3f}; "
                    f"{seconds:.0f} CPU s each.",
                )
            )
    return found + report_claims(here)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
