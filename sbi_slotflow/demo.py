"""A demonstration from start to end, ``python -m sbi_slotflow.demo --out demo``.

First the weights that come with the package analyse a signal of an unknown number of
sinusoids in noise, of the paper's kind: five minutes at 10 Hz, then ten seconds at
512 Hz. Then a posterior for a smaller problem is trained on fresh simulations and does
the same. Each time it prints what the posterior says of the signal and writes draws
(``posterior.nc``, an ArviZ ``DataTree``) and three figures, those of the first to the
folder ``paper``. The training is kept in ``training.safetensors``: a second run reuses
it, an interrupted one is resumed. A signal of yours, ``--x``, is analysed by the one of
the two whose length it has.
"""
# ruff: noqa: T201

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .cli.report import (
    PERIODS,
    UNITS,
    print_accuracy,
    print_cardinality,
    print_reconstruction,
    print_table,
    warn_if_foreign,
)
from .cli.signal_files import SignalFileError, open_signals
from .nn.builder import slot_nn
from .plots import plot_corner, plot_reconstruction, plot_spectrum
from .posterior.network import SlotPosterior
from .pretrained.load import load_pretrained
from .problems import Sinusoids, sinusoids
from .seeding import generator_for
from .training.checkpoint import load_state
from .training.online import OnlineSettings
from .training.trainer import SlotNPE

__all__ = ["main"]

NUM_SIMULATIONS = 64_000
NUM_DRAWS = 4_000
NUM_TEST_SIGNALS = 1_000
PRESETS: tuple[Literal["paper", "tiny"], ...] = ("paper", "tiny")
# Seeds of the signals and of the draws: five components in noise of 0.93, and two in
# noise of 0.69.
SEEDS = {"sinusoids-paper": 2, "sinusoids-tiny": 61}
TRAINING_SEED = 0
REFINE_SLOTS = 3
CHECKPOINT_EVERY = 100  # steps
TEST_SEED = 1

# Streams of a seed.
_THETA, _NOISE, _DRAWS, _DRAWS_GIVEN_K, _TEST_THETA, _TEST_NOISE, _PREDICTIVE = range(7)
# Replicated signals that are kept with the draws.
_NUM_PREDICTIVE = 20


class DemoError(Exception):
    """What the user can mend: a bad signal, or files of another run."""


@dataclass(frozen=True)
class Observation:
    """A signal and, if it was simulated, its true parameters.

    Attributes:
        name: Where it comes from.
        x: The signal, shape ``(1, T)``.
        theta: The true theta row, shape ``(1, E)``; None for a user's signal.
    """

    name: str
    x: Tensor
    theta: Tensor | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments; those of the command line if None.

    Returns:
        The exit status: 0, or 2 if the input is at fault, 130 if interrupted.
    """
    args = _parse(argv)
    problems = [sinusoids(preset) for preset in PRESETS]
    try:
        own = None
        if args.x is not None:
            own, problem = read_observation(problems, args.x)
            problems = [problem]
        for problem in problems:
            shipped = problem.name == "sinusoids-paper"
            observation = own or draw_observation(problem, SEEDS[problem.name])
            out = args.out / "paper" if shipped else args.out
            _make_folder(out)
            print(f"signal: {observation.name}\n  {_describe(problem)}", flush=True)
            if shipped:
                print("using the weights that come with the package", flush=True)
                posterior = load_pretrained(problem.name)
            else:
                posterior = train(
                    problem, out / "training.safetensors", args.simulations
                )
            analyse(problem, posterior, observation, out)
            print(flush=True)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes the training", file=sys.stderr)
        return 130
    return 0


def draw_observation(problem: Sinusoids, seed: int) -> Observation:
    """Simulate a signal from the prior."""
    theta = problem.prior.sample((1,), generator=generator_for(seed, _THETA))
    x = problem.simulator(theta, generator=generator_for(seed, _NOISE))
    return Observation(f"simulated with seed {seed}", x, theta)


def read_observation(
    problems: Sequence[Sinusoids], path: Path
) -> tuple[Observation, Sinusoids]:
    """Read a user's signal.

    Args:
        problems: The problems, one of which it must be as long as.
        path: A file of floating-point numbers, shape ``(T,)`` or ``(1, T)``.

    Returns:
        The signal, and the problem that it belongs to.

    Raises:
        DemoError: If the file can't be read, or holds something else.
    """
    lengths = " or ".join(str(problem.num_data) for problem in problems)
    described = "; or ".join(_describe(problem) for problem in problems)
    expected = (
        f"Expected a .npy file of {lengths} finite floating-point numbers, shape (T,) "
        f"or (1, T): {described}."
    )
    try:
        signals = open_signals(path)
    except SignalFileError as error:
        raise DemoError(f"{error}. {expected}") from error
    by_shape: dict[tuple[int, ...], Sinusoids] = {(p.num_data,): p for p in problems}
    by_shape |= {(1, p.num_data): p for p in problems}
    if signals.shape not in by_shape:
        raise DemoError(f"{path} has shape {signals.shape}. {expected}")
    x = torch.from_numpy(signals.read(0, 1))
    num_bad = int((~torch.isfinite(x)).sum())
    if num_bad:
        raise DemoError(
            f"{path} has {num_bad} entries that are NaN, infinite or too large for "
            f"float32. {expected}"
        )
    return Observation(str(path), x), by_shape[signals.shape]


def train(problem: Sinusoids, checkpoint: Path, num_simulations: int) -> SlotPosterior:
    """Train a posterior, or take up the training that the checkpoint holds.

    Raises:
        DemoError: If the checkpoint is corrupt or belongs to another training.
    """
    state = _announce_training(checkpoint, num_simulations)
    builder = slot_nn(problem, refine_slots=REFINE_SLOTS)
    trainer = SlotNPE(problem.prior, builder, tracker=_NoTracker())
    started = time.monotonic()
    try:
        trainer.train_online(
            problem.simulator,
            num_simulations=num_simulations,
            seed=TRAINING_SEED,
            validate_every=250,
            checkpoint=checkpoint,
            checkpoint_every=CHECKPOINT_EVERY,
        )
    except ValueError as error:
        if state == "new":
            raise
        raise DemoError(
            f"{error} To train anew, delete the file or give another --out."
        ) from error
    if state != "reused":
        print(f"training took {time.monotonic() - started:.0f} s", flush=True)
    return trainer.build_posterior()


def analyse(
    problem: Sinusoids,
    posterior: SlotPosterior,
    observation: Observation,
    out: Path,
) -> None:
    """Print what the posterior says of the signal and write draws and figures."""
    x, seed = observation.x, SEEDS[problem.name]
    probs = posterior.cardinality(x[0]).probs
    k = int(probs.argmax())
    draws = posterior.sample((NUM_DRAWS,), x, generator=generator_for(seed, _DRAWS))
    given_k = posterior.sample(
        (NUM_DRAWS,), x, k=k, generator=generator_for(seed, _DRAWS_GIVEN_K)
    )
    tests = problem.prior.sample(
        (NUM_TEST_SIGNALS,), generator_for(TEST_SEED, _TEST_THETA)
    )
    signals = problem.simulator(tests, generator_for(TEST_SEED, _TEST_NOISE))

    if observation.theta is None:
        warn_if_foreign(x, signals)
    true = observation.theta
    print_cardinality(
        probs, None if true is None else int(problem.layout.cardinality(true))
    )
    print_table(given_k, observation.theta, problem, k)
    mean = posterior.reconstruct(draws).mean(0)
    print_reconstruction(mean, x, observation.theta, draws, problem)
    print_accuracy(posterior.cardinality(signals).probs, tests, problem)
    _write(problem, posterior, observation, draws, given_k, out)


def _write(
    problem: Sinusoids,
    posterior: SlotPosterior,
    observation: Observation,
    draws: Tensor,
    given_k: Tensor,
    out: Path,
) -> None:
    """Write the draws and the figures."""
    x, theta, layout = observation.x, observation.theta, problem.layout
    tree = posterior.to_datatree(
        x=x,
        samples=draws,
        true_theta=None if theta is None else theta[0],
        num_predictive=_NUM_PREDICTIVE,
        generator=generator_for(SEEDS[problem.name], _PREDICTIVE),
    )
    tree.to_netcdf(out / "posterior.nc", engine="h5netcdf")
    corner = plot_corner(
        given_k, layout, true_theta=theta, units=UNITS, periods=PERIODS
    )
    figures = {
        "reconstruction.png": plot_reconstruction(problem, draws, x, theta),
        "spectrum.png": plot_spectrum(problem, draws, x, theta),
        "corner.png": corner,
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    print("\nwrote " + ", ".join(str(out / n) for n in ["posterior.nc", *figures]))


class _NoTracker:
    """Logs nothing, so that sbi writes no TensorBoard files."""

    log_dir = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_params(self, params: dict[str, Any]) -> None:
        pass

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        pass

    def flush(self) -> None:
        pass


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sbi_slotflow.demo",
        description="Infer how many sinusoids are in a signal, and their parameters.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder to write to (demo)"
    )
    parser.add_argument(
        "--x", type=Path, help="a signal of yours, .npy; simulated if left out"
    )
    parser.add_argument(
        "--simulations",
        type=_positive,
        default=NUM_SIMULATIONS,
        help=f"simulations to train on ({NUM_SIMULATIONS:,})",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {path}: {error.strerror}.") from error


def _describe(problem: Sinusoids) -> str:
    parts = [
        f"{grid.num_samples} samples of the {name} stream ({grid.duration:g} s at "
        f"{grid.rate:g} Hz, from t = 0)"
        for name, grid in zip(("long", "short"), problem.grids, strict=True)
    ]
    return ", then ".join(parts)


def _announce_training(
    checkpoint: Path, num_simulations: int
) -> Literal["new", "resumed", "reused"]:
    """Say and return what becomes of the checkpoint."""
    if not checkpoint.exists():
        print(f"training on {num_simulations:,} fresh simulations", flush=True)
        return "new"
    try:
        state = load_state(checkpoint)
    except ValueError as error:
        raise DemoError(
            f"{error} To train anew, delete it or give another --out."
        ) from error
    trained_on, step = state.settings["num_simulations"], state.progress["step"]
    if trained_on != num_simulations:
        raise DemoError(
            f"{checkpoint} belongs to a training on {trained_on} simulations, not "
            f"{num_simulations}. To reuse it, give --simulations {trained_on}; to "
            "train anew, delete it or give another --out."
        )
    total = OnlineSettings(num_simulations).num_steps
    if step >= total:
        print(f"reusing the trained network in {checkpoint} ({step:,} steps)")
        return "reused"
    print(f"resuming at step {step:,} of {total:,} from {checkpoint}", flush=True)
    return "resumed"


if __name__ == "__main__":
    # The network's matrices are small: threads that wait for each other cost more than
    # they gain, several times more on a busy machine.
    torch.set_num_threads(1)
    sys.exit(main())
