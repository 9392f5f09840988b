"""A network given data: one distribution, whoever asks it, and in whatever order."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from sbi_slotflow import SlotDensityEstimator, SlotPosterior, problems, slot_nn
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead

tiny = problems.sinusoids("tiny")
THREADS, ROUNDS = 4, 200
SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 8,
    "flow_hidden_features": 8,
    "flow_layers": 1,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def signals() -> Tensor:
    return tiny.simulator(tiny.prior.sample((THREADS,), seeded(1)), seeded(2))


@pytest.fixture(scope="module")
def estimator() -> SlotDensityEstimator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = tiny.prior.sample((64,))
        build = slot_nn(tiny, refine_slots=1, **SMALL)
        estimator = build(theta, tiny.simulator(theta)).eval()
    assert isinstance(estimator.component_head, AutoregressiveHead)
    estimator.component_head.weighed_sets = 4
    return estimator


def test_threads_with_data_of_their_own_find_what_one_finds(
    estimator: SlotDensityEstimator, signals: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbi_slotflow.nn.cell_sets._ROUNDS", 0)  # for speed
    posterior = SlotPosterior(estimator, tiny.prior)

    def draw(i: int) -> Tensor:
        return posterior.sample((2,), signals[i], k=1 + i % 3, generator=seeded(i))

    rows = [draw(i) for i in range(THREADS)]
    expected = [posterior.log_prob(rows[i], signals[i]) for i in range(THREADS)]

    def work(i: int) -> int:
        same = 0
        for _ in range(ROUNDS // 2):
            same += torch.equal(draw(i), rows[i])
            same += torch.equal(posterior.log_prob(rows[i], signals[i]), expected[i])
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [ROUNDS] * THREADS


@torch.no_grad()
def test_threads_may_share_a_distribution(
    estimator: SlotDensityEstimator, signals: Tensor
) -> None:
    def draw(sets: Any, k: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            rows = sets.sample((3,), k, seeded(k))
            return rows, sets.log_prob(rows)

    counts = [3, 1, 2, 0]
    expected = {k: draw(estimator.given(signals), k) for k in counts}
    for _ in range(5):
        sets = estimator.given(signals)
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda k: draw(sets, k), counts * 2))  # noqa: B023
        for k, each in zip(counts * 2, found, strict=True):
            assert all(map(torch.equal, each, expected[k]))
