"""Catalogues list what is there, with honest probabilities, whatever the labels."""

import math

import numpy as np
import pytest
import torch
import xarray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sbi_slotflow import (
    PosteriorDraws,
    ThetaLayout,
    build_catalogue,
    load_pretrained,
    problems,
)
from sbi_slotflow.calibration import faults
from sbi_slotflow.catalogue import fit_sources
from sbi_slotflow.catalogue.sources import best_matching
from sbi_slotflow.seeding import generator_for

LAYOUT = ThetaLayout(
    4, ("amplitude", "phase", "frequency"), ("sigma",), 2, {"phase": math.tau}
)
# amplitude, phase, frequency, probability; the first two are close, one phase is at
# the seam.
TRUE = torch.tensor(
    [
        [1.0, 0.1, 2.500, 1.0],
        [0.8, 3.0, 2.503, 0.9],
        [0.3, 5.0, 2.700, 0.3],
        [0.5, 2.0, 2.900, 0.6],
    ]
)
SCALE = torch.tensor([0.05, 0.3, 0.001])


def made(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draws of four sources that come and go, randomly labelled; who is there."""
    generator = generator_for(seed)
    there = torch.rand(num, 4, generator=generator) < TRUE[:, 3]
    components = torch.randn(num, 4, 3, generator=generator) * SCALE + TRUE[:, :3]
    components[..., 1] = components[..., 1].remainder(math.tau)
    order = (~there).long().argsort(dim=-1, stable=True)
    packed = components.gather(1, order.unsqueeze(-1).expand_as(components))
    rows = LAYOUT.pack(there.sum(-1), packed, torch.ones(num, 1))
    return LAYOUT.relabel(rows, generator), there


def brute(gains: np.ndarray) -> float:
    """Largest total gain of a partial matching, by scipy."""
    rows, columns = linear_sum_assignment(np.maximum(gains, 0), maximize=True)
    return float(np.maximum(gains, 0)[rows, columns].sum())


@pytest.mark.parametrize("sources", [1, 3, 6])
def test_matchings_are_the_best_partial_ones(sources):
    gains = torch.randn(300, sources, 4, generator=generator_for(sources)).double()
    gains[:100, :, 2:] = -math.inf
    owner = best_matching(gains)
    for matrix, chosen in zip(gains.numpy(), owner.numpy(), strict=True):
        taken = chosen[chosen >= 0]
        assert len(set(taken.tolist())) == len(taken)
        total = matrix[np.flatnonzero(chosen >= 0), taken].sum()
        assert total == pytest.approx(brute(matrix))


@pytest.mark.parametrize("unit", [2.0**-110, 2.0**70])  # 1e-33, 1e+21
def test_sources_do_not_depend_on_the_unit(unit):
    rows, _ = made(1_000)
    parts = LAYOUT.unpack(rows)
    factor = torch.tensor([unit, 1.0, 1.0])
    scaled = LAYOUT.pack(parts.cardinality, factor * parts.components, parts.shared)
    found, expected = fit_sources(scaled, LAYOUT), fit_sources(rows, LAYOUT)
    torch.testing.assert_close(found.existence, expected.existence)
    torch.testing.assert_close(found.centre / factor.double(), expected.centre)


def test_one_value_has_a_source_in_any_unit():
    for value in (0.0, 1e-33, 1e21):
        components = torch.full((100, 4, 3), value)
        rows = LAYOUT.pack(torch.ones(100), components, torch.ones(100, 1))
        sources = fit_sources(rows, LAYOUT)
        assert len(sources) == 1
        assert float(sources.existence) > 0.99
        assert float(sources.centre[0, 0]) == pytest.approx(value, rel=1e-6)


def test_sources_are_found_with_their_probabilities():
    rows, there = made(6_000)
    table = build_catalogue(rows, LAYOUT)
    assert table.sizes == {"source": 4}
    # Only draws in which the two close ones trade places can be wrong.
    share = there.double().mean(0).numpy()
    np.testing.assert_allclose(table["existence"], share, atol=0.01)
    error = np.sqrt(share * (1 - share) / 6_000)
    np.testing.assert_allclose(table["existence_error"], error, atol=5e-4)
    for d, name in enumerate(LAYOUT.component_names):
        # 6 standard errors of the medians of at least 1,700 draws, and some for draws
        # that were assigned wrongly.
        close = 0.25 * SCALE[d].item()
        np.testing.assert_allclose(table[name], TRUE[:, d], atol=close)
        np.testing.assert_allclose(table[f"{name}_std"], SCALE[d], rtol=0.15)
        width = (table[f"{name}_high"] - table[f"{name}_low"]) / (2 * 1.645 * SCALE[d])
        np.testing.assert_allclose(width, 1.0, atol=0.15)


def test_what_is_listed_and_what_is_not_adds_up():
    rows, there = made(2_000)
    table = build_catalogue(rows, LAYOUT, min_probability=0.5)
    assert table.sizes["source"] == 3
    expected = there.double().sum(-1).mean().item()
    assert table.attrs["expected_cardinality"] == pytest.approx(expected)
    missing = expected - float(table["existence"].sum())
    assert table.attrs["expected_unlisted"] == pytest.approx(missing)
    assert missing == pytest.approx(0.3, abs=0.05)


def test_labels_and_the_order_of_draws_do_not_matter():
    rows, _ = made(1_500)
    table = build_catalogue(rows, LAYOUT)
    again = build_catalogue(LAYOUT.relabel(rows, generator_for(9)), LAYOUT)
    assert table.identical(again)
    mixed = rows[torch.randperm(len(rows), generator=generator_for(10))]
    for name, values in build_catalogue(mixed, LAYOUT).items():
        np.testing.assert_allclose(values, table[name], rtol=1e-6)


def test_weights_count_as_repeated_draws():
    rows, _ = made(800)
    weights = torch.randint(0, 4, (800,), generator=generator_for(1))
    repeated = rows.repeat_interleave(weights, dim=0)
    table = build_catalogue(rows, LAYOUT, weights=weights)
    again = build_catalogue(repeated, LAYOUT)
    np.testing.assert_allclose(table["existence"], again["existence"], atol=2e-3)
    for name in LAYOUT.component_names:
        for ending in ("", "_mean", "_std"):
            # Quantiles interpolate between other points.
            close = 0.02 * SCALE[LAYOUT.component_names.index(name)].item()
            np.testing.assert_allclose(
                table[name + ending], again[name + ending], atol=close
            )


def test_weights_move_existence_as_they_should():
    rows, there = made(4_000)
    weights = torch.where(there[:, 2], 3.0, 1.0)
    table = build_catalogue(rows, LAYOUT, weights=weights)
    expected = (weights * there[:, 2]).sum() / weights.sum()
    assert float(table["existence"][2]) == pytest.approx(expected.item(), abs=0.01)
    ess = weights.sum().square() / weights.square().sum()
    assert table.attrs["ess"] == pytest.approx(ess.item())


def test_angles_are_summarised_on_the_circle():
    rows, _ = made(3_000)
    table = build_catalogue(rows, LAYOUT)
    seam = table.isel(source=0)
    assert float(seam["phase_low"]) < 0 < float(seam["phase_high"])
    assert float(seam["phase_high"] - seam["phase_low"]) < 1.2
    flat = ThetaLayout(4, LAYOUT.component_names, ("sigma",), 2)
    wrong = build_catalogue(rows, flat).isel(source=0)
    assert float(wrong["phase_high"] - wrong["phase_low"]) > 5


def test_truth_is_put_beside_its_source():
    rows, _ = made(2_000)
    components = TRUE[:, :3].clone()
    components[0, 1] += math.tau - 0.2  # the same phase less 0.2, on another turn
    three = components[[0, 1, 3]].roll(1, dims=0)
    padded = torch.cat([three, torch.zeros(1, 3)]).unsqueeze(0)
    truth = LAYOUT.pack(torch.tensor([3]), padded, torch.ones(1, 1))
    table = build_catalogue(rows, LAYOUT, true_theta=truth)
    found = table["true_frequency"].values
    np.testing.assert_allclose(found[[0, 1, 3]], TRUE[[0, 1, 3], 2], rtol=1e-6)
    assert np.isnan(found[2])
    assert float(table["true_phase"][0]) == pytest.approx(-0.1, abs=1e-5)


def test_tails_make_no_sources_of_their_own():
    num, generator = 3_000, generator_for(4)
    narrow = torch.rand(num, generator=generator) < 0.6
    spread = torch.where(narrow, 1.0, 8.0).reshape(-1, 1, 1)
    noise = torch.randn(num, 1, 3, generator=generator) * SCALE * spread
    components = torch.tensor([1.0, 3.0, 2.7]) + noise
    # Elsewhere in a tenth of the draws, so that space is wide.
    other = torch.rand(num, 1, 3, generator=generator) + torch.tensor([0.0, 2.0, 2.0])
    both = torch.rand(num, generator=generator) < 0.1
    padding = torch.zeros(num, 2, 3)
    packed = torch.cat([components, other, padding], dim=1)
    rows = LAYOUT.pack(1 + both.long(), packed, torch.ones(num, 1))
    table = build_catalogue(rows, LAYOUT, min_probability=0.05)
    assert float(table["existence"].max()) > 0.97
    close = np.abs(table["frequency"].values - 2.7) < 0.02
    assert close.sum() == 1


def test_two_places_of_one_component_are_two_alternatives():
    num, generator = 1_000, generator_for(2)
    here = torch.rand(num, generator=generator) < 0.5
    centre = torch.where(here[:, None], TRUE[0, :3], TRUE[3, :3])
    components = torch.zeros(num, 4, 3)
    components[:, 0] = centre + 0.1 * torch.randn(num, 3, generator=generator) * SCALE
    rows = LAYOUT.pack(torch.ones(num).long(), components, torch.ones(num, 1))
    table = build_catalogue(rows, LAYOUT)
    share = here.double().mean().item()
    np.testing.assert_allclose(table["existence"], [share, 1 - share], atol=1e-9)
    # They are not taken for one where only more probable ones are wanted.
    assert build_catalogue(rows, LAYOUT, min_probability=0.6).sizes["source"] == 0


@pytest.mark.parametrize("num", [1, 2, 30])
def test_few_and_empty_draws(num):
    empty = LAYOUT.pack(
        torch.zeros(num).long(), torch.zeros(num, 4, 3), torch.ones(num, 1)
    )
    table = build_catalogue(empty, LAYOUT, true_theta=empty[0])
    assert table.sizes["source"] == 0
    assert len(table.to_dataframe()) == 0
    same = LAYOUT.pack(
        torch.full((num,), 2), TRUE[:, :3].expand(num, -1, -1), torch.ones(num, 1)
    )
    table = build_catalogue(same, LAYOUT)
    np.testing.assert_allclose(table["existence"], [1.0, 1.0])
    np.testing.assert_allclose(table["frequency"], TRUE[:2, 2], rtol=1e-6)


def test_the_table_has_a_row_a_source():
    frame = build_catalogue(made(500)[0], LAYOUT).to_dataframe()
    assert frame.index.tolist() == [1, 2, 3, 4]
    assert {"existence", "frequency", "frequency_low", "phase_std"} <= set(frame)


def judged(num: int, shrink: float = 1.0) -> tuple[list[float], dict[str, list[bool]]]:
    """Presence less existence of each signal, and what intervals cover, by parameter.

    Draws are those of the exact posterior, drawn together by ``shrink``.
    """
    problem = problems.linear_gaussian()
    exact, layout = problem.exact_posterior(), problem.layout
    posterior = exact if shrink == 1 else faults.narrowed(exact, shrink)
    theta = problem.prior.sample((num,), generator_for(0))
    x = problem.simulator(theta, generator_for(1))
    differences: list[float] = []
    covered: dict[str, list[bool]] = {name: [] for name in layout.component_names}
    for i in range(num):
        rows = posterior.sample((200,), x[i], generator=generator_for(2, i))
        table = build_catalogue(rows, layout, true_theta=theta[i])
        there = np.isfinite(table["true_level"].values)
        differences.append(float((there - table["existence"].values).sum()))
        for name, found in covered.items():
            low, high = table[f"{name}_low"].values, table[f"{name}_high"].values
            truth = table[f"true_{name}"].values
            found.extend(((low <= truth) & (truth <= high))[there].tolist())
    return differences, covered


def miscoverage(found: list[bool]) -> float:
    """Coverage less 90 %, in standard errors; 200 draws' quantiles cover less."""
    error = math.sqrt(0.09 / len(found)) + 0.005
    return (float(np.mean(found)) - 0.9) / error


def test_probabilities_and_intervals_of_an_exact_posterior_are_right():
    """Each of three numbers within 4 standard errors: false alarms below 2e-4.

    The seeds are fixed.
    """
    differences, covered = judged(80)
    error = np.std(differences) / math.sqrt(len(differences))
    assert abs(np.mean(differences)) < 4 * error < 0.5
    for found in covered.values():
        assert len(found) > 60
        assert abs(miscoverage(found)) < 4


def test_a_posterior_that_is_too_narrow_fails_the_same_check():
    _, covered = judged(80, shrink=0.6)
    assert miscoverage(covered["slope"]) < -4


def test_shipped_weights_find_each_true_source_once():
    """On 12 signals of the paper's problem; always the same ones."""
    problem = problems.sinusoids("paper")
    theta = problem.prior.sample((12,), generator_for(0))
    x = problem.simulator(theta, generator_for(1))
    posterior = load_pretrained("sinusoids-paper")
    total = missed = spurious = 0
    for i in range(12):
        table = posterior.catalogue(
            x[i], num_samples=500, generator=generator_for(2, i), true_theta=theta[i]
        )
        likely = table["existence"].values > 0.9
        there = np.isfinite(table["true_frequency"].values)
        total += int(theta[i, 0])
        missed += int(theta[i, 0]) - int((likely & there).sum())
        spurious += int((likely & ~there).sum())
    assert total > 50
    assert missed <= 0.05 * total
    assert spurious <= 0.02 * total


def test_posteriors_and_draws_answer_alike():
    posterior = load_pretrained("sinusoids-tiny")
    problem = problems.sinusoids("tiny")
    theta = problem.prior.sample((1,), generator_for(3))
    x = problem.simulator(theta, generator_for(4))[0]
    rows = posterior.sample((500,), x, generator=generator_for(5))
    table = posterior.catalogue(x, num_samples=500, generator=generator_for(5))
    draws = PosteriorDraws(problem.layout, rows.unsqueeze(0), x)
    xarray.testing.assert_allclose(table, draws.catalogue(x))
    assert table.identical(posterior.catalogue(samples=rows))
    refined = posterior.refine(
        problem.log_likelihood, x, 1_000, generator=generator_for(6)
    )
    assert isinstance(refined, PosteriorDraws)
    found = refined.catalogue(min_probability=0.01)
    expected = float(refined.cardinality().probs @ torch.arange(4.0).double())
    listed = float(found["existence"].sum()) + found.attrs["expected_unlisted"]
    assert listed == pytest.approx(expected)


def test_bad_input_is_named():
    rows, _ = made(10)
    with pytest.raises(ValueError, match=r"samples must have shape \(S, 14\) with"):
        build_catalogue(rows[:0], LAYOUT)
    with pytest.raises(ValueError, match="samples must be finite"):
        build_catalogue(rows * math.nan, LAYOUT)
    with pytest.raises(TypeError, match="samples must be a floating-point tensor"):
        build_catalogue(rows.long(), LAYOUT)
    with pytest.raises(ValueError, match=r"weights must have shape \(10,\), got"):
        build_catalogue(rows, LAYOUT, weights=torch.ones(9))
    for wrong in (-torch.ones(10), torch.zeros(10), torch.full((10,), math.nan)):
        with pytest.raises(ValueError, match="weights must be finite, not negative"):
            build_catalogue(rows, LAYOUT, weights=wrong)
    for share in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="ci_prob must lie in"):
            build_catalogue(rows, LAYOUT, ci_prob=share)
        with pytest.raises(ValueError, match="min_probability must lie in"):
            build_catalogue(rows, LAYOUT, min_probability=share)
    with pytest.raises(ValueError, match="true_theta must be one row"):
        build_catalogue(rows, LAYOUT, true_theta=rows)
    with pytest.raises(ValueError, match="theta must have 14 entries"):
        fit_sources(rows, LAYOUT).assign(rows[:, 1:])
    posterior = load_pretrained("sinusoids-tiny")
    with pytest.raises(ValueError, match=r"catalogue\(\) takes one observation"):
        posterior.catalogue(torch.zeros(2, 300))
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        posterior.catalogue(torch.zeros(300), num_samples=0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_source_is_found_where_there_is_no_other(size: int, seed: int) -> None:
    """All components of all draws lie in one place, so that none is background."""
    layout = ThetaLayout(1, tuple(f"p{d}" for d in range(size)))
    rows = torch.zeros(400, layout.size)
    generator = torch.Generator().manual_seed(seed)
    rows[:200, 0] = 1.0
    rows[:200, 1:] = 12.0 + 0.1 * torch.randn(200, size, generator=generator)
    found = build_catalogue(rows, layout)
    assert found["existence"].values == pytest.approx([0.5], abs=0.03)
    assert float(found["p0"][0]) == pytest.approx(12.0, abs=0.05)
