"""Anchors weighed by their evidence: an exact distribution, near the posterior's."""

import math
from copy import deepcopy
from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor

from sbi_slotflow import slot_nn
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cell_chain import PrunedChain
from sbi_slotflow.nn.cell_sets import CellSets
from sbi_slotflow.nn.cells import OccupiedCells
from sbi_slotflow.nn.encoders import Encoding
from sbi_slotflow.nn.estimator import SlotDensityEstimator
from sbi_slotflow.nn.modes import ModeFinder
from sbi_slotflow.problems import sinusoids

tiny = sinusoids("tiny")
SIZE = tiny.layout.max_cardinality


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def estimator() -> SlotDensityEstimator:
    """Untrained, but for random scores of the anchors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = tiny.prior.sample((64,))
        build = slot_nn(tiny, refine_slots=3, hidden_features=16, trunk_features=8)
        estimator = build(theta, tiny.simulator(theta)).eval()
    generator = seeded(1)
    with torch.no_grad():
        for parameter in estimator.component_head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return estimator


def observation(sigma: float) -> Tensor:
    """Two tones, one in the middle of a cell, one at its edge."""
    components = torch.tensor([[[1.0, 1.0, 0.925], [0.8, 4.0, 1.35], [0, 0, 0]]])
    theta = tiny.layout.pack(torch.tensor([2]), components, torch.tensor([[sigma]]))
    return tiny.simulator(theta, seeded(3))


def weighed(
    estimator: SlotDensityEstimator, x: Tensor, num_sets: int
) -> tuple[AutoregressiveHead, Encoding, CellSets]:
    head = deepcopy(estimator.component_head)
    assert isinstance(head, AutoregressiveHead)
    head.weighed_sets = num_sets
    with torch.no_grad():
        encoding = estimator.encode(x)
        assert head.find_modes is not None
        chain = PrunedChain(head.cells, *head.tokens_and_edges(encoding))
        found = CellSets(chain, head.find_modes, num_sets, x)
    return head, encoding, found


def all_sets(head: AutoregressiveHead, k: int) -> Tensor:
    """Every ascending set of K anchors, shape ``(N, Kmax)``."""
    every = combinations_with_replacement(range(head.axis.num_cells), k)
    sets = torch.tensor(list(every))
    return torch.nn.functional.pad(sets, (0, SIZE - k))


@pytest.mark.parametrize("num_sets", [1, 4, 40, 10_000])
@pytest.mark.parametrize("k", [1, 2])
def test_probabilities_of_all_sets_add_up_to_one(estimator, k: int, num_sets: int):
    head, _, anchors = weighed(estimator, observation(0.5), num_sets)
    sets = all_sets(head, k)
    mask = tiny.layout.mask(torch.full((len(sets),), k))
    probs = anchors.log_prob(torch.zeros(len(sets)).long(), sets, mask).double().exp()
    assert float(probs.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("num_sets", [4, 40])
def test_draws_have_the_probabilities(estimator, num_sets: int) -> None:
    # the 5 % likeliest sets and the rest: five standard errors, 1 of 10^5 seeds fails
    k, num = 2, 20_000
    head, _, anchors = weighed(estimator, observation(0.5), num_sets)
    sets = all_sets(head, k)
    mask = tiny.layout.mask(torch.full((len(sets),), k))
    probs = anchors.log_prob(torch.zeros(len(sets)).long(), sets, mask).double().exp()
    drawn = anchors.sample(torch.zeros(num).long(), mask[:1].expand(num, -1), seeded(4))
    cells = head.axis.num_cells
    code, place = sets[:, 0] * cells + sets[:, 1], drawn[:, 0] * cells + drawn[:, 1]
    seen = torch.bincount(place, minlength=cells**2)[code].double() / num
    assert float(seen.sum()) == pytest.approx(1.0)
    top = probs.argsort(descending=True)[: len(probs) // 20]
    for index in [*top.split(1)[:8], top]:
        expected = float(probs[index].sum())
        error = math.sqrt(expected * (1 - expected) / num) + 1e-9
        assert abs(float(seen[index].sum()) - expected) < 5 * error


def test_shares_are_those_of_the_integrated_likelihood(estimator) -> None:
    # one component sought in noise: many cells could hold it, at the least amplitude
    sigma = 0.9
    theta = tiny.layout.pack(
        torch.tensor([0]), torch.zeros(1, SIZE, 3), torch.tensor([[sigma]])
    )
    x = tiny.simulator(theta, seeded(7))
    head, encoding, anchors = weighed(estimator, x, 10_000)
    cells = head.axis.num_cells
    sets = all_sets(head, 1)
    mask = tiny.layout.mask(torch.ones(cells).long())
    probs = anchors.log_prob(torch.zeros(cells).long(), sets, mask).double().exp()

    (a0, a1), _, (f0, f1) = (m.bounds for m in tiny.prior.component_marginals)
    axes = [
        a0 + (a1 - a0) * (torch.arange(24) + 0.5) / 24,
        2 * math.pi * (torch.arange(32) + 0.5) / 32,
        f0 + (f1 - f0) * (torch.arange(900) + 0.5) / 900,
    ]
    grid = torch.cartesian_prod(*axes)
    rows = torch.zeros(len(grid), SIZE, 3)
    rows[:, 0] = grid
    noise = torch.full((len(grid), 1), sigma)
    thetas = tiny.layout.pack(torch.ones(len(grid)).long(), rows, noise)
    residual = torch.cat(
        [
            (x - tiny.simulator.signal(part)).double().square().sum(-1)
            for part in thetas.split(20_000)
        ]
    )
    log_p = -0.5 * x.shape[-1] * residual.log()
    edges = head.tokens_and_edges(encoding)[1]
    position = head.local_chart.coordinates(grid)[0][:, :1]
    cell = head.axis.cells(position, edges.expand(len(grid), -1))[:, 0]
    shares = torch.zeros(cells).double().index_add(0, cell, log_p.softmax(0))
    assert float(shares.max()) < 0.9
    assert 0.5 * float((probs - shares).abs().sum()) < 0.1


def test_densities_do_not_depend_on_what_was_asked_before(estimator) -> None:
    estimator = deepcopy(estimator)
    estimator.component_head.weighed_sets = 4
    x = torch.cat([observation(0.3), observation(0.9)])
    with torch.no_grad():
        first, second = estimator.given(x), estimator.given(x)
        rows = first.sample((50,), generator=seeded(1))
        second.sample((20,), 3, seeded(2))
        second.log_prob(rows[:, :, :].flip(1))
        assert torch.equal(second.sample((50,), generator=seeded(1)), rows)
        both = first.log_prob(rows)
        assert torch.equal(first.log_prob(rows), both)
        assert torch.equal(second.log_prob(rows), both)
        each = [
            estimator.given(x[i : i + 1]).log_prob(rows[:, i : i + 1]) for i in (0, 1)
        ]
    torch.testing.assert_close(torch.cat(each, 1), both, rtol=0, atol=1e-2)


@pytest.mark.parametrize("knows", [True, False])
def test_more_sets_are_fitted_where_the_chain_knows_something(
    estimator, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A uniform chain's first sets are no better than any others.
    num_sets, estimator = 40, deepcopy(estimator)
    if not knows:
        with torch.no_grad():
            for parameter in estimator.component_head.cells.parameters():
                parameter.zero_()
            estimator.component_head.cells.presence.bias.fill_(-10.0)
    _, _, anchors = weighed(estimator, observation(0.9), num_sets)
    fitted, fit = [], ModeFinder.__call__

    def counted(self, data, sets):
        fitted.append(len(sets.owner))
        return fit(self, data, sets)

    monkeypatch.setattr(ModeFinder, "__call__", counted)
    mask = tiny.layout.mask(torch.tensor([3]))
    anchors.sample(torch.zeros(1).long(), mask, seeded(2))
    assert fitted[0] == num_sets // 4
    assert (sum(fitted) > num_sets) == knows


def test_modes_of_weighed_sets_are_fitted_once(
    estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, anchors = weighed(estimator, observation(0.5), 40)
    owner = torch.zeros(20).long()
    mask = tiny.layout.mask(torch.full((20,), 2))
    none = OccupiedCells.among(anchors.edges, owner[:0], owner[:0, None], mask[:0, :1])
    assert not len(anchors.modes(none).level)
    table = anchors._weighed(owner[:1], mask[:1])[0]
    best = table.log_weight[0].topk(20).indices
    sets = OccupiedCells.among(anchors.edges, owner, table.cells[0, best], mask)
    expected = anchors.find_modes(anchors.data, sets)

    def refit(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(ModeFinder, "__call__", refit)
    found = anchors.modes(sets)
    torch.testing.assert_close(found.height, expected.height)
    torch.testing.assert_close(found.mode, expected.mode)
