"""A network given data: one distribution, whoever asks it, and in whatever order."""

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Uniform

from sbi_slotflow import (
    SlotDensityEstimator,
    SlotPosterior,
    VariableKPrior,
    load_pretrained,
    problems,
    slot_nn,
)
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead

tiny = problems.sinusoids("tiny")
THREADS = 4
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


@pytest.mark.parametrize("rounds", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_threads_with_data_of_their_own_find_what_one_finds(
    rounds: int,
    estimator: SlotDensityEstimator,
    signals: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sbi_slotflow.nn.cell_sets._ROUNDS", 0)  # for speed
    posterior = SlotPosterior(estimator, tiny.prior)

    def draw(i: int) -> Tensor:
        return posterior.sample((2,), signals[i], k=1 + i % 3, generator=seeded(i))

    rows = [draw(i) for i in range(THREADS)]
    expected = [posterior.log_prob(rows[i], signals[i]) for i in range(THREADS)]

    def work(i: int) -> int:
        same = 0
        for _ in range(rounds):
            same += torch.equal(draw(i), rows[i])
            same += torch.equal(posterior.log_prob(rows[i], signals[i]), expected[i])
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [2 * rounds] * THREADS


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


def test_the_head_is_asked_when_needed_and_as_the_distribution_was_built(
    estimator: SlotDensityEstimator, signals: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    head: Any = estimator.component_head
    asked: list[int] = []
    given = head.given
    monkeypatch.setattr(head, "weighed_sets", 0)
    monkeypatch.setattr(head, "given", lambda *a: asked.append(1) or given(*a))
    sets = estimator.given(signals[:1])
    assert sets.cardinality().probs.shape == (1, 4)
    assert not asked
    rows = sets.sample((2,), 2, seeded(1))  # without gradients
    slope = torch.autograd.grad(sets.log_prob(rows).sum(), head.cells.keys.weight)[0]
    assert slope.abs().max() > 0
    assert asked == [1]


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_no_set_of_the_prior_has_density_zero(
    estimator: SlotDensityEstimator, factor: float
) -> None:
    # Untrained, with signals that are not those of the rows, and noise that is none of
    # the simulator's: coloured, and four times too strong.
    theta = tiny.prior.sample((10, 40), seeded(3))
    noise = torch.randn(10, 301, generator=seeded(4))
    x = tiny.simulator.signal(theta[:, 0]) + factor * (noise[:, 1:] + noise[:, :-1])
    values = estimator.given(x).log_prob(theta.transpose(0, 1))
    assert values.isfinite().all()


SCALES = {"2**-70": 2.0**-70, "2**70": 2.0**70, "1e-21": 1e-21, "1e21": 1e21}
STRUCTURES: dict[str, dict[str, Any]] = {
    "attention": {"slots": "attention"},
    "anchored": {"refine_slots": 1, "weighed_sets": 16},
}


def scaled(
    factor: float, **options: Any
) -> tuple[SlotDensityEstimator, Tensor, Tensor]:
    """An estimator of tiny signals in another unit, theta and x."""
    component = MultipleIndependent(
        [
            Uniform(torch.tensor([0.2 * factor]), torch.tensor([1.5 * factor])),
            Uniform(torch.zeros(1), torch.tensor([2 * math.pi])),
            Uniform(torch.tensor([0.5]), torch.tensor([2.0])),
        ]
    )
    sigma = Uniform(torch.tensor([0.1 * factor]), torch.tensor([1.0 * factor]))
    prior = VariableKPrior(
        component,
        [0.25] * 4,
        shared=sigma,
        order_by=2,
        min_separation=0.1,
        component_names=tiny.component_names,
        shared_names=tiny.shared_names,
    )
    problem = replace(tiny, prior=prior)
    theta = tiny.prior.sample((8,), seeded(5))
    x = tiny.simulator(theta, seeded(6)) * factor
    columns = torch.ones(theta.shape[-1])
    columns[[1, 2, 5, 8]] = factor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimator = slot_nn(problem, **SMALL, **options)(theta * columns, x)
    return estimator, theta * columns, x


@functools.cache
def results(unit: float, structure: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a network of signals in a unit: log p(K | x), slopes, drawn amplitudes."""
    estimator, theta, x = scaled(unit, **STRUCTURES[structure])
    terms = estimator.loss_terms(theta, x)
    estimator.weigh(terms).mean().backward()
    slopes = [
        p.grad.flatten() for p in estimator.net.parameters() if p.grad is not None
    ]
    estimator.eval()
    with torch.no_grad():
        log_k = estimator.given(x).log_cardinality
        amplitude = estimator.sample((4,), x, generator=seeded(7))[..., 2] / unit
    return log_k, torch.cat(slopes), amplitude


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SCALES)
def test_results_do_not_depend_on_the_unit(name: str, structure: str) -> None:
    log_k, slope, amplitude = results(1.0, structure)
    others = results(SCALES[name], structure)
    assert log_k.std(0).max() > 1e-4  # it does depend on x
    if name.startswith("2"):
        assert torch.equal(others[0], log_k)
    torch.testing.assert_close(others[0], log_k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others[1], slope, rtol=1e-2, atol=1e-3)
    assert (others[2].isclose(amplitude, rtol=1e-2)).double().mean() > 0.9


def test_data_of_any_precision_and_none_beyond_reach(
    estimator: SlotDensityEstimator, signals: Tensor
) -> None:
    half = signals.half()
    rows = estimator.sample((3,), half, generator=seeded(8))
    assert rows.dtype == torch.float32
    for x in (half.float(), half.double()):
        assert torch.equal(estimator.sample((3,), x, generator=seeded(8)), rows)
    for far in (1e30, 1e38):
        with pytest.raises(ValueError, match=r"x must be on the scale .*, got"):
            estimator.sample((2,), signals * far)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["tiny", "crowded"])
def test_a_signal_of_zeros_breaks_no_fit(preset: Any) -> None:
    posterior = load_pretrained(f"sinusoids-{preset}")
    x = torch.zeros(1, posterior.posterior_estimator.spec.num_data)
    rows = posterior.sample((50,), x, k=3, generator=seeded(9))
    assert rows.isfinite().all()
    assert posterior.log_prob(rows, x).isfinite().all()


@pytest.fixture
def double_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("build", [slot_nn, slot_nn.paper])
@pytest.mark.usefixtures("double_default")
def test_networks_are_of_single_precision_whatever_the_default(build: Any) -> None:
    theta = tiny.prior.sample((8,), seeded(1)).float()
    x = tiny.simulator(theta, seeded(2)).float()
    estimator = build(tiny)(theta, x)
    assert {p.dtype for p in estimator.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float64
    assert estimator.loss(theta, x).dtype == torch.float32
    assert estimator.eval().sample((2,), x, generator=seeded(3)).dtype == torch.float32


def test_draws_do_not_depend_on_the_default_precision(signals: Tensor) -> None:
    def draw() -> tuple[Tensor, Tensor]:
        posterior = load_pretrained("sinusoids-tiny")
        rows = posterior.sample((20,), signals[0], generator=seeded(1))
        return rows, posterior.log_prob(rows, signals[0])

    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    for part, wanted in zip(found, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, wanted)
