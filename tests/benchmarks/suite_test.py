"""Every experiment runs at the budget smoke, and what it leaves is whole."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from benchmarks.__main__ import main
from benchmarks.common import run_parts
from benchmarks.experiment import BUDGET_NAMES, Claim, discover, load
from benchmarks.experiments.dataset import Size
from benchmarks.intervals import spread
from benchmarks.report import write_report
from benchmarks.store import Cache, Result, decoded, encoded, write_json

pytestmark = pytest.mark.filterwarnings("ignore")  # tiny samples, hardly trained nets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", discover())
def test_an_experiment_leaves_data_and_claims_and_its_figure_follows(
    name: str, folder: Path
):
    experiment = load(name)
    assert set(experiment.module.BUDGETS) == set(BUDGET_NAMES)
    for heading in ("Paper", "Question", "Protocol"):
        assert experiment.about(heading), f"no {heading}: in the docstring"
    before = torch.get_rng_state()
    assert main(["run", name, "--budget", "smoke", "--out", str(folder)]) == 0
    assert torch.equal(torch.get_rng_state(), before), "reseeds the global generator"
    result = Result(experiment, "smoke", folder)
    assert result.done(0)
    assert not result.done(1)
    dataset = result.read()
    numbers = [v for v in dataset.data_vars.values() if v.dtype.kind == "f"]
    assert any(np.isfinite(v).any() for v in numbers)
    claims = experiment.claims(dataset)
    quantities = [claim.quantity for claim in claims]
    assert quantities
    assert len(set(quantities)) == len(quantities)
    for claim in claims:
        if claim.interval is not None and isinstance(claim.ours, float):
            low, high = claim.interval
            assert low <= claim.ours <= high or np.isnan(claim.ours), claim
    assert [c["quantity"] for c in result.facts()["claims"]] == quantities
    assert not result.figure.exists()
    assert main(["figures", name, "--budget", "smoke", "--out", str(folder)]) == 0
    assert result.figure.stat().st_size > 5_000


def test_the_report_has_a_section_with_its_command_for_each(folder: Path):
    there = [path.name.partition(".")[0] for path in folder.glob("*.smoke.json")]
    if not there:
        main(["run", "dataset", "--budget", "smoke", "--out", str(folder)])
        there = ["dataset"]
    text = write_report("smoke", folder).read_text()
    for name in there:
        assert f"## {name}\n" in text
        assert f"python -m benchmarks run {name} --budget smoke" in text


def test_the_report_tells_what_was_measured_with_other_weights(tmp_path: Path):
    main(["run", "dataset", "--budget", "smoke", "--out", str(tmp_path)])
    assert "earlier weights" not in write_report("smoke", tmp_path).read_text()
    place = tmp_path / "dataset.smoke.json"
    facts = json.loads(place.read_text())
    place.write_text(json.dumps({**facts, "weights": {"sinusoids-tiny": "other"}}))
    assert "earlier weights" in write_report("smoke", tmp_path).read_text()


def test_what_an_earlier_protocol_found_is_kept_and_told(tmp_path: Path):
    main(["run", "dataset", "--budget", "smoke", "--out", str(tmp_path)])
    assert "earlier protocol" not in write_report("smoke", tmp_path).read_text()
    place = tmp_path / "dataset.smoke.json"
    facts = json.loads(place.read_text())
    data = {"coords": {}, "data": {}}
    place.write_text(json.dumps({**facts, "budget means": {}, "dataset": data}))
    text = write_report("smoke", tmp_path).read_text()
    assert "earlier protocol" in text
    assert facts["claims"][0]["quantity"] in text


class _Counting:
    """An experiment that counts how often it runs."""

    BUDGETS: ClassVar[dict[str, Size]] = {"smoke": Size(2, 2)}
    WEIGHTS: tuple[str, ...] = ()
    __doc__ = "Nothing.\n\nPaper: none.\n"

    def __init__(self) -> None:
        self.runs = 0

    def run(self, budget: str, seed: int) -> xr.Dataset:
        self.runs += 1
        return xr.Dataset({"runs": float(self.runs), "seed": seed})

    def plot(self, dataset: xr.Dataset) -> Figure:
        return Figure()

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        return [Claim("runs", float(dataset["runs"]), target="< 2")]


def test_what_is_done_is_not_done_again_unless_asked(tmp_path, monkeypatch):
    module = _Counting()
    monkeypatch.setattr(
        "benchmarks.__main__.load", lambda name: _experiment(name, module)
    )
    monkeypatch.setattr("benchmarks.__main__.discover", lambda: ["counting"])
    command = ["run", "counting", "--budget", "smoke", "--out", str(tmp_path)]
    main(command)
    main(command)
    assert module.runs == 1
    main([*command, "--seed", "1"])
    assert module.runs == 2
    main([*command, "--seed", "1", "--again"])
    assert module.runs == 3
    _Counting.BUDGETS = {**_Counting.BUDGETS, "smoke": Size(1, 1)}
    main([*command, "--seed", "1"])
    assert module.runs == 4, "the budget means something else now"
    module.WEIGHTS = ("tiny",)
    main([*command, "--seed", "1"])
    main([*command, "--seed", "1"])
    assert module.runs == 5, "it uses weights now"
    monkeypatch.setattr("benchmarks.experiment.model_card", lambda name: {"sha256": ""})
    assert not Result(_experiment("counting", module), "smoke", tmp_path).done(1)
    facts = json.loads((tmp_path / "counting.smoke.json").read_text())
    assert facts["claims"][0]["met"] is False


class _Adding(_Counting):
    """One that keeps what several seeds find, of some things more than of others."""

    BUDGETS: ClassVar[dict[str, Size]] = {"smoke": Size(2, 2)}
    ADDS_SEEDS = True

    def run(self, budget: str, seed: int) -> xr.Dataset:
        self.runs += 1
        values = np.full(1 + seed, float(self.runs))
        return xr.Dataset({"runs": float(self.runs), "values": ("loud", values)})

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        return [Claim("runs", float(dataset["runs"].max()))]


def test_seeds_are_added_and_none_is_lost(tmp_path, monkeypatch):
    module = _Adding()
    monkeypatch.setattr(
        "benchmarks.__main__.load", lambda name: _experiment(name, module)
    )
    monkeypatch.setattr("benchmarks.__main__.discover", lambda: ["counting"])
    command = ["run", "counting", "--budget", "smoke", "--out", str(tmp_path)]
    main([*command, "--seed", "1"])
    main([*command, "--seed", "0", "1"])
    result = Result(_experiment("counting", module), "smoke", tmp_path)
    dataset = result.read()
    assert dataset.seed.values.tolist() == [0, 1]
    assert dataset.runs.values.tolist() == [2.0, 1.0]
    np.testing.assert_equal(dataset["values"].values, [[2.0, np.nan], [1.0, 1.0]])
    facts = result.facts()
    assert set(facts["seeds"]) == {"0", "1"}
    assert facts["command"].endswith("--seed 0 1")
    assert result.done(0)
    assert result.done(1)
    assert not result.done(2)
    main([*command, "--seed", "1", "--again"])
    assert result.read().runs.values.tolist() == [2.0, 3.0]
    _Adding.BUDGETS = {"smoke": Size(1, 1)}
    main([*command, "--seed", "1"])
    assert result.read().seed.values.tolist() == [1], "the budget means something else"


def test_a_stopped_run_keeps_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.store._PARTS", tmp_path)
    computed = []

    def part() -> xr.Dataset:
        computed.append(1)
        return xr.Dataset({"value": ("i", np.arange(3.0))})

    first = Cache("some", "quick", 0).get("a", part)
    again = Cache("some", "quick", 0).get("a", part)
    xr.testing.assert_identical(first, again)
    assert len(computed) == 1
    Cache("some", "quick", 1).get("a", part)
    Cache("some", "full", 0).get("a", part)
    assert len(computed) == 3
    Cache("some", "quick", 0).belongs_to({"num": 1})
    Cache("some", "quick", 0).get("a", part)
    assert len(computed) == 3
    Cache("some", "quick", 0).belongs_to({"num": 2})
    assert not (tmp_path / "some.quick.0" / "a.json").exists()
    Cache("some", "quick", 0).get("a", part)
    Cache("some", "smoke", 0).get("a", part)
    Cache("some", "smoke", 0).get("a", part)
    assert len(computed) == 6


def test_what_a_script_keeps_is_in_the_report(tmp_path, monkeypatch, capsys):
    for module in ("common", "store", "report"):
        monkeypatch.setattr(f"benchmarks.{module}.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.report._PLACE", tmp_path / "REPORT.md")
    monkeypatch.setattr("benchmarks.report.discover", list)

    def part(num: int, seed: int) -> dict[str, object]:
        """Seven and its errors."""
        return {"seven": spread([6.0, 7.0, 8.0]), "missing": np.nan, "num": num}

    monkeypatch.setattr("sys.argv", ["benchmarks/pulses.py", "part", "--signals", "3"])
    run_parts({"part": (part, 100), "other": (part, 100)}, None)
    assert not list(tmp_path.iterdir()), "kept though nobody asked"
    monkeypatch.setattr("sys.argv", ["benchmarks/pulses.py", "part", "--keep"])
    run_parts({"part": (part, 100), "other": (part, 100)}, None)
    text = write_report().read_text()
    assert "python -m benchmarks.pulses part<" in text
    assert "| seven | 7 ± 0.5774 (median 7, n = 3) |" in text
    assert "| missing | - |" in text
    assert "| num | 100 |" in text
    assert "pulses other" not in text


def test_a_dataset_survives_json(tmp_path):
    dataset = xr.Dataset(
        {
            "many": (("i", "j"), np.arange(6.0, dtype="f4").reshape(2, 3) / 7),
            "odd": ("j", [np.nan, np.inf, -np.inf]),
            "count": ("i", np.array([3, 250], dtype="u1")),
            "none": (("none", "j"), np.empty((0, 3))),
            "one": 1 / 3,
            "right": ("i", [True, False]),
        },
        {"j": ["a", "long name", ""]},
    )
    path = tmp_path / "dataset.json"
    write_json(encoded(dataset), path)
    again = decoded(json.loads(path.read_text()))
    xr.testing.assert_identical(again, dataset)
    assert {n: v.dtype for n, v in again.items()} == {
        n: v.dtype for n, v in dataset.items()
    }
    rounded = decoded(encoded(dataset, rounded=True))
    xr.testing.assert_allclose(rounded, dataset, rtol=1e-5)
    assert float(rounded.one) == 0.333333333


def test_targets_and_rivals_are_judged():
    assert Claim("error", 0.5, target="<= 0.5").met is True
    assert Claim("error", 0.5, target="< 0.5").met is False
    assert Claim("share", 0.4, target=">= 5e-1").met is False
    assert Claim("share", 0.4, target="as good as possible").met is None
    claim = Claim("error", 0.5, paper=0.4, better="lower", rivals={"a": 0.6, "b": 0.3})
    assert claim.worse_than() == ["paper", "b"]
    claim = Claim("error", 0.5, better="lower", rivals={"exact": 0.1, "a": 0.2})
    assert claim.worse_than() == ["a"]
    claim = Claim("share", 0.5, paper=0.4, better="higher", rivals={"a": 0.6})
    assert claim.worse_than() == ["a"]


def test_an_unknown_experiment_is_refused(capsys):
    assert main(["run", "no_such_experiment", "--budget", "smoke"]) == 2
    assert "dataset" in capsys.readouterr().err


def _experiment(name, module):
    from benchmarks.experiment import Experiment

    return Experiment(name, module)
