r"""What the parts of the network are worth.

Paper: fig. 11, fig. 12, fig. 14, sec. 5.3 (fig. 13, the phase weight, is in `theory`).

Question: Which representation, depth, matching, kind of slot and coupling pays, at
equal training?

Protocol: The problem `tiny` (K = 0..3), the same number of fresh simulations for every
variant, three seeds each, the same fresh signals to judge them. The error is the root
mean square distance of draws given the true K from the truth: the width of the paper's
"posteriors centred on the truth". Budgets are far below the paper's 500,000 simulations
with K up to 5: this ranks parts by how soon they learn. The base is the paper's
architecture in small (global slots, FFT of the long record, time domain of the short
one, Hungarian matching, 4 couplings) with a true chart and K in the slots' context.

Losses: Joint coupling costs training at first: the chain of cells sees the earlier
cells, and learns later than independent slots do; what it is for, components closer
than a resolution element, `tiny` does not have. The permanent and K in the context make
no difference that three seeds could show.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sbi_slotflow import problems, slot_nn
from sbi_slotflow.plots.style import CYCLE, FONT, SMALL, dress

from ..experiment import Budget, Claim
from ..intervals import mean_interval
from ..store import Cache
from ..training import PARAMETERS, scores, train

_SMALL: dict[str, Any] = {
    "hidden_features": 64,
    "trunk_features": 64,
    "flow_hidden_features": 32,
}
_GLOBAL, _ATTENTION = {**_SMALL, "slots": "global"}, {**_SMALL, "slots": "attention"}
_CIRCLE = {**_GLOBAL, "chart": "circle", "phase_weight": 2.0}
BASE = "base"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: _GLOBAL,
    "time only": {**_GLOBAL, "domains": ("time", "time")},
    "frequency only": {**_GLOBAL, "domains": ("frequency", "frequency")},
    "2 couplings": {**_GLOBAL, "flow_layers": 2},
    "8 couplings": {**_GLOBAL, "flow_layers": 8},
    "no K in the context": {**_GLOBAL, "condition_on_cardinality": False},
    "circle chart, w_f = 1": {**_CIRCLE, "frequency_weight": 1.0},
    "circle chart, w_f = 3": {**_CIRCLE, "frequency_weight": 3.0},
    "attention, Hungarian": _ATTENTION,
    "attention, permanent": {**_ATTENTION, "matching": "permanent"},
    "attention, ordered": {**_ATTENTION, "matching": "ordered"},
    "cells, factorised": {**_SMALL, "slots": "anchored", "coupling": "factorised"},
    "cells, joint": {**_SMALL, "slots": "anchored", "refine_slots": 0},
    "cells, refined": {**_SMALL, "slots": "anchored", "refine_slots": 3},
}
GROUPS = {
    "domain (fig. 11, 12)": (BASE, "time only", "frequency only"),
    "flow depth (fig. 14)": ("2 couplings", BASE, "8 couplings"),
    "K in context, weights": (
        BASE,
        "no K in the context",
        "circle chart, w_f = 1",
        "circle chart, w_f = 3",
    ),
    "matching": (
        "attention, Hungarian",
        "attention, permanent",
        "attention, ordered",
    ),
    "slots, coupling, fits": (
        BASE,
        "attention, Hungarian",
        "cells, factorised",
        "cells, joint",
        "cells, refined",
    ),
}


@dataclass(frozen=True)
class Size:
    """Variants, seeds of each, simulations of each, and signals to judge them."""

    variants: tuple[str, ...]
    num_seeds: int
    num_simulations: int
    num_signals: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size((BASE, "cells, joint"), 1, 64, 10),
    "quick": Size(tuple(VARIANTS), 3, 12_800, 200),
    "full": Size(tuple(VARIANTS), 3, 500_000, 5_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("ablations", budget, seed)
    cells = [(v, s) for s in range(size.num_seeds) for v in size.variants]
    parts = {
        cell: cache.get(
            f"{cell[0].replace(' ', '_')}-{cell[1]}",
            lambda c=cell: _one(c[0], 100 * seed + c[1], size, cache),
        )
        for cell in tqdm(cells, desc="trainings", leave=False)
    }
    rows = [
        xr.concat([parts[v, s] for s in range(size.num_seeds)], "seed")
        for v in size.variants
    ]
    return xr.concat(rows, xr.Variable("variant", list(size.variants)))


def _one(variant: str, seed: int, size: Size, cache: Cache) -> xr.Dataset:
    problem = problems.sinusoids("tiny")
    posterior, history = train(
        problem,
        slot_nn(problem, **VARIANTS[variant]),
        size.num_simulations,
        seed,
        cache.path(f"{variant.replace(' ', '_')}-{seed}", ".safetensors"),
    )
    found = scores(posterior, problem, size.num_signals, 0)
    dims = {"error": ("parameter",), "confusion": ("k", "k_chosen")}
    data: dict[str, Any] = {n: (dims.get(n, ()), v) for n, v in found.items()}
    data["flow"] = ((), history[-1]["val_flow"])
    return xr.Dataset(data, {"parameter": list(PARAMETERS)})


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(10.6, 6.6), layout="constrained")
    grid = figure.subplots(2, 3)
    panels = {"K right (%)": dataset.accuracy}
    panels |= {f"error of {p}": dataset.error.sel(parameter=p) for p in PARAMETERS}
    colours = {}
    for colour, names in zip(CYCLE, GROUPS.values(), strict=False):
        colours |= {name: colours.get(name, colour) for name in names}
    variants = list(dataset.variant.values)
    places = np.arange(len(variants))[::-1]
    for axes, (title, values) in zip(grid.ravel(), panels.items(), strict=False):
        for place, name in zip(places, variants, strict=True):
            each = values.sel(variant=name).values
            axes.plot(each, np.full(len(each), place), ".", color=colours[name])
            axes.plot(each.mean(), place, "|", color=colours[name], ms=12)
        axes.set_yticks(places, variants, fontsize=SMALL - 1)
        dress(axes, title, "", title)
    if "time only" in variants:
        domains = ("time only", "frequency only")
        for axes, name in zip(grid.ravel()[4:], domains, strict=True):
            counts = dataset.confusion.sel(variant=name).sum("seed").values
            share = counts / counts.sum(1, keepdims=True).clip(1)
            axes.imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower")
            axes.set_xticks(range(len(share)))
            axes.set_yticks(range(len(share)))
            for i, j in np.argwhere(counts > 0):
                axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", fontsize=FONT)
            dress(axes, "most probable K", "true K", f"{name}, %")
    else:
        for axes in grid.ravel()[4:]:
            axes.set_visible(False)
    return figure


# Figure 12's accuracies and figure 11's deviations (A, phi in rad, f in mHz).
_PAPER_ACCURACY = {BASE: 99.4, "frequency only": 99.6, "time only": 90.8}
_PAPER_PHASE = {BASE: 0.554, "frequency only": 0.887}


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for name in dataset.variant.values:
        part = dataset.sel(variant=name)
        accuracy = part.accuracy.values
        found.append(
            Claim(
                f"{name}: K right, %",
                float(accuracy.mean()),
                mean_interval(accuracy),
                paper=_PAPER_ACCURACY.get(name),
                source="fig. 12" if name in _PAPER_ACCURACY else "",
                note="The paper's ablations have 100 times as many simulations and "
                "another problem; compare the order, not the numbers."
                if name in _PAPER_ACCURACY
                else "",
            )
        )
        for parameter in PARAMETERS:
            values = part.error.sel(parameter=parameter).values
            paper = _PAPER_PHASE.get(name) if parameter == "phase" else None
            found.append(
                Claim(
                    f"{name}: error of {parameter}",
                    float(values.mean()),
                    mean_interval(values),
                    paper=paper,
                    source="fig. 11" if paper else "",
                )
            )
    if "cells, refined" in dataset.variant:
        pairs = (
            ("cells, joint", BASE, "slots in cells over the paper's"),
            ("cells, refined", "cells, joint", "Gauss-Newton in the slots"),
            ("cells, joint", "cells, factorised", "joint coupling"),
            ("attention, permanent", "attention, Hungarian", "permanent"),
            (BASE, "no K in the context", "K in the context"),
        )
        for mine, other, label in pairs:
            ratio = dataset.error.sel(variant=mine) / dataset.error.sel(variant=other)
            ratio = ratio.sel(parameter="frequency").values
            found.append(
                Claim(
                    f"error of frequency, {label}: {mine} over {other}",
                    float(ratio.mean()),
                    mean_interval(ratio),
                    target="<= 1",
                )
            )
    return found
