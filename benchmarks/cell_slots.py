"""Slots in cells of the location axis: ``python -m benchmarks.cell_slots``.

Parts, each a function: ``without_fits`` (posterior deviations over exact ones of slots
without Gauss-Newton steps), ``close`` (correlations of close components), ``scaling``
(a sample's cost as K grows to 100) and ``eryn`` (Eryn with slots as proposals against
plain Eryn).
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Uniform

from sbi_slotflow import (
    AdditiveSimulator,
    SlotNPE,
    VariableKPrior,
    WhiteNoise,
    metrics,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cell_chain import ChainGivenX
from sbi_slotflow.nn.estimator import SlotDensityEstimator
from sbi_slotflow.pretrained import RECIPES
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.sinusoids.grid import Grid, SineSignal
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.circular import circular_mean
from sbi_slotflow.sets.layout import ThetaLayout
from sbi_slotflow.training.stages import StageBuilder

from .common import PERIODS, TEST, Numbers, progress, ready, run_parts, simulate
from .intervals import spread
from .model_cards import widths_rows

_CHECKPOINTS = Path("checkpoints")
_SIMULATIONS = 192_000


def without_fits(num_signals: int, seed: int) -> Numbers:
    """Posterior deviations over exact ones of slots without Gauss-Newton, ``paper``.

    Everything is trained, from the shipped encoder, cardinality and cells; the training
    may be stopped and taken up again.
    """
    problem, shipped = ready("paper")
    weights = shipped.posterior_estimator.state_dict()
    start = StageBuilder(slot_nn(problem, refine_slots=0), weights, part="local")

    def build(theta: Tensor, x: Tensor) -> SlotDensityEstimator:
        return start(theta, x).requires_grad_()

    trainer = SlotNPE(problem.prior, build)
    trainer.train_online(
        problem.simulator,
        num_simulations=_SIMULATIONS,
        learning_rate=1e-3,
        seed=2,
        checkpoint=_CHECKPOINTS / "sinusoids-paper-amortized.safetensors",
    )
    return widths_rows(problem, trainer.build_posterior(), num_signals, seed)


def close(num_signals: int, seed: int) -> Numbers:
    """Correlations of two components closer than a resolution element, ``crowded``."""
    problem, posterior = ready("crowded")
    layout = problem.layout
    generator = generator_for(TEST, seed, 2)
    shape = (num_signals, 2)
    components = torch.zeros(num_signals, layout.max_cardinality, 3)
    components[:, :2, 0] = 0.5 + torch.rand(shape, generator=generator)
    components[:, :2, 1] = math.tau * torch.rand(shape, generator=generator)
    gap = 0.3 + 0.7 * torch.rand(num_signals, generator=generator)
    low, high = problem.prior.component_marginals[2].bounds
    first = low + (high - low - 1 / 300) * torch.rand(num_signals, generator=generator)
    components[:, :2, 2] = torch.stack([first, first + gap / 300], -1)
    k = torch.full((num_signals,), 2)
    theta = layout.pack(k, components, torch.full((num_signals, 1), 0.5))
    x = problem.simulator(theta, generator)
    kept: dict[str, list[float]] = {}
    for i in range(num_signals):
        runs = [
            rjmcmc.collapsed(problem, x[i], seed=2 * i + run, num_draws=5_000, thin=80)
            for run in range(2)
        ]
        if float(runs[0].cardinality().probs[2]) < 0.3:
            progress(f"signal {i + 1}: two components are not told apart, left out")
            continue
        draws = posterior.sample((10_000,), x[i], k=2, generator=generator_for(seed, i))
        found = metrics.compare(
            draws, *runs, layout=layout, k=2, periods=PERIODS, seed=seed
        )
        assert found.floor is not None
        for name, result in (("amortized", found), ("floor", found.floor)):
            assert result.correlation_error is not None
            kept.setdefault(name, []).append(result.correlation_error)
        exact, again = (run.rows[layout.cardinality(run.rows) == 2] for run in runs)
        for name, rows in (("amortized", draws), ("floor", again)):
            # Of ranks: a few draws in a wrong cell do not decide them.
            pair = _ranks(layout, rows, exact), _ranks(layout, exact, exact)
            error = metrics.correlation_error(*pair)
            kept.setdefault(f"{name}, of ranks", []).append(error)
        progress(f"signal {i + 1}: { {n: round(v[-1], 3) for n, v in kept.items()} }")
    return {name: spread(values) for name, values in kept.items()}


def _ranks(layout: ThetaLayout, rows: Tensor, reference: Tensor) -> Tensor:
    """Ranks of both components' parameters ``(S, 2, 3)``, phases about the exact."""
    values, others = (
        layout.unpack(part).components[:, :2].double() for part in (rows, reference)
    )
    middle = circular_mean(others[..., 1], [math.tau, math.tau])
    phase = torch.remainder(values[..., 1] - middle + math.pi, math.tau)
    values = torch.stack([values[..., 0], phase, values[..., 2]], -1)
    return values.argsort(0).argsort(0).double()


def eryn(num_signals: int, seed: int) -> Numbers:
    """Eryn with slots as proposals against plain Eryn, ``crowded``."""
    from sbi_slotflow.rjmcmc.eryn_moves import SlotFlowMove

    problem, posterior = ready("crowded")
    _, x = simulate(problem, num_signals, TEST + seed)
    seconds: dict[str, list[float]] = {}
    for i in range(num_signals):
        exact = rjmcmc.collapsed(problem, x[i], seed=i).cardinality().probs
        for name in ("plain", "with slots"):
            started = time.perf_counter()
            options = {}
            if name == "with slots":
                move = SlotFlowMove.from_posterior(posterior, x[i])
                options["moves"] = [move]
            sampler = rjmcmc.eryn_sampler(
                problem, x[i], start="prior", seed=seed + i, **options
            )
            # Three times as many steps for the one that is expected to need them.
            steps = 1_500 if name == "plain" else 500
            draws = sampler.run(steps, burn_in=steps // 2, thin=5)
            spent = time.perf_counter() - started
            k = problem.layout.cardinality(draws.theta).double().numpy()
            effective = max(1.0, ensemble_size(k))
            distance = metrics.total_variation(draws.cardinality().probs, exact)
            seconds.setdefault(name, []).append(spent / effective)
            seconds.setdefault(f"{name}, TV from exact", []).append(distance.item())
            progress(
                f"signal {i + 1}, {name}: {spent:.0f} s, {effective:.0f} effective "
                f"draws of K, TV {distance.item():.3f}"
            )
    both = zip(seconds["with slots"], seconds["plain"], strict=True)
    return {
        "seconds per effective draw of K, with slots over plain": spread(
            [a / b for a, b in both]
        ),
        **{name: spread(values) for name, values in seconds.items()},
    }


def ensemble_size(values: np.ndarray) -> float:
    """Effective size of (walkers, draws): variance over that of the grand mean."""
    mean = values.mean(0)
    size: Any = array_stats.ess(mean[None])
    return float(size) * float(values.var() / max(mean.var(), 1e-300))


def scaling(num_signals: int, seed: int) -> Numbers:
    """Seconds a sample as K grows to 100 in a band that widens with it.

    The network is untrained but for its cells, which are told where the components
    are: a trained one knows as much. What remains is what a sample costs.
    """
    numbers: Numbers = {}
    for steps in (0, 3):
        sizes, seconds = (10, 20, 50, 100), []
        for k in sizes:
            problem = wide_problem(k)
            theta, x = simulate(problem, 2, seed)
            estimator = slot_nn(problem, refine_slots=steps)(theta, x).eval()
            head = estimator.component_head
            assert isinstance(head, AutoregressiveHead)
            position = head.local_chart.coordinates(
                problem.layout.unpack(theta).components
            )[0][..., 0]
            encoding = estimator.encode(x[:1])
            cells = head.axis.cells(position[:1], head.tokens_and_edges(encoding)[1])
            times = []
            for _ in range(max(2, num_signals)):
                started = time.perf_counter()
                with _told(cells[0]):
                    estimator.sample((1_000,), x[:1], torch.tensor(k))
                times.append(time.perf_counter() - started)
            seconds.append(min(times) / 1_000)
            progress(f"refine_slots={steps}, K = {k}: {seconds[-1]:.2e} s a sample")
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        numbers[f"refine_slots={steps}"] = {
            "K": list(sizes),
            "seconds a sample": seconds,
            "exponent": float(slope),
        }
    return numbers


@contextmanager
def _told(cells: Tensor) -> Iterator[None]:
    """Chains know where the components are, at the cost of what they always do."""
    plain = ChainGivenX._scores

    def told(chain: ChainGivenX, *state: Tensor) -> Tensor:
        scores, before = plain(chain, *state), state[-1]
        there = torch.zeros(scores.shape[-1], dtype=torch.bool)
        there[cells] = True
        later = torch.arange(scores.shape[-1]) > before.unsqueeze(-1)
        return torch.where(there & later, 50.0, -50.0)

    with patch.object(ChainGivenX, "_scores", told):
        yield


def wide_problem(k: int) -> Sinusoids:
    """K sinusoids in a band of 0.05 Hz each, else as ``paper``."""
    paper = RECIPES["sinusoids-paper"].problem
    top = 0.5 + 0.05 * k
    component = MultipleIndependent(
        [
            Uniform(torch.tensor([0.5]), torch.tensor([1.5])),
            Uniform(torch.zeros(1), torch.tensor([math.tau])),
            Uniform(torch.tensor([0.5]), torch.tensor([top])),
        ],
        validate_args=False,
    )
    weights = [0.0] * k + [1.0]
    prior = VariableKPrior(
        component,
        weights,
        shared=paper.prior.shared,
        min_separation=0.01,
        order_by=2,
        component_names=paper.component_names,
        shared_names=paper.shared_names,
    )
    grids = (Grid(300.0, 20.0), Grid(10.0, 512.0))
    simulator = AdditiveSimulator(SineSignal(grids), WhiteNoise(), prior.layout)
    return Sinusoids(f"sinusoids-{k}", prior, simulator, grids)


PARTS = {
    "without_fits": (without_fits, 200),
    "close": (close, 20),
    "scaling": (scaling, 3),
    "eryn": (eryn, 3),
}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
