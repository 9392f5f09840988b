"""A demonstration from start to end, ``python -m sbi_slotflow.demo --out demo``.

It draws a signal of an unknown number of sinusoids in noise (or reads yours, ``--x``),
trains a posterior on fresh simulations, prints what the posterior says of the signal,
and writes draws (``posterior.nc``, an ArviZ ``DataTree``) and three figures. The
training is kept in ``training.safetensors`` beside them: a second run reuses it, an
interrupted one is resumed.
"""
# ruff: noqa: T201

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .circular import unwrap
from .datatree import to_datatree
from .nn.builder import slot_nn
from .plots import plot_corner, plot_reconstruction, plot_spectrum
from .posterior import SlotPosterior
from .problems import Sinusoids, sinusoids
from .seeding import generator_for
from .training.checkpoint import load_state
from .training.online import OnlineSettings
from .training.trainer import SlotNPE

__all__ = ["main"]

NUM_SIMULATIONS = 120_000
NUM_DRAWS = 4_000
NUM_TEST_SIGNALS = 1_000
OBSERVATION_SEED = 61  # two components, sigma 0.69
TRAINING_SEED = 0
CHECKPOINT_EVERY = 100  # steps
TEST_SEED = 1
UNITS = {"phase": "rad", "frequency": "Hz"}
PERIODS = {"phase": 2 * math.pi}

# Streams of a seed.
_THETA, _NOISE, _DRAWS, _DRAWS_GIVEN_K, _TEST_THETA, _TEST_NOISE = range(6)


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
    problem = sinusoids("tiny")
    try:
        if args.x is None:
            observation = draw_observation(problem, args.seed)
        else:
            observation = read_observation(problem, args.x)
        _make_folder(args.out)
        print(f"signal: {observation.name}\n  {_describe(problem)}", flush=True)
        posterior = train(problem, args.out / "training.safetensors", args.simulations)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes the training", file=sys.stderr)
        return 130
    analyse(problem, posterior, observation, args.out, args.seed)
    return 0


def draw_observation(problem: Sinusoids, seed: int) -> Observation:
    """Simulate a signal from the prior."""
    theta = problem.prior.sample((1,), generator=generator_for(seed, _THETA))
    x = problem.simulator(theta, generator=generator_for(seed, _NOISE))
    return Observation(f"simulated with seed {seed}", x, theta)


def read_observation(problem: Sinusoids, path: Path) -> Observation:
    """Read a user's signal.

    Args:
        problem: The problem, which says how long the signal must be.
        path: A ``.npy`` file of floating-point numbers, shape ``(T,)`` or ``(1, T)``.

    Raises:
        DemoError: If the file can't be read, or holds something else.
    """
    expected = (
        f"Expected a .npy file of {problem.num_data} finite floating-point numbers, "
        f"shape ({problem.num_data},) or (1, {problem.num_data}): {_describe(problem)}."
    )
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DemoError(f"there is no file {path}. {expected}") from error
    except OSError as error:
        reason = error.strerror or error
        raise DemoError(f"cannot read {path}: {reason}. {expected}") from error
    except (ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise DemoError(f"{path} is not a .npy file of numbers. {expected}") from error
    if not isinstance(array, np.ndarray):
        raise DemoError(f"{path} is an archive of several arrays. {expected}")
    if not np.issubdtype(array.dtype, np.floating):
        raise DemoError(f"{path} has dtype {array.dtype}. {expected}")
    if array.shape not in ((problem.num_data,), (1, problem.num_data)):
        raise DemoError(f"{path} has shape {array.shape}. {expected}")
    with np.errstate(over="ignore"):
        x = torch.from_numpy(array.astype(np.float32)).reshape(1, -1)
    num_bad = int((~torch.isfinite(x)).sum())
    if num_bad:
        raise DemoError(
            f"{path} has {num_bad} entries that are NaN, infinite or too large for "
            f"float32. {expected}"
        )
    return Observation(str(path), x)


def train(problem: Sinusoids, checkpoint: Path, num_simulations: int) -> SlotPosterior:
    """Train a posterior, or take up the training that the checkpoint holds.

    Raises:
        DemoError: If the checkpoint is corrupt or belongs to another training.
    """
    state = _announce_training(checkpoint, num_simulations)
    trainer = SlotNPE(problem.prior, slot_nn(problem), tracker=_NoTracker())
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
    seed: int,
) -> None:
    """Print what the posterior says of the signal and write draws and figures."""
    x = observation.x
    probs = posterior.cardinality(x).probs
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
        _warn_if_foreign(x, signals)
    _print_cardinality(probs, observation.theta, problem)
    _print_table(given_k, observation.theta, problem, k)
    mean = posterior.reconstruct(draws).mean(0)
    _print_reconstruction(mean, observation, draws, problem)
    _print_accuracy(posterior.cardinality(signals).probs, tests, problem)
    _write(problem, observation, draws, given_k, out)


def _write(
    problem: Sinusoids,
    observation: Observation,
    draws: Tensor,
    given_k: Tensor,
    out: Path,
) -> None:
    """Write the draws and the figures."""
    x, theta, layout = observation.x, observation.theta, problem.layout
    true_row = None if theta is None else theta[0]
    tree = to_datatree(draws, layout, x=x[0], true_theta=true_row)
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
        "--seed",
        type=int,
        default=OBSERVATION_SEED,
        help=f"seed of the simulated signal and of the draws ({OBSERVATION_SEED})",
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


def _warn_if_foreign(x: Tensor, signals: Tensor) -> None:
    """Warn where a signal is far louder or quieter than what was trained on."""
    rms, usual = _rms(x), signals.square().mean(-1).sqrt()
    if not usual.min() <= rms <= usual.max():
        print(
            f"warning: your signal's RMS is {rms:.3g}, that of {len(signals):,} "
            f"simulated ones {usual.min():.2g} to {usual.max():.2g}. The network never "
            "saw its like; do not trust what follows.",
            file=sys.stderr,
        )


def _print_cardinality(probs: Tensor, theta: Tensor | None, problem: Sinusoids) -> None:
    print("\np(K | x)")
    true = None if theta is None else int(problem.layout.cardinality(theta))
    for k, p in enumerate(probs.tolist()):
        bar, mark = "#" * round(30 * p), "  truth" if k == true else ""
        print(f"  K = {k}  {p:.3f}  {bar}{mark}".rstrip())


def _print_table(
    draws: Tensor, theta: Tensor | None, problem: Sinusoids, k: int
) -> None:
    """Print medians and 90 % intervals given K, beside the truth."""
    layout = problem.layout
    true = None if theta is None else layout.unpack(theta[0])
    same = true is not None and int(true.cardinality) == k
    parts = layout.unpack(draws)
    columns = [
        (name, parts.shared[:, i], None if true is None else true.shared[i])
        for i, name in enumerate(layout.shared_names)
    ]
    columns += [
        (
            f"{name} {slot + 1}",
            parts.components[:, slot, i],
            true.components[slot, i] if true is not None and same else None,
        )
        for slot in range(k)
        for i, name in enumerate(layout.component_names)
    ]
    print(f"\nPosterior given K = {k}")
    print(f"  {'parameter':<18}{'median':>9}{'90 % interval':>20}{'truth':>10}")
    for label, values, truth in columns:
        name = label.split()[0]
        low, median, high, truth = _summary(values, truth, PERIODS.get(name))
        unit = f" ({UNITS[name]})" if name in UNITS else ""
        shown = "" if truth is None else f"{truth:10.3f}"
        print(f"  {label + unit:<18}{median:9.3f}  [{low:7.3f}, {high:7.3f}]{shown}")
    if k:
        print("  phases are shifted by whole turns to lie around their circular mean")
    if true is not None and not same:
        print("  true components, not matched with these because K differs:")
        for row in true.components[true.mask].tolist():
            named = zip(layout.component_names, row, strict=True)
            print("    " + ", ".join(f"{name} {value:.3f}" for name, value in named))


def _summary(
    values: Tensor, truth: Tensor | None, period: float | None
) -> tuple[float, float, float, float | None]:
    """5 %, 50 % and 95 % quantile, and the truth on the same turn of the circle."""
    if period is not None:
        values = unwrap(values, period)
    quantiles = values.double().quantile(
        torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    )
    low, median, high = quantiles.tolist()
    true = None if truth is None else float(truth)
    if true is not None and period is not None:
        true += round((median - true) / period) * period
    return low, median, high, true


def _print_reconstruction(
    mean: Tensor, observation: Observation, draws: Tensor, problem: Sinusoids
) -> None:
    """Print how far the posterior mean of the signal is from the truth, or from x."""
    if observation.theta is None:
        sigma = _sigma(problem, draws).median()
        print(
            f"\nRMS residual of the reconstruction: {_rms(observation.x - mean):.3f} "
            f"(the posterior median of sigma is {sigma:.3f})"
        )
        return
    signal = problem.simulator.signal(observation.theta)
    sigma = _sigma(problem, observation.theta).item()
    error, size = _rms(mean - signal), _rms(signal)
    relative = "the true signal is zero"
    if size > 0:
        relative = f"{100 * error / size:.1f} % of the true signal's RMS"
    print(f"\nRMS error of the reconstruction: {error / sigma:.3f} sigma ({relative})")


def _print_accuracy(probs: Tensor, theta: Tensor, problem: Sinusoids) -> None:
    correct = probs.argmax(-1) == problem.layout.cardinality(theta)
    print(
        f"\nK accuracy on {len(theta):,} fresh signals: {correct.float().mean():.3f} "
        "(the most probable K against the true one)"
    )


def _sigma(problem: Sinusoids, theta: Tensor) -> Tensor:
    index = problem.shared_names.index("sigma")
    return problem.layout.unpack(theta).shared[:, index]


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


if __name__ == "__main__":
    # The network's matrices are small: threads that wait for each other cost more than
    # they gain, several times more on a busy machine.
    torch.set_num_threads(1)
    sys.exit(main())
