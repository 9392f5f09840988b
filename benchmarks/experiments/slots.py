r"""What the slots look for.

Paper: fig. 4, fig. 15, fig. 16, fig. 17, app. B.1, app. B.2.

Question: Do slots specialise, does a slot keep its component, and which parameter
organises the space of their contexts?

Protocol: (1) The shipped `paper` weights, slots in cells, K = 10: there slot k is the
k-th component by construction, so this shows what that means, not what was learnt.
(2) The paper's kind, global slots under Hungarian matching, trained here on `tiny` at
K = 3. One draw of each signal is matched with the truth (`slots.match_slots`).
Stability: the share of draws of one signal in which a slot draws the same component.
Contexts: t-SNE (a picture), and the cross-validated R^2 of nearest neighbours that
predict each parameter from the context (a number), phases by their cosine and sine.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from sbi_slotflow import SlotPosterior, problems, slot_nn
from sbi_slotflow.plots.style import SMALL, dress
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from ..common import TEST, given_k, ready, simulate
from ..experiment import Budget, Claim
from ..slots.figures import (
    draw_contexts,
    draw_specialisation,
    draw_stability,
    embedded,
)
from ..slots.matches import match_slots, slot_stability
from ..store import Cache
from ..training import PARAMETERS, train

KINDS = ("cells, paper", "global, tiny")


@dataclass(frozen=True)
class Size:
    """Signals to match, draws for the stability, simulations of the global slots."""

    num_signals: int
    num_stability: int
    num_draws: int
    num_simulations: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(20, 1, 10, 64),
    "quick": Size(400, 10, 50, 9_600),
    "full": Size(5_000, 500, 100, 1_000_000),
}
WEIGHTS = ("paper",)


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("slots", budget, seed)
    shipped, small = KINDS
    parts = {
        shipped: cache.get("cells", lambda: _shipped(size, seed)),
        small: cache.get("global", lambda: _small(size, seed, cache)),
    }
    return xr.merge(
        [
            part.rename({n: f"{name}/{n}".replace("/", ": ") for n in part}).rename(
                {d: f"{d} of {name}" for d in part.dims if d != "parameter"}
            )
            for name, part in parts.items()
        ]
    )


def _shipped(size: Size, seed: int) -> xr.Dataset:
    problem, posterior = ready("paper")
    return _look(given_k(problem, 10), posterior, 10, size, seed)


def _small(size: Size, seed: int, cache: Cache) -> xr.Dataset:
    problem = problems.sinusoids("tiny")
    options: dict[str, Any] = {
        "slots": "global",
        "hidden_features": 64,
        "trunk_features": 64,
        "flow_hidden_features": 32,
    }
    posterior, _ = train(
        problem,
        slot_nn(problem, **options),
        size.num_simulations,
        seed,
        cache.path("global", ".safetensors"),
        validate_every=50,
    )
    return _look(given_k(problem, 3), posterior, 3, size, seed)


def _look(
    problem: Sinusoids, posterior: SlotPosterior, k: int, size: Size, seed: int
) -> xr.Dataset:
    theta, x = simulate(problem, size.num_signals, TEST + seed)
    found = match_slots(posterior, theta, x, generator_for(seed, 1))
    shares = torch.stack(
        [
            slot_stability(posterior, theta[i], x[i], size.num_draws, generator_for(i))
            for i in range(size.num_stability)
        ]
    )
    slots = np.broadcast_to(found.order.argsort().numpy(), found.components.shape[:2])
    components = found.components.flatten(0, 1).double().numpy()
    contexts = found.contexts.flatten(0, 1).double().numpy()
    step = max(1, len(contexts) // 900)
    points = embedded(contexts[::step], "tsne", seed)
    return xr.Dataset(
        {
            "frequency": (
                ("signal", "slot"),
                found.components[:, found.order, 2].numpy(),
            ),
            "stability": (("matched", "slot", "component"), shares.numpy()),
            "r_squared": (
                "parameter",
                _predicted(contexts[::step], components[::step]),
            ),
            "embedding": (("point", "axis"), points.astype("f4")),
            "truth": (("point", "entry"), components[::step].astype("f4")),
            "slot_of_point": ("point", slots.ravel()[::step].astype("u1")),
        },
        {"parameter": list(PARAMETERS)},
    )


def _predicted(contexts: np.ndarray, components: np.ndarray) -> list[float]:
    """Cross-validated R^2 of each parameter from the 10 nearest contexts."""
    vectors = StandardScaler().fit_transform(contexts)
    amplitude, phase, frequency = components.T
    circle = np.stack([np.cos(phase), np.sin(phase)], -1)
    shares = []
    for target in (amplitude[:, None], circle, frequency[:, None]):
        model = KNeighborsRegressor(10, weights="distance")
        guess = np.asarray(cross_val_predict(model, vectors, target, cv=5))
        guess = guess.reshape(target.shape)
        shares.append(1 - np.square(guess - target).sum() / _variation(target))
    return shares


def _variation(target: np.ndarray) -> float:
    return float(np.square(target - target.mean(0)).sum())


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(11.0, 6.6), layout="constrained")
    for row, kind in zip(figure.subplots(2, 4), KINDS, strict=True):
        values = dataset[f"{kind}: frequency"].values
        draw_specialisation(row[0], values)
        row[0].tick_params(labelsize=SMALL)
        dress(row[0], "slot, by mean frequency", "matched frequency (Hz)", kind)
        shares = dataset[f"{kind}: stability"].values[0]
        draw_stability(row[1], shares)
        score = consistency(dataset, kind)
        title = f"one signal; consistency {np.mean(score):.2f}"
        dress(row[1], "component", "slot", title)
        points = dataset[f"{kind}: embedding"].values
        truth = dataset[f"{kind}: truth"].values
        for axes, index, name in ((row[2], 2, "frequency"), (row[3], 0, "amplitude")):
            draw_contexts(axes, points, truth[:, index])
            dress(axes, "", "", f"t-SNE of contexts: {name}")
    return figure


def consistency(dataset: xr.Dataset, kind: str) -> np.ndarray:
    """Probability that two draws of a slot are of one component, by signal."""
    shares = dataset[f"{kind}: stability"].values
    return np.square(shares).sum(-1).mean(-1)


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for kind in KINDS:
        score = consistency(dataset, kind)
        cells = kind.startswith("cells")
        note = "By construction: slots in cells stand in order." if cells else ""
        found.append(
            Claim(
                f"{kind}: consistency of slots over draws, mean over signals",
                float(score.mean()),
                paper=1.0,
                source="fig. 15",
                target=">= 0.99" if cells else None,
                note=note,
            )
        )
        frequency = dataset[f"{kind}: frequency"].values
        total = _variation(frequency.reshape(-1, 1))
        within = float(np.square(frequency - frequency.mean(0)).sum())
        found.append(
            Claim(
                f"{kind}: share of the frequency's variance that the slot explains",
                1 - within / total,
                note=note,
            )
        )
        for name in PARAMETERS:
            value = dataset[f"{kind}: r_squared"].sel(parameter=name)
            found.append(
                Claim(
                    f"{kind}: R^2 of {name} from nearest contexts",
                    float(value),
                    paper="highest" if name == "frequency" else None,
                    source="fig. 16" if name == "frequency" else "",
                )
            )
    return found
