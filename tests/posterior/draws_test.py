import math

import pytest
import torch

from sbi_slotflow.posterior.draws import PosteriorDraws
from sbi_slotflow.problems import linear_gaussian
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.layout import ThetaLayout

LAYOUT = ThetaLayout(2, ("level", "slope"))


def numbered(k: torch.Tensor) -> torch.Tensor:
    """Rows with the given cardinalities; rows with a component carry their number."""
    components = torch.arange(1.0, k.numel() + 1).reshape(*k.shape, 1, 1)
    return LAYOUT.pack(k, components.expand(*k.shape, 2, 2))


@pytest.fixture(name="x")
def _x():
    return torch.linspace(0, 1, 6)


@pytest.fixture(name="weighted")
def _weighted(x):
    """Two chains of 100 draws with K = 1 or 2 and weights of all sizes."""
    k = torch.randint(1, 3, (2, 100), generator=generator_for(0))
    log_weights = 2 * torch.randn(2, 100, generator=generator_for(1)) - 700
    log_weights[0, :10] = -math.inf
    return PosteriorDraws(LAYOUT, numbered(k), x, log_weights)


def counts_of(rows: torch.Tensor, num: int) -> torch.Tensor:
    """How often each numbered row appears."""
    return torch.bincount(rows[:, 1].long() - 1, minlength=num)


def test_rows_without_weights_count_the_same(x):
    draws = PosteriorDraws(LAYOUT, numbered(torch.tensor([[0, 1], [1, 2]])), x)
    assert draws.rows.shape == (4, 5)
    assert torch.equal(draws.rows[2:], draws.theta[1])
    assert draws.weights.tolist() == [0.25] * 4
    assert draws.weights.dtype == torch.float64
    assert draws.ess == pytest.approx(4)
    assert draws.cardinality().probs.tolist() == [0.25, 0.5, 0.25]


def test_weights_are_normalised_whatever_their_constant(weighted):
    expected = (weighted.log_weights.flatten().double() + 700).exp()
    expected = expected / expected.sum()
    torch.testing.assert_close(weighted.weights, expected, rtol=1e-4, atol=0)
    assert weighted.weights.sum() == pytest.approx(1)
    assert (weighted.weights[:10] == 0).all()
    assert weighted.ess == pytest.approx(float(1 / expected.square().sum()), rel=1e-4)


def test_effective_size_of_equal_and_of_lone_weights(x):
    theta = numbered(torch.ones(1, 5).long())
    some = torch.tensor([[0.0, 0.0, -math.inf, 0.0, -math.inf]])
    assert PosteriorDraws(LAYOUT, theta, x, some).ess == pytest.approx(3)
    lone = torch.tensor([[0.0, -900.0, -math.inf, -900.0, -math.inf]])
    assert PosteriorDraws(LAYOUT, theta, x, lone).ess == pytest.approx(1)


def test_cardinality_sums_the_weights(weighted, x):
    k = weighted.rows[:, 0]
    expected = torch.stack([weighted.weights[k == i].sum() for i in range(3)])
    torch.testing.assert_close(weighted.cardinality().probs, expected)
    torch.testing.assert_close(weighted.cardinality(x).probs, expected)


@pytest.mark.parametrize("num", [1, 7, 1_000, 30_000])
def test_systematic_counts_are_within_one_of_their_expectation(weighted, num):
    rows = weighted.sample((num,), generator=generator_for(num))
    counts = counts_of(rows, 200)
    assert ((counts - num * weighted.weights).abs() < 1 + 1e-9).all()
    assert (counts[:10] == 0).all()


def test_systematic_counts_are_unbiased(weighted):
    generator = generator_for(5)
    num, repeats = 50, 2_000
    total = sum(
        counts_of(weighted.sample((num,), generator=generator), 200)
        for _ in range(repeats)
    )
    expected = num * weighted.weights
    # A count has only two values, so its variance is f (1 - f) <= 1/4 and less than
    # its mean. 6 standard errors and the Poisson tail of rare rows: 200 rows give false
    # alarms below 1e-6.
    error = (expected.clamp(max=0.25) / repeats).sqrt()
    assert ((total / repeats - expected).abs() <= 6 * error + 12 / repeats).all()


def test_draws_of_equal_weight_are_taken_evenly(x):
    draws = PosteriorDraws(LAYOUT, numbered(torch.ones(4, 25).long()), x)
    assert (counts_of(draws.sample((100,)), 100) == 1).all()
    assert (counts_of(draws.sample((300,)), 100) == 3).all()
    taken = draws.sample((10,))[:, 1].sort().values
    assert (taken.diff() == 10).all()


def test_draws_come_in_random_order(x):
    draws = PosteriorDraws(LAYOUT, numbered(torch.ones(1, 100).long()), x)
    rows = draws.sample((100,), generator=generator_for(0))[:, 1]
    assert not torch.equal(rows, rows.sort().values)


def test_conditioning_on_a_cardinality(weighted):
    rows = weighted.sample((500,), k=2, generator=generator_for(0))
    assert (rows[:, 0] == 2).all()
    weights = weighted.weights * (weighted.rows[:, 0] == 2)
    expected = 500 * weights / weights.sum()
    assert ((counts_of(rows, 200) - expected).abs() < 1 + 1e-9).all()


def test_a_cardinality_without_weight_is_named(weighted, x):
    with pytest.raises(ValueError, match="no draw has k=0 components and a positive"):
        weighted.sample((5,), k=0)
    theta = numbered(torch.tensor([[1, 2]]))
    draws = PosteriorDraws(LAYOUT, theta, x, torch.tensor([[0.0, -math.inf]]))
    with pytest.raises(ValueError, match="no draw has k=2 components and a positive"):
        draws.sample((5,), k=2)


def test_shapes_of_draws(weighted):
    assert weighted.sample().shape == (5,)
    assert weighted.sample((0,)).shape == (0, 5)
    assert weighted.sample((3, 2)).shape == (3, 2, 5)
    assert weighted.sample((0, 2)).shape == (0, 2, 5)


def test_seeded_draws_repeat(weighted):
    first = weighted.sample((50,), generator=generator_for(3))
    assert torch.equal(first, weighted.sample((50,), generator=generator_for(3)))
    assert not torch.equal(first, weighted.sample((50,), generator=generator_for(4)))


def test_datatree_keeps_chains_and_weights(weighted, x, tmp_path):
    xarray = pytest.importorskip("xarray")
    weighted.to_datatree().to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as back:
        k = torch.as_tensor(back["posterior"]["K"].values)
        level = torch.as_tensor(back["posterior"]["level"].values)
        weights = torch.as_tensor(back["sample_stats"]["weight"].values)
        kept = torch.as_tensor(back["observed_data"]["x"].values)
    assert torch.equal(k, weighted.theta[..., 0].long())
    assert torch.equal(weights, weighted.weights.reshape(2, 100))
    assert torch.equal(kept, x)
    parts = LAYOUT.unpack(weighted.theta)
    assert torch.equal(level.isnan(), ~parts.mask)
    assert torch.equal(level[parts.mask], parts.components[..., 0][parts.mask])


def test_datatree_of_resampled_draws_has_no_weights(weighted):
    tree = weighted.to_datatree(300, generator=generator_for(0))
    assert tree["posterior"]["K"].shape == (1, 300)
    assert "weight" not in tree["sample_stats"]
    expected = weighted.sample((300,), generator=generator_for(0))
    k = torch.as_tensor(tree["posterior"]["K"].values[0])
    assert torch.equal(k, expected[:, 0].long())


def test_datatree_of_unweighted_draws_has_no_weights(x):
    draws = PosteriorDraws(LAYOUT, numbered(torch.ones(2, 3).long()), x)
    tree = draws.to_datatree()
    assert tree["posterior"]["K"].shape == (2, 3)
    assert "weight" not in tree["sample_stats"]


def test_another_observation_is_refused(weighted, x):
    message = "x differs from the observation that this posterior belongs to"
    for wrong in (x + 1, x[:5], torch.stack([x, x])):
        expected = "x must have shape" if len(wrong) == 5 else message
        with pytest.raises(ValueError, match=expected):
            weighted.cardinality(wrong)
    with pytest.raises(ValueError, match=message):
        weighted.sample((1,), x + 1)
    with pytest.raises(ValueError, match=message):
        weighted.set_default_x(x + 1)
    assert weighted.sample((1,), x.unsqueeze(0)).shape == (1, 5)
    assert weighted.sample((1,), x.double()).shape == (1, 5)


def test_bad_input_is_named(x):
    theta = numbered(torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"must have shape \(chains, draws, E\), got"):
        PosteriorDraws(LAYOUT, theta[0], x)
    with pytest.raises(ValueError, match="theta must have 5 entries"):
        PosteriorDraws(LAYOUT, theta[..., :4], x)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(2, 3\), got"):
        PosteriorDraws(LAYOUT, theta, x, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="got -inf: no draw has a positive weight"):
        PosteriorDraws(LAYOUT, theta, x, torch.full((2, 3), -math.inf))
    with pytest.raises(ValueError, match="finite largest entry, got nan"):
        PosteriorDraws(LAYOUT, theta, x, torch.full((2, 3), math.nan))
    one = torch.zeros(2, 3)
    one[0, 1] = math.nan
    with pytest.raises(ValueError, match="finite largest entry, got nan"):
        PosteriorDraws(LAYOUT, theta, x, one)
    with pytest.raises(ValueError, match="finite largest entry, got inf"):
        PosteriorDraws(LAYOUT, theta, x, one.nan_to_num() + math.inf)
    with pytest.raises(ValueError, match="theta must hold at least one draw"):
        PosteriorDraws(LAYOUT, theta[:, :0], x)


def test_double_rows_stay_double(x):
    draws = PosteriorDraws(LAYOUT, numbered(torch.ones(1, 3).long()).double(), x)
    assert draws.sample((2,)).dtype == torch.float64


def test_exact_draws_answer_as_the_exact_posterior():
    exact = linear_gaussian().exact_posterior()
    x = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 1.0])
    rows = exact.sample((20_000,), x, generator=generator_for(0))
    draws = PosteriorDraws(exact.prior.layout, rows.reshape(4, 5_000, -1), x)
    expected = exact.cardinality(x).probs
    error = (expected * (1 - expected) / 20_000).sqrt()
    # 5 standard errors of each of 4 shares: false alarms below 1e-5
    assert ((draws.cardinality().probs - expected).abs() <= 5 * error + 1e-4).all()
