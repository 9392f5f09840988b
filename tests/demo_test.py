"""The demo runs from start to end, reuses its training, and refuses bad signals."""

import io
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.image import imread

from sbi_slotflow import demo
from sbi_slotflow.problems import sinusoids
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.training.online import OnlineTraining

FILES = ("posterior.nc", "reconstruction.png", "spectrum.png", "corner.png")
CHECKPOINT = "training.safetensors"
VALID = np.random.default_rng(0).normal(size=300).astype(np.float32)


class Run(NamedTuple):
    """A run of the demo: exit status, what was printed, where it wrote."""

    status: int
    out: str
    err: str
    folder: Path


def run(
    folder: Path,
    *options: str | Path,
    simulations: int = 3_000,
    presets: tuple[str, ...] = ("tiny",),
) -> Run:
    """Run the demo with few draws, its second part alone unless asked."""
    words = ["--out", folder, "--simulations", simulations, *options]
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        own = any(option == "--x" for option in options)
        patch.setattr(demo, "PRESETS", ("paper", "tiny") if own else presets)
        patch.setattr(demo, "NUM_DRAWS", 500)
        patch.setattr(demo, "NUM_TEST_SIGNALS", 100)
        status = demo.main([str(word) for word in words])
    return Run(status, out.getvalue(), err.getvalue(), folder)


def read(run: Run) -> Any:
    with xr.open_datatree(run.folder / "posterior.nc", engine="h5netcdf") as tree:
        return tree.load()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A first run; no test writes to its folder."""
    parent = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(parent)
        return run(parent / "out")


@pytest.fixture
def trained(first: Run, tmp_path: Path) -> Path:
    """A folder that holds the first run's training."""
    folder = tmp_path / "trained"
    folder.mkdir()
    shutil.copy(first.folder / CHECKPOINT, folder)
    return folder


def test_first_run_trains_and_reports(first: Run) -> None:
    assert first.status == 0
    assert "training on 3,000 fresh simulations" in first.out
    assert "Training" in first.err  # the progress bar
    assert len(re.findall(r"^  K = \d  \d\.\d{3}", first.out, re.MULTILINE)) == 4
    number = r"\d\.\d{3,4}"  # as many digits as the width of the posterior asks for
    line = rf"sigma +{number}  \[ *{number}, +{number}\] +\d"
    assert re.search(line, first.out)
    assert re.search(r"RMS error of the reconstruction: \d+\.\d{3} sigma \(", first.out)
    assert re.search(r"K accuracy on 100 fresh signals: [01]\.\d{3}", first.out)


def test_first_run_writes_its_files_and_no_others(first: Run) -> None:
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted([*FILES, CHECKPOINT])
    assert [path.name for path in first.folder.parent.iterdir()] == ["out"]


def test_shipped_weights_analyse_a_signal_of_the_papers_kind(tmp_path: Path) -> None:
    done = run(tmp_path, presets=("paper",))
    assert done.status == 0
    assert "using the weights that come with the package" in done.out
    assert "Training" not in done.err
    (accuracy,) = re.findall(r"K accuracy on 100 fresh signals: (\d\.\d+)", done.out)
    assert float(accuracy) >= 0.95  # always the same signals
    assert sorted(path.name for path in (tmp_path / "paper").iterdir()) == sorted(FILES)


def test_a_long_signal_is_analysed_with_shipped_weights(tmp_path: Path) -> None:
    path = tmp_path / "mine.npy"
    np.save(path, np.random.default_rng(0).normal(size=8_120))
    done = run(tmp_path / "out", "--x", path)
    assert done.status == 0
    assert "using the weights that come with the package" in done.out


def test_draws_reopen_with_truth(first: Run) -> None:
    assert "median, 90 % interval and truth\n" in first.out
    tree = read(first)
    names = {"K", "sigma", "amplitude", "phase", "frequency"}
    assert set(tree["posterior"].data_vars) == names
    assert set(tree["constant_data"].data_vars) == {f"true_{n}" for n in names}
    assert tree["posterior"]["K"].shape == (1, 500)
    assert tree["posterior"]["frequency"].shape == (1, 500, 3)
    assert tree["observed_data"]["x"].shape == (300,)
    assert int(tree["constant_data"]["true_K"]) in (2, 3)


def test_figures_are_not_blank(first: Run) -> None:
    for name in FILES[1:]:
        image = imread(first.folder / name)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.02


def test_second_run_reuses_the_training(first: Run, trained: Path) -> None:
    before = (trained / CHECKPOINT).read_bytes()
    second = run(trained)
    assert second.status == 0
    message = f"reusing the trained network in {trained / CHECKPOINT} (24 steps)"
    assert message in second.out
    assert "Training" not in second.err
    assert (trained / CHECKPOINT).read_bytes() == before
    for group in ("posterior", "constant_data", "observed_data"):
        old, new = (read(r)[group].to_dataset().drop_attrs() for r in (first, second))
        xr.testing.assert_identical(old, new)


def test_users_signal_gets_a_residual_and_no_truth(trained: Path) -> None:
    path = trained.parent / "mine.npy"
    np.save(path, VALID.astype(np.float64)[None])
    done = run(trained, "--x", path)
    assert done.status == 0
    assert "RMS residual of the reconstruction" in done.out
    shown = done.out.partition("K accuracy")[0]
    assert "true" not in shown
    assert "median, 90 % interval\n" in shown
    assert "warning" not in done.err
    tree = read(done)
    assert "constant_data" not in tree.children
    np.testing.assert_array_equal(tree["observed_data"]["x"], VALID)


def test_a_loud_signal_is_warned_of(trained: Path) -> None:
    path = trained.parent / "loud.npy"
    np.save(path, 30 * VALID)
    done = run(trained, "--x", path)
    assert done.status == 0
    assert "warning: the signal is unlike the training data" in done.err


def test_interrupted_training_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(demo, "analyse", lambda *_, **__: None)
    step, stop_at = OnlineTraining._train_step, [3]

    def interrupted(training: OnlineTraining) -> None:
        if training._step in stop_at:
            raise KeyboardInterrupt
        step(training)

    monkeypatch.setattr(OnlineTraining, "_train_step", interrupted)
    done = run(tmp_path, simulations=600)
    assert done.status == 130
    assert "the same command resumes the training" in done.err
    stop_at.clear()
    done = run(tmp_path, simulations=600)
    assert done.status == 0
    assert "resuming at step 2 of 5" in done.out


def test_other_trainings_checkpoint_is_refused(trained: Path) -> None:
    done = run(trained, simulations=5_000)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert "belongs to another run (num_simulations was 3000, now 5000)" in done.err


def test_checkpoint_of_other_settings_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRAINING_SEED", 5)
    done = run(trained)
    assert done.status == 2
    assert "belongs to another run (seed was 0, now 5)" in done.err
    assert "delete the file or give another --out" in done.err


@pytest.mark.parametrize("name", FILES)
def test_files_of_others_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    done = run(tmp_path)
    assert done.status == 2
    assert f"{name} exists and is no result that sbi_slotflow wrote" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_corrupt_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    done = run(tmp_path)
    assert done.status == 2
    assert "corrupt" in done.err


def save_wrong_length(path: Path) -> None:
    np.save(path, VALID[:299])


def save_two_signals(path: Path) -> None:
    np.save(path, np.stack([VALID, VALID]))


def save_nan(path: Path) -> None:
    x = VALID.copy()
    x[[3, 4]] = np.nan
    np.save(path, x)


def save_too_large(path: Path) -> None:
    np.save(path, np.full(300, 1e300))


def save_integers(path: Path) -> None:
    np.save(path, np.zeros(300, dtype=np.int64))


def save_complex(path: Path) -> None:
    np.save(path, VALID.astype(np.complex64))


def save_objects(path: Path) -> None:
    np.save(path, np.array([None] * 300, dtype=object), allow_pickle=True)


def save_text(path: Path) -> None:
    path.write_text("0.1 0.2 0.3")


def save_nothing(path: Path) -> None:
    path.write_bytes(b"")


def save_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=VALID)


def save_broken_archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and no more")


def save_cut_off(path: Path) -> None:
    np.save(path, VALID)
    path.write_bytes(path.read_bytes()[:-40])


def make_folder(path: Path) -> None:
    path.mkdir()


def make_none(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (save_wrong_length, r"shape \(299,\)"),
        (save_two_signals, r"shape \(2, 300\)"),
        (save_nan, "entries that are NaN"),
        (save_too_large, "too large for float32"),
        (save_integers, "dtype int64"),
        (save_complex, "dtype complex64"),
        (save_objects, "not a .npy file of numbers"),
        (save_text, "not a .npy file of numbers"),
        (save_nothing, "not a .npy file of numbers"),
        (save_archive, "archive of several arrays"),
        (save_broken_archive, "not a .npy file of numbers"),
        (save_cut_off, "not a .npy file of numbers"),
        (make_folder, "cannot read .*directory"),
        (make_none, "there is no file"),
    ],
)
def test_bad_signal_is_refused_before_training(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "x.npy"
    make(path)
    done = run(tmp_path / "new", "--x", path)
    assert done.status == 2
    assert re.search(message, done.err)
    assert done.err.startswith("error: ")
    assert "8120 or 300 finite floating-point numbers, shape (T,) or (1, T)" in done.err
    streams = r"200 samples of stream 1 \(20 s at 10 Hz\), then 100 samples of stream 2"
    assert re.search(streams, done.err)
    assert "Traceback" not in done.err
    assert not done.out
    assert not (tmp_path / "new").exists()


def test_unusable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file")
    assert done.status == 2
    assert "cannot make" in done.err


@pytest.mark.parametrize("text", ["0", "-5", "many"])
def test_bad_number_of_simulations_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--simulations", text)
    assert stop.value.code == 2


def test_observation_is_fixed_and_has_two_or_three_components() -> None:
    problem = sinusoids("tiny")
    seed = demo.SEEDS["sinusoids-tiny"]
    x, theta = demo.simulated(problem, seed)
    torch.rand(3, generator=generator_for(5))
    again, _ = demo.simulated(problem, seed)
    torch.testing.assert_close(x, again, rtol=0, atol=0)
    assert int(problem.layout.cardinality(theta[0])) in (2, 3)
