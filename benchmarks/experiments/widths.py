r"""How wide the posteriors are.

Paper: fig. 9, sec. 5.1.6, sec. 5.1.5 (frequency precision).

Question: How does the posterior's width grow with K, and how much of it is the data's
and how much the network's?

Protocol: Equal numbers of signals at each K of `paper`; 500 draws given the true K from
the shipped weights. A width is the standard deviation of a component's parameter,
averaged over components and signals (the paper's eq. 25); amplitudes are relative to
the truth. Beside it the exact posterior's (`rjmcmc.fixed_k`: importance sampling that
shares nothing with the network) and the Cramér-Rao bound, from the Fisher matrix of all
3 K parameters at the truth.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sbi_slotflow import rjmcmc
from sbi_slotflow.plots.style import DATA, FONT, POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from ..common import TEST, given_k, ready, simulate
from ..experiment import Budget, Claim
from ..intervals import mean_interval, median_interval
from ..store import Cache

PARAMETERS = ("relative amplitude", "phase", "frequency")
UNITS = ("%", "rad", "mHz")
SCALE = np.array([100.0, 1.0, 1e3])
KINDS = ("ours", "exact", "bound")
# Figure 9's caption: widths at K = 1 and K = 10, and exponents.
PAPER = {
    "relative amplitude": (2.2, 4.0, 0.3),
    "phase": (0.03, 0.14, 0.6),
    "frequency": (0.09, 0.55, 0.2),
}


@dataclass(frozen=True)
class Size:
    """Cardinalities, signals at each, and draws of either posterior."""

    cardinalities: tuple[int, ...]
    num_signals: int
    num_draws: int
    num_exact: int


_ALL = tuple(range(1, 11))
BUDGETS: dict[Budget, Size] = {
    "smoke": Size((1, 2, 3), 2, 200, 1_000),
    "quick": Size(_ALL, 10, 500, 4_000),
    "full": Size(_ALL, 200, 500, 20_000),
}
WEIGHTS = ("paper",)


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("widths", budget, seed)
    parts = [
        cache.get(f"k{k}", lambda k=k: _at(k, size, seed))
        for k in tqdm(size.cardinalities, desc="K", leave=False)
    ]
    return xr.concat(parts, xr.Variable("k", list(size.cardinalities)))


def _at(k: int, size: Size, seed: int) -> xr.Dataset:
    problem, posterior = ready("paper")
    theta, x = simulate(given_k(problem, k), size.num_signals, TEST + 100 * seed + k)
    truth = problem.layout.unpack(theta)
    draws = posterior.sample_batched(
        (size.num_draws,), x, k=k, generator=generator_for(seed, k)
    )
    mine = problem.layout.unpack(draws).components[..., :k, :].double()
    ours = _deviations(mine.numpy())
    exact, bound = np.full_like(ours, np.nan), np.empty_like(ours)
    for i in range(size.num_signals):
        components = truth.components[i, :k].double().numpy()
        bound[i] = cramer_rao(problem, components, float(truth.shared[i, 0]))
        found = rjmcmc.fixed_k(problem, x[i], k, num_samples=size.num_exact, seed=i)
        if found.is_reliable:
            rows = found.sample((2_000,), generator=generator_for(seed, i))
            theirs = problem.layout.unpack(rows).components[:, :k].double()
            exact[i] = _deviations(theirs.numpy())
    for values in (ours, exact, bound):
        values[..., 0] /= truth.components[:, :k, 0].double().numpy()
    padded = np.full((3, size.num_signals, 10, 3), np.nan, dtype="f4")
    padded[:, :, :k] = np.stack([ours, exact, bound]) * SCALE
    return xr.Dataset(
        {"width": (("kind", "signal", "component", "parameter"), padded)},
        {"kind": list(KINDS), "parameter": list(PARAMETERS)},
    )


def _deviations(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations (..., K, 3) over the first axis, of phases about a mean."""
    centred = draws.copy()
    middle = np.angle(np.exp(1j * draws[..., 1]).mean(0))
    centred[..., 1] = np.angle(np.exp(1j * (draws[..., 1] - middle)))
    return centred.std(0, ddof=1)


def cramer_rao(
    problem: Sinusoids, components: NDArray[np.float64], sigma: float
) -> NDArray[np.float64]:
    r"""Cramér-Rao bounds of standard deviations of (A, phi, f), (K, 3).

    The Fisher matrix of white noise is :math:`J^T J / \sigma^2` with the signal's
    Jacobian J at the truth.
    """
    time = torch.cat([grid.times for grid in problem.grids]).double().numpy()
    amplitude, phase, frequency = components.T[:, :, None]
    angle = 2 * math.pi * frequency * time + phase
    slope = -amplitude * np.sin(angle)
    jacobian = np.stack([np.cos(angle), slope, 2 * math.pi * time * slope], 1)
    jacobian = jacobian.reshape(-1, len(time))
    scale = np.linalg.norm(jacobian, axis=1)
    unit = jacobian / scale[:, None]
    variance = np.linalg.inv(unit @ unit.T).diagonal() * sigma**2 / scale**2
    return np.sqrt(variance).reshape(-1, 3)


def _by_signal(dataset: xr.Dataset) -> xr.DataArray:
    """Widths averaged over components, signals whose reference is unreliable left out.

    So all three kinds average over the same signals.
    """
    width = dataset.width.mean("component")
    return width.where(width.sel(kind="exact").notnull())


def plot(dataset: xr.Dataset) -> Figure:
    width = _by_signal(dataset)
    mean = width.mean("signal")
    error = width.std("signal") / np.sqrt(width.count("signal"))
    figure = Figure(figsize=(9.8, 3.4), layout="constrained")
    dress_of = {
        "ours": {"color": POSTERIOR, "marker": "o", "label": "ours"},
        "exact": {
            "color": "black",
            "marker": "x",
            "linestyle": "--",
            "label": "exact",
        },
        "bound": {"color": DATA, "linestyle": ":", "label": "Cramér-Rao"},
    }
    panels = figure.subplots(1, 3)
    for axes, name, unit in zip(panels, PARAMETERS, UNITS, strict=True):
        for kind, style in dress_of.items():
            values = mean.sel(kind=kind, parameter=name)
            bars = error.sel(kind=kind, parameter=name) if kind == "ours" else None
            axes.errorbar(dataset.k, values, bars, markersize=4, **style)
        first, last, _ = PAPER[name]
        axes.plot([1, 10], [first, last], "s", color=TRUTH, label="paper (fig. 9)")
        axes.set_yscale("log")
        axes.set_xticks(dataset.k.values)
        axes.tick_params(which="both", labelsize=SMALL)
        dress(axes, "true K", f"mean posterior deviation ({unit})", name)
    panels[0].legend(fontsize=FONT - 1, frameon=False)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    width = _by_signal(dataset)
    each = dataset.width
    found = []
    for name, unit in zip(PARAMETERS, UNITS, strict=True):
        part = width.sel(parameter=name)
        for k, paper in zip((1, 10), PAPER[name], strict=False):
            if k in dataset.k:
                ours = part.sel(kind="ours", k=k).values
                found.append(
                    Claim(
                        f"mean deviation of {name} at K = {k}, {unit}",
                        float(np.nanmean(ours)),
                        mean_interval(ours),
                        paper=paper,
                        source="fig. 9",
                        better="lower",
                        rivals={
                            "exact": float(part.sel(kind="exact", k=k).mean()),
                            "Cramér-Rao": float(part.sel(kind="bound", k=k).mean()),
                        },
                        note="Narrower is better only down to the exact posterior: see "
                        "the ratios.",
                    )
                )
        ratio = (each.sel(kind="ours") / each.sel(kind="exact")).sel(parameter=name)
        values = ratio.values[np.isfinite(ratio.values)]
        found.append(
            Claim(
                f"deviation over exact, {name} (median over components)",
                float(np.median(values)),
                median_interval(values),
                paper="2-3" if name == "frequency" else None,
                source="sec. 5.1.5" if name == "frequency" else "",
                target="within 5 % of 1",
                met=bool(abs(np.median(values) - 1) <= 0.05),
            )
        )
        found.append(
            Claim(
                f"components wider than 1.2 times exact, {name}, %",
                100 * float((values > 1.2).mean()),
                target="<= 1",
            )
        )
        above = (each.sel(kind="exact") / each.sel(kind="bound")).sel(parameter=name)
        found.append(
            Claim(
                f"exact deviation over the Cramér-Rao bound, {name} (median)",
                float(above.median()),
                note="Near 1 where the posterior is Gaussian; the prior's bounds make "
                "it less where the noise is loud.",
            )
        )
        if len(dataset.k) > 3:
            mean = part.sel(kind="ours").mean("signal")
            slope = np.polyfit(np.log(dataset.k), np.log(mean), 1)[0]
            theirs = part.sel(kind="exact").mean("signal")
            exact = np.polyfit(np.log(dataset.k), np.log(theirs), 1)[0]
            found.append(
                Claim(
                    f"exponent of growth with K, {name}",
                    float(slope),
                    paper=PAPER[name][2],
                    source="fig. 9",
                    rivals={"exact": float(exact)},
                )
            )
    return found
