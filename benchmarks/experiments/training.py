r"""How a training goes.

Paper: fig. 20, app. B.4, sec. 5.2.1.

Question: Do training and validation loss stay together, and what does a training cost?

Protocol: Two trainings on fresh simulations of `tiny` with equal budgets: the package's
default (AdamW, cosine, averaged weights) and the paper's recipe (Adam, halved on
plateaus; its network in small). The gap is the mean over the last third of validations
of training less validation loss: fresh simulations cannot be overfitted, so beyond
noise it is the advantage of averaged weights. The shipped weights' simulations stand
beside the paper's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from sbi_slotflow import problems, slot_nn
from sbi_slotflow.plots.style import DATA, FONT, POSTERIOR, dress
from sbi_slotflow.pretrained import RECIPES

from ..experiment import Budget, Claim
from ..intervals import mean_interval
from ..store import Cache, concatenated
from ..training import train

TERMS = ("cardinality", "flow", "shared")
_KEPT = [f"{kind}_{term}" for kind in ("train", "val") for term in TERMS]
_NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper's recipe, small": {
        "slots": "global",
        "chart": "circle",
        "phase_weight": 2.0,
        "hidden_features": 64,
        "trunk_features": 64,
        "flow_hidden_features": 32,
    },
}
# Signals times epochs (8 million, 187 epochs), and GPU hours (sec. 5.2.1).
PAPER_SEEN, PAPER_HOURS = 8e6 * 187, 305


@dataclass(frozen=True)
class Size:
    """Simulations of each training, and steps between validations."""

    num_simulations: int
    validate_every: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(128, 1),
    "quick": Size(9_600, 10),
    "full": Size(1_000_000, 100),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("training", budget, seed)
    problem = problems.sinusoids("tiny")
    parts = {}
    for i, (name, options) in enumerate(_NETWORKS.items()):
        recipe: dict[str, Any] = {}
        if name != "default":
            recipe = {"recipe": "paper", "learning_rate": 1e-3, "ema_decay": None}

        def compute(i: int = i, options=options, recipe=recipe) -> xr.Dataset:
            _, history = train(
                problem,
                slot_nn(problem, **options),
                size.num_simulations,
                seed,
                cache.path(f"state-{i}", ".safetensors"),
                validate_every=size.validate_every,
                **recipe,
            )
            columns = ("step", "learning_rate", "val_correct", *_KEPT)
            return xr.Dataset(
                {c: ("validation", [entry[c] for entry in history]) for c in columns}
            )

        parts[name] = cache.get(f"network-{i}", compute)
    return concatenated(list(parts.values()), xr.Variable("network", list(parts)))


def total(dataset: xr.Dataset, kind: str) -> xr.DataArray:
    """The loss: the sum of the terms."""
    return sum((dataset[f"{kind}_{term}"] for term in TERMS), start=xr.DataArray(0.0))


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, dataset.network.values, strict=False):
        part = dataset.sel(network=name)
        axes.plot(part.step, total(part, "train"), color=DATA, label="training")
        axes.plot(part.step, total(part, "val"), color=POSTERIOR, label="validation")
        rate = part.learning_rate.values
        halved = np.isclose(rate[1:], 0.5 * rate[:-1])
        for step in part.step.values[1:][halved]:
            axes.axvline(step, color="black", linewidth=0.6, linestyle=":")
        axes.legend(fontsize=FONT - 1, frameon=False)
        dress(axes, "step", "loss (nats)", name)
    for name, colour in zip(dataset.network.values, (POSTERIOR, DATA), strict=True):
        part = dataset.sel(network=name)
        panels[2].plot(part.step, 100 * part.val_correct, color=colour, label=name)
    panels[2].legend(fontsize=FONT - 1, frameon=False)
    dress(panels[2], "step", "K right (%)", "cardinality")
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for name in dataset.network.values:
        part = dataset.sel(network=name)
        last = slice(-max(2, part.sizes["validation"] // 3), None)
        gap = (total(part, "train") - total(part, "val")).values[last]
        found += [
            Claim(
                f"{name}: training less validation loss at the end, nats",
                float(gap.mean()),
                mean_interval(gap),
                paper=0.01,
                source="app. B.4",
            ),
            Claim(
                f"{name}: K right at the end, %",
                100 * float(part.val_correct[-1]),
            ),
        ]
    budgets = {n: sum(s.num_simulations for s in r.stages) for n, r in RECIPES.items()}
    found.append(
        Claim(
            "signals seen in training, sinusoids-paper weights",
            float(budgets["sinusoids-paper"]),
            paper=PAPER_SEEN,
            source="sec. 5.2.1",
            better="lower",
            note=f"The paper: 8 million signals, 187 epochs, {PAPER_HOURS} GPU hours.",
        )
    )
    return found
