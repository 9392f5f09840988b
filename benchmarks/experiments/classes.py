r"""Classes: lines and bursts in one trace.

Paper: section 3.7 (several classes of sources).

Question: Where components are of two classes that overlap, does a network tell how many
there are of each, how wide are its posteriors beside the Cramer-Rao bound, and does
`refine` make it exact?

Protocol: `lines_and_bursts`, K = 0..3 lines and 0..2 bursts, unknown noise level.
Trained by `train_online` with all defaults. Fresh signals from the prior. Gain: log
q(truth) less log p(truth), nats. Widths: half the central 68 % of draws with the true
numbers of components, of signals that have one component alone, of at least 8 in units
of the noise, over the bound with the noise level known (it is orthogonal); the median
over signals. Refined by importance weights of 2,000 draws, with p(K | x) of the
classifier and by evidence (`with_evidence`), and by `refine(method="auto")`, which
takes particles where weights are not reliable; "reliable" is a k-hat below 0.7, 100
effective draws and, of particles, populations that agree. Exact: `rjmcmc.collapsed`
from draws of the network, where its chains have converged; total variation of p(K_line,
K_burst | x) from it, of the network and of those refined reliably.
Calibration: `calibration.report` of 300 pairs, which an exact posterior fails with a
probability of at most 5 %.

Losses: By weights alone too few signals are reliable: a burst that is narrow beside its
cell, and one component more beside a strong one, are in too few draws. Particles mend
it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import SlotPosterior, problems
from sbi_slotflow.plots.style import POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Classes
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

LOUDEST = 8.0


@dataclass(frozen=True)
class Size:
    """Simulations; signals for p(K), gain, refining, the exact sampler; draws.

    And pairs of the report.
    """

    num_simulations: int
    num_signals: int
    num_gain: int
    num_refined: int
    num_exact: int
    num_draws: int
    num_report: int


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 8, 2, 1, 0, 60, 0),
    "quick": Size(24_000, 300, 60, 16, 6, 2_000, 300),
    "full": Size(100_000, 1_000, 300, 60, 16, 2_000, 1_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("classes", budget, seed)
    problem = problems.lines_and_bursts()
    posterior, seconds = trained(
        problem,
        cache,
        "network",
        size.num_simulations,
        seed,
    )
    spent = cache.get("seconds", lambda: xr.Dataset({"seconds": seconds}))
    theta, x = unseen(problem, size.num_signals, seed)
    found = cache.get("network", lambda: _network(problem, posterior, theta, x, size))
    rows = [
        cache.get(
            f"refined-{i}",
            lambda i=i: _refined(problem, posterior, theta[i], x[i], size, seed, i),
        )
        for i in range(size.num_refined)
    ]
    report = cache.get(
        "report", lambda: reported(posterior, problem, size.num_report, seed)
    )
    return xr.merge([found, spent, xr.concat(rows, "refined"), report])


@torch.no_grad()
def _network(
    problem: Classes, posterior: SlotPosterior, theta: Tensor, x: Tensor, size: Size
) -> xr.Dataset:
    layout = problem.layout
    k = layout.cardinality(theta)
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    gain, both = [], []
    for row, one in zip(theta[: size.num_gain], x, strict=False):
        gain.append(posterior.log_prob(row[None], one) - problem.prior.log_prob(row))
        draws = posterior.sample((2_000,), x=one, show_progress_bars=False)
        both.append((layout.kind(draws) == layout.kind(row)).double().mean())
    return xr.Dataset(
        {
            "loss": ("signal", -logs.gather(-1, k[:, None])[:, 0].numpy()),
            "right": ("signal", (logs.argmax(-1) == k).numpy()),
            "counts": ("gained", -torch.stack(both).clamp(min=5e-4).log().numpy()),
            "gain": ("gained", torch.cat(gain).double().numpy()),
            "width": (("loud", "parameter"), _widths(problem, posterior, theta, x)),
        },
        {"parameter": _parameters(problem)},
    )


def _parameters(problem: Classes) -> list[str]:
    classes = problem.layout.classes
    return [f"{name}.{p}" for name, own in classes for p in own.component_names]


def _widths(
    problem: Classes, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> np.ndarray:
    """Half widths over the bound, (loud signals, parameters), NaN of other classes."""
    layout, fit = problem.layout, problem.build_fit()
    assert fit is not None
    names = _parameters(problem)
    ratios = [np.full(len(names), np.nan)]
    for i in (layout.cardinality(theta) == 1).nonzero().flatten().tolist():
        parts = layout.unpack(theta[i : i + 1].double())
        sigma, component = parts.shared[0, 0], parts.components[0, :1]
        if not problem.simulator.flat_signal(component).norm() / sigma > LOUDEST:
            continue
        label = int(component[0, 0])
        name, own = layout.classes[label]
        equations = fit.given(x[i : i + 1]).normal_equations(
            torch.zeros(1).long(), parts.components[:, :1], parts.mask[:, :1]
        )
        # In the order of the class, without the entries that it has not.
        places = layout.columns_of(label)
        curvature = equations.curvature[0][places][:, places] / sigma**2
        bound = torch.linalg.inv(curvature).diagonal().sqrt()
        draws = posterior.sample((2_000,), x=x[i], show_progress_bars=False)
        draws = draws[layout.kind(draws) == layout.kind(theta[i])]
        if len(draws) < 100:
            continue
        values = own.unpack(layout.view(draws.double(), name)).components[:, 0]
        truth = own.unpack(layout.view(theta[i].double(), name)).components[0]
        turns = values.new_tensor(own.component_periods)
        away = values - truth
        turned = away - turns * (away / turns).round()
        away = torch.where(turns.isfinite(), turned, away)
        ends = torch.tensor([0.16, 0.84], dtype=torch.float64)
        low, high = away.quantile(ends, dim=0)
        row = np.full(len(names), np.nan)
        first = names.index(f"{name}.{own.component_names[0]}")
        row[first : first + len(bound)] = (0.5 * (high - low) / bound).numpy()
        ratios.append(row)
    return np.stack(ratios[1:] or ratios)


def _refined(
    problem: Classes,
    posterior: SlotPosterior,
    theta: Tensor,
    x: Tensor,
    size: Size,
    seed: int,
    i: int,
) -> xr.Dataset:
    layout, found = problem.layout, {}
    num_kinds = int(np.prod([own.max_cardinality + 1 for _, own in layout.classes]))
    ways: dict[str, tuple[SlotPosterior, dict[str, Any]]] = {
        "weighed": (posterior, {}),
        "evidence": (posterior.with_evidence(), {}),
    }
    if size.num_draws >= 1_000:  # an untrained network's particles take minutes
        ways["auto"] = posterior, {"method": "auto"}
    for n, (name, (start, options)) in enumerate(ways.items()):
        generator = generator_for(seed, TEST, 2 + n, i)
        refined: Any = quietly_refined(
            start, problem, x, size.num_draws, generator, **options
        )
        probs = torch.bincount(layout.kind(refined.rows), refined.weights, num_kinds)
        found |= {
            f"reliable_{name}": refined.is_reliable,
            f"ess_{name}": refined.ess / len(refined.rows),
            f"p_{name}": ("kind", probs.numpy()),
        }
    found |= {"p_exact": ("kind", np.full(num_kinds, np.nan)), "exact_seconds": np.nan}
    start = posterior.sample((2_000,), x=x, show_progress_bars=False)
    probs = torch.bincount(layout.kind(start), minlength=num_kinds) / len(start)
    found["p_network"] = "kind", probs.numpy()
    if i < size.num_exact:
        exact, seconds = sampled_exactly(posterior, problem, x, seed)
        found["exact_seconds"] = seconds
        if exact.converged:
            kinds = torch.bincount(layout.kind(exact.rows), minlength=num_kinds)
            found["p_exact"] = "kind", (kinds / len(exact.rows)).numpy()
    if "auto" not in ways:
        found |= {
            f"{part}_auto": found[f"{part}_weighed"]
            for part in ("reliable", "ess", "p")
        }
    found["kind_of_truth"] = int(layout.kind(theta))
    return xr.Dataset(found)


def _variations(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Total variation of p(K_1, K_2 | x) from the exact one; NaN without."""
    exact = dataset["p_exact"].transpose("refined", ..., "kind")
    here = dataset[f"p_{name}"].transpose("refined", ..., "kind")
    return 0.5 * np.abs(here.values - exact.values).sum(-1).ravel()


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 2)
    panels[0].hist(dataset["gain"].values.ravel(), 20, color=POSTERIOR)
    dress(panels[0], "log q(truth) - log p(truth), nats", "signals", "gain")
    names = [str(name) for name in dataset.parameter.values]
    for i, name in enumerate(names):
        values = dataset["width"].sel(parameter=name).values.ravel()
        panels[1].plot(np.full(len(values), i), values, "o", color=POSTERIOR, alpha=0.6)
    panels[1].axhline(1.0, color=TRUTH)
    panels[1].set_xticks(range(len(names)), names, rotation=30, fontsize=SMALL)
    dress(panels[1], "", "half width / bound", "one component alone")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return dataset[name].values.ravel()

    right = values("right").astype(bool)
    found = [
        Claim("CPU seconds of training", round(float(np.mean(values("seconds"))))),
        Claim(
            "-log q(true K), all classes together",
            float(values("loss").mean()),
            mean_interval(values("loss")),
        ),
        Claim(
            "K right, all classes together",
            float(right.mean()),
            share_interval(int(right.sum()), len(right)),
        ),
        Claim(
            "-log q(true K of each class)",
            float(values("counts").mean()),
            mean_interval(values("counts")),
        ),
        Claim(
            "gain over the prior, nats",
            float(values("gain").mean()),
            mean_interval(values("gain")),
            target=">= 24",
            note=by_seed(dataset, "gain"),
        ),
    ]
    network = _variations(dataset, "network")
    network = network[np.isfinite(network)]
    if len(network):
        found.append(
            Claim(
                "TV of p(K of each class | x) from exact, network",
                float(network.mean()),
                mean_interval(network),
                note=f"Of {len(network)} signals, at most {network.max():.3f}. Exact "
                f"takes {np.nanmedian(values('exact_seconds')):.0f} CPU s each.",
            )
        )
    for name, label in (
        ("weighed", "refined by weights"),
        ("evidence", "refined by weights, K by evidence"),
        ("auto", "refined by weights or particles"),
    ):
        reliable = values(f"reliable_{name}").astype(bool)
        found.append(
            Claim(
                f"{label}: reliable",
                float(reliable.mean()),
                share_interval(int(reliable.sum()), len(reliable)),
                target=">= 0.75",
                note=by_seed(dataset, f"reliable_{name}") + "Median share of "
                "effective draws "
                f"{np.median(values(f'ess_{name}')):.2f}.",
            )
        )
        here = _variations(dataset, name)
        here = here[reliable & np.isfinite(here)]
        if len(here):
            found.append(
                Claim(
                    f"{label}: TV of p(K of each class | x) from exact",
                    float(here.mean()),
                    mean_interval(here) if len(here) > 1 else None,
                    note=f"Of {len(here)} reliable signals, at most {here.max():.3f}.",
                )
            )
    found += width_claims(dataset, lambda name: "<= 1.1")
    return found + report_claims(dataset)
