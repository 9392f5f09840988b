import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from sbi_slotflow.metrics import (
    Comparison,
    ReferencePoints,
    c2st,
    compare,
    correlation_error,
    jensen_shannon,
    sliced_wasserstein2,
    total_variation,
    wasserstein2,
    whiten,
)
from sbi_slotflow.posterior.draws import PosteriorDraws
from sbi_slotflow.sets.layout import ThetaLayout

LAYOUT = ThetaLayout(3, ("frequency", "amplitude", "phase"))
PERIODS = {"phase": 2 * math.pi}
MEAN = torch.tensor([[1.0, 1.0, 0.1], [2.0, 1.0, 3.0], [3.0, 0.5, 6.2]])
SCALE = torch.tensor([0.01, 0.1, 0.2])
NUM = 10_000


def rows(seed: int, num: int = NUM, correlation: float = -0.9) -> Tensor:
    """Draws of a 9-dimensional Gaussian; two frequencies depend on each other."""
    covariance = torch.eye(9, dtype=torch.float64)
    covariance[0, 3] = covariance[3, 0] = correlation
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, 9, generator=generator, dtype=torch.float64)
    noise = noise @ torch.linalg.cholesky(covariance).T
    components = MEAN + SCALE * noise.reshape(num, 3, 3)
    components[..., 2] = components[..., 2].remainder(2 * math.pi)
    return LAYOUT.pack(torch.full((num,), 3), components.float())


def factorised(theta: Tensor) -> Tensor:
    """The same marginals, the first component independent of the others."""
    parts = LAYOUT.unpack(theta)
    components = parts.components.clone()
    components[:, 0] = components[torch.randperm(len(theta)), 0]
    return LAYOUT.pack(parts.cardinality, components)


def normal(num: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Evenly spaced quantiles of a normal."""
    levels = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return mean + std * torch.special.ndtri(levels)


@pytest.fixture(scope="module")
def unmixed() -> Comparison:
    """A factorised posterior beside the floor."""
    torch.manual_seed(0)
    return compare(
        factorised(rows(1)), rows(2), rows(3), layout=LAYOUT, periods=PERIODS
    )


@pytest.fixture(scope="module")
def exact(unmixed: Comparison) -> Comparison:
    """Two independent exact runs."""
    assert unmixed.floor is not None
    return unmixed.floor


def test_cardinality_distances_have_their_closed_forms() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert total_variation(p, q).item() == pytest.approx(0.5)
    # half of the mass lies where the other has none
    assert jensen_shannon(p, q).item() == pytest.approx(0.5 * math.log(2))
    apart = torch.tensor([1.0, 0.0]), Categorical(probs=torch.tensor([0.0, 1.0]))
    assert total_variation(*apart).item() == pytest.approx(1.0)
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2))
    batch = torch.stack([p, q])
    assert total_variation(batch, q).tolist() == pytest.approx([0.5, 0.0])
    assert jensen_shannon(batch, q)[1].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.5, 0.5], "probs must have 3 entries as reference has, got 2"),
        ([0.5, 0.5, 0.5], "probs must be probabilities that add up to 1, got"),
        ([1.5, -0.5, 0.0], "probs must be probabilities that add up to 1, got"),
        ([math.nan, 0.5, 0.5], "probs must be probabilities that add up to 1, got"),
    ],
)
@pytest.mark.parametrize("distance", [total_variation, jensen_shannon])
def test_what_is_no_probability_is_refused(
    distance: Any, p: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distance(torch.tensor(p), torch.tensor([0.2, 0.3, 0.5]))


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (0.0, 1.5), (-1.0, 0.3)])
@pytest.mark.parametrize("num", [20_000, 15_000])
def test_wasserstein_of_normals_has_its_closed_form(
    mean: float, std: float, num: int
) -> None:
    found = wasserstein2(normal(20_000), normal(num, mean, std))
    # quantiles, not random draws: only the outermost steps differ from the formula
    assert found.item() == pytest.approx(math.hypot(mean, std - 1), rel=2e-3)


def test_unequal_sizes_count_as_if_every_draw_were_repeated() -> None:
    a, b = torch.randn(12, 4).double(), torch.randn(7, 4).double()
    repeated = a.repeat_interleave(7, 0), b.repeat_interleave(12, 0)
    gaps = repeated[0].sort(0).values - repeated[1].sort(0).values
    expected = gaps.square().mean(0).sqrt()
    assert torch.allclose(wasserstein2(a, b), expected)
    assert torch.allclose(wasserstein2(*repeated), expected)


def test_the_whitened_reference_has_unit_covariance() -> None:
    mixing = torch.randn(4, 4).double()
    reference = torch.randn(500, 4).double() @ mixing + 3.0
    shift = 0.5 * reference.std(0)
    moved, white = whiten(reference + shift, reference)
    assert torch.allclose(white.T.cov(), torch.eye(4, dtype=torch.float64))
    assert torch.allclose(white.mean(0), torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(moved - white, (moved - white)[0])


def test_the_sliced_distance_of_a_shift_is_its_length_over_root_dimension() -> None:
    reference = torch.randn(400, 3).double()
    _, white = whiten(reference, reference)
    shift = torch.tensor([0.3, 0.0, -0.4]).double()
    generator = torch.Generator().manual_seed(0)
    found = sliced_wasserstein2(
        white + shift, white, num_directions=2_000, generator=generator
    )
    # 2,000 directions: relative standard deviation 1 %, false alarm below 10^-6
    assert found == pytest.approx(0.5 / math.sqrt(3), rel=0.06)


def test_the_correlation_error_counts_only_pairs_of_different_components() -> None:
    first, second = torch.randn(2, 50_000, 1).double()
    reference = torch.cat([first, second, first, second], -1).unflatten(-1, (2, 2))
    draws = torch.cat([first, first, first, second], -1).unflatten(-1, (2, 2))
    # of (1,1) (1,2) (2,1) (2,2), the third and fourth differ, each by one
    # correlations of independent draws have standard deviation 0.0045: 10^-6
    assert correlation_error(draws, reference) == pytest.approx(0.5, abs=0.02)
    within = torch.cat([first, -second, first, second], -1).unflatten(-1, (2, 2))
    assert correlation_error(within, within) == 0.0


def test_a_parameter_that_never_varies_counts_as_uncorrelated() -> None:
    reference = torch.randn(100, 1, 1).double().expand(-1, 2, 1)
    draws = reference.clone()
    draws[:, 1] = 0.7
    assert correlation_error(draws, reference) == pytest.approx(1.0)


def test_independent_exact_draws_measure_the_floor(exact: Comparison) -> None:
    assert exact.k == 3
    assert len(exact.parameters) == 9
    assert exact.num_draws == exact.num_reference == NUM
    assert exact.total_variation == exact.jensen_shannon == 0.0
    # Over seeds: mean 0.025, standard deviation 0.0015.
    assert 0.015 < exact.mean_w2 < 0.035  # false alarm below 10^-6
    assert 0.015 < exact.sliced_w2 < 0.037  # likewise, 0.026 and 0.001
    # 0.500 with standard deviation 0.005: false alarm below 10^-6
    assert 0.47 < exact.c2st < 0.53
    # standard deviation 0.01 each: false alarm in 9 of 10^6 seeds
    assert all(0.95 < p.std_ratio < 1.05 for p in exact.parameters)
    # mean 0.010, standard deviation 0.001: false alarm below 10^-6
    assert exact.correlation_error is not None
    assert exact.correlation_error < 0.017


def test_lost_dependence_shows_in_the_joint_and_not_in_the_marginals(
    unmixed: Comparison,
) -> None:
    floor = unmixed.floor
    assert floor is not None
    assert floor.correlation_error is not None
    assert unmixed.correlation_error is not None
    # both are at the floor: mean 0.025, standard deviation 0.0015, false alarm 10^-6
    assert unmixed.mean_w2 < 0.035
    # standard deviation 0.01 each: false alarm in 9 of 10^6 seeds
    assert all(0.95 < p.std_ratio < 1.05 for p in unmixed.parameters)
    # 0.75 with standard deviation 0.005: false alarm below 10^-6
    assert unmixed.c2st >= 0.65
    assert floor.c2st < 0.53
    assert unmixed.sliced_w2 > 5 * floor.sliced_w2  # 0.54 against 0.026
    # one pair of 27 lost a correlation of 0.9: 0.033 above 0.010, floor as above
    assert unmixed.correlation_error > 0.025 > floor.correlation_error


def test_the_classifier_also_sees_dependence_that_the_reference_lacks() -> None:
    draws, reference = (
        LAYOUT.unpack(theta).components[..., :2].flatten(1)
        for theta in (rows(1, 3_000), factorised(rows(2, 3_000)))
    )
    # 0.725 with standard deviation 0.008: false alarm below 10^-6
    assert c2st(draws, reference) >= 0.65


def test_the_classifier_cannot_gain_from_repeated_rows() -> None:
    x = torch.randn(300, 2)
    # a row and its copy are in one fold and get the same answer: one is right
    assert c2st(x, x) == 0.5


def test_marginals_are_in_units_of_the_reference() -> None:
    reference = rows(1, 500)
    parts = LAYOUT.unpack(reference)
    components = parts.components.clone()
    components[:, 1, 1] += 0.2
    mean = components[:, 2, 0].mean()
    components[:, 2, 0] = mean + 3 * (components[:, 2, 0] - mean)
    draws = LAYOUT.pack(parts.cardinality, components)
    found = compare(draws, reference, layout=LAYOUT, periods=PERIODS)
    std = parts.components[:, 1, 1].std().item()
    assert found["amplitude_2"].w2_raw == pytest.approx(0.2, rel=1e-5)
    assert found["amplitude_2"].w2 == pytest.approx(0.2 / std, rel=1e-5)
    assert found["amplitude_2"].std_ratio == pytest.approx(1.0, rel=1e-5)
    assert found["frequency_3"].std_ratio == pytest.approx(3.0, rel=1e-4)
    # a scale of 3 about the mean moves each draw by twice its own distance from it
    assert found["frequency_3"].w2 == pytest.approx(2 * math.sqrt(0.998), rel=1e-4)
    assert found["phase_1"].w2 == 0.0
    with pytest.raises(KeyError, match="no parameter 'mass_1'"):
        found["mass_1"]


@pytest.mark.parametrize("turn", [math.pi, 6.2])
def test_phases_do_not_depend_on_where_the_circle_is_cut(turn: float) -> None:
    def turned(theta: Tensor) -> Tensor:
        parts = LAYOUT.unpack(theta)
        components = parts.components.clone()
        components[..., 2] = (components[..., 2] + turn).remainder(2 * math.pi)
        return LAYOUT.pack(parts.cardinality, components)

    draws, reference = rows(1, 100), rows(2, 100)
    plain = compare(draws, reference, layout=LAYOUT, periods=PERIODS)
    found = compare(turned(draws), turned(reference), layout=LAYOUT, periods=PERIODS)
    for one, other in zip(found.parameters, plain.parameters, strict=True):
        assert one.w2 == pytest.approx(other.w2, rel=1e-3, abs=1e-4)
        assert one.std_ratio == pytest.approx(other.std_ratio, rel=1e-4)
        # uncut, the phases near 0 would be 3 wide; false alarm below 10^-6
        assert one.w2_raw < 0.2
    assert found.sliced_w2 == pytest.approx(plain.sliced_w2, rel=1e-3)


def test_a_shared_parameter_may_be_circular_too() -> None:
    layout = ThetaLayout(1, ("location",), ("angle",))
    k = torch.ones(500)
    angle = (0.3 * torch.randn(500, 1)).remainder(1.0)
    reference = layout.pack(k, torch.randn(500, 1, 1), 0.1 * angle)
    found = compare(reference, reference, layout=layout, periods={"angle": 0.1})
    assert [p.name for p in found.parameters] == ["angle", "location_1"]
    assert found["angle"].w2 == 0.0
    assert found.correlation_error is None


@pytest.mark.parametrize("gap", [0.0, 0.005])
def test_labels_follow_the_tones_where_their_frequencies_cross(gap: float) -> None:
    layout = ThetaLayout(2, ("frequency", "amplitude"))
    k = torch.full((300,), 2)
    mean = torch.tensor([[1.0, 1.0], [1.0 + gap, 0.5]])
    tones = mean + torch.tensor([0.01, 0.05]) * torch.randn(2, 300, 2, 2)
    louder = tones[0] + torch.tensor([[0.0, 0.1], [0.0, 0.0]])
    reference = layout.canonical(layout.pack(k, tones[1]))
    points = ReferencePoints.of(
        layout.unpack(reference).components.double(), [math.inf, math.inf]
    )
    assert (points.centre[:, 0].diff() >= 0).all()
    loud = int(points.centre[:, 1].argmax())
    labelled = points.label(layout.unpack(reference).components.double())
    # 0.5 apart, 7 standard deviations of the difference: false alarm in 1 of 10^8
    assert torch.equal(labelled[:, loud], tones[1, :, 0].double())

    draws = layout.canonical(layout.pack(k, louder))
    found = compare(draws, reference, layout=layout)
    # 300 draws: 0.1 and 0.007 with standard deviations 0.004 and 0.002,
    # false alarm below 10^-6
    assert found[f"amplitude_{loud + 1}"].w2_raw == pytest.approx(0.1, abs=0.025)
    assert found[f"amplitude_{2 - loud}"].w2_raw < 0.025


def test_the_order_of_components_in_a_row_does_not_matter() -> None:
    draws, reference = rows(1, 100), rows(2, 100)
    plain = compare(draws, reference, layout=LAYOUT)
    relabelled = LAYOUT.relabel(draws), LAYOUT.relabel(reference)
    assert compare(*relabelled, layout=LAYOUT) == plain


def test_the_seed_decides_the_outcome() -> None:
    draws, reference = rows(1, 100), rows(2, 100)
    first, again, other = (
        compare(draws, reference, layout=LAYOUT, periods=PERIODS, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.sliced_w2 != other.sliced_w2
    assert first.parameters == other.parameters


@pytest.fixture
def mixed() -> Tensor:
    """Rows of which 70 % have K = 3, 20 % K = 2 and 10 % K = 0."""
    parts = LAYOUT.unpack(rows(4, 1_000))
    k = torch.tensor([3] * 7 + [2] * 2 + [0]).repeat(100)
    return LAYOUT.pack(k, parts.components)


def test_cardinalities_are_compared_and_the_most_probable_is_the_default(
    mixed: Tensor,
) -> None:
    found = compare(rows(1, 300), mixed, layout=LAYOUT, periods=PERIODS)
    assert found.k == 3
    assert (found.num_draws, found.num_reference) == (300, 700)
    assert found.total_variation == pytest.approx(0.3)
    given = compare(mixed, mixed, layout=LAYOUT, k=2, periods=PERIODS)
    assert (given.k, given.num_draws, len(given.parameters)) == (2, 200, 6)


def test_posteriors_are_sampled_given_k(mixed: Tensor) -> None:
    draws = PosteriorDraws(LAYOUT, mixed.unsqueeze(0), torch.zeros(1))
    found = compare(draws, mixed, draws, layout=LAYOUT, k=2, num_samples=200)
    assert found.num_draws == 200
    assert found.total_variation == pytest.approx(0.0, abs=1e-12)
    # 200 evenly spaced draws of 200 are the same set
    assert found.mean_w2 == pytest.approx(0.0, abs=1e-9)
    assert found.floor is not None
    assert found.floor.num_draws == 200


def test_no_components_leave_the_shared_parameters() -> None:
    layout = ThetaLayout(2, ("location",), ("sigma",))
    theta = layout.pack(torch.zeros(100), torch.zeros(100, 2, 1), torch.randn(100, 1))
    found = compare(theta, theta, layout=layout)
    assert found.k == 0
    assert [p.name for p in found.parameters] == ["sigma"]
    assert found.correlation_error is None


def test_the_table_shows_every_value_beside_its_floor(
    exact: Comparison, unmixed: Comparison
) -> None:
    assert str(exact) == exact.table()
    named = {line.split("  ")[0]: line for line in str(unmixed).splitlines()}
    assert unmixed.floor is not None
    assert f"{unmixed.c2st:.4g}" in named["C2ST"]
    assert f"{unmixed.floor.c2st:.4g}" in named["C2ST"]
    line = named["frequency_2"].split()
    assert line[1] == f"{unmixed['frequency_2'].w2:.4g}"
    assert line[2] == f"{unmixed.floor['frequency_2'].w2:.4g}"
    assert len(line) == 7
    bare = [line for line in str(exact).splitlines() if line[:5] in ("C2ST ", "phase")]
    assert len(bare) == 4
    assert all(line.endswith("-") for line in bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, r"draws must hold draws with K=1, got p\(K=1\) = 0"),
        ({"k": 4}, r"k must lie in 0\.\.3, got 4"),
        ({"k": 0}, "k must be positive without shared parameters, got 0"),
        ({"periods": {"mass": 1.0}}, r"periods must name .* got \['mass'\]"),
        ({"periods": {"phase": 0.0}}, "period must be positive, got 0"),
        ({"floor": rows(1, 49)}, "floor must hold at least 50 .* K=3, got 49"),
        ({"draws": rows(1, 60)[:, 1:]}, "draws must have 10 entries .*60, 9"),
        ({"draws": rows(1, 60)[None]}, r"draws must have shape \(S, 10\).*1, 60, 10"),
        ({"draws": rows(1, 0)}, r"draws must have shape .* S >= 1, got \(0, 10\)"),
        ({"reference": rows(1, 60) * math.nan}, "reference must be finite: .* 60 row"),
        ({"reference": rows(1, 1).expand(60, -1)}, "reference must vary .* frequency"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments = {"draws": rows(1, 60), "reference": rows(2, 60), **options}
    with pytest.raises(ValueError, match=message):
        compare(layout=LAYOUT, **arguments)


def test_what_cannot_be_sampled_is_refused() -> None:
    source: Any = "posterior"
    with pytest.raises(TypeError, match=r"reference must be theta rows .* got str"):
        compare(rows(1, 60), source, layout=LAYOUT)


@pytest.mark.parametrize(
    ("distance", "draws", "reference", "message"),
    [
        (wasserstein2, (9, 2), (9, 3), r"draws must have shape .*3,.* got \(9, 2\)"),
        (wasserstein2, (1,), (9,), r"draws must hold at least 2 draws, got shape \(1"),
        (whiten, (9,), (9,), r"draws must have shape \(S, C\), got \(9,\)"),
        (whiten, (9, 2), (2, 2), "reference must vary in each of its 2 directions"),
        (c2st, (49, 2), (60, 2), "at least 50, got 49, 60 and 5000"),
        (correlation_error, (9, 1, 2), (9, 1, 2), "at least 2 components, got"),
    ],
)
def test_bad_shapes_are_named(
    distance: Any, draws: tuple[int], reference: tuple[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distance(torch.randn(draws), torch.randn(reference))


@pytest.mark.parametrize("distance", [wasserstein2, whiten, c2st, sliced_wasserstein2])
def test_draws_that_are_not_finite_are_refused(distance: Any) -> None:
    good, bad = torch.randn(60, 2), torch.randn(60, 2)
    bad[3, 1] = math.inf
    with pytest.raises(ValueError, match="draws must be finite: NaN or Inf in 1"):
        distance(bad, good)
    with pytest.raises(ValueError, match="reference must be finite: NaN or Inf in 1"):
        distance(good, bad)
