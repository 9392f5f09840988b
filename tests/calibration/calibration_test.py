import itertools

import numpy as np
import pytest
import torch

from sbi_slotflow import calibration, problems
from sbi_slotflow.sets.layout import ThetaLayout

layout = ThetaLayout(3, ("amplitude", "frequency"), ("sigma",), order_by=1)


def rows() -> torch.Tensor:
    return torch.tensor(
        [
            [2.0, 0.3, 1.0, 0.2, 2.0, 0.7, 0.0, 0.0],
            [0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [3.0, 0.5, 1.0, 0.1, 1.0, 0.5, 3.0, 0.6],
        ]
    )


def test_jittered_cardinality_keeps_the_order_and_breaks_ties():
    values = calibration.JitteredCardinality(layout)(rows())
    assert torch.equal(values.floor(), torch.tensor([2.0, 0.0, 3.0]))
    ties = calibration.JitteredCardinality(layout)(rows()[:1].repeat(100, 1))
    assert len(ties.unique()) == 100


def test_total_power_counts_active_components_only():
    values = calibration.TotalPower(layout, "amplitude")(rows())
    torch.testing.assert_close(values[[0, 2]], torch.tensor([5.0, 11.0]).double())
    assert values[1] < 0


def test_lowest_ignores_the_padding():
    values = calibration.Lowest(layout, "frequency")(rows())
    torch.testing.assert_close(values[[0, 2]], torch.tensor([0.2, 0.1]))
    assert values[1] < -1e29


def test_count_in_band_counts_half_open():
    values = calibration.CountInBand(layout, "frequency", 0.2, 0.6)(rows())
    assert torch.equal(values.floor(), torch.tensor([1.0, 0.0, 1.0]))


def test_reduce_fns_are_blind_to_labels():
    relabelled = layout.relabel(rows(), torch.Generator().manual_seed(1))
    # Two lists, so that both sides get the same jitter.
    first = calibration.reduce_fns(layout, band=(0.2, 0.6))
    second = calibration.reduce_fns(layout, band=(0.2, 0.6))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one(rows(), rows()), two(relabelled, rows()))


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match=r"parameter must be one of \['amplitude'"):
        calibration.Lowest(layout, "phase")


@pytest.fixture(scope="module")
def distance():
    return calibration.SetDistance(
        layout, torch.tensor([1.0, 0.5]), torch.tensor([0.1]), cutoff=2.0
    )


def brute_force(a: torch.Tensor, b: torch.Tensor) -> float:
    one, two = layout.unpack(a), layout.unpack(b)
    short, long = sorted(
        (
            (one.components[: one.cardinality] / torch.tensor([1.0, 0.5])).numpy(),
            (two.components[: two.cardinality] / torch.tensor([1.0, 0.5])).numpy(),
        ),
        key=len,
    )
    totals = [
        sum(
            min(2.0, float(np.linalg.norm(short[i] - long[j]))) ** 2
            for i, j in enumerate(chosen)
        )
        for chosen in itertools.permutations(range(len(long)), len(short))
    ]
    missing = 4.0 * (len(long) - len(short))
    shared = float(((one.shared - two.shared) / 0.1).square().sum())
    return ((min(totals) + missing) / max(1, len(long)) + shared) ** 0.5


def test_set_distance_equals_brute_force(distance):
    for a, b in itertools.product(rows(), rows()):
        assert float(distance(a, b)) == pytest.approx(brute_force(a, b), abs=1e-5)


def test_set_distance_is_a_metric_on_sets(distance):
    values = distance(rows().unsqueeze(0), rows().unsqueeze(1))
    torch.testing.assert_close(values, values.mT)
    assert (values.diagonal() == 0).all()
    for i, j, k in itertools.permutations(range(3)):
        assert values[i, j] <= values[i, k] + values[k, j] + 1e-6
    relabelled = layout.relabel(rows(), torch.Generator().manual_seed(3))
    assert (distance(rows(), relabelled) < 1e-6).all()


def test_set_distance_takes_its_scales_from_active_entries():
    prior = problems.sinusoids("tiny").prior
    made = calibration.set_distance(prior.layout, prior.sample((4_000,)))
    # Standard deviation of a uniform is its width over sqrt(12).
    expected = torch.tensor([1.0, 2 * torch.pi, 1.5]) / 12**0.5
    torch.testing.assert_close(made.scale, expected, rtol=0.05, atol=0.0)


def test_rescaled_theta_is_refused(distance):
    with pytest.raises(ValueError, match="z_score_theta=False"):
        distance(rows(), rows() / 3)
