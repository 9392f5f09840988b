"""The paper's network and the package's default, side by side in one process.

``make bench`` prints the tables; times are for one thread. Both networks are untrained,
which does not change what they cost.
"""

from functools import cache

import pytest
import torch

from sbi_slotflow import SlotDensityEstimator, problems, slot_nn
from sbi_slotflow.seeding import generator_for

problem = problems.sinusoids("paper")
builders = {"paper": slot_nn.paper(problem), "default": slot_nn(problem)}
ten = torch.tensor(10)


@cache
def estimator(name: str) -> SlotDensityEstimator:
    generator = generator_for(0)
    theta = problem.prior.sample((32,), generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return builders[name](theta, problem.simulator(theta, generator)).eval()


@pytest.fixture
def observation():
    generator = generator_for(1)
    theta = problem.prior.sample((1,), generator)
    return problem.simulator(theta, generator)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(builders))
@pytest.mark.benchmark(group="10,000 posterior samples, K = 10")
def test_sampling(benchmark, name, observation):
    network = estimator(name)
    benchmark.extra_info["parameters"] = sum(p.numel() for p in network.parameters())
    rows = benchmark.pedantic(network.sample, ((10_000,), observation, ten), rounds=3)
    assert rows.shape == (10_000, 1, problem.layout.size)


@pytest.mark.parametrize("name", list(builders))
@pytest.mark.benchmark(group="encoder and p(K | x), one signal")
def test_cardinality(benchmark, name, observation):
    network = estimator(name)
    with torch.no_grad():
        log_k = benchmark(network.log_prob_cardinality, observation)
    assert log_k.shape == (1, 11)


@pytest.mark.parametrize("name", list(builders))
@pytest.mark.benchmark(group="training step, 32 signals")
def test_training_step(benchmark, name):
    network = estimator(name)
    generator = generator_for(2)
    theta = problem.prior.sample((32,), generator)
    x = problem.simulator(theta, generator)
    benchmark.pedantic(
        lambda: network.loss(theta, x).mean().backward(), rounds=3, warmup_rounds=1
    )
    network.zero_grad(set_to_none=True)


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.benchmark(group="log density of 1,000 sets")
def test_log_prob(benchmark, k, observation):
    network = estimator("default")
    rows = network.sample((1_000,), observation, torch.tensor(k))
    with torch.no_grad():
        values = benchmark.pedantic(network.log_prob, (rows, observation), rounds=3)
    assert values.shape == (1_000, 1)
