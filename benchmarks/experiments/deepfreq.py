r"""Line spectra: DeepFreq's test of frequency estimation.

Paper: none; Izacard, Mohan and Fernandez-Granda (2019), whose figures for CBLasso,
MDL, AIC and SORTE stand as the column of each name.

Question: On a protocol that nobody here wrote, are the number and the frequencies of
lines better known than by the classical methods?

Protocol: `problems.line_spectrum`: 50 complex samples, 1 to 10 lines, 1/50 apart around
the circle, amplitudes 0.1 + |N(0, 1)|, trained at 0 to 50 dB and tested at fixed ones.
The network has slots in cells and matching pursuit before its encoder. The run trains
it: first what finds the lines, then the densities about them.
Lines are uniform given their separation (as trained), or neighbours of one another (as
in the published test, and not as trained). Errors of the count; false negatives with
the count given, as published; Chamfer distance with the count estimated. Ours: the most
probable K, then the densest of 16 draws, refined by least squares. Rivals that are run
on the same signals: ESPRIT with MDL, AIC and SORTE, and matching pursuit with BIC.

Losses: Matching pursuit finds more lines where K is given, and subspace methods are
exact where there is no noise: both are made for lines and know no other signal. The
network has seen 96,000 signals, with gaps drawn in one way of the two.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import SlotPosterior, problems, slot_nn
from sbi_slotflow.plots.style import dress
from sbi_slotflow.problems import LineSpectrum
from sbi_slotflow.problems.sinusoids.line_spectrum import clustered
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.training.online import OnlineSettings, OnlineTraining
from sbi_slotflow.training.stages import Part, StageBuilder

from ..experiment import Budget, Claim
from ..intervals import mean_interval
from ..rivals.lines import chamfer, false_negatives, pursuit_bic, slots, subspace
from ..store import Cache

SNRS = (0, 10, 20, 30, 50)
LINES = ("uniform", "neighbours")
METHODS = ("ours", "pursuit + BIC", "ESPRIT + MDL", "ESPRIT + AIC", "ESPRIT + SORTE")
PUBLISHED = {
    "count": {
        "MDL": (89, 72, 40, 14, 3),
        "AIC": (86, 68, 37, 18, 6),
        "SORTE": (85, 71, 44, 19, 5),
    },
    "missed": {"CBLasso": (36.8, 9.9, 2.3, 1.1, 1.05)},
    "chamfer": {"CBLasso": (0.995, 0.153, 0.0695, 0.0480, 0.0410)},
}
TITLES = {
    "count": "count error, %",
    "missed": "false negatives with K given, %",
    "chamfer": "Chamfer distance",
}


@dataclass(frozen=True)
class Size:
    """Signals at each signal-to-noise ratio, and for each stage of the training."""

    num_signals: int
    num_cells: int
    num_local: int
    snrs: tuple[int, ...] = SNRS


BUDGETS = {
    "smoke": Size(2, 32, 32, (10,)),
    "quick": Size(200, 96_000, 12_800),
    "full": Size(10_000, 2_000_000, 200_000),
}
NETWORK: dict[str, Any] = {
    "slots": "anchored",
    "refine_slots": 3,
    "hidden_features": 64,
    "trunk_features": 64,
    "flow_hidden_features": 32,
    "flow_layers": 3,
    "encoder_options": {"width": 32},
}
_BATCH, _RATES = 64, {"cells": 2e-3, "local": 1e-3}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size = BUDGETS[budget]
    cache = Cache("deepfreq", budget, seed)
    posterior = _train(size, cache, seed)
    parts = [
        xr.concat(
            [
                cache.get(
                    f"{lines}-{snr}",
                    lambda lines=lines, snr=snr: _measure(
                        posterior, size.num_signals, lines, snr, seed
                    ),
                )
                for snr in size.snrs
            ],
            "snr",
        )
        for lines in LINES
    ]
    joined = xr.concat(parts, "lines")
    return joined.assign_coords(
        lines=list(LINES), snr=list(size.snrs), estimator=list(METHODS)
    )


def _train(size: Size, cache: Cache, seed: int) -> SlotPosterior:
    """Train in two stages, or take the training up."""
    problem = problems.line_spectrum()
    weights: dict[str, Tensor] | None = None
    stages: tuple[tuple[Part, int], ...] = (
        ("cells", size.num_cells),
        ("local", size.num_local),
    )
    estimator = None
    for part, num in stages:
        build = slot_nn(problem, loss_weights=(3.0, 1.0, 1.0), **NETWORK)
        settings = OnlineSettings(
            num_simulations=num,
            batch_size=_BATCH,
            learning_rate=_RATES[part],
            num_validation=min(512, num),
            validate_every=50,
            seed=seed,
            part="cells" if part == "cells" else "all",
        )
        estimator = OnlineTraining(
            StageBuilder(build, weights, part),
            problem.prior,
            problem.simulator,
            settings,
            checkpoint=cache.path(part, ".safetensors"),
        ).run(show_progress_bar=False)
        weights = estimator.state_dict()
    assert estimator is not None
    return SlotPosterior(estimator, problem.prior, simulator=problem.simulator)


def _measure(
    posterior: SlotPosterior, num: int, lines: str, snr: int, seed: int
) -> xr.Dataset:
    problem = problems.line_spectrum()
    theta, x = _signals(problem, num, lines, snr, seed)
    parts = problem.layout.unpack(theta)
    truth = torch.where(parts.mask, parts.components[..., 2], torch.nan)
    most = problem.layout.max_cardinality
    given = parts.cardinality
    methods = {
        "ours": lambda k: slots(problem, posterior, x, k, seed),
        "pursuit + BIC": lambda k: pursuit_bic(problem, x, k),
        "ESPRIT + MDL": lambda k: subspace(x, most, "mdl", k),
        "ESPRIT + AIC": lambda k: subspace(x, most, "aic", k),
        "ESPRIT + SORTE": lambda k: subspace(x, most, "sorte", k),
    }
    found = {name: [] for name in ("count", "missed", "missed_own", "chamfer")}
    for name in METHODS:
        counts, own = methods[name](None)
        _, told = methods[name](given)
        found["count"].append((counts != given).double().numpy())
        found["missed"].append(false_negatives(truth, told))
        found["missed_own"].append(false_negatives(truth, own))
        found["chamfer"].append(chamfer(truth, own))
    with torch.no_grad():
        log_k = posterior.posterior_estimator.log_prob_cardinality(x)
    score = -log_k.gather(-1, given.unsqueeze(-1)).squeeze(-1)
    data: dict[str, Any] = {
        name: (("estimator", "signal"), np.stack(values).astype("f4"))
        for name, values in found.items()
    }
    data["log_score"] = ("signal", score.numpy())
    data["cardinality"] = ("signal", given.numpy())
    return xr.Dataset(data)


def _signals(
    problem: LineSpectrum, num: int, lines: str, snr: float, seed: int
) -> tuple[Tensor, Tensor]:
    generator = generator_for(seed, 1_000_003, int(snr), LINES.index(lines))
    theta = (
        problem.prior.sample((num,), generator)
        if lines == "uniform"
        else clustered(problem, num, generator)
    )
    level = problem.prior.shared_marginals.clamp(torch.tensor([float(snr)]))
    theta[:, 1] = level
    return theta, problem.simulator(theta, generator)


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(10.5, 6.0), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for row, lines in zip(panels, LINES, strict=True):
        for axes, (name, title) in zip(row, TITLES.items(), strict=True):
            scale = 1.0 if name == "chamfer" else 100.0
            for i, method in enumerate(METHODS):
                values = dataset[name].sel(lines=lines, estimator=method).mean("signal")
                axes.plot(
                    dataset.snr.values,
                    scale * values,
                    marker="o",
                    color="C0" if i == 0 else f"C{i}",
                    linewidth=2.2 if i == 0 else 1.0,
                    label=method,
                )
            for i, (method, values) in enumerate(PUBLISHED[name].items()):
                axes.plot(
                    SNRS,
                    values,
                    linestyle=":",
                    marker="x",
                    color=("0.0", "0.4", "0.7")[i],
                    label=f"{method}, published",
                )
            if name != "count":
                axes.set_yscale("symlog", linthresh=0.003 if scale == 1.0 else 0.1)
            axes.set_ylim(bottom=0)
            dress(axes, "signal-to-noise ratio (dB)", title, f"lines: {lines}")
            axes.legend(fontsize=6, frameon=False)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    note = "The published figures are of neighbouring lines."
    for lines in LINES:
        for name, title in TITLES.items():
            scale = 1.0 if name == "chamfer" else 100.0
            for snr in dataset.snr.values.tolist():
                here = scale * dataset[name].sel(lines=lines, snr=snr)
                ours = here.sel(estimator="ours").values.astype(float)
                published = {
                    f"{method}, published": values[SNRS.index(snr)]
                    for method, values in PUBLISHED[name].items()
                }
                run_here = {
                    method: float(here.sel(estimator=method).mean())
                    for method in METHODS[1:]
                }
                if name == "missed":  # with K given there is one ESPRIT
                    run_here = {
                        "pursuit + BIC": run_here["pursuit + BIC"],
                        "ESPRIT": run_here["ESPRIT + MDL"],
                    }
                best = min(published.values())
                found.append(
                    Claim(
                        f"{title}, {snr} dB, lines {lines}",
                        float(ours.mean()),
                        mean_interval(ours),
                        target=f"{'<' if name == 'count' else '<='} {best:g}",
                        better="lower",
                        rivals=published | run_here,
                        note=note,
                    )
                )
    return found
