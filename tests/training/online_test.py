"""Online training: it learns, repeats itself exactly, and survives being killed."""

import itertools
import json
import math
import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from sbi_slotflow import SlotNPE, problems, slot_nn
from sbi_slotflow.nn import SlotDensityEstimator
from sbi_slotflow.training.online import (
    OnlineSettings,
    OnlineTraining,
    Recipe,
    RecipeName,
    load_state,
    make_recipe,
    optimizer_tensors,
    restore_optimizer,
)

PROBLEM = problems.linear_gaussian()
RECIPES: tuple[RecipeName, ...] = ("adamw", "paper")
SMALL: dict[str, Any] = {
    "hidden_features": 8,
    "trunk_features": 8,
    "flow_hidden_features": 8,
    "flow_layers": 2,
    "flow_bins": 4,
}
NUM_STEPS = 24
SETTINGS: dict[str, Any] = {
    "num_simulations": NUM_STEPS * 16,
    "batch_size": 16,
    "learning_rate": 0.05,  # so large that the validation loss rises at times
    "ema_decay": 0.9,
    "seed": 3,
    "num_validation": 24,
    "validate_every": 2,
}
Simulator = Callable[[Tensor], Tensor]


def training(
    checkpoint: Path | None = None,
    simulator: Simulator = PROBLEM.simulator,
    *,
    network: dict[str, Any] | None = None,
    resume: bool = True,
    **changes: Any,
) -> OnlineTraining:
    return OnlineTraining(
        slot_nn(PROBLEM, **{**SMALL, **(network or {})}),
        PROBLEM.prior,
        simulator,
        OnlineSettings(**{**SETTINGS, **changes}),
        checkpoint=checkpoint,
        resume=resume,
    )


def run(job: OnlineTraining, every: int | None = None) -> SlotDensityEstimator:
    return job.run(checkpoint_every=every, show_progress_bar=False)


def same_weights(left: SlotDensityEstimator, right: SlotDensityEstimator) -> bool:
    first, second = left.state_dict(), right.state_dict()
    assert list(first) == list(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_same_file(left: Path, right: Path) -> None:
    """Two checkpoints agree bit for bit: weights, averages, moments and history."""
    (first, first_meta), (second, second_meta) = load_state(left), load_state(right)
    assert first_meta == second_meta
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class InterruptionError(Exception):
    """Stands for anything that ends a run between two steps."""


class Recorder:
    """Simulator that keeps what it was asked for, and stops or spoils one call."""

    def __init__(self, stop_at: int | None = None, nan_at: int | None = None) -> None:
        self.thetas: list[Tensor] = []
        self.stop_at, self.nan_at = stop_at, nan_at

    def __call__(self, theta: Tensor) -> Tensor:
        call = len(self.thetas)
        if call == self.stop_at:
            raise InterruptionError
        self.thetas.append(theta.clone())
        x = PROBLEM.simulator(theta)
        if call == self.nan_at:
            x[0, 0] = math.nan
        return x


# --- learning


@pytest.fixture(scope="module")
def learnt() -> OnlineTraining:
    job = training(
        num_simulations=150 * 64,
        batch_size=64,
        learning_rate=1e-2,
        ema_decay=0.95,
        num_validation=1_000,
        validate_every=50,
        network=dict.fromkeys(
            ("flow_hidden_features", "trunk_features", "hidden_features"), 16
        ),
    )
    run(job)
    return job


def test_training_lowers_the_validation_loss(learnt: OnlineTraining) -> None:
    first, last = learnt.history[0], learnt.history[-1]
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert last["val_cardinality"] < math.log(4) - 0.1  # better than the prior
    assert last["val_correct"] > 0.45


@torch.no_grad()
def test_training_approaches_the_exact_posterior_from_above(
    learnt: OnlineTraining,
) -> None:
    generator = torch.Generator().manual_seed(11)
    theta = PROBLEM.prior.sample((2_000,), generator)
    x = PROBLEM.simulator(theta)
    log_q = learnt.averaged.log_prob(theta, x)[0].double()
    exact = PROBLEM.exact_posterior()
    log_p = exact.log_prob_batched(theta.unsqueeze(0), x)[0]
    divergence = log_p - log_q
    error = float(divergence.std()) / math.sqrt(len(divergence))
    # E[log p - log q] is a Kullback-Leibler divergence: positive, and small by now
    assert float(divergence.mean()) > -5 * error
    assert float(divergence.mean()) < 0.3


# --- repeating itself


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_seed_decides_the_weights_whatever_the_global_state(
    recipe: RecipeName,
) -> None:
    estimators, histories = [], []
    for state, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(state)
        job = training(recipe=recipe, seed=seed, num_simulations=5 * 16)
        estimators.append(run(job))
        histories.append(job.history)
    assert same_weights(estimators[0], estimators[1])
    assert histories[0] == histories[1]
    assert not same_weights(estimators[0], estimators[2])


def test_global_random_states_stay_as_they_are() -> None:
    torch.manual_seed(5)
    before = random_states()
    run(training(num_simulations=3 * 16))
    assert random_states() == before


def random_states() -> list[str]:
    """torch's, numpy's and Python's global states."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    with np.printoptions(threshold=10_000):
        states = torch.get_rng_state().tolist(), numpy_state, random.getstate()
        return [repr(state) for state in states]


def test_every_step_sees_new_simulations() -> None:
    recorder = Recorder()
    run(training(simulator=recorder))
    bank, *batches = recorder.thetas
    assert len(bank) == SETTINGS["num_validation"]
    assert len(batches) == NUM_STEPS
    assert all(len(batch) == 16 for batch in batches)
    rows = torch.cat([bank, *batches])
    rows = rows[rows[:, 0] > 0]  # K = 0 is one row only
    assert len(rows.unique(dim=0)) == len(rows)


def test_numbers_of_simulations_are_rounded_up_to_whole_batches() -> None:
    recorder = Recorder()
    job = training(simulator=recorder, num_simulations=33)
    run(job)
    assert len(recorder.thetas) == 1 + 3
    assert [entry["step"] for entry in job.history] == [2, 3]
    assert job.finished


def test_history_has_one_entry_a_validation() -> None:
    seen: list[dict[str, float]] = []
    job = training(num_simulations=7 * 16, validate_every=3)
    job.run(show_progress_bar=False, on_validation=seen.append)
    assert seen == job.history
    assert [entry["step"] for entry in seen] == [3, 6, 7]
    terms = ("cardinality", "flow", "shared", "correct")
    names = {f"{kind}_{term}" for kind in ("train", "val") for term in terms}
    for entry in seen:
        assert set(entry) == names | {"step", "learning_rate", "val_loss"}
        assert all(math.isfinite(value) for value in entry.values())
    assert json.loads(json.dumps(seen)) == seen


def test_history_averages_over_the_steps_since_the_last_entry() -> None:
    # With weights that stand still, the losses of steps and bank can be redone.
    recorder = Recorder()
    job = training(
        simulator=recorder, learning_rate=1e-30, ema_decay=None, validate_every=10
    )
    run(job)
    assert [entry["step"] for entry in job.history] == [10, 20, 24]
    bank, *batches = recorder.thetas
    with torch.no_grad():
        for entry, rows in zip(
            job.history, (batches[:10], batches[10:20], batches[20:]), strict=True
        ):
            theta = torch.cat(rows)
            x = PROBLEM.simulator(theta)  # other noise: a statistical comparison
            terms = job.estimator.loss_terms(theta, x)
            error = float(terms["flow"].std()) / math.sqrt(len(theta))
            assert entry["train_flow"] == pytest.approx(
                float(terms["flow"].mean()), abs=5 * error
            )
    first = job.history[0]
    for entry in job.history[1:]:  # the bank is drawn once
        for name in ("val_loss", "val_flow", "val_cardinality", "val_correct"):
            assert entry[name] == pytest.approx(first[name], abs=1e-6)
    assert len(bank) == SETTINGS["num_validation"]


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_returned_weights_are_the_warmed_running_average(decay: float) -> None:
    steps: list[dict[str, Tensor]] = []
    job = training(ema_decay=decay, validate_every=1, num_simulations=12 * 16)

    def keep(entry: dict[str, float]) -> None:
        steps.append({n: p.detach().clone() for n, p in parameters(job.estimator)})

    result = job.run(show_progress_bar=False, on_validation=keep)
    expected = {name: value.double() for name, value in steps[0].items()}
    for count, step in enumerate(steps[1:], start=1):
        kept = min(decay, (1 + count) / (10 + count))
        for name, value in step.items():
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
    for name, value in parameters(result):
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5)
    assert not same_weights(result, job.estimator)
    assert not result.training


def parameters(estimator: SlotDensityEstimator) -> list[tuple[str, Tensor]]:
    return list(estimator.named_parameters())


def test_without_averaging_the_last_weights_are_returned() -> None:
    job = training(ema_decay=None, num_simulations=3 * 16)
    assert run(job) is job.estimator


# --- interruptions


@pytest.mark.parametrize(
    ("recipe", "ema_decay"), [("adamw", 0.9), ("adamw", None), ("paper", 0.9)]
)
def test_a_run_that_is_interrupted_again_and_again_ends_as_an_unbroken_one(
    recipe: RecipeName, ema_decay: float | None, tmp_path: Path
) -> None:
    options = {"recipe": recipe, "ema_decay": ema_decay, "validate_every": 2}
    whole = training(tmp_path / "whole", **options)
    expected = run(whole)
    path = tmp_path / "broken"
    resumed_from = []
    calls = itertools.cycle((6, 8, 5))
    while True:
        # a checkpoint every 3 steps lies between two validations half of the time
        job = training(path, Recorder(stop_at=next(calls)), **options)
        resumed_from.append(job.resumed_from)
        with suppress(InterruptionError):
            result = run(job, every=3)
            break
    assert len(resumed_from) > 3
    assert resumed_from == sorted(set(resumed_from))
    assert any(step % 2 for step in resumed_from)
    assert same_weights(result, expected)
    assert job.history == whole.history
    assert_same_file(path, tmp_path / "whole")
    if recipe == "paper":  # the count of bad validations had to survive
        losses = [entry["val_loss"] for entry in whole.history]
        assert losses != sorted(losses, reverse=True)


def slow_simulator(theta: Tensor) -> Tensor:
    time.sleep(0.01)  # leaves the parent time to kill
    return PROBLEM.simulator(theta)


def run_in_child(path: str, recipe: RecipeName, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    run(training(Path(path), slow_simulator, recipe=recipe), every=1)


def wait_for_new_file(path: Path, old: int | None, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_mtime_ns != old:
            return
        assert process.is_alive(), "the run ended before its first checkpoint"
        time.sleep(0.002)
    raise TimeoutError("no checkpoint was written")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_killed_ends_as_an_unbroken_one(
    recipe: RecipeName, tmp_path: Path
) -> None:
    whole = training(tmp_path / "whole", recipe=recipe)
    expected = run(whole)
    # The server imports once, torch's lazy modules too; children fork from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sbi_slotflow", "torch._dynamo"])
    path = tmp_path / "killed"
    arguments = (str(path), recipe, torch.get_num_threads())
    moments = np.random.default_rng(len(recipe))
    for _ in range(3):
        old = path.stat().st_mtime_ns if path.exists() else None
        process = context.Process(target=run_in_child, args=arguments)
        process.start()
        wait_for_new_file(path, old, process)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        load_state(path)  # whole at any moment
    process = context.Process(target=run_in_child, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_file(path, tmp_path / "whole")
    job = training(path, recipe=recipe)
    assert job.finished
    assert job.history == whole.history
    assert same_weights(run(job), expected)


def test_a_finished_run_is_returned_without_training(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = training(path, num_simulations=5 * 16)
    expected = run(first)
    written = path.stat().st_mtime_ns
    recorder = Recorder()
    again = training(path, recorder, num_simulations=5 * 16)
    assert again.resumed_from == 5
    assert again.finished
    assert same_weights(run(again), expected)
    assert again.history == first.history
    assert len(recorder.thetas) <= 1  # the validation bank at most
    assert path.stat().st_mtime_ns == written


def test_resume_false_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    expected = run(training(path, num_simulations=5 * 16))
    recorder = Recorder()
    again = training(path, recorder, resume=False, num_simulations=5 * 16)
    assert again.resumed_from == 0
    assert same_weights(run(again), expected)
    assert len(recorder.thetas) == 1 + 5


def test_how_often_checkpoints_are_written_does_not_change_the_run(
    tmp_path: Path,
) -> None:
    for every in (2, 3, 100):
        run(training(tmp_path / str(every), num_simulations=6 * 16), every=every)
    assert_same_file(tmp_path / "2", tmp_path / "3")
    assert_same_file(tmp_path / "2", tmp_path / "100")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "run"
    run(training(path, num_simulations=2 * 16))
    return path


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_simulations": 4 * 16}, "num_simulations"),
        ({"batch_size": 8}, "batch_size"),
        ({"recipe": "paper"}, "recipe"),
        ({"learning_rate": 0.01}, "learning_rate"),
        ({"ema_decay": 0.5}, "ema_decay"),
        ({"ema_decay": None}, "ema_decay"),
        ({"clip_max_norm": None}, "clip_max_norm"),
        ({"seed": 4}, "seed"),
        ({"num_validation": 50}, "num_validation"),
        ({"validate_every": 1}, "validate_every"),
        ({"network": {"flow_layers": 3}}, r"estimator\.flow"),
        ({"network": {"matching": "ordered"}}, r"estimator\.matching"),
        ({"network": {"hidden_features": 9}}, r"estimator\.encoder"),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(
    change: dict[str, Any], name: str, short_run: Path
) -> None:
    options = {"num_simulations": 2 * 16, **change}
    with pytest.raises(ValueError, match=rf"another run \({name} was"):
        training(short_run, **options)


def test_a_corrupt_checkpoint_is_refused(short_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    whole = short_run.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
            training(path, num_simulations=2 * 16)


def test_a_foreign_checkpoint_is_refused(short_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="was not written by sbi_slotflow"):
        training(path, num_simulations=2 * 16)
    path.unlink()
    run(training(num_simulations=2 * 16)).save(path)
    with pytest.raises(ValueError, match=r"holds .*SlotDensityEstimator, expected"):
        training(path, num_simulations=2 * 16)
    torch.save({}, path)
    with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
        training(path, num_simulations=2 * 16)


def test_a_file_that_is_no_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt exists and is no"):
        training(path, resume=False, num_simulations=2 * 16)
    assert path.read_text() == "mine"


def test_a_checkpoint_is_one_file(short_run: Path) -> None:
    assert [path.name for path in short_run.parent.iterdir()] == ["run"]


# --- simulations that went wrong


def test_nan_from_the_first_simulation_on_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be finite"):
        run(training(simulator=lambda theta: torch.full((len(theta), 6), math.nan)))


def test_nan_in_one_step_stops_the_run_and_its_checkpoint_stands(
    tmp_path: Path,
) -> None:
    expected = run(training(tmp_path / "whole", num_simulations=9 * 16))
    path = tmp_path / "run"
    job = training(path, Recorder(nan_at=6), num_simulations=9 * 16)
    with pytest.raises(ValueError, match="x must be finite"):
        run(job, every=1)
    assert load_state(path)[1]["progress"]["step"] == 5
    mended = training(path, num_simulations=9 * 16)
    assert mended.resumed_from == 5
    assert same_weights(run(mended), expected)


@pytest.mark.parametrize("matching", ["hungarian", "permanent", "ordered"])
def test_a_loss_that_explodes_is_reported_as_such(
    matching: str, tmp_path: Path
) -> None:
    job = training(
        tmp_path / "run",
        learning_rate=1e30,
        clip_max_norm=None,
        network={"matching": matching},
        validate_every=100,
    )
    with pytest.raises(FloatingPointError, match="the loss became"):
        run(job, every=1)
    load_state(tmp_path / "run")


# --- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_simulations", 0),
        ("batch_size", 0),
        ("num_validation", 0),
        ("validate_every", -1),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("seed", -1),
        ("clip_max_norm", math.nan),
        ("clip_max_norm", -1.0),
        ("recipe", "sgd"),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.replace("_", "[_ ]")):
        training(**{"num_simulations": 16, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 1.5), ("seed", "0"), ("num_simulations", True)]
)
def test_a_setting_that_is_no_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        training(**{"num_simulations": 16, name: value})


def test_checkpoints_every_zero_steps_are_refused() -> None:
    # Zero was taken for "every validation".
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        training(num_simulations=16).run(checkpoint_every=0, show_progress_bar=False)


# --- the trainer


def trainer(**options: Any) -> SlotNPE:
    return SlotNPE(
        PROBLEM.prior, slot_nn(PROBLEM, **SMALL), show_progress_bars=False, **options
    )


def test_trainer_trains_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # sbi's tracker writes into the working directory
    settings = {**SETTINGS, "num_simulations": 5 * 16}
    job = training(**settings)
    expected = run(job)
    inference = trainer()
    path = tmp_path / "run"
    estimator = inference.train_online(PROBLEM.simulator, checkpoint=path, **settings)
    assert same_weights(estimator, expected)
    assert inference.history == job.history
    # a second trainer finds the run finished
    recorder = Recorder()
    again = trainer()
    found = again.train_online(recorder, checkpoint=path, **settings)
    assert same_weights(found, expected)
    assert again.history == job.history
    assert len(recorder.thetas) <= 1
    posterior = again.build_posterior()
    assert same_weights(posterior.posterior_estimator, expected)


def test_trainer_passes_every_setting_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "num_simulations": 20,
        "batch_size": 10,
        "recipe": "paper",
        "learning_rate": 0.5,
        "ema_decay": 0.25,
        "clip_max_norm": 0.125,
        "seed": 7,
        "num_validation": 9,
        "validate_every": 1,
    }
    trainer().train_online(PROBLEM.simulator, checkpoint=tmp_path / "run", **settings)
    stored = load_state(tmp_path / "run")[1]["settings"]
    assert {name: stored[name] for name in settings} == settings


# Optimizers and the shape of their learning-rate schedules


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def recipe_for(
    name: RecipeName,
    net: nn.Module,
    learning_rate: float | None = None,
    num_steps: int = 1_000,
) -> Recipe:
    return make_recipe(name, net.parameters(), learning_rate, num_steps)


def rate(recipe: Recipe) -> float:
    (value,) = {group["lr"] for group in recipe.optimizer.param_groups}
    return value


def rates(recipe: Recipe, num_steps: int) -> Iterator[float]:
    """The rate of every step, which a step without gradients leaves alone."""
    for _ in range(num_steps):
        yield rate(recipe)
        recipe.optimizer.step()
        recipe.after_step()
    yield rate(recipe)


@pytest.mark.parametrize(
    ("num_steps", "warm_up"), [(1, 1), (10, 1), (200, 10), (12_000, 500)]
)
def test_adamw_warms_up_linearly_and_decays_as_a_cosine_to_zero(
    num_steps: int, warm_up: int
) -> None:
    found = list(rates(recipe_for("adamw", network(), 2e-3, num_steps), num_steps))
    for step, value in enumerate(found):
        rise = min(1.0, (step + 1) / warm_up)
        decay = math.cos(math.pi * step / num_steps / 2) ** 2
        assert value == pytest.approx(2e-3 * rise * decay, abs=1e-12)
    assert max(found) <= 2e-3
    assert found[-1] == pytest.approx(0.0, abs=1e-12)
    assert found[max(warm_up - 1, 0) :] == sorted(found[warm_up - 1 :], reverse=True)


def test_adamw_does_not_listen_to_the_validation_loss() -> None:
    recipe = recipe_for("adamw", network())
    before = rate(recipe)
    for _ in range(20):
        recipe.after_validation(1.0)
    assert rate(recipe) == before


def test_paper_halves_on_a_plateau() -> None:
    recipe = recipe_for("paper", network(), 1e-3)
    found = []
    for _ in range(22):
        recipe.after_validation(1.0)
        found.append(rate(recipe))
    # one best, then six that are no better and are forgiven
    assert found[:7] == [1e-3] * 7
    assert found[7:14] == [5e-4] * 7
    assert found[14:21] == [2.5e-4] * 7


def test_paper_keeps_its_rate_while_the_loss_falls() -> None:
    recipe = recipe_for("paper", network(), 1e-3)
    for step in range(50):
        recipe.after_validation(10.0 * 0.9**step)
    assert rate(recipe) == 1e-3
    for _ in range(6):
        recipe.after_validation(1.0)
    recipe.after_validation(1e-6)  # a new best within the patience
    for _ in range(6):
        recipe.after_validation(1.0)
    assert rate(recipe) == 1e-3


def test_paper_rate_has_a_floor_and_ignores_steps() -> None:
    recipe = recipe_for("paper", network(), 1e-4)
    assert set(rates(recipe, 100)) == {1e-4}
    for _ in range(200):
        recipe.after_validation(1.0)
    assert rate(recipe) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "default"), [("adamw", AdamW, 2e-3), ("paper", Adam, 1e-4)]
)
def test_a_recipe_has_its_own_optimizer_and_rate(
    name: RecipeName, kind: type, default: float
) -> None:
    recipe = recipe_for(name, network(), None, num_steps=10)
    assert type(recipe.optimizer) is kind
    assert rate(recipe) == default
    assert rate(recipe_for(name, network(), 0.25, num_steps=10)) == 0.25
    number = sum(len(g["params"]) for g in recipe.optimizer.param_groups)
    assert number == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_rate_of_zero_is_not_taken_for_none(name: RecipeName) -> None:
    assert rate(recipe_for(name, network(), 0.0)) == 0.0


def advance(net: nn.Module, recipe: Recipe, step: int) -> float:
    """One step of regression; every third step is validated, on a plateau."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    loss = (net(x) - x[:, :2] ** 2).square().mean()
    recipe.optimizer.zero_grad()
    loss.backward()
    recipe.optimizer.step()
    recipe.after_step()
    if step % 3 == 0:
        recipe.after_validation(1.0)
    return rate(recipe)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stop", [1, 7, 25, 59])
def test_a_restored_recipe_goes_on_bit_for_bit(name: RecipeName, stop: int) -> None:
    whole = network()
    recipe = recipe_for(name, whole, 1e-2, num_steps=60)
    expected = [advance(whole, recipe, step) for step in range(60)]

    first = network()
    recipe = recipe_for(name, first, 1e-2, num_steps=60)
    found = [advance(first, recipe, step) for step in range(stop)]
    schedule = json.loads(json.dumps(recipe.schedule_state()))
    moments = {k: v.clone() for k, v in optimizer_tensors(recipe.optimizer).items()}

    second = network()
    second.load_state_dict(first.state_dict())
    recipe = recipe_for(name, second, 1e-2, num_steps=60)
    restore_optimizer(recipe.optimizer, moments)
    recipe.load_schedule_state(schedule)
    found += [advance(second, recipe, step) for step in range(stop, 60)]
    assert found == expected
    for left, right in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)
    if name == "paper":
        assert min(found) < 1e-2  # the plateau was reached


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe must be 'adamw' or 'paper'"):
        recipe_for("sgd", network())  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_of_another_simulator_is_refused(tmp_path) -> None:
    problem = problems.linear_gaussian()
    path = tmp_path / "run.safetensors"

    def run(simulator):
        torch.manual_seed(0)
        SlotNPE(problem.prior).train_online(
            simulator, num_simulations=256, num_validation=64, checkpoint=path
        )

    run(problem.simulator)
    run(problem.simulator)  # finished: returned at once
    with pytest.raises(ValueError, match=r"another run .simulated data was"):
        run(lambda theta: 10 * problem.simulator(theta))
