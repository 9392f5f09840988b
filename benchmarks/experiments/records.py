r"""Records at irregular times: planets, and one network for many schedules.

Paper: none.

Question: With the library's defaults and CPU-minutes of training, how much does a
network know of planets in radial velocities, how wide are its posteriors beside the
Cramer-Rao bound, does `refine` make it exact, and is one network as good on schedules
that it never saw as networks trained for them?

Protocol: `radial_velocity`, 60 nights of 400 days, K = 0..3, unknown offset and scale
of the errors. Trained by `train_online` with all defaults. Fresh signals from the
prior. Gain: log q(truth) less log p(truth), nats. By evidence:
`posterior.with_evidence(share)`. Widths: half the central 68 % of draws with K = 1 of
signals that have it, over the bound with offset and all parameters of the planet
unknown, where the bound allows the period to be known to 2 %; the median over signals.
Refined by 2,000 draws of the posterior by evidence: "reliable" is a k-hat below 0.7 and
100 effective draws. Exact: `rjmcmc.collapsed` from draws of the network, where its
chains have converged; total variation of p(K | x) from it. Schedules: four drawn once,
the network of all schedules against one trained for each, with as few simulations for
all alike; differences on the same signals. Calibration: `calibration.report` of 300
pairs, which an exact posterior fails with a probability of at most 5 %.

Losses: Planets that the record hardly shows have posteriors as broad as their prior in
all but one or two directions, in many cells at once: more sets of cells than are
weighed (evidence says too few planets), and a Gaussian above each set is a part of it.
Small eccentricities of strong planets are crescents in the plane of the disc.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import SlotPosterior, problems
from sbi_slotflow.plots.style import POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Series
from sbi_slotflow.problems.radial_velocity import observing_nights
from sbi_slotflow.seeding import generator_for

from ..common import (
    TEST,
    by_seed,
    quietly_refined,
    report_claims,
    reported,
    sampled_exactly,
    trained,
    unseen,
    width_claims,
)
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache

# Relative error of the period, by the bound, below which widths are compared with it.
_KNOWN = 0.02
# Share of the evidence in p(K | x), and others that follow from it.
_SHARE, _OTHER_SHARES = 0.98, (0.9, 0.7)


# Signals by which training is checked.
NUM_CHECKED = 1_000


@dataclass(frozen=True)
class Size:
    """Simulations; signals for p(K), gain, widths, refining; schedules.

    And pairs of the report, and signals for the exact sampler.
    """

    num_simulations: int
    num_signals: int
    num_gain: int
    num_widths: int
    num_refined: int
    num_draws: int
    num_schedules: int
    schedule_simulations: int
    schedule_signals: int
    schedule_gain: int
    num_report: int
    num_exact: int


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(16, 8, 1, 1, 1, 60, 1, 16, 4, 1, 0, 0),
    "quick": Size(16_000, 300, 40, 24, 16, 2_000, 4, 3_072, 300, 15, 300, 8),
    "full": Size(130_000, 1_000, 300, 100, 60, 2_000, 4, 25_000, 1_000, 60, 1_000, 30),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("records", budget, seed)
    problem = problems.radial_velocity()
    posterior, seconds = trained(
        problem, cache, "all", size.num_simulations, seed, num_validation=NUM_CHECKED
    )
    spent = cache.get("seconds", lambda: xr.Dataset({"seconds": seconds}))
    theta, x = unseen(problem, size.num_signals, seed, 0)
    found = cache.get("network", lambda: _network(problem, posterior, theta, x, size))
    rows = [
        cache.get(
            f"refined-{i}",
            lambda i=i: _refined(problem, posterior, x[i], size, seed, i),
        )
        for i in range(size.num_refined)
    ]
    beside = [
        cache.get(f"schedule-{i}", lambda i=i: _beside(size, seed, cache, i))
        for i in range(size.num_schedules)
    ]
    refined, schedules = xr.concat(rows, "refined"), xr.concat(beside, "schedule")
    report = cache.get(
        "report", lambda: reported(posterior, problem, size.num_report, seed)
    )
    return xr.merge([found, spent, refined, schedules, report])


def _fixed(seed: int, i: int) -> Callable[[int, torch.Generator], Tensor]:
    """The i-th schedule, the same for every simulation."""
    drawn = observing_nights()(1, generator_for(seed, TEST, 100 + i))
    return lambda num, generator: drawn.expand(num, -1, -1)


@torch.no_grad()
def _gains(
    problem: Series, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> np.ndarray:
    gain = [
        posterior.log_prob(row[None], one_x) - problem.prior.log_prob(row[None])
        for row, one_x in zip(theta, x, strict=True)
    ]
    return torch.cat(gain).double().numpy()


def _losses(posterior: SlotPosterior, theta: Tensor, x: Tensor) -> np.ndarray:
    """-log q(true K), ``(B,)``."""
    k = posterior.prior.layout.cardinality(theta)
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    return -logs.gather(-1, k[:, None])[:, 0].numpy()


@torch.no_grad()
def _network(
    problem: Series, posterior: SlotPosterior, theta: Tensor, x: Tensor, size: Size
) -> xr.Dataset:
    some, weighed = slice(size.num_gain), posterior.with_evidence(_SHARE)
    evidence = [
        _losses(weighed, row[None], one_x[None])
        for row, one_x in zip(theta[some], x[some], strict=True)
    ]
    return xr.Dataset(
        {
            "loss": ("signal", _losses(posterior, theta, x)),
            "loss_evidence": ("gained", np.concatenate(evidence)),
            "gain": ("gained", _gains(problem, posterior, theta[some], x[some])),
            "width": (
                ("known", "parameter"),
                _widths(problem, posterior, theta, x, size),
            ),
        },
        {"parameter": list(problem.component_names)},
    )


def _widths(
    problem: Series, posterior: SlotPosterior, theta: Tensor, x: Tensor, size: Size
) -> np.ndarray:
    """Half widths over the Cramer-Rao bound, (signals, parameters)."""
    layout, fit = problem.layout, problem.build_fit()
    assert fit is not None
    ratios = [np.full(layout.num_component_params, np.nan)]
    for i in (layout.cardinality(theta) == 1).nonzero().flatten().tolist():
        parts = layout.unpack(theta[i : i + 1].double())
        alone = parts.components[:, :1], parts.mask[:, :1]
        given = fit.given(x[i : i + 1])
        equations = given.normal_equations(torch.zeros(1).long(), *alone)
        level = parts.shared[0, 0]
        bound = torch.linalg.inv(equations.curvature[0] / level**2).diagonal().sqrt()
        if not bound[0] / parts.components[0, 0, 0] < _KNOWN:
            continue
        draws = posterior.sample((2_000,), x=x[i], k=1, show_progress_bars=False)
        ends = torch.tensor([0.16, 0.84], dtype=torch.float64)
        values = layout.unpack(draws.double()).components[:, 0]
        for d, period in enumerate(layout.component_periods):
            if np.isfinite(period):  # angles about the truth
                turned = values[:, d] - parts.components[0, 0, d] + 0.5 * period
                values[:, d] = turned % period
        low, high = values.quantile(ends, dim=0)
        ratios.append((0.5 * (high - low) / bound).numpy())
        if len(ratios) > size.num_widths:
            break
    return np.stack(ratios[1:] or ratios)


def _refined(
    problem: Series, posterior: SlotPosterior, x: Tensor, size: Size, seed: int, i: int
) -> xr.Dataset:
    generator = generator_for(seed, TEST, 2, i)
    evidence = posterior.with_evidence(_SHARE)
    refined = quietly_refined(evidence, problem, x, size.num_draws, generator)
    probs = {
        "network": posterior.cardinality(x).probs,
        "evidence": evidence.cardinality(x).probs,
        "weighed": refined.cardinality().probs,
        "exact": torch.full((problem.prior.max_cardinality + 1,), torch.nan),
    }
    seconds, rhat = np.nan, np.nan
    if i < size.num_exact:
        exact, seconds = sampled_exactly(posterior, problem, x, seed)
        assert exact.diagnostics is not None
        rhat = exact.diagnostics.worst_rhat
        if exact.converged:
            probs["exact"] = exact.cardinality().probs
    return xr.Dataset(
        {
            "reliable": refined.is_reliable,
            "ess": refined.ess / size.num_draws,
            "khat": refined.pareto_k,
            "exact_seconds": seconds,
            "exact_rhat": rhat,
            **{f"p_{name}": ("k", p.flatten().numpy()) for name, p in probs.items()},
        }
    )


def _variations(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Total variation of p(K | x) from the exact one; NaN where there is none."""
    exact = dataset["p_exact"].transpose(..., "k").values
    here = dataset[f"p_{name}"].transpose(..., "k").values
    return 0.5 * np.abs(here - exact).sum(-1).ravel()


def _beside(size: Size, seed: int, cache: Cache, i: int) -> xr.Dataset:
    """A network of all schedules beside one of the i-th schedule only."""
    many, alone = (
        problems.radial_velocity(),
        problems.radial_velocity(schedule=_fixed(seed, i)),
    )
    num = size.schedule_simulations
    posteriors = {
        name: trained(one, cache, file, num, seed, num_validation=NUM_CHECKED)[0]
        for name, one, file in (
            ("many", many, "few"),
            ("alone", alone, f"alone-{i}"),
        )
    }
    theta, x = unseen(alone, size.schedule_signals, seed, 10 + i)
    some = theta[: size.schedule_gain], x[: size.schedule_gain]
    found = {}
    for name, posterior in posteriors.items():
        found[f"loss_{name}"] = "fresh", _losses(posterior, theta, x)
        found[f"gain_{name}"] = "fresh_gained", _gains(alone, posterior, *some)
    return xr.Dataset(found)


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].hist(dataset["gain"].values.ravel(), 20, color=POSTERIOR)
    dress(panels[0], "log q(truth) - log p(truth), nats", "signals", "gain")
    for i, name in enumerate(dataset.parameter.values):
        values = dataset["width"].sel(parameter=name).values.ravel()
        panels[1].plot(np.full(len(values), i), values, "o", color=POSTERIOR, alpha=0.6)
    panels[1].axhline(1.0, color=TRUTH)
    panels[1].set_yscale("log")
    panels[1].set_xticks(
        range(dataset.sizes["parameter"]), [str(n) for n in dataset.parameter.values]
    )
    panels[1].tick_params(axis="x", labelsize=SMALL)
    dress(panels[1], "", "half width / bound", "one planet")
    change = dataset["loss_many"] - dataset["loss_alone"]
    change = change.transpose("schedule", ..., "fresh").values
    change = change.reshape(dataset.sizes["schedule"], -1)
    panels[2].boxplot(list(change), showfliers=False)
    panels[2].axhline(0.0, color=TRUTH)
    dress(panels[2], "schedule", "nats", "-log q(K), all schedules less own")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return dataset[name].values.ravel()

    reliable = values("reliable").astype(bool)
    found = [
        Claim("CPU seconds of training", round(float(np.mean(values("seconds"))))),
        _mean("-log q(true K)", values("loss"), "<= 0.75", by_seed(dataset, "loss")),
        *_by_evidence(dataset),
        _mean("gain over the prior, nats", values("gain")),
        Claim(
            "refined reliably",
            float(reliable.mean()),
            share_interval(int(reliable.sum()), len(reliable)),
            target=">= 0.75",
            note=by_seed(dataset, "reliable")
            + f"Median share of effective draws {np.median(values('ess')):.2f}.",
        ),
    ]
    found += width_claims(dataset, lambda name: "<= 1.3" if name == "period" else None)
    found += _exact(dataset)
    loss = values("loss_many") - values("loss_alone")
    gain = values("gain_alone") - values("gain_many")
    text = "four new schedules, network of all less networks of each"
    found.append(_mean(f"{text}: -log q(true K)", loss, "<= 0.05"))
    found.append(_mean(f"{text}: -log q(truth), nats", gain, "<= 0.05"))
    return found + report_claims(dataset)


def _exact(dataset: xr.Dataset) -> list[Claim]:
    """The exact sampler, and how far p(K | x) is from it."""
    rhat = dataset["exact_rhat"].values.ravel()
    tried = np.isfinite(dataset["exact_seconds"].values.ravel())
    converged = np.isfinite(_variations(dataset, "network"))
    if not tried.any():
        return []
    num, all_tried = int(converged.sum()), int(tried.sum())
    seconds = float(np.nanmedian(dataset["exact_seconds"].values))
    found = [
        Claim(
            "exact sampler: chains have converged",
            num / all_tried,
            share_interval(num, all_tried),
            note=f"{seconds:.0f} CPU s each (median); the worst R-hat of all is "
            f"{np.nanmax(rhat):.3g}.",
        )
    ]
    reliable = dataset["reliable"].values.ravel().astype(bool)
    for name, label, rows in (
        ("network", "network", converged),
        ("evidence", "network by evidence", converged),
        ("weighed", "refined, reliable or not", converged),
        ("weighed", "refined reliably", converged & reliable),
    ):
        values = _variations(dataset, name)[rows]
        if len(values):
            found.append(
                Claim(
                    f"TV of p(K | x) from exact, {label}",
                    float(values.mean()),
                    mean_interval(values) if len(values) > 1 else None,
                    note=f"Of {len(values)} signals, at most {values.max():.3f}.",
                )
            )
    return found


def _mean(
    quantity: str, values: np.ndarray, target: str | None = None, note: str = ""
) -> Claim:
    mean, interval = float(values.mean()), mean_interval(values)
    return Claim(quantity, mean, interval, target=target, note=note)


def _by_evidence(dataset: xr.Dataset) -> list[Claim]:
    """Losses of K with some shares of the evidence in p(K | x)."""
    loss = dataset["loss"].transpose(..., "signal").values
    network = np.exp(-loss[..., : dataset.sizes["gained"]].ravel())
    mixed = np.exp(-dataset["loss_evidence"].transpose(..., "gained").values.ravel())
    evidence = (mixed - (1 - _SHARE) * network) / _SHARE
    note = (
        f"Of the first {dataset.sizes['gained']} signals of each seed; the classifier "
        f"has {-np.log(network).mean():.3f} there."
    )
    claims = []
    for share in (_SHARE, *_OTHER_SHARES):
        values = -np.log((share * evidence + (1 - share) * network).clip(1e-300))
        text = f"-log q(true K), evidence with a share of {share:g}"
        claims.append(_mean(text, values, "<= 0.75", note))
    return claims
