r"""Fields: problems that are no sinusoids, trained as their users would.

Paper: none.

Question: With the library's defaults and CPU-minutes of training, how much does a
network know of another field's problem, how wide are its posteriors beside the
Cramer-Rao bound, and does `refine` make it exact?

Protocol: `stars`, 32 x 32 pixels, K = 0..6, unknown noise level and sky. Trained by
`train_online` with all defaults. Fresh signals from the prior. Gain: log q(truth) less
log p(truth), nats. Widths: half the central 68 % of draws with the true K = 1, of
signals of 20 to 40 in units of the noise (norm of the component's signal), over the
bound with background and all parameters of the component unknown; the median over
signals. Refined by `refine(method="auto")` with 2,000 draws: importance weights, and
particles where these are not reliable; "reliable" is a k-hat below 0.7, 100 effective
draws and, of particles, populations that agree. Exact: `rjmcmc.collapsed` from draws of
the network, where its chains have converged; total variation of p(K | x) from it, of
the network and of those refined reliably. Shifted: scenes of 1 to 4 stars, moved with
their noise by one or two pixels; by how much the probability changes that there is a
star within two pixels of each. Calibration: `calibration.report` of 300 pairs, which
an exact posterior fails with a probability of at most 5 %.

Losses: By weights alone, a star that is split into two near its place, and one more
star than there are beside a bright one: the posterior of two blended stars is a ridge,
of which one Gaussian describes a part. Particles mend it, in about 15 CPU seconds. The
classifier's p(K | x) was never told that a scene may be shifted, and changes with it;
evidence, which sums over cells, changes far less.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import SlotPosterior, problems, rjmcmc
from sbi_slotflow.plots.style import POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Image
from sbi_slotflow.seeding import generator_for

from ..common import (
    TEST,
    by_seed,
    one,
    report_claims,
    reported,
    trained,
    unseen,
    width_claims,
)
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache

# Pixels by which scenes are moved, and draws by which existences are known.
MOVES, MANY = ((0, 0), (1, 0), (0, 1), (2, 2)), 10_000
# Signals whose widths are compared with the bound, in units of the noise.
LOUD = 20.0, 40.0


@dataclass(frozen=True)
class Size:
    """Simulations; signals for p(K), gain, refining, the exact sampler; draws.

    And scenes that are moved by pixels, and pairs of the report.
    """

    num_simulations: int
    num_signals: int
    num_gain: int
    num_refined: int
    num_exact: int
    num_draws: int
    num_scenes: int
    num_report: int


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 8, 2, 1, 0, 60, 0, 0),
    "quick": Size(40_000, 300, 60, 16, 16, 2_000, 6, 300),
    "full": Size(130_000, 1_000, 300, 60, 30, 2_000, 40, 1_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("fields", budget, seed)
    problem = problems.stars()
    posterior, seconds = trained(
        problem,
        cache,
        "stars",
        size.num_simulations,
        seed,
    )
    spent = cache.get("seconds", lambda: xr.Dataset({"seconds": seconds}))
    theta, x = unseen(problem, size.num_signals, seed)
    found = cache.get("network", lambda: _network(problem, posterior, theta, x, size))
    rows = [
        cache.get(
            f"refined-{i}",
            lambda i=i: _refined(problem, posterior, x[i], size, seed, i),
        )
        for i in range(size.num_refined)
    ]
    moved = [
        cache.get(f"moved-{i}", lambda i=i: _moved(problem, posterior, seed, i))
        for i in range(size.num_scenes)
    ]
    report = cache.get(
        "report", lambda: reported(posterior, problem, size.num_report, seed)
    )
    parts = [found, spent, xr.concat(rows, "refined"), report]
    if moved:
        parts.append(xr.concat(moved, "scene"))
    return xr.merge(parts)


@torch.no_grad()
def _network(
    problem: Image, posterior: SlotPosterior, theta: Tensor, x: Tensor, size: Size
) -> xr.Dataset:
    k = problem.layout.cardinality(theta)
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    gain = [
        posterior.log_prob(row[None], one_x) - problem.prior.log_prob(row[None])
        for row, one_x in zip(theta[: size.num_gain], x, strict=False)
    ]
    return xr.Dataset(
        {
            "loss": ("signal", -logs.gather(-1, k[:, None])[:, 0].numpy()),
            "right": ("signal", (logs.argmax(-1) == k).numpy()),
            "gain": ("gained", torch.cat(gain).double().numpy()),
            "width": (("loud", "parameter"), _widths(problem, posterior, theta, x)),
        },
        {"parameter": list(problem.component_names)},
    )


def _widths(
    problem: Image, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> np.ndarray:
    """Half widths over the Cramer-Rao bound, (loud signals, parameters)."""
    layout, fit = problem.layout, problem.build_fit()
    assert fit is not None
    ratios = [np.full(layout.num_component_params, np.nan)]
    for i in (layout.cardinality(theta) == 1).nonzero().flatten().tolist():
        parts = layout.unpack(theta[i : i + 1].double())
        sigma = parts.shared[0, 0]
        signal = problem.simulator.flat_signal(parts.components[0, :1])
        if not LOUD[0] < float(signal.norm() / sigma) < LOUD[1]:
            continue
        alone = parts.components[:, :1], parts.mask[:, :1]
        given = fit.given(x[i : i + 1])
        equations = given.normal_equations(torch.zeros(1).long(), *alone)
        bound = torch.linalg.inv(equations.curvature[0] / sigma**2).diagonal().sqrt()
        draws = posterior.sample((2_000,), x=x[i], show_progress_bars=False)
        draws = draws[layout.cardinality(draws) == 1]
        if len(draws) < 100:
            continue
        ends = torch.tensor([0.16, 0.84], dtype=torch.float64)
        values = layout.unpack(draws.double()).components[:, 0]
        low, high = values.quantile(ends, dim=0)
        ratios.append((0.5 * (high - low) / bound).numpy())
    return np.stack(ratios[1:] or ratios)


def _moved(problem: Image, posterior: SlotPosterior, seed: int, i: int) -> xr.Dataset:
    """How existences change as a scene of 1 to 4 stars is moved, with its noise."""
    layout, k = problem.layout, 1 + i % 4
    generator = generator_for(seed, TEST, 4, i)
    stars = torch.zeros(1, layout.max_cardinality, 3)
    stars[0, :k, :2] = 7 + 17 * torch.rand(k, 2, generator=generator)
    stars[0, :k, 2] = (3.0 + 1.6 * torch.rand(k, generator=generator)).exp()
    noise = torch.randn(problem.event_shape, generator=generator)
    shared = torch.tensor([[1.0, 8.0]])
    ways = {"network": posterior, "evidence": posterior.with_evidence()}
    found = {name: [] for name in ways}
    for along, across in MOVES:
        here = stars + torch.tensor([along, across, 0.0]) * (stars[..., 2:] > 0)
        row = layout.pack(torch.tensor([k]), here, shared)
        signal = problem.simulator.signal(layout.canonical(row))[0]
        x = signal + torch.roll(noise, (across, along), (0, 1))
        for name, start in ways.items():
            draws = start.sample((MANY,), x=x, show_progress_bars=False)
            parts = layout.unpack(draws)
            apart = (parts.components[:, :, None, :2] - here[0, :k, :2]).norm(dim=-1)
            near = (apart < 2) & parts.mask.unsqueeze(-1)
            found[name].append(near.any(1).double().mean(0))
    changes = {
        f"shifted_{name}": (
            "change",
            _padded((torch.stack(each[1:]) - each[0]).abs().flatten()),
        )
        for name, each in found.items()
    }
    return xr.Dataset(changes)


def _padded(values: Tensor) -> np.ndarray:
    """Changes of up to four stars."""
    row = np.full(4 * (len(MOVES) - 1), np.nan)
    row[: len(values)] = values.numpy()
    return row


def _refined(
    problem: Image, posterior: SlotPosterior, x: Tensor, size: Size, seed: int, i: int
) -> xr.Dataset:
    generator = generator_for(seed, TEST, 2, i)
    # An untrained network's particles take minutes.
    method: Any = "auto" if size.num_draws >= 1_000 else "importance"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it is reliable is recorded
        refined = one(
            posterior.refine(
                problem.log_likelihood,
                x,
                size.num_draws,
                method=method,
                generator=generator,
            )
        )
        probs = {
            "network": posterior.cardinality(x).probs,
            "weighed": refined.cardinality().probs,
            "exact": torch.full((problem.prior.max_cardinality + 1,), torch.nan),
        }
        if i < size.num_exact:
            start = posterior.sample((48,), x=x, show_progress_bars=False)
            exact = rjmcmc.collapsed(
                problem, x, start=start, num_draws=400, burn_in=1_000, seed=seed
            )
            assert exact.diagnostics is not None
            if exact.diagnostics.converged:
                probs["exact"] = exact.cardinality().probs
    return xr.Dataset(
        {
            "reliable": refined.is_reliable,
            "moved": refined.convergence is not None,
            "ess": refined.ess / size.num_draws,
            "khat": refined.pareto_k,
            **{f"p_{name}": ("k", p.flatten().numpy()) for name, p in probs.items()},
        }
    )


def _variations(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Total variation of p(K | x) from the exact one; NaN where there is none."""
    exact = dataset["p_exact"].transpose("refined", ..., "k")
    here = dataset[f"p_{name}"].transpose("refined", ..., "k")
    return 0.5 * np.abs(here.values - exact.values).sum(-1).ravel()


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].hist(dataset["gain"].values.ravel(), 20, color=POSTERIOR)
    dress(panels[0], "log q(truth) - log p(truth), nats", "signals", "gain")
    for i, name in enumerate(dataset.parameter.values):
        values = dataset["width"].sel(parameter=name).values.ravel()
        panels[1].plot(np.full(len(values), i), values, "o", color=POSTERIOR, alpha=0.6)
    panels[1].axhline(1.0, color=TRUTH)
    panels[1].set_xticks(
        range(dataset.sizes["parameter"]), [str(n) for n in dataset.parameter.values]
    )
    dress(panels[1], "", "half width / bound", "one loud star")
    for name, label, marker in (
        ("network", "network", "o"),
        ("weighed", "refined", "x"),
    ):
        values = _variations(dataset, name)
        panels[2].plot(values, marker, label=label)
    panels[2].legend(fontsize=SMALL, frameon=False)
    dress(panels[2], "signal", "TV of p(K | x) from exact", "")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return dataset[name].values.ravel()

    right, reliable = values("right").astype(bool), values("reliable").astype(bool)
    seconds = float(np.mean(values("seconds")))
    found = [
        Claim("stars: CPU seconds of training", round(seconds)),
        Claim(
            "stars: -log q(true K)",
            float(values("loss").mean()),
            mean_interval(values("loss")),
        ),
        Claim(
            "stars: K right",
            float(right.mean()),
            share_interval(int(right.sum()), len(right)),
        ),
        Claim(
            "stars: gain over the prior, nats",
            float(values("gain").mean()),
            mean_interval(values("gain")),
            target=">= 24",
            note=by_seed(dataset, "gain"),
        ),
        Claim(
            "stars: refined reliably",
            float(reliable.mean()),
            share_interval(int(reliable.sum()), len(reliable)),
            target=">= 0.9375",
            note=by_seed(dataset, "reliable") + "By weights alone, without particles: "
            f"{int((reliable & ~values('moved').astype(bool)).sum())} of "
            f"{len(reliable)}.",
        ),
    ]
    found += width_claims(dataset, lambda name: "<= 1.05", "stars: ")
    for name in ("network", "evidence"):
        if f"shifted_{name}" in dataset:
            here = values(f"shifted_{name}")
            here = here[np.isfinite(here)]
            found.append(
                Claim(
                    f"stars: change of an existence as a scene shifts, {name}, most",
                    float(here.max()),
                    target="<= 0.02",
                    note=f"Mean {here.mean():.4f}, of {len(here)} changes.",
                )
            )
    for label, name, rows in (
        ("network", "network", reliable | True),
        ("refined, those reliable", "weighed", reliable),
    ):
        here = _variations(dataset, name)[rows]
        here = here[np.isfinite(here)]
        if len(here):
            found.append(
                Claim(
                    f"stars: TV of p(K | x) from exact, {label}",
                    float(here.mean()),
                    mean_interval(here),
                    note=f"Of {len(here)} signals, at most {here.max():.3f}.",
                )
            )
    return found + report_claims(dataset, "stars: ")
