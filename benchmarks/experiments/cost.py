r"""What an inference costs.

Paper: table 3, sec. 5.2.2, sec. 5.2.3.

Question: How long does a posterior of 10,000 draws take, and how much memory, for us,
the paper's network and the samplers?

Protocol: `paper` signals of K components, one thread, each method in a process of its
own. Memory is the process's peak resident size less that after loading, not what
Python's tracemalloc sees of it (the paper's 5 KB). Ours and the paper's network
(untrained: its cost is the same) give p(K | x) and 10,000 draws; `collapsed` 10,000
draws over all K after 40,000 moves of burn-in in each of four chains; SMC and nested
sampling are given K, so an unknown K multiplies them. Numbers scaled from a shorter run
say so.

Losses: The encoder and p(K | x) cost the same at every K; milliseconds differ by what
else the machine does. Samplers hold one point at a time, and need less memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sbi_slotflow.plots.style import CYCLE, FONT, dress

from ..common import TEST, given_k, ready, simulate
from ..experiment import Budget, Claim
from ..isolated import isolated, peak_memory
from ..store import Cache

NUM_DRAWS = 10_000
LABELS = {
    "ours": "ours",
    "network": "paper's network",
    "collapsed": "collapsed RJMCMC",
    "eryn": "Eryn RJMCMC",
    "smc": "SMC",
    "nested": "nested sampling",
}


@dataclass(frozen=True)
class Size:
    """Preset, and the K at which each method is timed."""

    preset: str
    ours: tuple[int, ...]
    network: tuple[int, ...]
    collapsed: tuple[int, ...]
    eryn: tuple[int, ...]
    smc: tuple[int, ...]
    nested: tuple[int, ...]


BUDGETS: dict[Budget, Size] = {
    "smoke": Size("tiny", (1,), (), (), (), (), ()),
    "quick": Size("paper", (1, 2, 5, 10), (1, 5), (1, 5, 10), (3,), (2,), (2,)),
    "full": Size(
        "paper", tuple(range(1, 11)), (1, 5, 10), (1, 2, 5, 10), (3, 5), (1, 2, 3, 5),
        (1, 2, 3),
    ),
}  # fmt: skip
WEIGHTS = ("paper",)


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("cost", budget, seed)
    cells = [(name, k) for name in LABELS for k in getattr(size, name)]
    parts = [
        cache.get(
            f"{name}-{k}",
            lambda n=name, k=k: xr.Dataset(
                isolated(_timed, n, size.preset, k, seed)[0]
            ),
        )
        for name, k in tqdm(cells, desc="methods", leave=False)
    ]
    dataset = xr.concat(parts, "cell")
    return dataset.assign_coords(
        method=("cell", [name for name, _ in cells]), k=("cell", [k for _, k in cells])
    )


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _timed(name: str, preset: str, k: int, seed: int) -> dict[str, float]:
    """Time one method, in a process of its own."""
    problem, posterior = ready(preset)
    theta, x = simulate(given_k(problem, k), 2, TEST + 10 * seed + k)
    if name == "ours":
        return _amortized(posterior, posterior.sample, x, k, NUM_DRAWS)
    if name == "network":
        from sbi_slotflow import SlotPosterior, slot_nn

        network = slot_nn.paper(problem)(theta, x).eval()
        rival = SlotPosterior(network, problem.prior)

        def draw(shape: tuple[int], one: torch.Tensor, k: int) -> torch.Tensor:
            return network.sample(shape, one.unsqueeze(0), torch.tensor(k))

        return _amortized(rival, draw, x, k, NUM_DRAWS // 10)
    work = {"collapsed": _collapsed, "eryn": _eryn, "smc": _smc, "nested": _nested}
    return work[name](problem, theta[0], x[0], k, seed)


def _amortized(posterior, draw, x, k, num) -> dict[str, float]:
    before = peak_memory()
    posterior.cardinality(x[0])
    first = [_seconds(lambda: posterior.cardinality(x[0])) for _ in range(11)]
    draw((min(num, 1_000),), x[0], k=k)
    seconds = min(_seconds(lambda: draw((num,), x[0], k=k)) for _ in range(2))
    return {
        "cardinality_seconds": float(np.median(first)),
        "seconds": float(np.median(first)) + seconds * NUM_DRAWS / num,
        "megabytes": peak_memory() - before,
        "scaled": NUM_DRAWS / num,
    }


def _collapsed(problem, theta, x, k, seed) -> dict[str, float]:
    from sbi_slotflow import rjmcmc

    rjmcmc.collapsed(problem, x, num_chains=1, num_draws=1, burn_in=1)  # compiles
    before = peak_memory()
    seconds = _seconds(
        lambda: rjmcmc.collapsed(problem, x, seed=seed, num_draws=NUM_DRAWS // 4)
    )
    return _sampler(seconds, before)


def _eryn(problem, theta, x, k, seed) -> dict[str, float]:
    from sbi_slotflow import rjmcmc

    before, steps = peak_memory(), 100
    sampler = rjmcmc.eryn_sampler(problem, x, start="prior", seed=seed)
    seconds = _seconds(lambda: sampler.run(steps))
    # The paper's protocol: 10,000 steps after 10,000 of burn-in.
    return _sampler(seconds * 20_000 / steps, before, 20_000 / steps)


def _smc(problem, theta, x, k, seed) -> dict[str, float]:
    from ..samplers_by_k import tempered

    before = peak_memory()
    seconds = _seconds(lambda: tempered(problem, x, k, 1_000, seed))
    return _sampler(seconds, before)


def _nested(problem, theta, x, k, seed) -> dict[str, float]:
    from ..samplers_by_k import nested

    before = peak_memory()
    seconds = _seconds(lambda: nested(problem, x, k, 250, seed, maxcall=150_000))
    return _sampler(seconds, before)


def _sampler(seconds: float, before: float, scaled: float = 1.0) -> dict[str, float]:
    return {
        "cardinality_seconds": np.nan,
        "seconds": seconds,
        "megabytes": peak_memory() - before,
        "scaled": scaled,
    }


def _of(dataset: xr.Dataset, name: str) -> xr.Dataset:
    return dataset.isel(cell=dataset.method.values == name)


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, label), colour in zip(LABELS.items(), CYCLE, strict=True):
        part = _of(dataset, name)
        if not part.sizes["cell"]:
            continue
        scaled = " (scaled)" if (part.scaled > 1).any() else ""
        left.plot(part.k, part.seconds, "o-", color=colour, label=label + scaled)
        right.plot(part.k, part.megabytes.clip(min=0.1), "o-", color=colour)
        if name in ("ours", "network"):
            left.plot(part.k, part.cardinality_seconds, "o:", color=colour, mfc="none")
    for axes in (left, right):
        axes.set_yscale("log")
    left.axhline(0.0135, color="black", linewidth=0.7)
    left.text(6.5, 0.0145, "paper, 13.5 ms", fontsize=FONT - 2)
    left.legend(fontsize=FONT - 2, frameon=False)
    title = "10,000 draws (dotted: p(K | x) alone)"
    dress(left, "K", "seconds", title)
    dress(right, "K", "MB above the loaded process", "peak memory")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    ours = _of(dataset, "ours")
    mine = {int(k): ours.isel(cell=i) for i, k in enumerate(ours.k.values)}
    found = []
    for k, part in mine.items():
        rivals, memory = {}, {}
        for name, label in LABELS.items():
            other = _of(dataset, name)
            here = other.isel(cell=other.k.values == k)
            if name != "ours" and here.sizes["cell"]:
                rivals[label] = float(here.seconds[0])
                memory[label] = float(here.megabytes[0])
        found += [
            Claim(
                f"10,000 draws and p(K | x), K = {k}, s",
                float(part.seconds),
                better="lower",
                rivals=rivals,
                paper="3-6 h RJMCMC, 0.5-2 h SMC" if k == 5 else None,
                source="table 3" if k == 5 else "",
            ),
            Claim(
                f"peak memory above the loaded process, K = {k}, MB",
                float(part.megabytes),
                paper="0.005 by tracemalloc" if k == 5 else None,
                source="table 3" if k == 5 else "",
                better="lower",
                rivals=memory,
                note="What allocates outside Python's own heap, as torch does, is not "
                "seen by tracemalloc.",
            ),
        ]
        network = _of(dataset, "network")
        network = network.isel(cell=network.k.values == k)
        theirs = None
        if network.sizes["cell"]:
            theirs = 1e3 * float(network.cardinality_seconds[0])
        found.append(
            Claim(
                f"p(K | x), K = {k}, ms",
                1e3 * float(part.cardinality_seconds),
                paper=13.5,
                source="sec. 5.2.2, another machine",
                rivals={} if theirs is None else {LABELS["network"]: theirs},
                better="lower",
            )
        )
    for name in ("eryn", "smc", "nested"):
        for i, k in enumerate(_of(dataset, name).k.values):
            part = _of(dataset, name).isel(cell=i)
            found.append(
                Claim(
                    f"{LABELS[name]}, K = {int(k)}, over ours (seconds)",
                    float(part.seconds) / _nearest(mine, int(k)),
                    note={
                        "eryn": "20,000 steps, scaled from 100; the paper's protocol.",
                        "smc": "1,000 particles, K given.",
                        "nested": "250 live points, at most 150,000 evaluations, K "
                        "given.",
                    }[name],
                )
            )
    return found


def _nearest(mine: dict[int, xr.Dataset], k: int) -> float:
    """Our seconds at the nearest K that was timed."""
    return float(mine[min(mine, key=lambda other: abs(other - k))].seconds)
