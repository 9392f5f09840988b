r"""Mixtures: how many normal laws are 82 points drawn from?

Paper: none.

Question: Where x is a set of points and components have no place in it, how much does
a network know after CPU-minutes of training, does `refine` make it exact by SMC with
splits and merges of moments, and is what it calls reliable right?

Protocol: `gaussian_mixture`, 82 points, K uniform on 1..6, shares Dirichlet(1). Trained
by `train_online` in batches of 20, with an average over the last 200 steps. Fresh
signals from the prior, and the velocities of 82 galaxies (Roeder 1990) as the last.
Refined by SMC with 2,000 particles. "Reliable" is what `is_reliable` says. Exact: Gibbs
sampling of partitions (`benchmarks.mixture_gibbs`), which shares neither network nor
moves with it; total variation of p(K | x) from it. Calibration: `calibration.report`
of 300 pairs, which an exact posterior fails with a probability of at most 5 %.

Losses: The network alone is far from p(K | x): each simulation is seen once, and there
are 41,000; the report's check of coverage sees it. SMC takes a minute a signal, where
the likelihood costs microseconds.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import SlotPosterior, problems
from sbi_slotflow.plots.style import POSTERIOR, SMALL, dress
from sbi_slotflow.problems import Points
from sbi_slotflow.seeding import generator_for

from ..common import (
    TEST,
    quietly_refined,
    report_claims,
    reported,
    trained,
    unseen,
)
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..mixture_gibbs import gibbs_cardinality
from ..store import Cache

# fmt: off
GALAXIES = (
    9172, 9350, 9483, 9558, 9775, 10227, 10406, 16084, 16170, 18419, 18552, 18600,
    18927, 19052, 19070, 19330, 19343, 19349, 19440, 19473, 19529, 19541, 19547, 19663,
    19846, 19856, 19863, 19914, 19918, 19973, 19989, 20166, 20175, 20179, 20196, 20215,
    20221, 20415, 20629, 20795, 20821, 20846, 20875, 20986, 21137, 21492, 21701, 21814,
    21921, 21960, 22185, 22209, 22242, 22249, 22314, 22374, 22495, 22746, 22747, 22888,
    22914, 23206, 23241, 23263, 23484, 23538, 23542, 23666, 23706, 23711, 24129, 24285,
    24289, 24366, 24717, 24990, 25633, 26960, 26995, 32065, 32789, 34279,
)
# fmt: on


@dataclass(frozen=True)
class Size:
    """Simulations; signals of p(K), refined; particles; Gibbs sweeps.

    And pairs of the report.
    """

    num_simulations: int
    num_signals: int
    num_refined: int
    num_draws: int
    num_sweeps: int
    num_report: int
    method: Literal["importance", "smc"] = "smc"  # a network of no use takes SMC long


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 8, 1, 60, 200, 0, "importance"),
    "quick": Size(41_000, 1_000, 9, 2_000, 15_000, 300),
    "full": Size(41_000, 10_000, 60, 4_000, 60_000, 1_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("mixtures", budget, seed)
    problem = problems.gaussian_mixture()
    posterior, seconds = trained(
        problem,
        cache,
        "mixture",
        size.num_simulations,
        seed,
        num_validation=1_000,
        batch_size=20,
        learning_rate=1.5e-3,
        ema_decay=0.995,
    )
    spent = cache.get("seconds", lambda: xr.Dataset({"seconds": seconds}))
    theta, x = unseen(problem, size.num_signals, seed)
    found = cache.get("network", lambda: _network(problem, posterior, theta, x))
    galaxies = problem.pack(np.array(GALAXIES) / 1_000).to(x)
    data = torch.cat([x[: size.num_refined], galaxies])
    rows = [
        cache.get(
            f"refined-{i}",
            lambda i=i: _refined(problem, posterior, data[i], size, seed, i),
        )
        for i in range(len(data))
    ]
    report = cache.get(
        "report", lambda: reported(posterior, problem, size.num_report, seed)
    )
    return xr.merge([found, spent, xr.concat(rows, "refined"), report])


@torch.no_grad()
def _network(
    problem: Points, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> xr.Dataset:
    k = problem.layout.cardinality(theta)
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    gain = posterior.log_prob_batched(theta, x)[0] - problem.prior.log_prob(theta)
    return xr.Dataset(
        {
            "loss": ("signal", -logs.gather(-1, k[:, None])[:, 0].numpy()),
            "gain": ("signal", gain.double().numpy()),
        }
    )


def _refined(
    problem: Points, posterior: SlotPosterior, x: Tensor, size: Size, seed: int, i: int
) -> xr.Dataset:
    generator, begun = generator_for(seed, TEST, 2, i), time.process_time()
    refined = quietly_refined(
        posterior, problem, x, size.num_draws, generator, method=size.method
    )
    seconds = time.process_time() - begun
    exact = gibbs_cardinality(problem, x, num_sweeps=size.num_sweeps, seed=seed)
    probs = {
        "network": posterior.cardinality(x).probs,
        "refined": refined.cardinality().probs,
        "exact": exact.probs,
    }
    return xr.Dataset(
        {
            "reliable": refined.is_reliable,
            "khat": refined.pareto_k,
            "smc_seconds": seconds,
            "floor": exact.spread,
            "rhat": exact.rhat,
            **{f"p_{name}": ("k", p.flatten().numpy()) for name, p in probs.items()},
        }
    )


def _variations(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Total variation of p(K | x) from the exact one, a number a signal."""
    exact = dataset["p_exact"].transpose("refined", ..., "k")
    here = dataset[f"p_{name}"].transpose("refined", ..., "k")
    return 0.5 * np.abs(here.values - exact.values).sum(-1).ravel()


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 2)
    panels[0].hist(dataset["gain"].values.ravel(), 30, color=POSTERIOR)
    dress(panels[0], "log q(truth) - log p(truth), nats", "signals", "gain")
    reliable = dataset["reliable"].values.ravel().astype(bool)
    for name, marker in (("network", "."), ("refined", "x")):
        panels[1].plot(_variations(dataset, name), marker, label=name)
    refined = np.where(reliable, _variations(dataset, "refined"), np.nan)
    panels[1].plot(refined, "o", mfc="none", label="called reliable")
    panels[1].axhline(0.05, lw=0.7)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    panels[1].legend(fontsize=SMALL, frameon=False, ncols=3, **above)
    dress(panels[1], "signal", "TV of p(K | x) from exact", "")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return dataset[name].values.ravel()

    reliable = values("reliable").astype(bool)
    network, refined = (_variations(dataset, n) for n in ("network", "refined"))
    galaxies = (
        f"Of {len(refined)} signals, the last of which are galaxies: "
        f"{refined[-1]:.3f}, {'reliable' if reliable[-1] else 'flagged'}. Median "
        f"{np.median(values('smc_seconds')):.0f} CPU s."
    )
    found = [
        Claim("CPU seconds of training", round(float(np.mean(values("seconds"))))),
        Claim(
            "-log q(true K)",
            float(values("loss").mean()),
            mean_interval(values("loss")),
        ),
        Claim(
            "gain over the prior, nats",
            float(values("gain").mean()),
            mean_interval(values("gain")),
        ),
        Claim(
            "reliable after SMC",
            float(reliable.mean()),
            share_interval(int(reliable.sum()), len(reliable)),
            note=galaxies,
        ),
        Claim(
            "TV of p(K | x) from exact, network",
            float(network.mean()),
            mean_interval(network),
        ),
        Claim(
            "TV of p(K | x) from exact, refined, all",
            float(refined.mean()),
            mean_interval(refined),
            note=f"The exact one is known to {values('floor').mean():.3f}.",
        ),
    ]
    if reliable.any():
        good = refined[reliable]
        found.append(
            Claim(
                "TV of p(K | x) from exact, those called reliable, largest",
                float(good.max()),
                target="<= 0.05",
                note=f"Mean {good.mean():.3f}, of {len(good)} signals.",
            )
        )
    return found + report_claims(dataset)
