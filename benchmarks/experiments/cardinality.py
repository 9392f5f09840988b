r"""How often K is right.

Paper: fig. 5, sec. 5.1.3 (fig. 12, the encoder's domains, is in `ablations`).

Question: How often is the most probable K the true one, and does p(K | x) say how sure
it may be?

Protocol: Fresh signals from the priors of `paper` and `crowded`, the shipped weights,
the most probable K against the true one. A calibrated p(K | x) is right as often as the
probability of its most probable K says. On `crowded` K cannot always be known: `rjmcmc`
has the exact posterior's score beside ours.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sbi_slotflow.plots.style import SMALL, dress

from ..common import TEST, ready, simulate
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache, concatenated

PAPER_ACCURACY = 99.85
# What p(K | x) may be off by: weights that are never wrong are still not certain.
_TOLERANCE = 1e-3
_CHUNK = 250


@dataclass(frozen=True)
class Size:
    """Number of signals of each preset."""

    paper: int
    crowded: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(40, 20),
    "quick": Size(10_000, 1_500),
    "full": Size(100_000, 100_000),
}
WEIGHTS = ("paper", "crowded")


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("cardinality", budget, seed)
    parts = []
    for preset in ("paper", "crowded"):
        num = getattr(size, preset)
        parts += [
            cache.get(
                f"{preset}-{start}",
                lambda p=preset, s=start, n=num: _part(p, min(_CHUNK, n - s), seed, s),
            )
            for start in tqdm(range(0, num, _CHUNK), desc=preset, leave=False)
        ]
    return concatenated(parts, "signal", data_vars="all")


def _part(preset: str, num: int, seed: int, start: int) -> xr.Dataset:
    problem, posterior = ready(preset)
    theta, x = simulate(problem, num, TEST + 7_919 * seed + start)
    k = problem.layout.cardinality(theta)
    probs = torch.cat([posterior.cardinality(p).probs for p in x.split(50)]).double()
    chosen = probs.max(-1)
    score = -probs.gather(-1, k.unsqueeze(-1)).squeeze(-1).clamp(min=1e-12).log()
    data = {
        "preset": np.full(num, preset == "crowded", dtype="u1"),
        "k": k.numpy().astype("u1"),
        "chosen": chosen.indices.numpy().astype("u1"),
        "confidence": chosen.values.numpy().astype("f4"),
        "score": score.numpy().astype("f4"),
    }
    return xr.Dataset({name: ("signal", values) for name, values in data.items()})


def _of(dataset: xr.Dataset, preset: str) -> xr.Dataset:
    """Signals of a preset."""
    return dataset.isel(signal=dataset.preset.values == (preset == "crowded"))


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    for axes, preset in zip(figure.subplots(1, 2), ("paper", "crowded"), strict=True):
        part = _of(dataset, preset)
        k, chosen = part.k.values.astype(int), part.chosen.values.astype(int)
        low, high = (1, 10) if preset == "paper" else (0, 10)
        counts = np.zeros((11, 11))
        np.add.at(counts, (k, chosen), 1)
        counts = counts[low : high + 1, low : high + 1]
        share = counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower")
        for i, j in np.argwhere(counts > 0):
            colour = "white" if share[i, j] > 0.6 else "black"
            text = f"{int(counts[i, j])}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
        ticks = np.arange(high - low + 1)
        axes.set_xticks(ticks, [str(low + t) for t in ticks], fontsize=SMALL)
        axes.set_yticks(ticks, [str(low + t) for t in ticks], fontsize=SMALL)
        right = 100 * float((k == chosen).mean())
        title = f"{preset}: {right:.2f} % of {len(k):,} signals right"
        dress(axes, "most probable K", "true K", title)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for preset in ("paper", "crowded"):
        part = _of(dataset, preset)
        right = part.k.values == part.chosen.values
        low, high = share_interval(right.sum(), len(right))
        paper = preset == "paper"
        gap = right - part.confidence.values.astype(float)
        interval = mean_interval(gap)
        score = part.score.values.astype(float)
        found += [
            Claim(
                f"K right, {preset}, %",
                100 * float(right.mean()),
                (100 * low, 100 * high),
                paper=PAPER_ACCURACY if paper else None,
                source="fig. 5" if paper else "",
                target=">= 99.95" if paper else None,
                better="higher",
                note=""
                if paper
                else "Weak and blended components: no method can know K "
                "for certain; see `rjmcmc` for the exact posterior's score.",
            ),
            Claim(f"wrong signals, {preset}", float((~right).sum())),
            Claim(
                f"share right less mean confidence, {preset}",
                float(gap.mean()),
                interval,
                target="interval holds 0",
                met=None
                if interval is None
                else interval[0] <= _TOLERANCE and interval[1] >= -_TOLERANCE,
                note="Zero if p(K | x) says how sure it may be (to within 0.001).",
            ),
            Claim(
                f"mean negative log score of the true K, {preset}, nats",
                float(score.mean()),
                mean_interval(score),
            ),
        ]
    return found
