"""The command line analyses files of any kind, resumes, and refuses bad input."""

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from matplotlib.image import imread

from sbi_slotflow import load_pretrained, model_card, problems
from sbi_slotflow.cli import infer as module
from sbi_slotflow.cli import main
from sbi_slotflow.pretrained import available_weights
from sbi_slotflow.seeding import generator_for

MODEL = "sinusoids-tiny"
BATCH = 3
NUM = BATCH + 2  # two batches, the second not full
PROBLEM = problems.sinusoids("tiny")
THETA = PROBLEM.prior.sample((NUM,), generator_for(0))
X = PROBLEM.simulator(THETA, generator_for(1)).numpy()
TRUE_K = PROBLEM.layout.cardinality(THETA).numpy()
GROUPS = ("cardinality", "posterior", "sample_stats", "catalogue")


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", BATCH)
        yield


class Run(NamedTuple):
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


def run(*words: object) -> Run:
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's
            status = int(stop.code or 0)
    return Run(status, out.getvalue(), err.getvalue())


def infer(signals: object, out: object, *options: object, model: object = MODEL) -> Run:
    options = ("--num-samples", 50, *options)
    return run("infer", signals, "--model", model, "--out", out, *options)


def read(path: Path) -> Any:
    with xr.open_datatree(
        path, engine="zarr" if path.suffix == ".zarr" else "h5netcdf"
    ) as tree:
        return tree.load()


def save_hdf5(path: Path, array: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("night/flux", data=array)
        file.create_dataset("night/time", data=np.arange(5.0))
    return f"{path}:night/flux"


def save_npy(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def save_zarr_group(path: Path, array: np.ndarray) -> str:
    group = zarr.open_group(path, mode="w")
    group.create_array("flux", data=array)
    group.create_array("time", data=np.arange(5.0))
    return f"{path}:flux"


@pytest.fixture(scope="module", name="many")
def _many(tmp_path_factory: pytest.TempPathFactory, _small_batches: None) -> Path:
    """Result of NUM signals, with a table beside it; no test writes to its folder."""
    folder = tmp_path_factory.mktemp("many")
    signals = save_npy(folder / "x.npy", X)
    done = infer(signals, folder / "r.nc", "--catalogue", folder / "r.csv")
    assert done.status == 0, done.err
    assert f"{NUM} signals; the most probable K = 0" in done.out
    assert f"{NUM}/{NUM}" in done.err  # the progress bar
    return folder / "r.nc"


def test_one_signal_becomes_an_arviz_tree_with_catalogue_and_figures(
    tmp_path: Path,
) -> None:
    i = int(TRUE_K.argmax())
    signals = save_npy(tmp_path / "x.npy", X[i])
    table = tmp_path / "t.csv"
    done = infer(signals, tmp_path / "r.nc", "--plot", "--catalogue", table)
    assert done.status == 0, done.err
    assert len(re.findall(r"^  K = \d  \d\.\d{3}", done.out, re.MULTILINE)) == 4
    tree = read(tmp_path / "r.nc")
    assert tree["posterior"]["frequency"].shape == (1, 50, 3)
    assert {"posterior_predictive", "prior", "posterior_given_k"} <= set(tree.children)
    np.testing.assert_array_equal(tree["observed_data"]["x"], X[i])
    expected = load_pretrained(MODEL).cardinality(torch.from_numpy(X[i])).probs
    np.testing.assert_allclose(
        tree["cardinality"]["probability"], expected, rtol=0, atol=1e-6
    )
    rows = pd.read_csv(table)
    assert len(rows) == tree["catalogue"].sizes["source"] >= TRUE_K[i]
    np.testing.assert_allclose(
        rows["frequency"], tree["catalogue"]["frequency"], rtol=1e-12
    )
    assert set(rows.columns) == set(tree["catalogue"].data_vars)  # no row numbers
    names = {"cardinality", "reconstruction", "spectrum", "corner"}
    files = {f"r.{name}.png" for name in names} | {"x.npy", "r.nc", "t.csv"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in names:
        assert imread(tmp_path / f"r.{name}.png")[..., :3].std() > 0.02


def test_many_signals_find_their_sources(many: Path) -> None:
    tree = read(many)
    assert set(tree.children) == set(GROUPS)
    assert dict(tree["posterior"]["frequency"].sizes) == {
        "observation": NUM,
        "draw": 50,
        "component": 3,
    }
    most_probable = tree["cardinality"]["probability"].values.argmax(-1)
    # Always the same signals; the card has 99.7 %.
    assert (most_probable == TRUE_K).sum() >= NUM - 1
    k = tree["posterior"]["K"]
    there = tree["posterior"]["frequency"].notnull().sum("component")
    np.testing.assert_array_equal(there, k)
    assert np.isfinite(tree["sample_stats"]["lp"]).all()
    catalogue = tree["catalogue"]
    for i in range(NUM):
        mine = catalogue["frequency"].values[catalogue["observation"].values == i]
        true = PROBLEM.layout.unpack(THETA[i])
        for frequency in true.components[true.mask][:, 2].tolist():
            assert np.abs(mine - frequency).min() < 0.05


def test_the_results_log_density_is_the_posteriors(many: Path) -> None:
    tree, posterior = read(many), load_pretrained(MODEL)
    i = int(TRUE_K.argmax())
    group = tree["posterior"].isel(observation=i)
    parts = [group[n].values for n in ("amplitude", "phase", "frequency")]
    components = torch.tensor(np.nan_to_num(np.stack(parts, -1)))
    k = torch.tensor(group["K"].values)
    shared = torch.tensor(group["sigma"].values)[:, None]
    rows = PROBLEM.layout.pack(k, components, shared)
    expected = posterior.log_prob(rows, torch.from_numpy(X[i]))
    found = tree["sample_stats"]["lp"].isel(observation=i)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_table_has_the_catalogues_of_all_signals(many: Path) -> None:
    table, catalogue = pd.read_csv(many.with_suffix(".csv")), read(many)["catalogue"]
    assert table.columns[0] == "observation"
    frame = catalogue.to_dataset().to_dataframe()
    pd.testing.assert_frame_equal(
        table, frame[table.columns].reset_index(drop=True), check_dtype=False
    )


def test_only_the_results_are_left(many: Path) -> None:
    assert {path.name for path in many.parent.iterdir()} == {"x.npy", "r.nc", "r.csv"}


def test_zarr_in_and_zarr_out_give_the_same_answers(many: Path, tmp_path: Path) -> None:
    signals = save_zarr_group(tmp_path / "x.zarr", X.astype(np.float64))
    done = infer(signals, tmp_path / "r.zarr")
    assert done.status == 0, done.err
    tree, expected = read(tmp_path / "r.zarr"), read(many)
    for group in GROUPS:
        xr.testing.assert_equal(tree[group].to_dataset(), expected[group].to_dataset())
    same = ("model", "model_sha256", "signals_sha256", "order_by", "model_card")
    assert all(tree.attrs[key] == expected.attrs[key] for key in same)


def test_an_interrupted_run_is_taken_up_again(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X), tmp_path / "r.nc"
    answered, real = [], module.answer

    def interrupted(model, x, settings, batch):
        if batch == 1 and len(answered) == 1:
            raise KeyboardInterrupt
        answered.append(batch)
        return real(model, x, settings, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer", interrupted)
        done = infer(signals, out)
        assert done.status == 130
        assert "the same command goes on" in done.err
        assert not out.exists()
        assert infer(signals, out, "--seed", 5).status == 2
        answered.append(-1)
        assert infer(signals, out).status == 0
    assert answered == [0, -1, 1]  # the first batch was not analysed again
    tree, expected = read(out), read(many)
    for group in GROUPS:
        xr.testing.assert_equal(tree[group].to_dataset(), expected[group].to_dataset())
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "r.nc"}


def test_another_runs_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[:2]), tmp_path / "r.nc"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer", interrupted)
        assert infer(signals, out).status == 130
    done = infer(signals, out, "--seed", 5)
    assert done.status == 2
    assert "unfinished run of other settings (seed was 0, now 5)" in done.err
    save_npy(tmp_path / "x.npy", X[1:3])
    assert "signals_sha256 was" in infer(signals, out).err


def test_a_failing_write_leaves_the_old_result_and_nothing_else(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[0]), tmp_path / "r.nc"
    out.write_bytes(many.read_bytes())

    def fail(self: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", fail)
    with pytest.raises(OSError, match="no space"):
        infer(signals, out)
    assert out.read_bytes() == many.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "r.nc"}


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_signals_without_any_source_are_no_trouble(suffix: str, tmp_path: Path) -> None:
    noise = 0.5 * np.random.default_rng(0).normal(size=(BATCH + 1, 300))
    out = tmp_path / f"r{suffix}"
    signals = save_npy(tmp_path / "x.npy", noise)
    for _ in range(2):  # the second replaces the first
        done = infer(signals, out, "--num-samples", 10)
        assert done.status == 0, done.err
        tree = read(out)
        assert tree["posterior"].sizes["observation"] == BATCH + 1
        assert tree["catalogue"].sizes["source"] == 0
        assert {path.name for path in tmp_path.iterdir()} == {"x.npy", out.name}


def test_a_row_of_many_is_one_signal(tmp_path: Path) -> None:
    save_npy(tmp_path / "x.npy", X)
    save_npy(tmp_path / "y.npy", X[4])
    assert infer(tmp_path / "x.npy", tmp_path / "x.nc", "--row", 4).status == 0
    assert infer(tmp_path / "y.npy", tmp_path / "y.nc").status == 0
    x, y = read(tmp_path / "x.nc"), read(tmp_path / "y.nc")
    assert x.attrs["row"] == 4
    for group in ("posterior", "posterior_predictive", "catalogue"):
        xr.testing.assert_equal(x[group].to_dataset(), y[group].to_dataset())


def test_a_refined_result_says_how_far_to_trust_it(tmp_path: Path) -> None:
    signals = save_npy(tmp_path / "x.npy", X[:2])
    done = infer(signals, tmp_path / "r.nc", "--refine")
    assert done.status == 0, done.err
    stats = read(tmp_path / "r.nc")["sample_stats"]
    reliable = stats["pareto_k"] <= 0.7
    assert (stats["ess"] > 0).all()
    assert np.isfinite(stats["log_evidence"]).all()
    bad = int((~reliable).sum())
    assert (f"{bad} of 2 refined posteriors" in done.err) == (bad > 0)
    # The density of the exact posterior: prior times likelihood over evidence.
    group = read(tmp_path / "r.nc")["posterior"].isel(observation=0)
    parts = [group[n].values for n in ("amplitude", "phase", "frequency")]
    rows = PROBLEM.layout.pack(
        torch.tensor(group["K"].values),
        torch.tensor(np.nan_to_num(np.stack(parts, -1))),
        torch.tensor(group["sigma"].values)[:, None],
    )
    x = torch.from_numpy(X[0])
    exact = PROBLEM.prior.log_prob(rows) + PROBLEM.simulator.log_likelihood(rows, x)
    np.testing.assert_allclose(
        stats["lp"][0] + stats["log_evidence"][0], exact, rtol=1e-4, atol=0.02
    )


def test_a_loud_signal_is_warned_of(tmp_path: Path) -> None:
    loud = save_npy(tmp_path / "x.npy", 100 * X[:2])
    done = infer(loud, tmp_path / "r.nc")
    assert "warning: 2 of 2 signals are unlike the training data" in done.err
    done = infer(loud, tmp_path / "r.nc", "--row", 0, "--quiet")
    assert done.err.startswith("warning: the signal is unlike the training data")
    assert not done.out
    assert not infer(save_npy(tmp_path / "y.npy", X[0]), tmp_path / "r.nc").err


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    signals = save_npy(tmp_path / "x.npy", X[:2])
    assert infer(signals, tmp_path / "r.nc", "--quiet") == Run(0, "", "")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kept(folder: Path, done: Run, message: str, before: dict[str, bytes]) -> None:
    """The run was refused in one line, and left the folder as it was."""
    refused(done, message)
    assert contents(folder) == before


def save_nc(path: Path, array: np.ndarray) -> str:
    xr.Dataset({"flux": ("time", array)}).to_netcdf(path, engine="h5netcdf")
    return str(path)


@pytest.mark.parametrize("spelling", ["plain", "dots", "link", "folder link", "hard"])
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_result_never_replaces_its_signals(
    suffix: str, spelling: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    source = data / f"x{suffix}"
    if suffix == ".nc":
        signals = save_nc(source, X[0])
    else:
        signals = save_zarr_group(source, X[0])
    out = source
    if spelling == "dots":
        out = data / ".." / "data" / source.name
    elif spelling == "link":
        out = data / f"link{suffix}"
        out.symlink_to(source)
    elif spelling == "folder link":
        (tmp_path / "other").symlink_to(data)
        out = tmp_path / "other" / source.name
    elif spelling == "hard":
        if suffix == ".zarr":
            pytest.skip("folders have no hard links")
        out = data / "hard.nc"
        out.hardlink_to(source)
    before = contents(tmp_path)
    kept(tmp_path, infer(signals, out), "would change", before)


def test_a_result_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "r.nc"
    assert infer(save_npy(tmp_path / "x.npy", X[0]), out).status == 0
    before = contents(tmp_path)
    done = infer(f"{out}:observed_data/x", out)
    kept(tmp_path, done, "would change", before)
    assert infer(f"{out}:observed_data/x", tmp_path / "again.nc").status == 0


def test_nothing_is_written_into_a_store_that_is_read(tmp_path: Path) -> None:
    signals = save_zarr_group(tmp_path / "x.zarr", X[0])
    before = contents(tmp_path)
    done = infer(signals, tmp_path / "x.zarr" / "flux.nc")
    kept(tmp_path, done, "would change", before)


def test_a_result_does_not_hold_its_table(tmp_path: Path) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[:2]), tmp_path / "r.zarr"
    before = contents(tmp_path)
    for place in (out, tmp_path / "r.zarr.parts"):
        done = infer(signals, out, "--catalogue", place / "t.csv")
        kept(tmp_path, done, "would change", before)


def put_dataset(path: Path) -> None:
    save_nc(path, np.arange(5.0))


def put_text(path: Path) -> None:
    path.write_text("time,flux\n1,2\n")


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def put_store(path: Path) -> None:
    save_zarr_group(path, np.arange(5.0))


def put_array(path: Path) -> None:
    zarr.create_array(path, data=np.arange(5.0))


def put_figure(path: Path) -> None:
    from matplotlib.figure import Figure

    Figure().savefig(path)


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("r.nc", put_dataset),
        ("r.nc", put_text),
        ("r.nc", put_folder),
        ("r.nc", put_store),
        ("r.zarr", put_folder),
        ("r.zarr", put_store),
        ("r.zarr", put_array),
        ("r.zarr", put_text),
        ("t.csv", put_text),
        ("t.csv", put_folder),
        ("r.corner.png", put_figure),
        ("r.cardinality.png", put_text),
    ],
)
def test_only_what_the_program_wrote_is_replaced(
    name: str, put: Any, tmp_path: Path
) -> None:
    signals = save_npy(tmp_path / "x.npy", X[0])
    put(tmp_path / name)
    before = contents(tmp_path)
    out = tmp_path / (name if name.startswith("r.") and "png" not in name else "r.nc")
    done = infer(signals, out, "--plot", "--catalogue", tmp_path / "t.csv")
    kept(tmp_path, done, "no result that sbi_slotflow wrote.*move it away", before)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_an_earlier_result_with_table_and_figures_is_replaced(
    suffix: str, tmp_path: Path
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[0]), tmp_path / f"r{suffix}"
    options = ("--plot", "--catalogue", tmp_path / "t.csv")
    for seed in (0, 1):
        done = infer(signals, out, "--seed", seed, *options)
        assert done.status == 0, done.err
        assert read(out).attrs["seed"] == str(seed)
    table = pd.read_csv(tmp_path / "t.csv").assign(mine=1)
    table.to_csv(tmp_path / "t.csv", index=False)
    refused(infer(signals, out, *options), "t.csv exists and is no result")


def add_text(path: Path) -> None:
    (path / "posterior" / "mine.txt").write_text("mine")


def add_chart(path: Path) -> None:
    (path / "mine").mkdir()
    (path / "mine" / "0").write_text("mine")


def add_group(path: Path) -> None:
    if path.suffix == ".zarr":
        zarr.open_group(path, mode="r+").create_group("mine")
    else:
        with h5py.File(path, "r+") as file:
            file.create_group("mine")


@pytest.mark.parametrize(
    ("suffix", "add"),
    [
        (".zarr", add_text),
        (".zarr", add_chart),
        (".zarr", add_group),
        (".nc", add_group),
    ],
)
def test_a_result_to_which_something_was_added_is_kept(
    suffix: str, add: Any, tmp_path: Path
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[0]), tmp_path / f"r{suffix}"
    assert infer(signals, out).status == 0
    add(out)
    before = contents(tmp_path)
    kept(tmp_path, infer(signals, out), "no result that sbi_slotflow wrote", before)


def test_a_signal_on_another_scale_is_refused(tmp_path: Path) -> None:
    for x in (X[0], X[:2]):
        signals = save_npy(tmp_path / "x.npy", x * 1e30)
        done = infer(signals, tmp_path / "r.nc")
        assert done.status == 2
        assert "error: cannot analyse SIGNALS: x must be on the scale" in done.err


def test_what_appears_during_a_run_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, out = save_npy(tmp_path / "x.npy", X[:2]), tmp_path / "r.nc"
    real = module.answer

    def meanwhile(*args: Any) -> Any:
        out.write_text("mine")
        return real(*args)

    monkeypatch.setattr(module, "answer", meanwhile)
    refused(infer(signals, out, "--quiet"), "no result that sbi_slotflow wrote")
    assert out.read_text() == "mine"
    assert (tmp_path / "r.nc.parts").is_dir()  # nothing that was computed is lost


@pytest.mark.parametrize("content", [{}, {"run.json": '{"seed": 3}'}, {"a.nc": "mine"}])
def test_a_folder_of_parts_that_is_no_runs_is_left_alone(
    content: dict[str, str], tmp_path: Path
) -> None:
    signals, parts = save_npy(tmp_path / "x.npy", X[:2]), tmp_path / "r.nc.parts"
    parts.mkdir()
    for name, text in content.items():
        (parts / name).write_text(text)
    before = contents(tmp_path)
    done = infer(signals, tmp_path / "r.nc")
    kept(tmp_path, done, "no folder of an unfinished run", before)
    assert parts.is_dir()


def test_files_of_others_among_the_parts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, parts = save_npy(tmp_path / "x.npy", X[:2]), tmp_path / "r.nc.parts"
    real = module.answer

    def meanwhile(*args: Any) -> Any:
        (parts / "notes.txt").write_text("mine")
        return real(*args)

    monkeypatch.setattr(module, "answer", meanwhile)
    assert infer(signals, tmp_path / "r.nc").status == 0
    assert contents(parts) == {"notes.txt": b"mine"}


SCRIPT = """
from sbi_slotflow import problems
problem = problems.spikes(num_samples=64, max_cardinality=2)
prior = problem.prior
number = 3
"""


@pytest.fixture(scope="module", name="own")
def _own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the user's, hardly trained: files model.safetensors and mine.py."""
    from sbi_slotflow import slot_nn

    folder = tmp_path_factory.mktemp("own")
    problem = problems.spikes(num_samples=64, max_cardinality=2)
    theta = problem.prior.sample((200,), generator_for(0))
    x = problem.simulator(theta, generator_for(1))
    slot_nn(problem)(theta, x).save(folder / "model.safetensors")
    np.save(folder / "x.npy", x[:3].numpy())
    (folder / "mine.py").write_text(SCRIPT)
    return folder


@pytest.mark.parametrize("name", ["problem", "prior"])
def test_a_model_of_ones_own_is_used_with_its_problem(
    name: str, own: Path, tmp_path: Path
) -> None:
    done = infer(
        own / "x.npy",
        tmp_path / "r.nc",
        *("--problem", f"{own / 'mine.py'}:{name}", "--row", 1, "--plot"),
        model=own / "model.safetensors",
    )
    assert done.status == 0, done.err
    tree = read(tmp_path / "r.nc")
    assert {"K", "sigma", "time", "width", "amplitude"} <= set(tree["posterior"])
    assert ("posterior_predictive" in tree.children) == (name == "problem")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds a network but no prior"),
        (["--problem", "mine.py"], "expected --problem to be FILE.py:NAME"),
        (["--problem", "{own}/mine.py:number"], "to be a Problem .* got int"),
        (["--problem", "{own}/mine.py:other"], "to be a Problem .* no such name"),
        (["--problem", "{own}/broken.py:x"], "cannot be run: ValueError: oh no"),
        (["--problem", "sinusoids-tiny"], "must share a layout"),
        (["--problem", "{own}/mine.py:prior", "--refine"], "needs a likelihood"),
    ],
)
def test_a_model_without_its_problem_is_refused(
    options: list[str], message: str, own: Path, tmp_path: Path
) -> None:
    (own / "broken.py").write_text("raise ValueError('oh no')")
    words = [option.format(own=own) for option in options]
    model = own / "model.safetensors"
    refused(infer(own / "x.npy", tmp_path / "r.nc", *words, model=model), message)


def refused(done: Run, message: str) -> None:
    """One line on stderr, status 2, nothing on stdout."""
    assert done.status == 2
    assert re.search(message, done.err), done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not done.out


def nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[[2, 4], 7] = np.nan
    return x


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (X[:, :299], r"expected signals of 300 samples .* got shape \(5, 299\)"),
        (X[0, :299], r"got shape \(299,\)"),
        (X[None], r"expected an array \(T,\) or \(N, T\).* shape \(1, 5, 300\)"),
        (X[:0], r"has shape \(0, 300\)"),
        (nan(X), r"2 of 5 signals .* NaN, infinite or too large for float32: 2, 4"),
        (np.full(300, 1e300), "1 of 1 signals .* too large"),
        (np.zeros(300, dtype=int), "dtype int64; expected an array"),
        (X.astype(complex), "dtype complex128; expected an array"),
    ],
)
def test_bad_signals_are_refused(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    refused(infer(save_npy(tmp_path / "x.npy", array), tmp_path / "r.nc"), message)
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.npy", "r.nc"], "there is no file none.npy; expected an array"),
        (["x.npy", "r.txt"], "expected --out to end in .nc or .zarr; got r.txt"),
        (["x.npy", "one.npy/r.nc"], "cannot make one.npy"),
        (["x.npy", "r.nc", "--catalogue", "r.txt"], "--catalogue to end in .csv"),
        (["x.npy", "r.nc", "--plot"], "--plot takes one signal; x.npy holds 2"),
        (["x.npy", "r.nc", "--row", 2], r"expected --row to be in 0..1 .* got 2"),
        (["one.npy", "r.nc", "--row", 0], r"--row goes with an array \(N, T\)"),
        (["two.h5", "r.nc"], r"holds 2 arrays \(night/flux, night/time\): name one"),
        (["two.h5:flux", "r.nc"], "holds no array flux, but night/flux, night/time"),
        (["text.npy", "r.nc"], "is not a .npy file of numbers"),
        (["text.h5", "r.nc"], "cannot read text.h5"),
        (["folder.zarr", "r.nc"], "is no Zarr store"),
        (["x.npy", "r.nc", "--problem", "x.py:y"], "sinusoids-tiny has a problem"),
    ],
)
def test_bad_usage_is_refused(
    words: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_npy(Path("x.npy"), X[:2])
    save_npy(Path("one.npy"), X[0])
    save_hdf5(Path("two.h5"), X[:2])
    Path("text.npy").write_text("0.1 0.2")
    Path("text.h5").write_text("0.1 0.2")
    Path("folder.zarr").mkdir()
    refused(infer(*words), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("sinusoids", "expected --model to be one of sinusoids-crowded, sinusoids-p"),
        ("foreign.safetensors", "cannot use --model foreign.* corrupt or no safet"),
    ],
)
def test_a_foreign_model_is_refused(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign.safetensors").write_bytes(b"\x80\x04\x95" * 50)
    signals = save_npy(tmp_path / "x.npy", X[0])
    problem = ["--problem", MODEL] if model.startswith("foreign") else []
    refused(infer(signals, "r.nc", *problem, model=model), message)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["guess"],
        ["infer", "x.npy"],
        ["infer", "x.npy", "--model", MODEL, "--out", "r.nc", "--num-samples", "0"],
        ["infer", "x.npy", "--model", MODEL, "--out", "r.nc", "--seed", "-1"],
    ],
)
def test_malformed_commands_end_with_two(words: list[str]) -> None:
    done = run(*words)
    assert done.status == 2
    assert "usage: sbi-slotflow" in done.err


def test_help_tells_the_exit_status_and_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys\nfrom sbi_slotflow.cli import main\ntry:\n    main(['infer', "
    code += "'--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "bad usage or bad input" in done.stdout
    assert done.stdout.endswith("False\n")


def test_info_lists_models_and_prints_cards() -> None:
    done = run("info")
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()] == list(
        available_weights()
    )
    for name in available_weights():
        card = run("info", name).out
        accuracy = model_card(name)["measured"]["K accuracy"]["accuracy"]
        assert f"accuracy: {accuracy:.4g}" in card
        assert f"make pretrained NAME={name}" in card
    refused(run("info", "sinusoids"), "expected a model of .* got 'sinusoids'")
