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
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .cli import InputError, at_least, exit_status
from .cli.infer import analyse
from .cli.models import Model, Settings, load_model, sha256
from .cli.report import print_accuracy
from .cli.results_file import MARK, check_apart, check_out
from .cli.signal_files import open_signals
from .nn.builder import slot_nn
from .posterior.network import SlotPosterior
from .pretrained import training_reference
from .problems import Problem, sinusoids
from .seeding import generator_for
from .training.online import OnlineSettings, OnlineTraining

__all__ = ["main"]

NUM_SIMULATIONS, NUM_DRAWS, NUM_TEST_SIGNALS = 64_000, 4_000, 1_000
PRESETS: tuple[Literal["paper", "tiny"], ...] = ("paper", "tiny")
# Seeds of the signals and of the draws: five components in noise of 0.93, and two in
# noise of 0.69.
SEEDS = {"sinusoids-paper": 2, "sinusoids-tiny": 61}
TRAINING_SEED, TEST_SEED = 0, 1
CHECKPOINT_EVERY = 100  # steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns what ``cli.exit_status`` does."""
    parser = argparse.ArgumentParser(
        prog="python -m sbi_slotflow.demo",
        description="Infer how many sinusoids are in a signal, and their parameters.",
    )
    add, trained_on = parser.add_argument, f"simulations ({NUM_SIMULATIONS:,})"
    add("--out", type=Path, default=Path("demo"), help="folder to write to (demo)")
    add("--x", type=Path, help="a signal of yours, .npy; simulated if left out")
    add("--simulations", type=at_least(1), default=NUM_SIMULATIONS, help=trained_on)
    args = parser.parse_args(argv)
    problems = [sinusoids(preset) for preset in PRESETS]

    def work() -> None:
        own = None if args.x is None else read_signal(problems, args.x)
        for problem in problems:
            if own is None or own.shape[-1] == problem.num_data:
                _run(problem, own, args)

    return exit_status(work, "the same command resumes the training")


def _run(problem: Problem, own: Tensor | None, args: argparse.Namespace) -> None:
    seed, shipped = SEEDS[problem.name], problem.name == "sinusoids-paper"
    folder = args.out / "paper" if shipped else args.out
    out, names = folder / "posterior.nc", ("reconstruction", "spectrum", "corner")
    figures = {name: folder / f"{name}.png" for name in names}
    check_apart([out, *figures.values()], [] if args.x is None else [args.x])
    for path in (out, *figures.values()):
        check_out(path, "--out", (path.suffix,))
    x, theta = (own, None) if own is not None else simulated(problem, seed)
    source = f"simulated with seed {seed}" if own is None else str(args.x)
    print(f"signal: {source}\n  {_describe(problem)}", flush=True)
    if shipped:
        print("using the weights that come with the package", flush=True)
        model = load_model(problem.name, None)
    else:
        model = train(problem, folder / "training.safetensors", args.simulations)
    settings, attrs = Settings(NUM_DRAWS, seed), {**MARK, "signals": source}
    true = None if theta is None else theta[0]
    analyse(model, x, settings, attrs, out, figures=figures, true_theta=true)
    x, theta = simulated(problem, TEST_SEED, NUM_TEST_SIGNALS, stream=4)
    probs = model.posterior.cardinality(x).probs
    print_accuracy(probs, problem.layout.cardinality(theta))


def simulated(
    problem: Problem, seed: int, num: int = 1, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Simulate signals ``(num, T)`` and their theta rows from two streams of a seed."""
    theta = problem.prior.sample((num,), generator_for(seed, stream))
    return problem.simulator(theta, generator_for(seed, stream + 1)), theta


def read_signal(problems: Sequence[Problem], path: Path) -> Tensor:
    """Read a signal ``(1, T)`` of one of the problems' lengths, or raise InputError."""
    lengths = [problem.num_data for problem in problems]
    try:
        signals = open_signals(path)
        if signals.shape[-1] not in lengths or signals.shape[:-1] not in ((), (1,)):
            raise InputError(f"{path} has shape {signals.shape}")
        signals.checked()
    except InputError as error:
        raise InputError(
            f"{error}. Expected a .npy file of {' or '.join(map(str, lengths))} finite "
            "floating-point numbers, shape (T,) or (1, T): "
            f"{'; or '.join(map(_describe, problems))}."
        ) from error
    return torch.from_numpy(signals.read(0, 1))


def train(problem: Problem, checkpoint: Path, num_simulations: int) -> Model:
    """Train a posterior, or take up the training that the checkpoint holds."""
    build = slot_nn(problem)
    settings = OnlineSettings(num_simulations, seed=TRAINING_SEED, validate_every=250)
    data, prior = problem.simulator, problem.prior
    try:
        training = OnlineTraining(build, prior, data, settings, checkpoint=checkpoint)
    except ValueError as error:
        advice = "To train anew, delete the file or give another --out."
        raise InputError(f"{error} {advice}") from error
    step, state = training.resumed_from, f"on {num_simulations:,} fresh simulations"
    if step:
        state = f"at step {step:,} of {settings.num_steps:,} from {checkpoint}"
    if training.finished:
        state = f"the trained network in {checkpoint} ({step:,} steps)"
    word = "reusing" if training.finished else "resuming" if step else "training"
    print(f"{word} {state}", flush=True)
    estimator = training.run(checkpoint_every=CHECKPOINT_EVERY)
    posterior = SlotPosterior(estimator, prior, data)
    posterior.set_training_reference(training_reference(problem.name))
    return Model(problem.name, sha256(checkpoint), posterior, problem)


def _describe(problem: Problem) -> str:
    return ", then ".join(
        f"{stream.num_samples} samples of {stream.title}" for stream in problem.streams
    )


if __name__ == "__main__":
    # The network's matrices are small: threads that wait for each other cost more than
    # they gain, several times more on a busy machine.
    torch.set_num_threads(1)
    sys.exit(main())
