"""A report is complete, self-contained, and the same for any number of workers."""

import json
import re
from importlib import import_module
from typing import Any

import populations
import pytest
import torch

from sbi_slotflow import calibration, problems
from sbi_slotflow.calibration import faults

problem = problems.linear_gaussian()
exact = problem.exact_posterior()
OPTIONS = {"num_draws": 20, "false_alarm_rate": 0.5, "show_progress": False}
NAMES = [
    "sets",
    "components",
    "coverage",
    "cardinality",
    "cardinality under another prior",
    "tarp",
    "local C2ST",
    "residuals",
]


@pytest.fixture(scope="module")
def small():
    return calibration.report(exact, problem, 62, seed=1, **OPTIONS)


def test_report_makes_every_check_or_says_why_not(small):
    assert list(small.checks) == NAMES
    assert list(small.skipped) == ["misspecification"]
    for check in small.checks.values():
        assert check.false_alarm_rate == pytest.approx(0.5 / 8)
    x = torch.full((1, 6), 30.0)
    found = calibration.report(exact, problem, 62, x=x, seed=1, **OPTIONS)
    assert list(found.checks) == [*NAMES, "misspecification"]
    assert not found.checks["misspecification"].passed
    assert not found.passed
    assert "misspecification" in found.failures


def test_workers_do_not_change_the_result(small, tmp_path):
    again = calibration.report(exact, problem, 62, seed=1, num_workers=2, **OPTIONS)
    small.to_json(tmp_path / "one.json")
    again.to_json(tmp_path / "two.json")
    one = (tmp_path / "one.json").read_text()
    assert one == (tmp_path / "two.json").read_text()
    found = json.loads(one)
    assert found["passed"] == small.passed
    assert found["settings"]["n"] == 62
    assert found["checks"]["tarp"]["p_values"] == small.checks["tarp"].p_values


def test_page_is_self_contained(small, tmp_path):
    small.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == len(small.checks)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = re.findall(r'href="([^"]*)"', page)
    assert links
    assert all(f'id="{link[1:]}"' in page for link in links)
    assert "<script" not in page
    assert "probability of at most 0.5" in page
    for name in small.skipped.values():
        assert name in page


def test_seed_changes_the_result(small):
    other = calibration.report(exact, problem, 62, seed=2, **OPTIONS)
    assert other.checks["sets"].p_values != small.checks["sets"].p_values


def test_report_prints_a_line_for_each_check(small):
    lines = str(small).splitlines()
    assert len(lines) == len(small.checks) + len(small.skipped) + 1
    assert "family-wise false-alarm rate 0.5" in lines[-1]


@pytest.mark.slow
def test_exact_posterior_passes_a_full_report():
    assert calibration.report(exact, problem, false_alarm_rate=1e-3).passed


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults.__all__[1:])
def test_faulty_posterior_fails_a_full_report(fault):
    wrong = getattr(faults, fault)(exact)
    assert not calibration.report(wrong, problem, seed=3).passed


@pytest.mark.slow
def test_a_report_tells_whether_a_population_goes_with_its_components():
    """The exact posterior passes (false alarms 1e-3), a looser one fails."""
    heights = populations.problem()
    options: dict[str, Any] = {"num_draws": 100, "seed": 1, "show_progress": False}
    right = calibration.report(
        populations.Exact(), heights, 300, false_alarm_rate=1e-3, **options
    )
    assert right.passed
    wrong = calibration.report(
        populations.Loose(), heights, 300, false_alarm_rate=1e-2, **options
    )
    assert not wrong.passed


def test_malformed_arguments_are_refused():
    with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1"):
        calibration.report(exact, problem, false_alarm_rate=0.0)
    with pytest.raises(
        ValueError, match="x must be one observation of length 6, got shape"
    ):
        calibration.report(exact, problem, x=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="num_draws must be at least 20, got 1"):
        calibration.report(exact, problem, num_draws=1, show_progress=False)


@pytest.mark.parametrize("write", ["to_json", "to_html"])
def test_a_report_replaces_a_report_and_nothing_else(small, tmp_path, write):
    mine, earlier = tmp_path / "mine", tmp_path / "earlier"
    mine.write_text('{"passed": true}')
    with pytest.raises(FileExistsError, match=r"mine exists and is no .*Report"):
        getattr(small, write)(mine)
    assert mine.read_text() == '{"passed": true}'
    for _ in range(2):
        getattr(small, write)(earlier)
    assert earlier.stat().st_size > 1_000


def test_the_least_number_of_pairs_is_named_before_any_work(monkeypatch):
    report_module: Any = import_module("sbi_slotflow.calibration.report")

    def worked(*_, **__):
        raise AssertionError("draws were made")

    with monkeypatch.context() as patch:
        patch.setattr(report_module, "draw", worked)
        with pytest.raises(ValueError, match=r"n must be at least \d+ here, got 30"):
            calibration.report(exact, problem, 30)
    least = report_module._least_pairs(exact, problem, None)
    found = calibration.report(exact, problem, least, seed=5, show_progress=False)
    assert "cardinality under another prior" in found.checks
