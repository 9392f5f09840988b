"""What the shipped weights cost: ``python -m benchmarks.anchored_cost``.

Parts, each a function: ``speed`` and ``memory`` (against the paper's network, in one
process), ``scaling`` (a sample's cost as K grows to 100) and ``eryn`` (Eryn with slots
as proposals against plain Eryn).
"""

import math
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Uniform

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    VariableKPrior,
    WhiteNoise,
    metrics,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cell_chain import CellChain
from sbi_slotflow.pretrained.recipes import RECIPES
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.sinusoids.grid import Grid, SineSignal

from .common import (
    TEST,
    Numbers,
    ensemble_size,
    given_k,
    progress,
    ready,
    run_parts,
    simulate,
    spread,
)

# Evaluations of p(K | x) of each signal by each network.
_TURNS = 10


def speed(num_signals: int, seed: int) -> Numbers:
    """Cost of an analysis against the paper's network, one thread.

    Seconds are the thread's own: waiting for other programs does not count. The
    networks take turns, and a ratio is one of neighbours.
    """
    problem, posterior = ready("paper")
    theta, x = simulate(given_k(problem, 10), max(2, num_signals), TEST + seed)
    rival = SlotPosterior(slot_nn.paper(problem)(theta, x), problem.prior)
    times: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object]) -> None:
        started = time.thread_time()
        work()
        times.setdefault(name, []).append(time.thread_time() - started)

    for one_of in (posterior, rival):  # what only a first call does
        one_of.cardinality(x[0])
    for i in range(num_signals):
        for _ in range(_TURNS):
            clock("weights: p(K | x)", lambda i=i: posterior.cardinality(x[i]))
            clock("paper: p(K | x)", lambda i=i: rival.cardinality(x[i]))
        clock(
            "weights: 10,000 samples",
            lambda i=i: posterior.sample((10_000,), x[i], k=10),
        )
        # A tenth of the draws of the paper's network: its cost is their number's.
        clock(
            "paper: 1,000 samples",
            lambda i=i: rival.posterior_estimator.sample(
                (1_000,), x[i : i + 1], torch.tensor(10)
            ),
        )
        progress(f"{ {name: round(t[-1], 4) for name, t in times.items()} }")

    def ratios(ours: str, theirs: str, share: float = 1.0) -> Numbers:
        pairs = zip(times[ours], times[theirs], strict=True)
        return spread([share * a / b for a, b in pairs])

    return {
        "p(K | x) over the paper's": ratios("weights: p(K | x)", "paper: p(K | x)"),
        "10,000 samples at K = 10 over the paper's": ratios(
            "weights: 10,000 samples", "paper: 1,000 samples", 0.1
        ),
        "seconds": {name: spread(t) for name, t in times.items()},
    }


def memory(num_signals: int, seed: int) -> Numbers:
    """Peak memory of 10,000 samples at K = 10."""
    problem, posterior = ready("paper")
    _, x = simulate(given_k(problem, 10), 1, TEST + seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    posterior.sample((10_000,), x[0], k=10)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "megabytes of the process before": before / 1024,
        "megabytes that sampling adds": (after - before) / 1024,
    }


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


def scaling(num_signals: int, seed: int) -> Numbers:
    """Seconds a sample as K grows to 100 in a band that widens with it.

    The network is untrained but for its anchors, which are told where the components
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
            cells = head.axis.anchors(position[:1], head.edges(encoding))
            head.pointer = _Told.instead_of(head.pointer, cells[0])
            times = []
            for _ in range(max(2, num_signals)):
                started = time.perf_counter()
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


class _Told(CellChain):
    """A chain of anchors that knows where the components are."""

    cells: Tensor

    @classmethod
    def instead_of(cls, chain: CellChain, cells: Tensor) -> "_Told":
        told = cls(chain.axis, chain.keys.in_features, chain.max_cardinality)
        told.load_state_dict(chain.state_dict())
        told.cells = cells
        return told.eval()

    def _scores(
        self, tokens: Tensor, owner: Tensor, count: Tensor, k: Tensor, before: Tensor
    ) -> Tensor:
        # Costs what it always does.
        scores = super()._scores(tokens, owner, count, k, before)
        there = torch.zeros(scores.shape[-1], dtype=torch.bool)
        there[self.cells] = True
        later = torch.arange(scores.shape[-1]) > before.unsqueeze(-1)
        return torch.where(there & later, 50.0, -50.0)


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
    "speed": (speed, 5),
    "memory": (memory, 1),
    "scaling": (scaling, 3),
    "eryn": (eryn, 3),
}

if __name__ == "__main__":
    run_parts(PARTS, "anchored", __doc__)
