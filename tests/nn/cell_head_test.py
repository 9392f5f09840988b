"""Anchored slots: each of their parts is a density, and so is the whole."""

import math
from bisect import bisect_right
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import (
    combinations,
    combinations_with_replacement,
    pairwise,
    permutations,
    product,
)
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import StudentT

from sbi_slotflow import VariableKPrior, problems
from sbi_slotflow.nn import Encoding, RowContext, SlotDensityEstimator, slot_nn
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cell_chain import (
    CellChain,
    CellMarginals,
    ChainGivenX,
    FlooredCells,
    PrunedChain,
    UniformCells,
)
from sbi_slotflow.nn.cell_head import CellHead, IndependentHead
from sbi_slotflow.nn.cells import CellAxis, unique_rows
from sbi_slotflow.nn.encoders import Observations, TokenEncoder, TraceTokens
from sbi_slotflow.nn.local import LocalDensity
from sbi_slotflow.nn.spec import build
from sbi_slotflow.problems.sinusoids.tokens import BandTokens
from sbi_slotflow.sets.layout import ThetaParts

tiny = problems.sinusoids("tiny")
SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "refined": {"refine_slots": 2},
    "plain": {"refine_slots": 2, "flow_layers": 0},
    "pursued": {"slots": "anchored", "encoder_options": {"pursuit": True}},
    "factorised": {"coupling": "factorised", "matching": "permanent"},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def builder(**options: Any) -> slot_nn:
    usual: dict[str, Any] = {"refine_slots": 0, **SMALL}
    if "encoder" in options:
        del usual["hidden_features"]
    if options.get("flow_layers") == 0:
        del usual["trunk_features"], usual["flow_hidden_features"]
    return slot_nn(tiny, **{**usual, **options})


@torch.no_grad()
def shake(module: nn.Module, noise: float, seed: int) -> None:
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)


@cache
def untrained(name: str) -> SlotDensityEstimator:
    """An estimator whose weights are random enough for nothing to be constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = tiny.prior.sample((64,))
        estimator = builder(**VARIANTS[name])(theta, tiny.simulator(theta))
    shake(estimator.component_head, 0.05, seed=1)
    if estimator.spec.noise_from_fit:
        assert estimator.shared_head is not None
        shake(estimator.shared_head, 0.05, seed=2)
    return estimator.eval()


def observation(sigma: float = 0.8) -> Tensor:
    """Two tones, each at 0.3 of a cell."""
    components = torch.tensor([[[1.0, 1.0, 0.915], [0.8, 4.0, 1.315], [0, 0, 0]]])
    theta = tiny.layout.pack(torch.tensor([2]), components, torch.tensor([[sigma]]))
    return tiny.simulator(theta, seeded(3))


def given_data() -> Observations:
    return Observations(observation(), torch.ones(()))


def components_prior(k: int, separated: bool) -> VariableKPrior:
    """The prior of K components and nothing else."""
    return VariableKPrior(
        tiny.prior.component,
        [float(n == k) for n in range(4)],
        min_separation=tiny.prior.min_separation if separated else None,
        order_by=2,
    )


@dataclass(frozen=True)
class Sets:
    """A head's density of sets of K components of one observation."""

    head: CellHead
    encoding: Encoding
    data: Observations
    k: int

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, k: int, seed: int | None = None) -> "Sets":
        estimator = untrained(name)
        head = deepcopy(estimator.component_head)
        assert isinstance(head, CellHead)
        if seed is not None:
            shake(head, 0.02, seed)
        return cls(head, estimator.encode(observation()), given_data(), k)

    def mask(self, num: int) -> Tensor:
        return tiny.layout.mask(torch.full((num,), self.k))

    def sample(self, num: int, seed: int = 0) -> Tensor:
        """Components in ascending order, shape ``(num, 3, 3)``."""
        owner = torch.zeros(num, dtype=torch.int64)
        mask = self.mask(num)
        given = self.head.given(self.encoding, self.data, None)
        rows, _ = given.sample(mask, owner, seeded(seed))
        key = rows[..., 2].masked_fill(~mask, torch.inf)
        return rows.gather(1, key.argsort(-1)[..., None].expand_as(rows))

    @torch.no_grad()
    def log_prob(self, components: Tensor, matching: Any = None) -> Tensor:
        """Of the density, or with a matching of what training maximises."""
        num = len(components)
        owner = torch.zeros(num, dtype=torch.int64)
        parts = ThetaParts(
            cardinality=torch.full((num,), self.k),
            shared=components.new_zeros(num, 0),
            components=components,
            mask=self.mask(num),
        )
        args = self.encoding, self.data, None
        given = self.head.given(*args)
        if matching is not None:
            given = self.head.in_training(*args, matching)
        return given.log_terms(parts, owner)[0]


def assert_mean_is_one(ratio: Tensor, largest_error: float) -> None:
    """Within five standard errors, which one of 2 * 10^6 seeds exceeds."""
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < largest_error
    assert abs(float(ratio.mean()) - 1) < 5 * error


# --- the densities of sets


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ["joint", "factorised"])
def test_mass_is_one_and_that_of_the_draws(name: str, k: int) -> None:
    sets = Sets.of(name, k)
    prior = components_prior(k, sets.head.keeps_separation)
    layout, num = prior.layout, 4_000
    drawn = layout.pack(torch.full((num,), k), sets.sample(num))
    rows = torch.cat([prior.sample((num,), seeded(5)), drawn])
    log_q, log_p = sets.log_prob(layout.unpack(rows).components), prior.log_prob(rows)
    # half from either, so that no ratio is beyond 2
    assert_mean_is_one(2 * torch.sigmoid(log_q - log_p), 0.02)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "plain"])  # one density
def test_draws_of_one_density_give_the_mass_of_another(name: str, k: int) -> None:
    first, second = Sets.of(name, k), Sets.of(name, k, seed=7)
    rows = first.sample(6_000, seed=1)
    log_ratio = second.log_prob(rows) - first.log_prob(rows)
    assert log_ratio.std() > 0.02
    assert_mean_is_one(log_ratio.exp(), 0.05)


@dataclass(frozen=True)
class Broad:
    """Independent Student variables in the axes of a cloud of points, but wider."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def about(cls, points: Tensor) -> "Broad":
        return cls(points.mean(0), 1.3 * torch.linalg.cholesky(points.T.cov()))

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        student = StudentT(torch.tensor(5.0).double())
        z = student.sample(torch.Size((num, len(self.mean))))
        log_det = self.factor.diagonal().log().sum()
        return self.mean + z @ self.factor.T, student.log_prob(z).sum(-1) - log_det


def assert_density_is_that_of_the_draws(
    head: CellHead, draws: Tensor, log_q: Any
) -> None:
    """Compare draws ``(N, K, 3)`` of one peak with integrals of their density.

    The peak's mass is one, and it has a quarter of that between the quartiles of each
    coordinate of the draws.
    """
    num, k = draws.shape[:2]
    points, _ = head.local_chart.coordinates(draws)
    turns = torch.polar(torch.ones_like(points[..., 1]), points[..., 1])
    centre = turns.mean(0).angle()
    points[..., 1] = (points[..., 1] - centre + math.pi) % (2 * math.pi)
    rows, log_g = Broad.about(points.flatten(1)).sample(num)
    shaped = rows.reshape(num, k, 3).clone()
    inside = ((shaped[..., 1] >= 0) & (shaped[..., 1] < 2 * math.pi)).all(-1)
    inside &= (shaped[..., 0].diff(dim=-1) > 0).all(-1)
    shaped[..., 1] += centre - math.pi
    components = head.local_chart.components(shaped)
    inside &= head.chart.contains(components).all(-1)
    safe = torch.where(inside[:, None, None], components, draws)
    _, log_det = head.local_chart.coordinates(safe)
    value = log_q(safe).double() - log_det.sum(-1) - log_g
    ratio = torch.where(inside, value.exp(), 0.0)
    assert_mean_is_one(ratio, 0.06)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for column, drawn in zip(rows.T, points.flatten(1).T, strict=True):
        places = torch.bucketize(column.contiguous(), drawn.quantile(quarters))
        for place in range(4):
            part = ratio * (places == place)
            error = math.sqrt((float(part.var()) + 0.19) / num)
            assert abs(float(part.mean()) - 0.25) < 5 * error


# Anchors of the tones; two in one cell or with room for a sliver only; none there.
ANCHORS = [[8], [8, 16], [8, 10], [2, 20]]


@pytest.mark.parametrize("anchors", ANCHORS, ids=str)
@pytest.mark.parametrize("name", ["joint", "refined", "plain"])
def test_density_above_anchors_has_mass_one_and_is_that_of_the_draws(
    name: str, anchors: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # five standard errors: 1 of 10^4 seeds fails for all of these cases together
    num, k = 20_000, len(anchors)
    sets = Sets.of(name, k)
    assert isinstance(sets.head, AutoregressiveHead)
    sets.head.weighed_sets = 0
    fixed = torch.tensor([anchors + [0] * (3 - k)])
    tokens, edges = sets.head.tokens_and_edges(sets.encoding)
    assert tokens is not None
    with torch.no_grad():
        chain = PrunedChain(sets.head.cells, tokens, edges)
        cells = FlooredCells(chain, UniformCells(sets.head.axis, edges))
        chance = cells.log_prob(torch.tensor([0]), fixed, sets.mask(1))
    monkeypatch.setattr(
        FlooredCells, "sample", lambda *_, **__: fixed.expand(num, -1).clone()
    )
    draws = sets.sample(num)[:, :k]

    def log_q(components: Tensor) -> Tensor:
        position = sets.head.local_chart.coordinates(components)[0][..., 0]
        cells = sets.head.axis.cells(position, edges.expand(len(position), -1))
        here = (cells == torch.tensor(anchors)).all(-1)
        padded = nn.functional.pad(components, (0, 0, 0, 3 - k))
        return torch.where(here, sets.log_prob(padded) - chance, -torch.inf)

    assert_density_is_that_of_the_draws(sets.head, draws.double(), log_q)


@pytest.mark.parametrize("name", ["joint", "refined"])
def test_joint_draws_keep_the_least_separation(name: str) -> None:
    sets = Sets.of(name, 3)
    rows = tiny.layout.pack(
        torch.full((5_000,), 3), sets.sample(5_000), torch.full((5_000, 1), 0.5)
    )
    assert tiny.prior.support.check(rows).all()
    assert sets.log_prob(tiny.layout.unpack(rows).components).isfinite().all()
    # some are as near as may be, so that the bound is at work
    gaps = tiny.layout.unpack(rows).components[..., 2].diff(dim=-1)
    assert gaps.min() < 0.105


@torch.no_grad()
def test_joint_density_vanishes_below_the_least_separation() -> None:
    sets = Sets.of("joint", 2)
    rows = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0, 0, 0]]]).repeat(3, 1, 1)
    rows[:, 1, 2] += torch.tensor([0.09, 0.099, 0.101])
    assert sets.log_prob(rows).isneginf().tolist() == [True, True, False]


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_factorised_density_is_the_sum_over_all_assignments(k: int) -> None:
    sets = Sets.of("factorised", k)
    head = sets.head
    assert isinstance(head, IndependentHead)
    assert sets.encoding.tokens is not None
    rows = sets.sample(20)
    slots = head.cells(sets.encoding.tokens)[0, k - 1]
    position = head.local_chart.coordinates(rows[:, :k])[0][..., 0]
    anchors = head.axis.cells(
        position, head.tokens_and_edges(sets.encoding)[1].expand(20, -1)
    )
    assigned = torch.stack(
        [
            sum((slots[p[j], anchors[:, j]] for j in range(k)), torch.zeros(20))
            for p in permutations(range(k))
        ]
    )
    # the first permutation gives each slot the component of its own place
    local = sets.log_prob(rows, "ordered") - assigned[0]
    for matching, expected in (
        ("permanent", assigned.logsumexp(0)),
        ("hungarian", assigned.amax(0)),
    ):
        torch.testing.assert_close(
            sets.log_prob(rows, matching), local + expected, rtol=1e-5, atol=1e-4
        )
    mixed = rows.clone()
    mixed[:, :k] = rows[:, :k].flip(1)
    torch.testing.assert_close(sets.log_prob(mixed), sets.log_prob(rows))


# --- the location axis

SIX = {"even": [0, 1, 2, 3, 4, 5, 6], "uneven": [0, 1.25, 1.75, 3, 4.25, 4.75, 6]}


@dataclass(frozen=True)
class Axis:
    """An axis of six cells whose edges are quarters."""

    axis: CellAxis
    edges: Tensor

    def placements(self, k: int) -> dict[tuple[int, ...], Tensor]:
        """Positions of K components on quarters that keep the separation, by anchors.

        Each entry has shape ``(n, K)``.
        """
        found: dict[tuple[int, ...], list[list[float]]] = {}
        for steps in combinations_with_replacement(range(24), k):
            y = [step / 4 for step in steps]
            if all(b - a >= self.axis.separation for a, b in pairwise(y)):
                cells = tuple(bisect_right(self.edges[0].tolist(), v) - 1 for v in y)
                found.setdefault(cells, []).append(y)
        return {cells: torch.tensor(y).double() for cells, y in found.items()}


@pytest.fixture(params=SIX, name="edges")
def _edges(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor([SIX[request.param]], dtype=torch.float64)


@pytest.fixture(params=[0.0, 0.5, 1.0, 1.5, 2.0], name="six")
def _six(request: pytest.FixtureRequest, edges: Tensor) -> Axis:
    return Axis(CellAxis(0, 6, request.param), edges)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ends_of_anchors_are_those_of_all_placements(six: Axis, k: int) -> None:
    axis, found = six.axis, six.placements(k)
    anchors = torch.tensor(list(found))
    starts, ends = six.edges[0, anchors], six.edges[0, anchors + 1]
    least = torch.stack([y.amin(0) for y in found.values()])
    most = torch.stack([y.amax(0) for y in found.values()])
    assert torch.equal(axis.earliest(starts), least)
    # cells are open at their upper end, a quarter above the last place in them
    mask = torch.ones_like(anchors, dtype=torch.bool)
    assert torch.equal(axis.upper(ends, mask), most + 0.25)
    for cells, y in found.items():
        rows = torch.tensor(cells).expand(len(y), -1)
        assert torch.equal(axis.cells(y, six.edges.expand(len(y), -1)), rows)
        for i in range(1, k):
            # the least place of a component, given the one before
            low = axis.lower(six.edges[0, rows[:, i]], y[:, i - 1])
            for before in y[:, i - 1].unique():
                at = y[:, i - 1] == before
                assert (low[at] == y[at, i].min()).all()


@pytest.mark.parametrize("left", [0, 1, 2])
def test_feasible_anchors_are_those_with_a_placement(six: Axis, left: int) -> None:
    every = torch.cat(list(six.placements(left + 1).values()))[:, :1]
    cells = six.axis.cells(every, six.edges.expand(len(every), -1))
    for earliest in (-math.inf, 0.0, 0.5, 1.0, 2.5, 5.0):
        given = torch.tensor([earliest]).double(), torch.tensor([left])
        found = six.axis.feasible(*given, six.edges)[0].nonzero().flatten()
        expected = cells[every >= earliest + six.axis.separation]
        assert torch.equal(found, expected.unique())


def test_upper_ends_take_no_notice_of_inactive_anchors() -> None:
    axis = CellAxis(0, 6, 1.5)
    ends = torch.tensor([[3.0, 1.0, 1.0], [3.0, 4.0, 1.0]]).double()
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert axis.upper(ends, mask)[mask].tolist() == [3.0, 2.5, 4.0]


def test_both_ends_of_the_axis_lie_in_a_cell(edges: Tensor) -> None:
    ends = torch.tensor([[-0.1, 0.0, 5.99, 6.0, 6.1]]).double()
    assert CellAxis(0, 6).cells(ends, edges).tolist() == [[0, 0, 5, 5, 5]]


# --- distributions over anchors


def table(k: int) -> tuple[Tensor, Tensor]:
    """All ascending anchors, padded to three, with a mask."""
    rows = list(combinations_with_replacement(range(6), k))
    anchors = torch.tensor([[*a, *[0] * (3 - k)] for a in rows])
    return anchors, (torch.arange(3) < k).expand(len(rows), -1)


def chain(axis: CellAxis) -> CellChain:
    pointer = CellChain(axis, 4, 3, hidden_features=8, reach=3)
    shake(pointer, 0.7, seed=2)
    return pointer


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_anchor_chain_sums_to_one_over_the_feasible(six: Axis, k: int) -> None:
    pointer, tokens = chain(six.axis), torch.randn(2, 6, 4)
    edges = six.edges.expand(2, -1)
    anchors, mask = table(k)
    for b in range(2):
        rows = torch.full((len(anchors),), b), anchors, mask
        log_q = ChainGivenX(pointer, tokens, edges).log_prob(*rows)
        assert float(log_q.double().exp().sum()) == pytest.approx(1, abs=1e-5)
        finite = {tuple(a[:k].tolist()) for a in anchors[log_q.isfinite()]}
        assert finite == set(six.placements(k))
        with torch.enable_grad():  # where equal states are not merged
            again = ChainGivenX(pointer, tokens, edges).log_prob(*rows).detach()
        torch.testing.assert_close(again, log_q)


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_a_tilted_chain_is_the_chain_times_its_shifts(six: Axis, k: int) -> None:
    pointer, tokens = chain(six.axis), torch.randn(2, 6, 4, generator=seeded(1))
    edges = six.edges.expand(2, -1)
    anchors, mask = table(k)
    shift = torch.randn(2, 6, generator=seeded(2))
    there = (anchors.unsqueeze(-1) == torch.arange(6)) & mask.unsqueeze(-1)
    rows, every = torch.zeros(len(anchors)).long(), ChainGivenX(pointer, tokens, edges)
    for b in range(2):
        one = PrunedChain(pointer, tokens, edges).one(b).tilted(shift[b : b + 1], k)
        log_q = one.log_prob(rows, anchors, mask).double()
        assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-5)
        if six.axis.separation == 0:  # or looking ahead is an approximation
            # a cell's shift counts once, however many components it holds
            value = every.log_prob(rows + b, anchors, mask)
            value = value + (there.any(1) * shift[b]).sum(-1)
            expected, kept = value.log_softmax(-1).double(), log_q.isfinite()
            assert expected[~kept].exp().sum() < 1e-4  # pruned
            torch.testing.assert_close(log_q[kept], expected[kept], rtol=0, atol=1e-3)


@pytest.mark.parametrize("separation", [0.0, 1.5])
@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_anchor_chain_draws_what_it_says(separation: float, k: int) -> None:
    pointer = chain(CellAxis(0, 6, separation))
    tokens = torch.randn(2, 6, 4)
    edges = torch.tensor(list(SIX.values())).double()
    anchors, mask = table(k)
    num, power = 10_000, torch.tensor([36, 6, 1])
    owner = torch.arange(2).repeat(num)
    given = ChainGivenX(pointer, tokens, edges)
    drawn = given.sample(owner, mask[:1].expand(2 * num, -1), seeded(1))
    codes, drawn_codes = (anchors * power).sum(-1), (drawn * power).sum(-1)
    for b in range(2):
        owners = torch.full((len(codes),), b)
        log_q = given.log_prob(owners, anchors, mask)
        own = drawn_codes[owner == b].unsqueeze(-1)
        # false alarm in 1 of 10^6 for each of 12 tests
        assert_counts_follow((own == codes).sum(0), log_q.double().exp(), num)


def assert_counts_follow(counts: Tensor, probs: Tensor, num: int) -> None:
    """By a chi-square test, in which rare cells are taken together."""
    assert counts.sum() == num
    assert (counts[probs == 0] == 0).all()
    expected = num * probs / probs.sum()
    pairs = torch.stack([counts.double(), expected])
    rare = expected < 10
    pairs = torch.cat([pairs[:, ~rare], pairs[:, rare].sum(-1, keepdim=True)], -1)
    pairs = pairs[:, pairs[1] > 0].numpy()
    assert stats.chisquare(*pairs).pvalue > 1e-6


@torch.no_grad()
def test_anchor_marginals_are_those_of_a_conditional_bernoulli_sample() -> None:
    pointer, tokens = CellMarginals(CellAxis(0, 5), 4, 3, 8), torch.randn(2, 5, 4)
    shake(pointer, 0.7, seed=2)
    found = pointer(tokens).double().exp()
    odds = pointer.scores(tokens).double().exp()  # (B, L, K - 1)
    for b, k in product(range(2), (1, 2, 3)):
        expected = torch.zeros(k, 5, dtype=torch.float64)
        for cells in combinations(range(5), k):
            for slot, cell in enumerate(cells):
                expected[slot, cell] += odds[b, list(cells), k - 1].prod()
        expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(found[b, k - 1, :k], expected, rtol=0, atol=1e-6)


# --- the density in a cell

INTERVALS: dict[str, tuple[float, float, float, float]] = {
    # mean, deviation and ends
    "wide": (0.1, 1.0, -0.5, 0.5),
    "inside": (0.1, 0.02, -0.5, 0.5),
    "at an end": (0.5, 0.1, -0.5, 0.5),
    "below": (-3.0, 0.3, -0.5, 0.5),
    "far above": (60.0, 0.5, -0.5, 0.5),
    "open": (0.3, 0.2, -math.inf, math.inf),
    "half open": (2.0, 0.4, -0.5, math.inf),
}


def local_density(features: int) -> LocalDensity:
    options: dict[str, Any] = {"hidden_features": 8, "num_layers": 2}
    density = LocalDensity(features, 4, 0, **options, location_scale=False)
    shake(density, 0.1, seed=4)
    return density


def context(num: int) -> RowContext:
    return RowContext(torch.ones(1, 4), torch.zeros(num, dtype=torch.int64))


def constant(values: Any, num: int) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.expand(num, *values.shape).contiguous()


@pytest.mark.parametrize("name", ["joint", "refined", "pursued"])
def test_float32_draws_stay_in_the_cells_that_they_were_drawn_in(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = deepcopy(untrained(name).component_head)
    assert isinstance(head, AutoregressiveHead)
    head.weighed_sets = 0
    # far beyond the ends of the cells, so that most draws lie at one of them
    monkeypatch.setattr(
        "sbi_slotflow.nn.local.Cut.inverse",
        lambda cut, y: torch.where(y > 0, cut.high, cut.low),
    )
    seen: list[Tensor] = []
    sample = FlooredCells.sample
    monkeypatch.setattr(
        FlooredCells,
        "sample",
        lambda *a, **b: seen.append(sample(*a, **b)) or seen[-1],
    )
    encoding = untrained(name).encode(observation())
    mask = (torch.arange(3) < 2).expand(500, -1)
    owner = torch.zeros(500, dtype=torch.int64)
    drawn, _ = head.given(encoding, given_data(), None).sample(mask, owner, seeded(1))
    position = head.local_chart.coordinates(
        torch.where(mask.unsqueeze(-1), drawn, head.chart.some_point(drawn))
    )[0][..., 0]
    found = head.axis.cells(position, head.tokens_and_edges(encoding)[1][owner])
    assert (found == seen[0])[mask].double().mean() > 0.995


@pytest.mark.parametrize("case", INTERVALS)
@torch.no_grad()
def test_local_density_has_mass_one_and_is_that_of_the_draws(case: str) -> None:
    mean, scale, low, high = INTERVALS[case]
    density = local_density(1)
    # steps that shrink towards ends, where densities may diverge, and grow in the
    # tails, which are log-normal
    steps = torch.linspace(-7, 7, 20_001, dtype=torch.float64)
    if math.isfinite(high):
        grid = low + (high - low) * torch.special.ndtr(steps)
    elif math.isfinite(low):
        grid = low + (4 * steps).exp()
    else:
        grid = mean + scale * steps.sinh()
    ends = (constant([low], len(grid)), constant([high], len(grid)))
    given = (constant([mean], len(grid)), constant([[scale]], len(grid)), ends)
    value = density.log_prob(grid[:, None], *given, context(len(grid))).double().exp()
    assert value.isfinite().all()
    mass = torch.cumulative_trapezoid(value, grid)
    assert float(mass[-1]) == pytest.approx(1, abs=2e-3)
    draws, z = density.sample(*given, context(len(grid)), generator=seeded(1))
    assert ((draws >= low) & (draws <= high)).all()
    torch.testing.assert_close(draws, mean + scale * z, rtol=0, atol=2.1e-4)
    places = torch.searchsorted(grid, draws[:, 0].contiguous()).clamp(1, len(grid) - 1)
    # false alarm in 1 of 10^6 for each of seven tests
    levels = mass[places - 1].clamp(0, 1).numpy()
    assert stats.kstest(levels, "uniform").pvalue > 1e-6


@torch.no_grad()
def test_local_density_of_two_coordinates() -> None:
    density, side = local_density(2), 420
    factor, mean = [[0.3, 0.0], [0.5, 0.4]], [0.4, 0.6]
    ends = [-0.5, -1.0], [0.5, 1.0]
    half = torch.tensor(ends[1]).double()
    # w = half (2 Phi(t) - 1): densities may diverge at the ends
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) * 14 / side - 7
    t = torch.cartesian_prod(steps, steps)
    grid = half * (2 * torch.special.ndtr(t) - 1)
    measure = 2 * half.prod() * (-0.5 * t.square().sum(-1)).exp() / math.pi
    measure = measure * (14 / side) ** 2

    def given(num: int) -> Any:
        low, high = (constant(end, num) for end in ends)
        return constant(mean, num), constant(factor, num), (low, high), context(num)

    mass = density.log_prob(grid, *given(len(grid))).double().exp() * measure
    assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
    num = 20_000
    draws, z = density.sample(*given(num), generator=seeded(1))
    expected = torch.tensor(mean) + z @ torch.tensor(factor).double().T
    torch.testing.assert_close(draws, expected, rtol=0, atol=2.1e-4)
    assert (draws.abs() <= half).all()
    borders = torch.tensor([-1.0, -0.4, 0.1, 0.5, 1.0]).double()  # between the steps
    drawn = torch.special.ndtri(0.5 * (draws / half + 1))
    codes, drawn_codes = (
        (torch.bucketize(values, borders) * torch.tensor([6, 1])).sum(-1)
        for values in (t, drawn)
    )
    counts = torch.bincount(drawn_codes, minlength=36)
    expected = torch.zeros(36).double().index_add(0, codes, mass)
    # false alarm in 1 of 10^6 seeds
    assert_counts_follow(counts, expected, num)


# --- the whole estimator


@every_variant
@torch.no_grad()
def test_a_saved_estimator_is_the_same(name: str, tmp_path: Path) -> None:
    estimator = untrained(name)
    path = tmp_path / "estimator.safetensors"
    estimator.save(path)
    loaded = SlotDensityEstimator.load(path)
    x = observation()
    theta = estimator.sample((10,), x, generator=seeded(1))
    assert torch.equal(theta, loaded.sample((10,), x, generator=seeded(1)))
    log_q = estimator.log_prob(theta, x)
    assert log_q.isfinite().all()
    assert torch.equal(loaded.log_prob(theta, x), log_q)
    assert loaded.keeps_separation == (name != "factorised")


@every_variant
def test_every_parameter_receives_a_gradient(name: str) -> None:
    theta = tiny.prior.sample((40,))
    estimator = untrained(name)
    parameters = dict(estimator.named_parameters())
    loss = estimator.loss(theta, tiny.simulator(theta)).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None, parameter
        assert gradient.isfinite().all(), parameter
        assert (gradient != 0).any(), parameter


@every_variant
@torch.no_grad()
def test_log_prob_takes_sets_in_any_order(name: str) -> None:
    estimator, x = untrained(name), observation()
    theta = estimator.sample((50,), x, generator=seeded(1))
    log_q = estimator.log_prob(theta, x)
    mixed = tiny.layout.relabel(theta, seeded(2))
    torch.testing.assert_close(estimator.log_prob(mixed, x), log_q)


class Tokens(nn.Module):
    """An encoder of the user's own."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 4 * num_tokens)

    def forward(self, x: Tensor) -> Encoding:
        hidden = self.layer(x)
        return Encoding(hidden, hidden, hidden, hidden.unflatten(-1, (-1, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"refine_slots": 2, "coupling": "factorised"},
            "needs slots='anchored', coupling='joint'",
        ),
        ({"refine_slots": -1}, "refine_slots must be at least 0, got -1"),
        ({"weighed_sets": -1}, "weighed_sets must be at least 0, got -1"),
        ({"refine_slots": 2, "slots": "attention"}, "needs slots='anchored'"),
        ({"coupling": "both"}, "coupling must be one of"),
        ({"encoder": Tokens(29), "slots": "anchored"}, "keeps 30 tokens"),
        ({"encoder": nn.Linear(300, 8), "slots": "anchored"}, "keeps 30 tokens"),
        ({"chart": "circle", "slots": "anchored"}, "need a true chart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str
) -> None:
    theta = tiny.prior.sample((8,))
    with pytest.raises(ValueError, match=message):
        builder(**options)(theta, tiny.simulator(theta))


def test_anchored_slots_need_a_location() -> None:
    problem = problems.linear_gaussian()
    theta = problem.prior.sample((8,))
    with pytest.raises(ValueError, match="declares where components are"):
        slot_nn(problem, slots="anchored", **SMALL)(theta, problem.simulator(theta))


def test_an_encoder_with_a_token_for_each_cell_fits() -> None:
    theta = tiny.prior.sample((8,))
    x = tiny.simulator(theta)
    estimator = builder(encoder=Tokens(30), slots="anchored")(theta, x)
    assert isinstance(estimator.component_head, AutoregressiveHead)
    assert estimator.loss(theta, x).isfinite().all()


@every_variant
def test_x_of_another_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 300\)"):
        untrained(name).sample((2,), torch.zeros(1, 299))
    net = untrained(name).net
    assert isinstance(net, TokenEncoder)
    with pytest.raises(ValueError, match="x must have 300 entries, got 299"):
        net(torch.zeros(1, 299))


# --- tables and tokens


@pytest.mark.parametrize("num", [0, 1, 500])
def test_distinct_rows_are_torchs(num: int) -> None:
    table = torch.randint(-3, 3, (num, 3), generator=seeded())
    # infinite positions occur among the pointer's states
    last = torch.where(table[:, 2] < 0, -torch.inf, table[:, 2].double())
    columns, which = unique_rows(table[:, 0], table[:, 1], last)
    found = torch.stack([column.double() for column in columns], -1)
    whole = torch.stack([table[:, 0].double(), table[:, 1].double(), last], -1)
    assert torch.equal(found[which], whole)
    expected = torch.unique(whole, dim=0) if num else whole
    assert sorted(found.tolist()) == expected.tolist()


def test_band_tokens_read_the_complex_amplitude_of_a_tone() -> None:
    lengths, rates, (low, high), cells = [400, 200], [10.0, 50.0], (0.5, 2.0), 30
    front_end = BandTokens(lengths, rates, (low, high), cells)
    cell, amplitude, phase = 11, 1.7, 0.9
    frequency = low + (cell + 0.5) * (high - low) / cells
    x = torch.cat(
        [
            amplitude
            * torch.cos(
                2 * math.pi * frequency * (torch.arange(n) - 0.5 * (n - 1)) / rate
                + phase
            )
            for n, rate in zip(lengths, rates, strict=True)
        ]
    )
    channels, level, _ = front_end(x.unsqueeze(0))
    assert channels.shape == (1, cells, front_end.channels)
    assert level.shape == (1, front_end.num_levels)
    # after the edges' shifts: the middle, the edge, the taper, the second's middle
    real, imag = channels[0, cell, 2:10].unflatten(-1, (4, 2)).T
    read = torch.complex(real, imag)
    expected = torch.polar(torch.tensor(amplitude), torch.tensor(phase))
    # but for the tone at minus the frequency, which leaks 1 / (2 pi f T): T is 4 s
    error = (read - expected).abs()
    assert (error[[0, 2]] < 0.01).all()
    assert error[3] < 0.07
    # half a cell of 0.05 Hz off, which is one bin of 40 s: there is no signal
    assert read[1].abs() < 0.02


def test_edges_of_cells_lie_away_from_tones() -> None:
    front_end = BandTokens([400], [10.0], (0.5, 2.0), 30)
    times = torch.arange(400) / 10
    places = torch.tensor([11.0, 11.2, 10.8])
    x = torch.cos(2 * math.pi * (0.5 + 0.05 * places.unsqueeze(-1)) * times)
    edges = front_end(x)[2]
    assert edges.dtype == torch.float64
    assert (edges[:, [0, -1]] == torch.tensor([0, 30])).all()
    shifts = edges - torch.arange(31)
    assert (shifts.abs() <= 0.4 + 1e-6).all()
    assert ((edges[:, 11] - places).abs() > 0.35).all()
    assert shifts[1, 11] < -0.35
    assert shifts[2, 11] > 0.35


def test_token_levels_follow_the_noise() -> None:
    noise = torch.randn(50, 300, generator=seeded())
    band = BandTokens([200, 100], [10.0, 50.0], (0.5, 2.0), 30)
    for front_end in (band, TraceTokens(300, 30)):
        for sigma in (0.1, 3.0):
            level = front_end(sigma * noise)[1].exp().mean(0)
            assert torch.allclose(level, torch.tensor(sigma), rtol=0.1)


def test_trace_tokens_keep_every_sample() -> None:
    front_end = TraceTokens(60, 12)
    x = torch.randn(3, 60, generator=seeded())
    channels, level, edges = front_end(x)
    assert edges.tolist() == [list(range(13))] * 3
    assert channels.shape == (3, 12, front_end.channels)
    assert level.shape == (3, front_end.num_levels)
    assert torch.equal(channels[..., :5].flatten(1), x)
    with pytest.raises(ValueError, match="num_tokens must divide the 60 samples"):
        TraceTokens(60, 13)


def test_token_encoders_are_rebuilt_from_their_specs() -> None:
    for front_end in (TraceTokens(60, 12), BandTokens([40, 20], [4, 9], (0.5, 1), 12)):
        encoder = TokenEncoder(front_end, width=8, hidden_features=6, num_heads=2)
        options = {k: v for k, v in encoder.spec.items() if k != "kind"}
        again = TokenEncoder(**options)
        again.load_state_dict(encoder.state_dict())
        x = torch.randn(3, 60, generator=seeded())
        first, second = encoder(x), again(x)
        assert first.tokens.shape == (3, 12, 8)
        assert first.context.shape == (3, 6)
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.shared, second.shared)
    with pytest.raises(ValueError, match="front end kind must be one of"):
        build("front end", {"kind": "other"})


def test_negligible_anchors_are_ruled_out_where_asked() -> None:
    pointer = chain(CellAxis(0, 6))
    with torch.no_grad():
        pointer.presence.weight.zero_()
        pointer.presence.weight[0, 0] = 20.0
        pointer.keys.weight.zero_()
        pointer.keys.bias.zero_()
        pointer.presence.bias.zero_()
    tokens = torch.zeros(1, 6, 4)
    tokens[0, :, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    edges = torch.arange(7.0, dtype=torch.float64).expand(1, -1)
    anchors = torch.zeros(6, 3, dtype=torch.int64)
    anchors[:, 0] = torch.arange(6)
    mask = torch.tensor([True, False, False]).expand(6, -1)
    rows = (torch.zeros(6, dtype=torch.int64), anchors, mask)
    with torch.no_grad():
        whole = ChainGivenX(pointer, tokens, edges).log_prob(*rows)
        pruned = PrunedChain(pointer, tokens, edges).log_prob(*rows)
    assert torch.isfinite(whole).all()
    assert torch.isfinite(pruned).tolist() == [False, False, True, False, False, False]
    assert pruned[2] == pytest.approx(0.0, abs=1e-6)
