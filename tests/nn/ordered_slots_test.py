"""Ordered slots: densities integrate to one, draws follow them and come in order."""

import math
from typing import Any

import pytest
import torch
from sbi.utils import MultipleIndependent
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Gamma,
    Independent,
    MixtureSameFamily,
    Normal,
)

from sbi_slotflow import SlotDensityEstimator, VariableKPrior, slot_nn
from sbi_slotflow.nn.ordered_slots import CutMixture
from sbi_slotflow.problems import Mixture, Points, PointsSimulator
from sbi_slotflow.problems.base import uniform
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.layout import ThetaParts


def line_law(components: Tensor) -> Normal:
    return Normal(components[..., 0], 0.5, validate_args=False)


def of_equal_weight(parts: ThetaParts) -> Distribution:
    shares = Categorical(logits=parts.mask.double().log(), validate_args=False)
    each = line_law(parts.components)
    return MixtureSameFamily(shares, each, validate_args=False)


def problem_of(dim: int) -> Points:
    """Components of a place, and of a weight if ``dim`` is 2."""
    laws: list[Any] = [uniform(-2.0, 3.0), Gamma(torch.tensor([2.0]), torch.ones(1))]
    component = laws[0] if dim == 1 else MultipleIndependent(laws)
    prior = VariableKPrior(component, [0.0, 1.0, 1.0, 1.0])
    law = of_equal_weight if dim == 1 else Mixture(line_law, 1)
    return Points("some", prior, PointsSimulator(law, prior, 8, fewest=3))


def shaken(problem: Points, seed: int = 0, **options: Any) -> SlotDensityEstimator:
    """An untrained estimator whose weights are far from where they begin."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        theta = problem.prior.sample((64,))
        found = slot_nn(problem, **options)(theta, problem.simulator(theta))
        for parameter in found.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return found.eval()


def some_x(problem: Points) -> Tensor:
    rows = problem.prior.sample((2,), generator_for(5))
    return problem.simulator(rows, generator_for(6))


LAWS = {
    "below": (-1e30, [0.0, 1.0], [0.5, 2.0]),
    "middle": (0.3, [0.0, 1.0], [0.5, 2.0]),
    "tail": (6.0, [0.0, -1.0], [0.5, 0.2]),
    "far tail": (40.0, [0.0, -1.0], [1.0, 0.2]),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_cut_mixture_integrates_to_one_and_is_drawn_from(name: str) -> None:
    bound, mean, deviation = LAWS[name]
    num = 4_000

    laws = [torch.tensor(each).double() for each in ([-0.3, -1.35], mean, deviation)]
    low = max(bound, -12.0)
    grid = low + torch.linspace(0, 30.0, 600_001).double()
    middle, width = 0.5 * (grid[1:] + grid[:-1]), 30.0 / 600_000

    def copies(size: int) -> CutMixture:
        weight, centre, spread = (part.expand(size, 2) for part in laws)
        return CutMixture(weight, centre, spread, torch.full((size,), bound).double())

    law, spread = copies(num), copies(len(middle))
    density = spread.log_prob(middle).exp()
    assert float(density.sum() * width) == pytest.approx(1.0, abs=5e-4)
    drawn = law.sample(generator_for(1))
    assert (drawn >= bound).all()
    share = (density * width).cumsum(0)

    def fraction(v: Any) -> Any:
        index = torch.searchsorted(middle, torch.as_tensor(v)).clamp(
            max=len(middle) - 1
        )
        return share[index].numpy()

    result: Any = stats.kstest(drawn.numpy(), fraction)
    assert result.pvalue > 1e-5  # of four cases: false alarms below 4e-5


def test_nothing_lies_below_the_bound() -> None:
    one = torch.zeros(1).double()
    law = CutMixture(one, one, one + 1, torch.tensor(0.5).double())
    assert torch.isneginf(law.log_prob(torch.tensor([0.4, 0.499]).double())).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("dim", "k"), [(1, 1), (1, 2), (2, 1)])
@torch.no_grad()
def test_the_density_integrates_to_one_over_the_canonical_region(
    dim: int, k: int, seed: int
) -> None:
    # A grid of 200 x 200 over two places, or over place and weight, in the coordinates
    # in which the prior is normal; of the second place in the logarithm of how far it
    # lies above the first.
    problem = problem_of(dim)
    net, x = shaken(problem, seed), some_x(problem)[:1]
    first = torch.linspace(-7.0, 7.0, 201).double()
    gap = torch.linspace(-11.0, 3.0, 201).double()
    if k == 2:
        scores = torch.cartesian_prod(first, gap)
        log_cell = scores[:, 1]
        scores = torch.stack([scores[:, 0], scores[:, 0] + scores[:, 1].exp()], -1)
    else:
        scores = torch.cartesian_prod(*dim * [first]).reshape(-1, dim)
        log_cell = torch.zeros(len(scores))
    marginals = [*problem.prior.component_marginals] * k
    columns = []
    for marginal, column in zip(marginals, scores.unbind(-1), strict=True):
        columns.append(marginal.score.inverse(column))
        log_cell = log_cell - marginal.score.forward(columns[-1])[1]
    log_cell = log_cell + dim * k * math.log(14.0 / 200)
    rows = torch.stack([torch.full((len(scores),), float(k)), *columns], -1)
    rows = torch.nn.functional.pad(rows, (0, problem.layout.size - rows.shape[1]))
    log_q = net.log_prob(rows.unsqueeze(1), x)[:, 0].double()
    log_k = net.log_prob_cardinality(x)[0, k].double()
    inside = scores.amax(-1) < 7.5  # beyond, places are told apart no more
    mass = (log_q - log_k + log_cell).exp()
    assert float(mass[inside].sum()) == pytest.approx(1.0, abs=0.01)


@torch.no_grad()
def test_densities_are_those_of_the_draws() -> None:
    # E_q[p / (p + q); K] = E_p[p / (p + q); K] for the prior p, see the contract test.
    problem = problem_of(2)
    net, x, num = shaken(problem), some_x(problem)[:1], 20_000

    def log_ratio(rows: Tensor) -> Tensor:
        log_p = problem.prior.log_prob(rows).double()
        return net.log_prob(rows.unsqueeze(1), x)[:, 0].double() - log_p

    ours = net.sample((num,), x, generator=generator_for(1))[:, 0]
    theirs = problem.prior.sample((num,), generator_for(2))
    left, right = torch.sigmoid(-log_ratio(ours)), torch.sigmoid(log_ratio(theirs))
    for k in (1, 2, 3):
        first = torch.where(ours[:, 0] == k, left, 0.0)
        second = torch.where(theirs[:, 0] == k, right, 0.0)
        error = float(torch.hypot(first.std(), second.std())) / math.sqrt(num)
        # 5 standard errors of three: false alarms below 2e-6
        assert abs(float(first.mean() - second.mean())) < 5 * error
        assert error < 0.05 * float(second.mean())


@torch.no_grad()
def test_draws_come_in_order_and_have_a_density() -> None:
    problem = problem_of(2)
    net, x = shaken(problem), some_x(problem)
    rows = net.sample((500,), x, generator=generator_for(1))
    assert torch.equal(problem.layout.canonical(rows), rows)
    assert problem.prior.support.check(rows).all()
    log_q = net.log_prob(rows, x)
    assert log_q.isfinite().all()
    shuffled = problem.layout.relabel(rows, generator_for(3))
    torch.testing.assert_close(net.log_prob(shuffled, x), log_q, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_order_of_points_does_not_change_the_density() -> None:
    problem = problem_of(2)
    net, x = shaken(problem), some_x(problem)
    rows = net.sample((50,), x, generator=generator_for(1))
    order = torch.randperm(x.shape[1], generator=generator_for(2))
    torch.testing.assert_close(
        net.log_prob(rows, x[:, order]), net.log_prob(rows, x), rtol=1e-4, atol=1e-3
    )


def test_training_sees_the_density() -> None:
    problem = problem_of(2)
    net, x = shaken(problem), some_x(problem)
    theta = problem.prior.sample((2,), generator_for(5))
    loss = net.loss(theta, x)
    torch.testing.assert_close(-loss, net.log_prob(theta, x)[0], rtol=1e-5, atol=1e-4)
    loss.sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None]
    assert idle == []


def test_outside_the_support_there_is_no_density() -> None:
    problem = problem_of(2)
    net, x = shaken(problem), some_x(problem)[:1]
    rows = problem.prior.sample((20,), generator_for(5))
    rows[:, 1] = 4.0
    with torch.no_grad():
        assert torch.isneginf(net.log_prob(rows.unsqueeze(1), x)).all()


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    problem = problem_of(2)
    net, x = shaken(problem), some_x(problem)
    net.save(tmp_path / "net.safetensors")
    again = SlotDensityEstimator.load(tmp_path / "net.safetensors")
    rows = net.sample((5,), x, generator=generator_for(1))
    assert torch.equal(again.sample((5,), x, generator=generator_for(1)), rows)


def test_options_without_a_use_are_refused() -> None:
    problem = problem_of(2)
    theta = problem.prior.sample((8,))
    x = problem.simulator(theta)
    unused: list[dict[str, Any]] = [
        {"matching": "hungarian"},
        {"coupling": "joint"},
        {"refine_slots": 2},
        {"condition_on_cardinality": False},
    ]
    for options in unused:
        with pytest.raises(ValueError, match="would do nothing"):
            slot_nn(problem, **options)(theta, x)
    plain = VariableKPrior(Independent(Normal(torch.zeros(2), 1.0), 1), [1.0, 1.0])
    rows = plain.sample((8,))
    with pytest.raises(ValueError, match="encoder that returns an Encoding"):
        slot_nn(plain, slots="ordered")(rows, torch.randn(8, 6))


def test_other_slots_work_on_points_too() -> None:
    problem = problem_of(2)
    theta = problem.prior.sample((8,))
    x = problem.simulator(theta)
    for slots in ("attention", "global"):
        net = slot_nn(problem, slots=slots)(theta, x)
        assert net.spec.slots["kind"] == slots
        assert net.loss(theta, x).isfinite().all()
