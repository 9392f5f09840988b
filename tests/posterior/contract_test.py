"""What every posterior keeps to, whatever it is made of.

Networks are untrained: what holds here holds of any weights. Observations are numbers
that half precision can hold, so that the kinds in which users pass them are equal.
"""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from sbi_slotflow import SlotPosterior, problems, slot_nn
from sbi_slotflow.calibration import faults
from sbi_slotflow.nn.encoders import Encoding
from sbi_slotflow.posterior.base import Posterior, PosteriorOfOne
from sbi_slotflow.posterior.draws import ChainDraws, PosteriorDraws
from sbi_slotflow.posterior.refinable import LeaningPosterior
from sbi_slotflow.posterior.refine import refine
from sbi_slotflow.problems import Problem
from sbi_slotflow.seeding import generator_for

LINEAR = problems.linear_gaussian()
EXACT = LINEAR.exact_posterior()
TINY = problems.sinusoids("tiny")


@cache
def observations(problem: Problem) -> Tensor:
    """Three observations; of the linear problem those with the least certain K."""
    generator = generator_for(7)
    x = problem.simulator(problem.prior.sample((40,), generator), generator)
    x = x.half().float()
    if problem is LINEAR:
        x = x[EXACT.cardinality(x).probs.max(-1).values.argsort()]
    return x[:3]


def untrained(problem: Problem, **options: Any) -> SlotPosterior:
    torch.manual_seed(1)
    theta = problem.prior.sample((64,))
    estimator = slot_nn(problem, **options)(theta, problem.simulator(theta))
    return SlotPosterior(estimator, problem.prior, problem.simulator)


def drawn(num: int = 2_000) -> dict[str, Any]:
    x = observations(LINEAR)[0]
    rows = EXACT.sample((4, num // 4), x, generator=generator_for(1))
    return {"layout": LINEAR.layout, "theta": rows, "x": x}


def weighted() -> PosteriorDraws:
    log_weights = torch.randn(4, 500, generator=generator_for(2))
    return PosteriorDraws(**drawn(), log_weights=log_weights)


def refined() -> Posterior:
    x = observations(LINEAR)[0]
    found = refine(EXACT, LINEAR.log_likelihood, x, 2_000, generator=generator_for(3))
    assert isinstance(found, PosteriorDraws)
    return found


class SixTokens(nn.Module):
    """A token for each of six entries."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Encoding:
        place = torch.eye(6).to(x).expand(len(x), 6, 6)
        tokens = self.lift(torch.cat([x.unsqueeze(-1), place], -1)).tanh()
        pooled = tokens.flatten(1)
        return Encoding(pooled, pooled, pooled, tokens)


MAKERS = {
    "exact": lambda: EXACT,
    "network": lambda: untrained(LINEAR),
    "ordered": lambda: untrained(LINEAR, encoder=SixTokens(), slots="ordered"),
    "separated": lambda: untrained(TINY, slots="attention"),
    "laplace": lambda: TINY.laplace_proposal(observations(TINY)[0]),
    "draws": lambda: PosteriorDraws(**drawn()),
    "weighted": weighted,
    "chains": lambda: ChainDraws(**drawn()),
    "refined": refined,
    "reweighted": lambda: EXACT.with_prior(LINEAR.prior.with_cardinality([1, 2, 3, 4])),
    "leaning": lambda: LeaningPosterior(
        EXACT, LINEAR.prior.with_cardinality([4, 3, 2, 1]), observations(LINEAR)[0]
    ),
    "narrowed": lambda: faults.narrowed(EXACT),
    "shifted": lambda: faults.shifted(EXACT),
    "oversharp": lambda: faults.oversharp(EXACT),
    "unmixed": lambda: faults.unmixed(EXACT),
    "independent": lambda: faults.independent(EXACT),
}


@dataclass(frozen=True)
class Case:
    name: str
    posterior: Any
    problem: Problem

    @property
    def x(self) -> Tensor:
        """All observations that the posterior may be asked about."""
        one = isinstance(self.posterior, PosteriorOfOne)
        return observations(self.problem)[: 1 if one else 3]

    def draws(self, num: int, seed: int = 0, x: Any = None, **options: Any) -> Tensor:
        x = self.x[0] if x is None else x
        generator = generator_for(seed)
        return self.posterior.sample(num, x, generator=generator, **options)


@cache
def case_of(name: str) -> Case:
    problem = TINY if name in ("separated", "laplace") else LINEAR
    return Case(name, MAKERS[name](), problem)


@pytest.fixture(name="case", params=MAKERS)
def _case(request) -> Case:
    return case_of(request.param)


DENSE = ["exact", "network", "ordered", "separated", "laplace", "reweighted", "leaning"]


@pytest.fixture(name="dense", params=DENSE)
def _dense(request) -> Case:
    return case_of(request.param)


def test_posteriors_without_a_density_say_so(case: Case):
    assert case.posterior.has_density == (case.name in DENSE)
    if case.name not in DENSE:
        with pytest.raises(NotImplementedError, match="log_prob does not exist"):
            case.posterior.log_prob(case.draws(2), case.x[0])


def test_every_posterior_is_here():
    def below(kind: type) -> set[type]:
        kinds = {kind, *(k for sub in kind.__subclasses__() for k in below(sub))}
        return {k for k in kinds if k.__module__.startswith("sbi_slotflow.")}

    for name in MAKERS:
        case_of(name)
    abstract = {k for k in below(Posterior) if getattr(k, "__abstractmethods__", ())}
    tested = {type(case_of(name).posterior) for name in MAKERS}
    assert below(Posterior) - abstract == tested


SHAPES = [
    ((), ()),
    (5, (5,)),
    (np.int64(5), (5,)),
    ((2, 3), (2, 3)),
    ([np.int32(4)], (4,)),
    (torch.Size((3,)), (3,)),
    (0, (0,)),
]


def test_shapes_follow_those_of_x_and_of_the_draws(case: Case):
    posterior, x, size = case.posterior, case.x, case.problem.layout.size
    for shape, expected in SHAPES:
        for one in (x[0], x[:1]):
            assert posterior.sample(shape, one).shape == (*expected, size)
        draws = posterior.sample_batched(shape, x)
        assert draws.shape == (*expected, len(x), size)
    assert posterior.sample_batched(5, x[0]).shape == (5, 1, size)
    assert posterior.cardinality(x[0]).batch_shape == ()
    for num in {1, len(x)}:
        assert posterior.cardinality(x[:num]).batch_shape == (num,)
    torch.testing.assert_close(
        posterior.cardinality(x[0]).probs, posterior.cardinality(x).probs[0]
    )


def test_a_batch_belongs_where_it_is_asked_for(case: Case):
    x = observations(case.problem)
    for method in ("sample", "map", "catalogue", "to_datatree"):
        first = (5,) if method == "sample" else ()
        with pytest.raises(ValueError, match=rf"\.{method}\(\) takes one observation"):
            getattr(case.posterior, method)(*first, x=x)
    if len(case.x) == 1:
        with pytest.raises(ValueError, match="x differs from the observation"):
            case.posterior.sample_batched(5, x)


def test_densities_have_the_shape_of_their_rows(dense: Case):
    posterior, x = dense.posterior, dense.x
    draws = posterior.sample_batched((2, 3), x, generator=generator_for(0))
    values = posterior.log_prob_batched(draws[0], x)
    assert values.shape == (3, len(x))
    assert posterior.log_prob_batched(draws[0, 0], x).shape == (1, len(x))
    assert posterior.log_prob(draws[0, 0, 0], x[0]).shape == (1,)
    assert posterior.log_prob(draws[:, :, 0], x[:1]).shape == (2, 3)
    for b, one in enumerate(x):
        alone = posterior.log_prob(draws[0, :, b], one)
        # the acceptance of separated slots is estimated anew
        torch.testing.assert_close(values[:, b], alone, rtol=1e-4, atol=0.05)
    with pytest.raises(ValueError, match=r"theta must have shape \(S, B, E\) or"):
        posterior.log_prob_batched(draws[0, 0, 0], x)
    with pytest.raises(ValueError, match="entries on its last axis"):
        posterior.log_prob(draws[0, 0, 0, :-1], x[0])


def test_draws_are_canonical_rows_of_the_support(case: Case):
    layout = case.problem.layout
    rows = case.posterior.sample_batched(300, case.x, generator=generator_for(1))
    assert torch.equal(layout.canonical(rows), rows)
    assert layout.is_well_formed(rows).all()
    inside = case.problem.prior.support.check(rows)
    if case.name == "laplace":  # amplitudes are Gaussian: a proposal
        assert inside.double().mean() > 0.5
    else:
        assert inside.all()


def test_draws_have_the_cardinality_that_is_claimed(case: Case):
    num = 2_000
    probs = case.posterior.cardinality(case.x[0]).probs.double()
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    counts = case.problem.layout.cardinality(case.draws(num)).bincount(minlength=4)
    error = (probs * (1 - probs) / num).sqrt()
    # 5 standard errors of 4 shares and 13 posteriors: false alarms below 1e-4
    assert ((counts / num - probs).abs() <= 5 * error + 1 / num).all()


def test_draws_may_be_given_a_cardinality(case: Case):
    probs = case.posterior.cardinality(case.x[0]).probs
    for k in probs.nonzero().flatten().tolist():
        for kind in (int, np.int64, np.uint8):
            rows = case.draws(20, k=kind(k))
            assert (case.problem.layout.cardinality(rows) == k).all()
        assert torch.equal(rows, case.draws(20, k=k))
    for bad in (True, 1.0, "1", np.bool_(True)):
        with pytest.raises(TypeError, match=r"k must be an integer in 0\.\.3, got"):
            case.draws(2, k=bad)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=r"k must be an integer in 0\.\.3, got"):
            case.draws(2, k=bad)


def test_the_empty_set_is_a_set(case: Case):
    if case.posterior.cardinality(case.x[0]).probs[0] == 0:
        with pytest.raises(ValueError, match="no draw has k=0"):
            case.draws(3, k=0)
        return
    rows = case.draws(3, k=0)
    parts = case.problem.layout.unpack(rows)
    assert (parts.cardinality == 0).all()
    assert (parts.components == 0).all()
    if case.posterior.has_density:
        assert torch.isfinite(case.posterior.log_prob(rows, case.x[0])).all()


def test_densities_do_not_depend_on_the_order(dense: Case):
    rows = dense.draws(50, k=2)
    other = dense.problem.layout.relabel(rows, generator_for(3))
    assert not torch.equal(rows, other)
    torch.testing.assert_close(
        dense.posterior.log_prob(rows, dense.x[0]),
        dense.posterior.log_prob(other, dense.x[0]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_densities_vanish_outside_the_support(dense: Case):
    rows = dense.draws(20, k=1)
    # a frequency beyond the band; for normal components only padding is forbidden
    rows[:, -1 if dense.problem is LINEAR else 4] = 50.0
    assert not dense.problem.prior.support.check(rows).any()
    assert torch.isneginf(dense.posterior.log_prob(rows, dense.x[0])).all()


@pytest.mark.parametrize("name", ["exact", "network", "ordered", "separated"])
def test_densities_are_those_of_the_draws(name: str):
    # E_q[p / (p + q); K] = E_p[q / (p + q); K] for the prior p; no term exceeds 1. A
    # density that is c times too large makes the right side c times the left. The
    # acceptance of separated slots is estimated from 10,000 draws: 2 % are its 2 sigma.
    case, num = case_of(name), 20_000
    prior, layout, x = case.problem.prior, case.problem.layout, case.x[0]
    slack = 0.02 if name == "separated" else 0.0

    def log_ratio(rows: Tensor) -> Tensor:
        return case.posterior.log_prob(rows, x).double() - prior.log_prob(rows).double()

    ours, theirs = case.draws(num, seed=5), prior.sample((num,), generator_for(6))
    left, right = torch.sigmoid(-log_ratio(ours)), torch.sigmoid(log_ratio(theirs))
    for size in range(4):
        first = torch.where(layout.cardinality(ours) == size, left, 0.0)
        second = torch.where(layout.cardinality(theirs) == size, right, 0.0)
        error = float(torch.hypot(first.std(), second.std())) / math.sqrt(num)
        # 5 standard errors of 12: false alarms below 1e-5
        miss = abs(float(first.mean() - second.mean()))
        assert miss <= 5 * error + slack * float(second.mean())
        assert error < 0.05 * float(second.mean())


def test_the_map_is_the_densest_of_the_most_probable(dense: Case):
    best = dense.posterior.map(dense.x[0], num_init_samples=300)
    assert best.shape == (1, dense.problem.layout.size)
    k = int(dense.posterior.cardinality(dense.x[0]).probs.argmax())
    assert dense.problem.layout.cardinality(best) == k
    rows = torch.cat([best, dense.draws(100, k=k)])
    values = dense.posterior.log_prob(rows, dense.x[0])
    assert (values[0] >= values[1:]).double().mean() > 0.95


def test_a_generator_decides_the_draws_alone(case: Case):
    state = torch.random.get_rng_state()
    first, again, other = (case.draws(30, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_copies_and_pickles_draw_alike(case: Case):
    expected = case.draws(20)
    packed = pickle.dumps(case.posterior)
    for twin in (copy.deepcopy(case.posterior), pickle.loads(packed)):
        rows = twin.sample(20, case.x[0], generator=generator_for(0))
        assert torch.equal(rows, expected)


def test_nothing_is_remembered_of_an_observation(case: Case):
    # what was asked before, and of what, changes neither the answers nor the object
    before = pickle.dumps(case.posterior)
    first = case.draws(20)
    for one in case.x:
        case.posterior.cardinality(one)
        rows = case.draws(5, x=one)
        if case.posterior.has_density:
            case.posterior.log_prob(rows, one)
    assert torch.equal(case.draws(20), first)
    assert pickle.dumps(case.posterior) == before


def test_four_threads_answer_as_one(case: Case):
    def ask(task: int) -> tuple[Tensor, Tensor, Tensor]:
        one = case.x[task % len(case.x)]
        rows = case.draws(40, seed=task, x=one)
        probs, values = case.posterior.cardinality(one).probs, torch.zeros(1)
        if case.posterior.has_density:
            values = case.posterior.log_prob(rows, one)
        return rows, probs, values

    tasks = range(8)
    serial = [ask(task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(serial, pool.map(ask, tasks), strict=True):
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def series(x: Tensor) -> pd.Series:
    return pd.Series(x.numpy(), index=np.arange(len(x))[::-1] + 7)


KINDS = {
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "array": lambda x: x.numpy(),
    "double array": lambda x: x.double().numpy(),
    "half array": lambda x: x.half().numpy(),
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "list": lambda x: x.tolist(),
    "series": series,
    "masked array without a mask": lambda x: np.ma.array(x.numpy()),
}


def test_x_may_be_any_array_of_numbers(case: Case):
    x, expected = case.x[0], case.draws(10)
    for name, kind in KINDS.items():
        assert torch.equal(case.draws(10, x=kind(x)), expected), name
        assert torch.equal(
            case.posterior.cardinality(kind(x)).probs,
            case.posterior.cardinality(x).probs,
        ), name
    for kind in ("array", "list", "big-endian"):
        batch = case.posterior.sample_batched(2, KINDS[kind](case.x))
        assert batch.shape[:2] == (2, len(case.x))


def test_the_default_x_may_be_any_array_of_numbers(case: Case):
    posterior = copy.deepcopy(case.posterior)
    for one, batch_shape in ((case.x[0], ()), (case.x[:1], (1,))):
        posterior.set_default_x(one.numpy())
        assert torch.equal(
            posterior.sample(10, generator=generator_for(0)), case.draws(10)
        )
        if not isinstance(posterior, PosteriorOfOne):
            assert posterior.cardinality().batch_shape == batch_shape


def test_theta_may_be_any_array_of_numbers(dense: Case):
    rows = dense.draws(10).float()
    expected = dense.posterior.log_prob(rows, dense.x[0])
    for kind in ("array", "double array", "big-endian", "list"):
        found = dense.posterior.log_prob(KINDS[kind](rows), dense.x[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="theta must hold real numbers"):
        dense.posterior.log_prob(rows > 0, dense.x[0])


WRONG = {
    "too short": (lambda x: x[:-1], ValueError, r"x must have shape \(\d+,\) or \(ba"),
    "too deep": (lambda x: x[None, None], ValueError, "x must have shape"),
    "none": (lambda x: x.new_zeros(0, len(x)), ValueError, "at least one observation"),
    "NaN": (lambda x: x * math.nan, ValueError, "x must be finite"),
    "a masked sample": (
        lambda x: np.ma.array(x.numpy(), mask=np.arange(len(x)) == 0),
        ValueError,
        "x must be finite",
    ),
    "truth values": (lambda x: x > 0, TypeError, "x must hold real numbers"),
    "words": (lambda x: ["a"] * len(x), TypeError, "x must hold real numbers"),
    "ragged": (lambda x: [[1.0], [1.0, 2.0]], ValueError, "x must be an array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_x_is_named_alike_everywhere(case: Case, name: str):
    kind, error, message = WRONG[name]
    x, posterior = kind(case.x[0]), case.posterior
    rows = case.draws(2)
    for call in (
        lambda: posterior.sample(2, x),
        lambda: posterior.sample_batched(2, x),
        lambda: posterior.cardinality(x),
        lambda: posterior.log_prob(rows, x),
        lambda: posterior.map(x),
        lambda: posterior.catalogue(x),
        lambda: posterior.to_datatree(10, x),
        lambda: copy.copy(posterior).set_default_x(x),
    ):
        with pytest.raises(error, match=message):
            call()


def test_wrong_shapes_of_draws_are_named(case: Case):
    for bad in (2.0, (1.5,), True, "3", None):
        with pytest.raises(TypeError, match="sample_shape must be an integer or a tup"):
            case.posterior.sample(bad, case.x[0])
    for bad in (-1, (2, -1)):
        with pytest.raises(ValueError, match="sample_shape must not be negative"):
            case.posterior.sample_batched(bad, case.x)


def test_keywords_are_sbis_or_refused(case: Case):
    posterior, x = case.posterior, case.x[0]
    assert posterior.sample(
        2,
        x,
        show_progress_bars=False,
        max_sampling_batch_size=10,
        reject_outside_prior=True,
        max_sampling_time=None,
        return_partial_on_timeout=False,
        sample_with="direct",
    ).shape == (2, case.problem.layout.size)
    for method in (posterior.sample, posterior.sample_batched):
        with pytest.raises(TypeError, match="unexpected keyword argument 'generater'"):
            method(2, x, generater=None)
        with pytest.raises(NotImplementedError, match="discrete entry and a dimension"):
            method(2, x, sample_with="mcmc")
        with pytest.raises(NotImplementedError, match=r"max_sampling_time=3\.0 is not"):
            method(2, x, max_sampling_time=3.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_samples'"):
        posterior.map(x, num_samples=10)
    with pytest.raises(NotImplementedError, match="there is no gradient ascent"):
        posterior.map(x, num_iter=10)


def test_trees_and_catalogues_are_of_the_draws(case: Case):
    generator = generator_for(4)
    tree = case.posterior.to_datatree(
        300, case.x[0], generator, num_predictive=0, num_prior=0
    )
    assert tree["posterior"]["K"].shape == (1, 300)
    rows = case.draws(300, seed=4)
    assert tree["posterior"]["K"].values[0].tolist() == rows[:, 0].tolist()
    assert ("lp" in tree["sample_stats"]) == case.posterior.has_density
    table = case.posterior.catalogue(
        case.x[0], num_samples=300, generator=generator_for(4)
    )
    assert table.equals(case.posterior.catalogue(case.x[0], samples=rows))
