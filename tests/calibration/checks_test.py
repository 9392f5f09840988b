"""Checks pass on an exact posterior and fail on one that is wrong in a known way.

The yardstick is ``problems.linear_gaussian``, whose posterior is known. All p-values
are exact, so the false-alarm rate of a test is the rate that it passes to the check.
"""

import math
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sbi.diagnostics import run_tarp
from sklearn.metrics import confusion_matrix, log_loss

from sbi_slotflow import calibration, problems
from sbi_slotflow.calibration import faults
from sbi_slotflow.calibration.draws import MatchedComponents, cardinality_probs
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.circular import circular_mean
from sbi_slotflow.sets.matching import hungarian

problem = problems.linear_gaussian()
exact = problem.exact_posterior()
tiny = problems.sinusoids("tiny")
SIZE = 1_000  # pairs, as in a report
POSTERIORS = {
    "exact": lambda: exact,
    "narrowed": lambda: faults.narrowed(exact),
    "shifted": lambda: faults.shifted(exact),
    "oversharp": lambda: faults.oversharp(exact),
    "unmixed": lambda: faults.unmixed(exact),
    "independent": lambda: faults.independent(exact),
}


@cache
def drawn(name, num=SIZE, num_draws=100, seed=0):
    return calibration.draw(
        POSTERIORS[name](), problem, num, num_draws=num_draws, seed=seed
    )


def sets(draws, rate):
    return calibration.sbc(
        draws, log_likelihood=problem.log_likelihood, false_alarm_rate=rate
    )


def another_prior(draws, rate):
    weights = torch.tensor([4.0, 3.0, 2.0, 1.0])
    probs = draws.probs * weights
    return calibration.cardinality_reliability(
        draws, probs=probs / probs.sum(-1, keepdim=True), weights=weights,
        false_alarm_rate=rate,
    )  # fmt: skip


CHECKS = {
    "sets": sets,
    "components": lambda d, rate: calibration.sbc_components(d, false_alarm_rate=rate),
    "coverage": lambda d, rate: calibration.coverage(d, false_alarm_rate=rate),
    "cardinality": lambda d, rate: calibration.cardinality_reliability(
        d, false_alarm_rate=rate
    ),
    "another prior": another_prior,
    "tarp": lambda d, rate: calibration.tarp(d, problem.prior, false_alarm_rate=rate),
    "residuals": lambda d, rate: calibration.residuals(
        d.draws[0], d.x, problem, false_alarm_rate=rate
    ),
}
# A report's rate of a check: 0.05 over eight.
RATE = 0.05 / 8
CAUGHT = [
    ("narrowed", "sets"),
    ("narrowed", "components"),
    ("narrowed", "coverage"),
    ("shifted", "sets"),
    ("shifted", "components"),
    ("shifted", "coverage"),
    ("oversharp", "sets"),
    ("oversharp", "cardinality"),
    ("oversharp", "another prior"),
    ("unmixed", "sets"),
    ("unmixed", "components"),
    ("unmixed", "coverage"),
    ("independent", "components"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_exact_posterior_passes(name):
    check = CHECKS[name](drawn("exact", 300), 1e-4)
    assert check.passed
    assert check.failures == ()
    assert 0 < check.p_value <= 1


# A power of two, so that rounding is the same in either unit.
UNIT = 2.0**-80  # 1e-24


@pytest.mark.parametrize("name", ["components", "coverage", "sets"])
@pytest.mark.parametrize("fault", ["exact", "shifted"])
def test_checks_do_not_depend_on_the_unit(fault, name):
    def in_unit(rows):
        return torch.cat([rows[..., :1], UNIT * rows[..., 1:]], dim=-1)

    check = {**CHECKS, "sets": lambda d, r: calibration.sbc(d, false_alarm_rate=r)}[
        name
    ]
    draws = drawn(fault)
    parts = {n: in_unit(getattr(draws, n)) for n in ("theta", "draws", "given_k")}
    small = replace(draws, x=UNIT * draws.x, guides=in_unit(draws.guides), **parts)
    assert check(small, RATE).p_values == check(draws, RATE).p_values


def test_distances_do_not_depend_on_the_unit():
    rows = drawn("exact").theta
    scaled = torch.cat([rows[:, :1], UNIT * rows[:, 1:]], dim=-1)
    found = []
    for theta in (rows, scaled):
        distance = calibration.set_distance(problem.layout, theta)
        found.append(distance(theta[:-1], theta[1:]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("fault", "name"), CAUGHT)
def test_fault_is_caught_at_the_reports_size(fault, name):
    check = CHECKS[name](drawn(fault), RATE)
    assert not check.passed
    assert set(check.failures) <= set(check.p_values)
    assert check.p_value <= RATE


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("fault", [name for name in POSTERIORS if name != "exact"])
def test_faults_are_caught_whatever_the_seed(fault, seed):
    draws = drawn(fault, SIZE, 200, seed)
    for name in (check for wrong, check in CAUGHT if wrong == fault):
        assert not CHECKS[name](draws, RATE).passed, name


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["narrowed", "oversharp"])
def test_tarp_catches_what_changes_distances(fault):
    assert not CHECKS["tarp"](drawn(fault, SIZE, 200), RATE).passed


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated():
    # At most 10 % of 40 runs; 13 failures of a check have a probability of 1e-4.
    failures = dict.fromkeys(CHECKS, 0)
    for seed in range(40):
        draws = drawn("exact", 100, 50, seed)
        for name, check in CHECKS.items():
            failures[name] += not check(draws, 0.1).passed
    assert max(failures.values()) < 13


def test_what_does_not_concern_a_check_passes():
    # Widths don't touch q(K | x), nor its sharpness the components given K.
    assert CHECKS["cardinality"](drawn("narrowed"), 1e-4).passed
    assert CHECKS["coverage"](drawn("oversharp"), 1e-4).passed


def test_matching_with_the_truth_would_fail_an_exact_posterior():
    draws = drawn("exact")
    layout = problem.layout
    truth = layout.unpack(draws.theta).components.double()
    others = layout.unpack(draws.given_k).components.double()
    cost = (truth.unsqueeze(-2) - others.unsqueeze(-3)).square().sum(-1)
    counts = draws.cardinality.repeat(len(others))
    order = hungarian(-cost.flatten(0, 1), counts).reshape(others.shape[:-1])
    matched = others.gather(-2, order.unsqueeze(-1).expand_as(others))
    several = draws.cardinality > 1
    ranks = calibration.pit(truth[several, 0], matched[:, several, 0], generator_for(0))
    slope = np.abs(2 * ranks[:, 1] - 1)
    assert calibration.uniformity_p_value(slope) < 1e-6  # the truth is too central
    assert slope.mean() < 0.5


def test_matched_components_are_those_of_the_rows():
    draws = drawn("exact", 300)
    truth, others, _ = MatchedComponents(draws).components
    for rows, found in ((draws.theta, truth), (draws.given_k, others)):
        given = problem.layout.unpack(rows).components.double()
        torch.testing.assert_close(found.sort(-2).values, given.sort(-2).values)


def test_components_go_to_the_nearest_guides():
    draws = drawn("exact", 300)
    matched = MatchedComponents(draws)
    points, scale = matched._points
    for k in (2, 3):
        here = draws.cardinality == k
        goal = points[here, :k]
        for found in matched.components:
            given = found[..., here, :k, :]
            distances = [
                ((given[..., order, :] - goal) / scale[here]).square().sum((-2, -1))
                for order in permutations(range(k))
            ]
            nearest = torch.stack(distances).amin(0)
            torch.testing.assert_close(distances[0], nearest)


def test_circular_means_know_the_seam():
    turns = torch.tensor([[6.2, 3.0], [0.1, 5.0]], dtype=torch.float64)
    found = circular_mean(turns, torch.tensor([2 * math.pi, math.inf]).double())
    expected = (6.2 + 0.1 - 2 * math.pi) / 2 % (2 * math.pi)
    torch.testing.assert_close(found, torch.tensor([expected, 4.0]).double())


def test_coverage_counts_truths_in_central_intervals():
    draws = drawn("exact", 300)
    curve = calibration.coverage(draws).parameters["slope"]
    truth, others, _ = MatchedComponents(draws).components
    mask = problem.layout.mask(draws.cardinality)
    low, high = others[..., 1].quantile(torch.tensor([0.25, 0.75]).double(), dim=0)
    inside = ((truth[..., 1] >= low) & (truth[..., 1] <= high))[mask]
    # Quantiles of 100 draws interpolate; ranks do not.
    assert curve.coverage[9] == pytest.approx(inside.double().mean().item(), abs=0.02)
    assert curve.num == int((draws.cardinality > 0).sum())


def test_bias_has_the_sign_of_the_width():
    narrow = calibration.coverage(drawn("narrowed")).cardinalities["mixed"]
    assert narrow.bias_interval[1] < 0
    assert narrow.absolute_bias_interval[0] > 0.03
    low, high = narrow.bias_interval
    assert low <= narrow.bias <= high
    right = calibration.coverage(drawn("exact", 300)).cardinalities["mixed"]
    assert right.absolute_bias_interval[0] < 0.03


def test_scores_of_k_agree_with_their_definitions():
    draws = drawn("exact", 300)
    check = calibration.cardinality_reliability(draws)
    k, q = draws.cardinality.numpy(), draws.probs.numpy()
    labels = [0, 1, 2, 3]
    assert check.scores["log score"]["value"] == pytest.approx(
        -log_loss(k, q, labels=labels)
    )
    squares = ((q - np.eye(4)[k]) ** 2).sum(-1)
    assert check.scores["Brier score"]["value"] == pytest.approx(squares.mean())
    best = q.argmax(-1)
    assert (check.confusion == confusion_matrix(k, best, labels=labels)).all()
    assert check.accuracy == pytest.approx((best == k).mean())


def test_expected_scores_are_those_of_q_itself():
    draws = drawn("exact", 300)
    check = calibration.cardinality_reliability(draws)
    q = draws.probs
    entropy = torch.special.entr(q).sum(-1).mean()
    # 9,999 simulations of 300 pairs: the standard error is below 1e-3.
    assert check.scores["log score"]["expected"] == pytest.approx(
        -float(entropy), abs=5e-3
    )


def test_calibration_error_of_an_overconfident_posterior():
    draws = drawn("exact", 300)
    sure = torch.nn.functional.one_hot(draws.probs.argmax(-1), 4).double()
    check = calibration.cardinality_reliability(draws, probs=0.97 * sure + 0.0075)
    error = check.scores["calibration error"]["value"]
    assert error == pytest.approx(0.9775 - check.accuracy, abs=1e-6)
    assert not check.passed


def test_pairs_kept_for_another_prior_have_it():
    check = another_prior(drawn("exact"), RATE)
    share = check.confusion.sum(1) / check.confusion.sum()
    # About 600 pairs are kept: 5 standard errors.
    assert np.abs(share - np.array([0.4, 0.3, 0.2, 0.1])).max() < 5 * 0.5 / 600**0.5


def test_posterior_under_another_prior_is_the_reweighted_one():
    draws = drawn("exact", 300)
    weights = [4.0, 3.0, 2.0, 1.0]
    found = cardinality_probs(exact.with_cardinality_prior(weights), draws.x)
    right = draws.probs * torch.tensor(weights)
    torch.testing.assert_close(found, right / right.sum(-1, keepdim=True))


class Replayed:
    """A posterior that returns draws it was given."""

    def __init__(self, draws):
        self.draws = draws

    def sample_batched(self, shape, x, **options):
        return self.draws


def test_tarp_curve_is_the_one_of_sbi():
    draws = drawn("exact", 300)
    distance = calibration.set_distance(problem.layout, draws.theta)
    check = calibration.tarp(draws, problem.prior, distance=distance)
    coverage, levels = run_tarp(
        draws.theta,
        draws.x,
        Replayed(draws.draws[1:]),  # type: ignore[arg-type]
        references=draws.draws[0],
        num_posterior_samples=len(draws.draws) - 1,
        distance=distance,
        z_score_theta=False,
        show_progress_bar=False,
    )
    ours = np.searchsorted(
        np.sort(check.ranks["posterior"]), levels.numpy(), side="right"
    ) / len(draws.theta)
    # They count draws, we rank among them: values differ by up to 1 / 100.
    assert np.abs(ours - coverage.numpy()).max() < 0.06


def test_figures_have_a_panel_for_each_quantity():
    draws = drawn("exact", 300)
    for name, function in CHECKS.items():
        check = function(draws, 0.01)
        figure = check.plot()
        assert isinstance(figure, Figure)
        panels = [axes for axes in figure.axes if axes.get_visible()]
        expected = len(check.p_values) if name in ("sets", "components", "tarp") else 2
        assert len(panels) == expected, name
        if name in ("sets", "components"):
            for axes in panels:  # zero in the middle, and nothing cut off
                low, high = axes.get_ylim()
                assert low == -high
                assert np.abs(axes.lines[0].get_ydata()).max() < high
                band = axes.collections[0].get_datalim(axes.transData)
                assert low < band.y0 < 0 < band.y1 < high


def test_the_lowest_residuals_panels_name_their_axes():
    figure = CHECKS["residuals"](drawn("exact", 300), 0.01).plot()
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "frequency (cycles per sample)",
        "lag (samples)",
    ]
    theta, x = truths(20)
    figure = calibration.residuals(theta, x, tiny).plot()
    shown = [bool(axes.get_xlabel()) for axes in figure.axes]
    assert shown == [False, False, True, True]


def test_an_observation_is_looked_at_once():
    seen = []

    class Watched(type(exact)):
        def given(self, x):
            seen.append(len(x))
            return super().given(x)

    watched = Watched.__new__(Watched)
    vars(watched).update(vars(exact))
    draws = calibration.draw(watched, problem, 60, num_draws=20)
    # p(K | x) of all, and draws of either kind from what is known of those of one K.
    assert sum(seen) == 2 * 60
    assert (problem.layout.cardinality(draws.given_k) == draws.cardinality).all()
    assert (problem.layout.cardinality(draws.draws) != draws.cardinality).any()


def test_one_process_does_the_work_unless_more_are_asked_for():
    seen = []

    class Watched:
        cardinality = exact.cardinality

        def sample_batched(self, *args, **kwargs):
            seen.append(args)  # a worker's copy of the list would get it
            return exact.sample_batched(*args, **kwargs)

    calibration.draw(Watched(), problem, 20, num_draws=20)
    assert seen


def test_verdict_names_what_failed():
    check = CHECKS["cardinality"](drawn("oversharp"), 0.01)
    assert "FAILED" in str(check)
    assert check.failures[0] in str(check)
    assert "false-alarm rate 0.01" in str(check)
    assert check.level == pytest.approx(0.01 / 4)


def test_impossible_rates_and_sizes_are_refused():
    draws = drawn("exact", 300)
    with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1"):
        calibration.sbc_components(draws, false_alarm_rate=1.0)
    with pytest.raises(ValueError, match="n must be at least 20, got 3"):
        calibration.draw(exact, problem, 3)
    with pytest.raises(TypeError, match="posterior must have a method sample_batched"):
        calibration.draw(problem, problem)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"probs must have shape \(300, 4\)"):
        calibration.cardinality_reliability(draws, probs=torch.ones(3, 4))


# The residuals of signals, where truths stand in for exact posterior draws: given x
# they are just that.
def truths(num=400):
    theta = tiny.prior.sample((num,), generator_for(1, 0))
    return theta, tiny.simulator(theta, generator_for(1, 1))


def test_residuals_of_the_truth_are_noise():
    theta, x = truths()
    check = calibration.residuals(theta, x, tiny, false_alarm_rate=1e-4)
    assert check.passed
    assert len(check.streams) == 2
    assert len(check.p_values) == 6


def test_residuals_of_coloured_noise_are_not_white():
    theta, _ = truths()
    other = problems.sinusoids("tiny", noise="resampled")
    x = other.simulator(theta, generator_for(1, 2))
    check = calibration.residuals(theta, x, tiny, false_alarm_rate=1e-3)
    assert "whiteness, stream 2" in check.failures


def test_residuals_show_a_tone_that_was_left_out():
    theta, x = truths()
    parts = tiny.layout.unpack(theta)
    fewer = tiny.layout.pack(
        (parts.cardinality - 1).clamp(min=0), parts.components, parts.shared
    )
    check = calibration.residuals(fewer, x, tiny, false_alarm_rate=1e-3)
    assert "peak, stream 1" in check.failures


def test_residuals_show_a_wrong_noise_level():
    theta, x = truths()
    parts = tiny.layout.unpack(theta)
    louder = tiny.layout.pack(parts.cardinality, parts.components, 1.05 * parts.shared)
    check = calibration.residuals(louder, x, tiny, false_alarm_rate=1e-3)
    assert "power, stream 1" in check.failures


def test_residuals_of_one_observation():
    theta, x = truths(1)
    check = calibration.residuals(theta, x, tiny, false_alarm_rate=1e-6)
    assert check.passed
    with pytest.raises(ValueError, match="streams must be lengths of at least 4"):
        calibration.residuals(theta, x, tiny, streams=[200, 200])
    with pytest.raises(ValueError, match="theta and x must have shapes"):
        calibration.residuals(theta[0], x, tiny)


def test_local_c2st_sees_a_shift_where_it_is():
    draws = drawn("shifted")
    x = draws.x[draws.cardinality == 3][:1]
    options = {"num_null": 99, "false_alarm_rate": 0.01}
    wrong = calibration.local_c2st(POSTERIORS["shifted"](), x, draws, **options)
    assert not wrong.passed
    # The least p-value, 1 / 100, is the rate of false alarms of this one.
    draws = drawn("exact", 300)
    right = calibration.local_c2st(exact, x, draws, **options)
    assert right.statistic <= right.null.max()


def test_local_c2st_refuses_what_it_cannot_do():
    draws = drawn("exact", 300)
    with pytest.raises(ValueError, match="x must be one observation of length 6"):
        calibration.local_c2st(exact, torch.zeros(2, 6), draws)
    with pytest.raises(ValueError, match="num_null must be at least 999"):
        calibration.local_c2st(
            exact, draws.x[0], draws, num_null=99, false_alarm_rate=1e-3
        )


NAN = torch.tensor([[float("nan")] * 6])
HALF: Any = 20.5
NO_NUMBER: Any = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: calibration.draw(exact, problem, 19), ValueError, "n must be at"),
        (
            lambda d: calibration.draw(exact, problem, HALF),
            TypeError,
            "n must be an in",
        ),
        (
            lambda d: calibration.draw(exact, problem, 20, num_draws=NO_NUMBER),
            TypeError,
            "num_draws must be an integer, got nan",
        ),
        (
            lambda d: calibration.report(exact, problem, 80, num_workers=0),
            ValueError,
            "num_workers must be at least 1, got 0",
        ),
        (
            lambda d: calibration.report(exact, problem, false_alarm_rate=float("nan")),
            ValueError,
            "false_alarm_rate must lie between 0 and 1, got nan",
        ),
        (
            lambda d: calibration.sbc(d, num_likelihood_draws=0),
            ValueError,
            "num_likelihood_draws must be at least 1, got 0",
        ),
        (
            lambda d: calibration.residuals(d.draws[0], d.x, problem, num_noise=0),
            ValueError,
            "num_noise must be at least 1, got 0",
        ),
        (
            lambda d: calibration.residuals(d.draws[0, :1], NAN, problem),
            ValueError,
            "must be finite",
        ),
        (
            lambda d: calibration.local_c2st(exact, NAN, d),
            ValueError,
            "x must be finite",
        ),
        (
            lambda d: calibration.local_c2st(exact, d.x[:1], d, num_null=HALF),
            TypeError,
            "num_null must be an integer, got 20.5",
        ),
        (
            lambda d: calibration.cardinality_reliability(d, probs=d.probs * torch.nan),
            ValueError,
            "probs must be probabilities",
        ),
        (
            lambda d: calibration.cardinality_reliability(
                d, weights=torch.tensor([1.0, 1.0, -1.0, 1.0])
            ),
            ValueError,
            "weights must be finite, not negative",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(drawn("exact", 300))
