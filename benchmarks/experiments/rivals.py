r"""Every method that people would use instead, on the same signals.

Paper: table 1, made quantitative.

Question: How good and how dear are the alternatives?

Protocol: Signals of `tiny`. Those that train have the same signals, passes over them,
encoder and sbi's training loop (the paper's network has an encoder of its own, a
hundred times the parameters, and one pass over as many signals of its own); `ours,
shipped` has trained longer and is no rival of theirs. Seconds are of processor time, on
one thread. p(K | x) and log scores on test signals; C2ST, sliced W2 and the total
variation of p(K | x) against reversible-jump MCMC (`rjmcmc.collapsed`, its own second
run beside) at the reference's most probable K, on the first few of them. A method with
fewer than 50 draws of that K counts as told apart for sure, C2ST = 1. Samplers run on
some of those only. Coverage is that of central intervals given the true K, over all
parameters. Methods that need no training, and the shipped weights, also meet signals of
`paper` and `crowded`.

Losses: Where there is a likelihood and the components are far apart, classical answers
are right, and samplers exact: what a network adds is speed over many observations, and
doubt where there should be some. Training costs more than of others with as many
passes, as slots in cells fit every mode. A few draws in a wrong cell decide the sliced
W2 of a network with this little training; the shipped weights do not have them.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import metrics, problems, rjmcmc
from sbi_slotflow.plots.style import dress
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.circular import circular_mean
from sbi_slotflow.sets.layout import ThetaLayout

from ..experiment import Budget, Claim
from ..intervals import mean_interval, median_interval
from ..isolated import isolated, peak_memory
from ..rivals import RIVALS, Answer, Rival, Training
from ..rivals.classical import PursuitLaplace, SubspaceMDL
from ..rivals.slots import Shipped
from ..store import Cache

PRESETS = ("paper", "crowded")
UNTRAINED = ("ours, shipped", "pursuit + BIC", "pursuit + Laplace", "ESPRIT + MDL")
FLOOR = "second run of the reference"
_LARGE = "paper's network"
_FEWEST = 50
_FEW = ("ours, shipped", "saturated flow", "ESPRIT + MDL")


@dataclass(frozen=True)
class Size:
    """Numbers of signals, passes and draws.

    Attributes:
        num_train: Signals that rivals train on.
        epochs: Passes over them.
        num_test: Test signals.
        num_coverage: Those of them whose draws are judged by the truth.
        num_exact: Those that are compared with the exact posterior.
        num_sampled: Those that samplers see.
        num_draws: Draws of each posterior.
        num_compared: Most draws that a comparison looks at.
        num_hard: Signals of each larger preset.
        rivals: Who takes part.
    """

    num_train: int
    epochs: int
    num_test: int
    num_coverage: int
    num_exact: int
    num_sampled: int
    num_draws: int
    num_compared: int
    num_hard: int
    rivals: tuple[str, ...] = tuple(RIVALS)


BUDGETS = {
    "smoke": Size(64, 1, 6, 2, 1, 1, 300, 200, 1, _FEW),
    "quick": Size(4_000, 4, 200, 30, 4, 2, 10_000, 2_000, 8),
    "full": Size(50_000, 40, 2_000, 500, 50, 50, 10_000, 5_000, 500),
}
WEIGHTS = ("tiny", "paper", "crowded")


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("rivals", budget, seed)
    reference = cache.get("reference", lambda: _reference(size, seed))
    parts = [_as_rival(reference, size)]
    for name in size.rivals:

        def part(name: str = name) -> xr.Dataset:
            if budget == "smoke":
                found, peak = _measure(name, size, seed, reference), peak_memory()
            else:
                found, peak = isolated(_measure, name, size, seed, reference)
            return found.assign(peak=peak)

        parts.append(cache.get(name.replace(" ", "_").replace("'", ""), part))
    dataset = xr.concat(parts, "rival", data_vars="all", join="outer")
    dataset = dataset.assign_coords(rival=[FLOOR, *size.rivals])
    hard = cache.get("hard", lambda: _hard(size, seed))
    return xr.merge([dataset, hard])


def _signals(size: Size, seed: int) -> tuple[Tensor, Tensor]:
    problem = problems.sinusoids("tiny")
    theta = problem.prior.sample((size.num_test,), generator_for(seed, 1_000_003, 0))
    return theta, problem.simulator(theta, generator_for(seed, 1_000_003, 1))


def _reference(size: Size, seed: int) -> xr.Dataset:
    """Two runs of the collapsed sampler on each of the first signals."""
    problem = problems.sinusoids("tiny")
    _, x = _signals(size, seed)
    probs, rows, seconds = [], [], []
    for i in range(size.num_exact):
        started = time.process_time()
        runs = [
            rjmcmc.collapsed(problem, x[i], seed=2 * i + j, num_draws=2_500)
            for j in range(2)
        ]
        seconds.append(0.5 * (time.process_time() - started))
        probs.append(torch.stack([r.cardinality().probs.double() for r in runs]))
        drawn = [
            r.sample((size.num_compared * 2,), generator=generator_for(seed, i))
            for r in runs
        ]
        rows.append(torch.stack(drawn).float())
    return xr.Dataset(
        {
            "reference_probs": (("exact", "run", "K"), torch.stack(probs).numpy()),
            "reference_rows": (("exact", "run", "draw", "entry"), torch.stack(rows)),
            "reference_seconds": ("exact", seconds),
        }
    )


def _as_rival(reference: xr.Dataset, size: Size) -> xr.Dataset:
    """The second run of the reference, judged as the rivals are."""
    distances = []
    for i in range(size.num_exact):
        here = reference.isel(exact=i)
        second = here.isel(run=1)
        answer = Answer(
            torch.from_numpy(second.reference_probs.values),
            torch.from_numpy(second.reference_rows.values),
        )
        distances.append(_distances(answer, here, size, i))
    return _columns(distances, "exact").assign(
        seconds=("exact", reference.reference_seconds.values)
    )


def _measure(name: str, size: Size, seed: int, reference: xr.Dataset) -> xr.Dataset:
    """Fit one rival and judge it."""
    problem = problems.sinusoids("tiny")
    rival, training, seconds = RIVALS[name](), None, 0.0
    if rival.trains:
        theta = problem.prior.sample((size.num_train,), generator_for(seed, 10))
        x = problem.simulator(theta, generator_for(seed, 11))
        epochs = 1 if name == _LARGE else size.epochs
        training = Training(theta, x, epochs, seed)
    started = time.process_time()
    rival.fit(problem, training)
    if training is not None:
        seconds = time.process_time() - started
    theta, x = _signals(size, seed)
    data = _scores(rival, theta, x, size, seed, reference)
    network = rival.network
    data["training_seconds"] = ((), seconds)
    data["training_signals"] = ((), size.num_train if training else 0)
    data["epochs"] = ((), training.epochs if training else 0)
    data["parameters"] = (
        (),
        0 if network is None else sum(p.numel() for p in network.parameters()),
    )
    return xr.Dataset(data)


def _scores(
    rival: Rival, theta: Tensor, x: Tensor, size: Size, seed: int, reference: xr.Dataset
) -> dict[str, Any]:
    layout = rival.problem.layout
    true_k = layout.cardinality(theta)
    probs = torch.full((len(x), layout.max_cardinality + 1), torch.nan).double()
    many = rival.probs(x)
    if many is not None:
        probs = many
    distances, seconds, levels = [], [], []
    num = len(x) if many is None else max(size.num_exact, size.num_coverage)
    for i in range(size.num_sampled if rival.samples_anew else num):
        exact = i < size.num_exact
        draws = size.num_draws if exact else 500
        started = time.process_time()
        answer = rival.infer(x[i], draws, seed + i, truth=theta[i])
        spent = time.process_time() - started
        probs[i] = answer.probs
        if exact:
            seconds.append(spent)
            distances.append(_distances(answer, reference.isel(exact=i), size, i))
        if i < size.num_coverage and answer.rows is not None:
            levels += _levels(layout, answer.rows, theta[i])
    chosen = probs.gather(-1, true_k.unsqueeze(-1)).squeeze(-1)
    correct = (probs.argmax(-1) == true_k).double()
    correct[probs.isnan().any(-1)] = torch.nan
    density = rival.log_prob_given_k(theta, x)
    each = torch.full((len(x),), torch.nan).double()
    if density is not None:
        each = torch.where(true_k > 0, -density / true_k, torch.nan)
    inside = np.array(levels)
    missing = size.num_exact - len(seconds)
    seconds += [np.nan] * missing
    distances += [dict.fromkeys(distances[0], np.nan)] * missing
    columns: dict[Any, Any] = {
        "correct": ("test", correct.numpy()),
        "score": ("test", -chosen.clamp(min=1e-6).log().numpy()),
        "component_score": ("test", each.numpy()),
        "coverage_90": ((), (inside < 0.9).mean() if levels else np.nan),
        "coverage_50": ((), (inside < 0.5).mean() if levels else np.nan),
        "num_levels": ((), float(len(levels))),
        "seconds": ("exact", seconds),
        **{name: v.variable for name, v in _columns(distances, "exact").items()},
    }
    return columns


def _distances(
    answer: Answer, reference: xr.Dataset, size: Size, i: int
) -> dict[str, float]:
    layout = problems.sinusoids("tiny").layout
    first = reference.isel(run=0)
    probs = torch.from_numpy(first.reference_probs.values)
    exact = torch.from_numpy(first.reference_rows.values)
    k = int(probs.argmax())
    found = {
        "variation": float(metrics.total_variation(answer.probs, probs)),
        "c2st": np.nan,
        "sliced_w2": np.nan,
    }
    if answer.rows is None:
        return found
    rows, exact = (
        r[layout.cardinality(r) == k][: size.num_compared] for r in (answer.rows, exact)
    )
    if len(rows) < _FEWEST:
        return {**found, "c2st": 1.0}
    compared = metrics.compare(rows.float(), exact.float(), layout=layout, k=k, seed=i)
    return {**found, "c2st": compared.c2st, "sliced_w2": compared.sliced_w2}


def _levels(layout: ThetaLayout, rows: Tensor, truth: Tensor) -> list[float]:
    """Least levels of central intervals that hold the truth, a parameter each."""
    k = int(layout.cardinality(truth))
    rows = rows[layout.cardinality(rows) == k]
    if len(rows) < _FEWEST:
        return []
    parts, true = layout.unpack(rows.double()), layout.unpack(truth.double())
    draws = torch.cat([parts.shared, parts.components[:, :k].flatten(1)], -1)
    values = torch.cat([true.shared, true.components[:k].flatten()])
    periods = [math.inf] * layout.num_shared + [*layout.component_periods] * k
    levels = []
    for column, value, period in zip(draws.T, values, periods, strict=True):
        if math.isfinite(period):
            middle = circular_mean(column.unsqueeze(-1), [period])
            far = [
                ((v - middle + period / 2) % period - period / 2).abs()
                for v in (column, value)
            ]
            levels.append(float((far[0] < far[1]).double().mean()))
        else:
            levels.append(abs(2 * float((column < value).double().mean()) - 1))
    return levels


def _hard(size: Size, seed: int) -> xr.Dataset:
    """Methods without training, and shipped weights, on the larger presets."""
    score = np.full((len(PRESETS), len(UNTRAINED), size.num_hard), np.nan)
    correct, seconds = score.copy(), score.copy()
    for p, preset in enumerate(PRESETS):
        problem = problems.sinusoids(preset)
        theta = problem.prior.sample((size.num_hard,), generator_for(seed, 20, p))
        x = problem.simulator(theta, generator_for(seed, 21, p))
        makers = (
            lambda preset=preset: Shipped(f"sinusoids-{preset}"),
            lambda: PursuitLaplace("bic"),
            lambda: PursuitLaplace("evidence"),
            SubspaceMDL,
        )
        for m, make in enumerate(makers):
            rival = make()
            rival.fit(problem, None)
            for i in range(size.num_hard):
                started = time.process_time()
                answer = rival.infer(x[i], size.num_compared, seed + i)
                seconds[p, m, i] = time.process_time() - started
                k = int(problem.layout.cardinality(theta[i]))
                correct[p, m, i] = int(answer.probs.argmax()) == k
                score[p, m, i] = -math.log(max(float(answer.probs[k]), 1e-6))
    dims = ("preset", "untrained", "hard")
    return xr.Dataset(
        {
            "hard_score": (dims, score),
            "hard_correct": (dims, correct),
            "hard_seconds": (dims, seconds),
        },
        {"preset": list(PRESETS), "untrained": list(UNTRAINED)},
    )


def _columns(rows: list[dict[str, float]], dim: str) -> xr.Dataset:
    return xr.Dataset({name: (dim, [row[name] for row in rows]) for name in rows[0]})


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).ravel()
    names = [str(name) for name in dataset.rival.values]
    places = np.arange(len(names))[::-1]
    show = (
        ("correct", "test", "K right", (0, 1.02), None),
        ("score", "test", "- log q(true K), nats", None, None),
        ("component_score", "test", "- log q(component), nats", None, None),
        ("c2st", "exact", "C2ST to the exact posterior", (0.45, 1.02), 0.5),
        ("sliced_w2", "exact", "sliced W2, exact sd", None, None),
        ("seconds", "exact", "CPU seconds for 10,000 draws", None, None),
    )
    for axes, (name, dim, label, limits, ideal) in zip(panels, show, strict=True):
        values = dataset[name].astype(float)
        middle = values.mean(dim, skipna=True).values
        colours = ["C0" if n.startswith("ours") else "0.55" for n in names]
        colours[0] = "C2"
        axes.barh(places, np.nan_to_num(middle), color=colours, height=0.7)
        if dim == "exact":
            for place, row in zip(places, values.values, strict=True):
                axes.plot(row, np.full(len(row), place), "k.", markersize=3)
        if ideal is not None:
            axes.axvline(ideal, color="C2", linewidth=1)
        if limits is not None:
            axes.set_xlim(*limits)
        if name in ("seconds", "sliced_w2"):
            axes.set_xscale("log")
        dress(axes, label, "", "")
        axes.set_yticks(places, names, fontsize=7)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    there = [str(name) for name in dataset.rival.values]
    ours = "ours" if "ours" in there else "ours, shipped"
    others = [name for name in there if name != ours]
    wanted = (
        ("correct", "test", "K right on tiny, %", 100.0, "higher"),
        ("score", "test", "- log q(true K) on tiny, nats", 1.0, "lower"),
        ("component_score", "test", "- log q(component), nats", 1.0, "lower"),
        ("variation", "exact", "total variation of p(K given x)", 1.0, "lower"),
        ("c2st", "exact", "C2ST to the exact posterior", 1.0, "lower"),
        ("sliced_w2", "exact", "sliced W2 to the exact posterior, sd", 1.0, "lower"),
        ("seconds", "exact", "CPU seconds for 10,000 draws", 1.0, "lower"),
        ("training_seconds", None, "CPU seconds of training", 1.0, "lower"),
        ("epochs", None, "passes over the training signals", 1.0, None),
        ("parameters", None, "parameters", 1.0, None),
        ("peak", None, "peak memory of the process, MiB", 1.0, "lower"),
    )
    found = []
    for name, dim, label, scale, better in wanted:
        values = scale * dataset[name].astype(float)
        mean = values if dim is None else values.mean(dim, skipna=True)
        mine = values.sel(rival=ours).values
        interval = None if dim is None else mean_interval(mine)
        rivals = {o: float(mean.sel(rival=o)) for o in others}
        rivals = {o: v for o, v in rivals.items() if np.isfinite(v)}
        if name == "training_seconds":  # nothing to train is no rival in this
            rivals = {o: v for o, v in rivals.items() if v > 0}
        found.append(
            Claim(
                label,
                float(mean.sel(rival=ours)),
                interval,
                better=better,  # pyright: ignore[reportArgumentType]
                rivals=rivals,
                note=_NOTES.get(name, ""),
            )
        )
    for level in (50, 90):
        coverage = 100 * dataset[f"coverage_{level}"]
        values = {o: float(coverage.sel(rival=o)) for o in there}
        found.append(
            Claim(
                f"coverage of {level} % intervals given the true K, %",
                values.pop(ours),
                rivals={o: v for o, v in values.items() if np.isfinite(v)},
                note="Of draws with the true K, over all parameters.",
            )
        )
    for preset in dataset.preset.values:
        for name, label, scale, better in (
            ("hard_correct", "K right on {}, %", 100.0, "higher"),
            ("hard_score", "- log q(true K) on {}, nats", 1.0, "lower"),
            ("hard_seconds", "median CPU seconds an observation, {}", 1.0, "lower"),
        ):
            values = scale * dataset[name].sel(preset=preset)
            middle = values.median if name == "hard_seconds" else values.mean
            spread = median_interval if name == "hard_seconds" else mean_interval
            centre = {str(u): float(middle("hard").sel(untrained=u)) for u in UNTRAINED}
            mine = values.sel(untrained=UNTRAINED[0]).values
            found.append(
                Claim(
                    label.format(preset),
                    centre.pop(UNTRAINED[0]),
                    spread(mine),
                    better=better,  # pyright: ignore[reportArgumentType]
                    rivals=centre,
                    note="Ours: the shipped weights of that preset.",
                )
            )
    return found


_NOTES = {
    "score": "A wrong K that is certain costs log 10^6: ESPRIT with MDL has no doubts.",
    "component_score": "In nats of (A, phi, f), and sigma shared among the components; "
    "MNPE and the paper's network have no such density.",
    "c2st": "1 where fewer than 50 draws have the reference's most probable K.",
    "seconds": "The first call of a process compiles; samplers do most work here.",
    "peak": "Each in a process of its own, packages (about 0.5 GiB) included.",
}
