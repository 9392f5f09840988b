r"""Continuum: emission lines on a continuum, counted.

Paper: none.

Question: With the library's defaults and two CPU-minutes of training, are posteriors
of lines on an unknown continuum, of Poisson counts, calibrated, how wide are they
beside the Cramer-Rao bound, and does `refine` make them exact?

Protocol: 256 bins, K = 0..4 Gaussian lines (position, width, counts) on a continuum of
unknown offset and slope; `bright` has 20 to 60 counts a bin, `faint` a tenth of it. The
problem is what a user writes (`lines`), trained by `train_online` with all defaults.
Fresh signals from the prior. Gain: log q(truth) less log p(truth), nats. Widths: half
the central 68 % of draws with the true K = 1, of lines of at least 10 in units of the
noise, over the bound with continuum and all parameters of the line unknown; the median
over signals. Refined by importance weights of 2,000 draws, and by
`refine(method="auto")`, which takes particles where weights are not reliable;
"reliable" is a k-hat below 0.7, 100 effective draws and, of particles, populations that
agree. Exact: particles (`method="smc"`) of another seed, where their populations agree;
total variation of p(K | x) from them. Calibration: `calibration.report` of 300 pairs,
which an exact posterior fails with a probability of at most 5 %.

Losses: By weights alone a component more than there are is in too few draws; particles
mend it. Where lines are bright the network's p(K | x) is off by a tenth in the mean,
and the continuum takes up what lines too many or too few leave: the report's check of
whole sets may see that.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor

from sbi_slotflow import (
    AdditiveSimulator,
    PoissonNoise,
    SlotPosterior,
    VariableKPrior,
)
from sbi_slotflow.plots.style import POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Trace
from sbi_slotflow.problems.base import log_uniform, uniform
from sbi_slotflow.seeding import generator_for

from ..common import (
    TEST,
    by_seed,
    quietly_refined,
    report_claims,
    reported,
    trained,
    unseen,
    width_claims,
)
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache


def lines(level: float) -> Trace:
    """Lines on a continuum of about so many counts a bin: all that a user writes."""
    bins = torch.arange(256.0) + 0.5

    def line(components: Tensor) -> Tensor:
        position, width, counts = components[..., None].unbind(-2)
        profile = torch.exp(-0.5 * ((bins.to(position) - position) / width) ** 2)
        return counts * profile / (width * (2 * torch.pi) ** 0.5)

    def continuum(shared: Tensor) -> Tensor:
        offset, slope = shared[..., None].unbind(-2)
        return offset + slope * (bins.to(offset) / 256 - 0.5)

    least, most = 6 * level**0.5, 300 * level**0.5
    places = [uniform(0, 256), log_uniform(1.2, 5), log_uniform(least, most)]
    low, high = torch.tensor([0.5, -0.5]), torch.tensor([1.5, 0.5])
    prior = VariableKPrior(
        MultipleIndependent(places, validate_args=False),
        cardinality=[1, 1, 1, 1, 1],
        shared=BoxUniform(level * low, level * high),
        component_names=["position", "width", "counts"],
        shared_names=["offset", "slope"],
    )
    noise = PoissonNoise()
    simulator = AdditiveSimulator(line, noise, prior.layout, background=continuum)
    return Trace("lines", prior, simulator)


LEVELS = {"bright": 40.0, "faint": 4.0}
LOUDEST = 10.0


@dataclass(frozen=True)
class Size:
    """Simulations; signals for p(K), gain, refining, the report; draws."""

    num_simulations: int
    num_signals: int
    num_gain: int
    num_refined: int
    num_report: int
    num_draws: int


# Each seed has a training, and signals, of its own.
ADDS_SEEDS = True
BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 8, 2, 1, 0, 60),
    "quick": Size(25_000, 300, 60, 10, 300, 2_000),
    "full": Size(100_000, 1_000, 300, 60, 1_000, 2_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("continuum", budget, seed)
    found = [_of_level(name, size, cache, seed) for name in LEVELS]
    return xr.concat(found, xr.IndexVariable("level", list(LEVELS)))


def _of_level(name: str, size: Size, cache: Cache, seed: int) -> xr.Dataset:
    problem = lines(LEVELS[name])
    posterior, seconds = trained(problem, cache, name, size.num_simulations, seed)
    theta, x = unseen(problem, size.num_signals, seed)
    rows = [
        cache.get(
            f"{name}-refined-{i}",
            lambda i=i: _refined(problem, posterior, x[i], size, seed, i),
        )
        for i in range(size.num_refined)
    ]
    parts: dict[str, Callable[[], xr.Dataset]] = {
        "seconds": lambda: xr.Dataset({"seconds": seconds}),
        "network": lambda: _network(problem, posterior, theta, x, size),
        "report": lambda: reported(posterior, problem, size.num_report, seed),
    }
    made = [cache.get(f"{name}-{part}", make) for part, make in parts.items()]
    return xr.merge([*made, xr.concat(rows, "refined")])


@torch.no_grad()
def _network(
    problem: Trace, posterior: SlotPosterior, theta: Tensor, x: Tensor, size: Size
) -> xr.Dataset:
    k = problem.layout.cardinality(theta)
    logs = posterior.cardinality(x).logits.double().log_softmax(-1)
    gain = [
        posterior.log_prob(row[None], one_x) - problem.prior.log_prob(row[None])
        for row, one_x in zip(theta[: size.num_gain], x, strict=False)
    ]
    widths = _widths(problem, posterior, theta, x)
    row = np.full((len(x), widths.shape[-1]), np.nan)
    row[: len(widths)] = widths
    return xr.Dataset(
        {
            "loss": ("signal", -logs.gather(-1, k[:, None])[:, 0].numpy()),
            "right": ("signal", (logs.argmax(-1) == k).numpy()),
            "gain": ("gained", torch.cat(gain).double().numpy()),
            "width": (("signal", "parameter"), row),
        },
        {"parameter": list(problem.component_names + problem.shared_names)},
    )


def _widths(
    problem: Trace, posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> np.ndarray:
    """Half widths over the Cramer-Rao bound, (loud signals, parameters)."""
    layout, simulator = problem.layout, problem.simulator
    size = layout.num_component_params

    def rate(values: Tensor) -> Tensor:
        shared = simulator.background_signal(values[None, size:])[0]
        return shared + simulator.flat_signal(values[:size])

    ratios = []
    for i in (layout.cardinality(theta) == 1).nonzero().flatten().tolist():
        parts = layout.unpack(theta[i].double())
        truth = torch.cat([parts.components[0], parts.shared])
        mean = rate(truth)
        signal = simulator.flat_signal(truth[:size])
        if (signal.square() / mean).sum().sqrt() < LOUDEST:
            continue
        slopes = torch.autograd.functional.jacobian(rate, truth)
        bound = torch.linalg.inv((slopes / mean[:, None]).mT @ slopes).diagonal().sqrt()
        draws = posterior.sample((2_000,), x=x[i], show_progress_bars=False)
        draws = draws[layout.cardinality(draws) == 1]
        if len(draws) < 100:
            continue
        ends = torch.tensor([0.16, 0.84], dtype=torch.float64)
        drawn = layout.unpack(draws.double())
        values = torch.cat([drawn.components[:, 0], drawn.shared], -1)
        low, high = values.quantile(ends, dim=0)
        ratios.append((0.5 * (high - low) / bound).numpy())
    return np.stack(ratios) if ratios else np.empty((0, size + layout.num_shared))


def _refined(
    problem: Trace, posterior: SlotPosterior, x: Tensor, size: Size, seed: int, i: int
) -> xr.Dataset:
    found: dict[str, Any] = {}
    # An untrained network's particles take minutes.
    tried = size.num_draws >= 1_000
    probs = {"network": posterior.cardinality(x).probs.flatten().numpy()}
    methods: dict[str, Any] = {"weighed": "importance"}
    if tried:
        methods |= {"auto": "auto", "exact": "smc"}
    for n, (name, method) in enumerate(methods.items()):
        generator = generator_for(seed, TEST, 2 + (n == 2), i)
        refined = quietly_refined(
            posterior, problem, x, size.num_draws, generator, method=method
        )
        probs[name] = refined.cardinality().probs.flatten().numpy()
        found |= {
            f"reliable_{name}": refined.is_reliable,
            f"ess_{name}": refined.ess / size.num_draws,
            f"khat_{name}": refined.pareto_k,
        }
    for name in ("auto", "exact"):
        if name not in methods:
            probs[name] = probs["weighed"]
            for part in ("reliable", "ess", "khat"):
                found[f"{part}_{name}"] = found[f"{part}_weighed"]
    return xr.Dataset(found | {f"p_{name}": ("k", p) for name, p in probs.items()})


def _variations(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Total variation of p(K | x) from particles; NaN where they are not reliable."""
    far = 0.5 * abs(dataset[f"p_{name}"] - dataset["p_exact"]).sum("k")
    return far.where(dataset["reliable_exact"].astype(bool)).values.ravel()


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    panels = figure.subplots(len(LEVELS), 3)
    for row, name in zip(panels, LEVELS, strict=True):
        here = dataset.sel(level=name)
        row[0].hist(here["gain"].values.ravel(), 20, color=POSTERIOR)
        dress(row[0], "log q(truth) - log p(truth), nats", "signals", f"{name}: gain")
        for i, parameter in enumerate(here.parameter.values):
            values = here["width"].sel(parameter=parameter).values.ravel()
            at = np.full(len(values), i)
            row[1].plot(at, values, "o", color=POSTERIOR, ms=3, alpha=0.5)
        row[1].axhline(1.0, color=TRUTH)
        names = [str(n) for n in here.parameter.values]
        row[1].set_xticks(range(len(names)), names, rotation=30, fontsize=SMALL)
        dress(row[1], "", "half width / bound", "one loud line")
        for label, which, marker in (
            ("network", "network", "o"),
            ("weights", "weighed", "x"),
            ("weights or particles", "auto", "+"),
        ):
            row[2].plot(_variations(here, which), marker, ms=5, label=label)
        row[2].set_ylim(bottom=0.0)
        row[2].legend(fontsize=SMALL, frameon=False)
        dress(row[2], "signal", "TV of p(K | x) from particles", "")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    code = [line for line in inspect.getsource(lines).splitlines() if line.strip()]
    found = [
        Claim(
            "user's lines of code",
            len(code),
            target="<= 30",
            note="The function `lines`, without empty lines.",
        )
    ]
    for name in LEVELS:
        found += _claims(dataset.sel(level=name), name)
    return found


def _claims(dataset: xr.Dataset, level: str) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return dataset[name].values.ravel()

    right = values("right").astype(bool)
    found = [
        Claim(
            f"{level}: CPU seconds of training", round(float(values("seconds").mean()))
        ),
        Claim(
            f"{level}: -log q(true K)",
            float(values("loss").mean()),
            mean_interval(values("loss")),
        ),
        Claim(
            f"{level}: K right",
            float(right.mean()),
            share_interval(int(right.sum()), len(right)),
        ),
        Claim(
            f"{level}: gain over the prior, nats",
            float(values("gain").mean()),
            mean_interval(values("gain")),
            note=by_seed(dataset, "gain"),
        ),
    ]
    for way, label, target in (
        ("weighed", "refined reliably by weights", None),
        ("auto", "refined reliably by weights or particles", ">= 0.8"),
    ):
        reliable = values(f"reliable_{way}").astype(bool)
        found.append(
            Claim(
                f"{level}: {label}",
                float(reliable.mean()),
                share_interval(int(reliable.sum()), len(reliable)),
                target=target,
                note=by_seed(dataset, f"reliable_{way}")
                + "Median share of effective draws "
                f"{np.median(values(f'ess_{way}')):.2f}.",
            )
        )
    for way, label in (
        ("network", "network"),
        ("weighed", "weights"),
        ("auto", "weights or particles"),
    ):
        rows = values(f"reliable_{way}").astype(bool) if way != "network" else True
        far = _variations(dataset, way)
        far = far[np.isfinite(far) & rows]
        if len(far):
            found.append(
                Claim(
                    f"{level}: TV of p(K | x) from particles of another seed, {label}",
                    float(far.mean()),
                    mean_interval(far),
                    note=f"Of {len(far)} signals, at most {far.max():.3f}.",
                )
            )
    found += width_claims(dataset, prefix=f"{level}: ")
    return found + report_claims(dataset, f"{level}: ")
