r"""How many simulations a network needs as K grows.

Paper: fig. 18, fig. 19, app. B.3.

Question: How does the loss fall with the number of simulations N at each K, and how
does the N that a given loss needs grow with K?

Protocol: `tiny` at one K each, attention slots, a fixed set of N simulations, seen as
often as it takes for the same number of steps; the loss (components and sigma, nats) on
fresh signals, lowest over the validations (early stopping), a component. N at a
threshold is interpolated in log N; the exponent of N against K is fitted over seeds,
its interval is Student's over them. The paper has K up to 10 and finds 0.35.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sbi_slotflow import problems, slot_nn
from sbi_slotflow.plots.style import CYCLE, FONT, dress
from sbi_slotflow.seeding import forked_rng, generator_for

from ..common import TEST, given_k, simulate
from ..experiment import Budget, Claim
from ..intervals import mean_interval
from ..store import Cache

CARDINALITIES = (1, 2, 3)
_BATCH, _NUM_VALIDATION, _NUM_VALIDATIONS = 64, 400, 8


@dataclass(frozen=True)
class Size:
    """Sizes of the training sets, seeds, and steps of 64 simulations."""

    nums: tuple[int, ...]
    num_seeds: int
    num_steps: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size((64, 128), 1, 1),
    "quick": Size((100, 800, 6_400), 2, 300),
    "full": Size((100, 300, 1_000, 3_000, 10_000, 30_000), 5, 5_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("sample_complexity", budget, seed)
    shape = (size.num_seeds, len(CARDINALITIES), len(size.nums))
    loss = np.empty(shape)
    for i, a, b in tqdm(list(np.ndindex(shape)), desc="trainings", leave=False):
        k, num = CARDINALITIES[a], size.nums[b]
        part = cache.get(
            f"k{k}-n{num}-{i}",
            lambda k=k, n=num, i=i: xr.Dataset(
                {"loss": _loss(k, n, size.num_steps, 100 * seed + i)}
            ),
        )
        loss[i, a, b] = float(part.loss)
    return xr.Dataset(
        {"loss": (("seed", "k", "num"), loss)},
        {"k": list(CARDINALITIES), "num": list(size.nums)},
    )


def _loss(k: int, num: int, num_steps: int, seed: int) -> float:
    """Lowest validation loss a component of a network trained on ``num`` signals."""
    problem = given_k(problems.sinusoids("tiny"), k)
    theta, x = simulate(problem, num, seed)
    fresh = simulate(problem, _NUM_VALIDATION, TEST + seed)
    generator = generator_for(seed, 2)
    with forked_rng(generator):
        build = slot_nn(
            problem,
            slots="attention",
            hidden_features=64,
            trunk_features=64,
            flow_hidden_features=32,
        )
        estimator = build(theta, x)
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=2e-3, weight_decay=1e-4)
    losses = []
    for step in range(1, num_steps + 1):
        rows = torch.randint(num, (_BATCH,), generator=generator)
        estimator.train()
        loss = estimator.loss(theta[rows], x[rows]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(estimator.parameters(), 5.0)
        optimizer.step()
        if step % max(1, num_steps // _NUM_VALIDATIONS) == 0:
            with torch.no_grad():
                losses.append(float(estimator.eval().loss(*fresh).mean()))
    return min(losses) / k


def needed(dataset: xr.Dataset, threshold: float) -> np.ndarray:
    """N at which the loss falls to a threshold, (seed, k); NaN where it does not."""
    log_n = np.log(dataset.num.values)
    found = np.full(dataset.loss.shape[:2], np.nan)
    for index in np.ndindex(found.shape):
        falling = np.minimum.accumulate(dataset.loss.values[index])
        if falling[-1] <= threshold <= falling[0]:
            found[index] = np.exp(np.interp(-threshold, -falling, log_n))
    return found


def _threshold(dataset: xr.Dataset) -> float:
    """A loss that every K and seed crosses, if there is one: halfway."""
    reached = float(dataset.loss.isel(num=-1).max())
    start = float(dataset.loss.isel(num=0).min())
    return 0.5 * (reached + start)


def exponent(dataset: xr.Dataset, threshold: float) -> np.ndarray:
    """Slopes of log N against log K, one a seed that crosses at each K."""
    log_n = np.log(needed(dataset, threshold))
    rows = log_n[np.isfinite(log_n).all(1)]
    return np.array([np.polyfit(np.log(dataset.k), row, 1)[0] for row in rows])


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    threshold = _threshold(dataset)
    number = needed(dataset, threshold)
    for i, (k, colour) in enumerate(zip(dataset.k.values, CYCLE, strict=False)):
        each = dataset.loss.sel(k=k)
        left.plot(dataset.num, each.values.T, ".", color=colour)
        left.plot(dataset.num, each.mean("seed"), color=colour, label=f"K = {k}")
        right.plot(np.full(len(number), k), number[:, i], "o", color=colour)
    left.axhline(threshold, color="black", linewidth=0.7, linestyle=":")
    left.set_xscale("log")
    left.legend(fontsize=FONT - 1, frameon=False)
    dress(left, "simulations N", "loss a component (nats)", "lowest validation loss")
    right.set_xlim(0.5, 3.5)
    right.set_xticks(dataset.k.values)
    if np.isfinite(number).any():
        right.set_yscale("log")
    dress(right, "K", "N at the dotted loss", "simulations needed")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    first, last = dataset.loss.isel(num=0), dataset.loss.isel(num=-1)
    for k in dataset.k.values:
        drop = (first - last).sel(k=k).values
        found.append(
            Claim(
                f"loss saved a component from N = {int(dataset.num[0])} to "
                f"{int(dataset.num[-1])}, K = {k}, nats",
                float(drop.mean()),
                mean_interval(drop),
                target="> 0",
            )
        )
    slopes = exponent(dataset, _threshold(dataset))
    found.append(
        Claim(
            "exponent of N against K at one loss a component",
            float(slopes.mean()) if len(slopes) else None,
            mean_interval(slopes),
            paper=0.35,
            source="fig. 19",
            note=f"{len(slopes)} of {dataset.sizes['seed']} seeds cross the loss at "
            "every K. The paper's threshold is one total loss, not one a component, "
            "and its K goes to 10.",
        )
    )
    return found
