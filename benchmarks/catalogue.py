"""Are catalogues right? ``python -m benchmarks.catalogue --keep``.

Every source of every catalogue says how probable it is to be there. Over many signals
the mean of these numbers must equal the share of sources that are there, at every
level, and a share of 90 % of those that are there must lie inside their intervals. A
true component is assigned to the sources as a draw's components are. ``collapsed``
takes the draws from the reference sampler: what is wrong there is the catalogue's
fault, what is wrong only with the networks is theirs.
"""

import time
from itertools import pairwise
from typing import Any

import numpy as np

from sbi_slotflow import build_catalogue, load_pretrained, problems, rjmcmc
from sbi_slotflow.seeding import generator_for

from .common import Numbers, progress, run_parts, simulate
from .intervals import spread

NUM_DRAWS = 1_000
CI_PROB = 0.9
EDGES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0 + 1e-9)


def judge(preset: Any, reference: bool, num: int, seed: int) -> Numbers:
    """Catalogues of simulated signals against the truth."""
    problem = problems.sinusoids(preset)
    theta, x = simulate(problem, num, seed)
    posterior = load_pretrained(f"sinusoids-{preset}")
    columns: dict[str, list[np.ndarray]] = {"existence": [], "there": []}
    inside: dict[str, list[np.ndarray]] = {n: [] for n in problem.component_names}
    listed, once, seconds = [], [], []
    for i in range(num):
        if reference:
            draws = rjmcmc.collapsed(problem, x[i], seed=seed, num_draws=1_000)
            samples = draws.rows
        else:
            generator = generator_for(seed, 2, i)
            samples = posterior.sample((NUM_DRAWS,), x[i], generator=generator)
        started = time.perf_counter()
        table = build_catalogue(
            samples, problem.layout, ci_prob=CI_PROB, true_theta=theta[i]
        )
        seconds.append(time.perf_counter() - started)
        there = np.isfinite(table["true_frequency"].values)
        columns["existence"].append(table["existence"].values)
        columns["there"].append(there)
        for name, values in inside.items():
            truth = table[f"true_{name}"].values
            within = (table[f"{name}_low"].values <= truth) & (
                truth <= table[f"{name}_high"].values
            )
            values.append(within[there])
        k = int(problem.layout.cardinality(theta[i]))
        listed.append(there.sum() / max(k, 1))
        once.append(there.sum() == k and (table["existence"].values[there] > 0.5).all())
        if i % 20 == 19:
            progress(f"  {preset} {i + 1} of {num}")
    existence = np.concatenate(columns["existence"])
    there = np.concatenate(columns["there"])
    coverage = {
        name: spread(np.concatenate(values).astype(float).tolist())
        for name, values in inside.items()
    }
    levels = {}
    for low, high in pairwise(EDGES):
        chosen = (existence >= low) & (existence < high)
        if chosen.any():
            levels[f"{low:g}-{min(high, 1):g}"] = {
                "mean existence": float(existence[chosen].mean()),
                "there": spread(there[chosen].astype(float).tolist()),
            }
    difference = spread((there - existence).tolist())
    return {
        "signals": num,
        "sources listed": len(existence),
        "mean existence": float(existence.mean()),
        "share there": float(there.mean()),
        "share there less mean existence": difference,
        "by existence": levels,
        "coverage of 90 % intervals": coverage,
        "share of true components listed": spread(listed),
        "signals whose true components are all listed at more than 1/2": spread(
            np.array(once, float).tolist()
        ),
        "seconds a catalogue": spread(seconds),
    }


def paper(num: int, seed: int) -> Numbers:
    """The paper's signals, by shipped weights."""
    return judge("paper", False, num, seed)


def crowded(num: int, seed: int) -> Numbers:
    """Crowded signals, by shipped weights."""
    return judge("crowded", False, num, seed)


def collapsed(num: int, seed: int) -> Numbers:
    """Crowded signals, by the reference sampler."""
    return judge("crowded", True, num, seed)


if __name__ == "__main__":
    parts = {"paper": (paper, 200), "crowded": (crowded, 100)}
    run_parts(parts | {"collapsed": (collapsed, 30)}, __doc__)
