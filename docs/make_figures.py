"""Make the README's figures: ``python docs/make_figures.py``.

The figures in ``docs/figures`` come from weights that are shipped with the package, on
signals of fixed seeds. ``--all FOLDER`` writes one of every kind that
``sbi_slotflow.plots`` has.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sbi_slotflow import (
    SlotNPE,
    VariableKPrior,
    load_pretrained,
    plots,
    problems,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.seeding import generator_for

UNITS = {"frequency": "Hz", "phase": "rad"}
README = Path(__file__).parent / "figures"
CROWDED_SEED, PAPER_SEED = 12, 5


def readme_figures() -> Iterator[tuple[str, Figure]]:
    """The six figures of the README."""
    problem = problems.sinusoids("crowded")
    theta, x = signal(problem, CROWDED_SEED, 5)
    posterior = load_pretrained("sinusoids-crowded")
    reference = rjmcmc.collapsed(problem, x[0], seed=1)
    yield "spectrum", plots.plot_spectrum(problem, reference.rows, x, theta)
    yield (
        "cardinality",
        plots.plot_cardinality(
            posterior.cardinality(x[0]),
            int(theta[0, 0]),
            reference=reference.cardinality(),
            labels=("network", "reversible-jump MCMC"),
        ),
    )
    yield (
        "sources",
        plots.plot_source_corners(
            reference.rows, problem.layout, theta, min_probability=0.5, units=UNITS
        ),
    )

    problem = problems.sinusoids("paper")
    theta, x = signal(problem, PAPER_SEED, 3)
    posterior = load_pretrained("sinusoids-paper")
    samples = posterior.sample((8_000,), x[0], k=3, generator=generator_for(3))
    reference = rjmcmc.collapsed(problem, x[0], seed=1)
    yield (
        "corner",
        plots.plot_corner(
            samples,
            problem.layout,
            3,
            theta,
            reference=reference.sample((8_000,), k=3, generator=generator_for(4)),
            units=UNITS,
            labels=("network", "reversible-jump MCMC"),
        ),
    )
    yield "reconstruction", plots.plot_reconstruction(problem, samples, x, theta)
    ks = torch.tensor([1, 2, 4, 6, 8, 10]).repeat_interleave(15)
    theta = torch.cat(
        [given_k(problem, int(k)).sample((1,), generator_for(6, i))
         for i, k in enumerate(ks)]
    )  # fmt: skip
    x = problem.simulator(theta, generator_for(7))
    widths = plots.posterior_widths(
        posterior, theta, x, num_samples=200, generator=generator_for(8)
    )
    widths["frequency"] = 1e3 * widths["frequency"]
    labels = {"amplitude": "amplitude (relative)", "phase": "phase (rad)"}
    labels["frequency"] = "frequency (mHz)"
    yield "scaling", plots.plot_width_scaling(ks, widths, labels)


def other_figures() -> Iterator[tuple[str, Figure]]:
    """The figure of a training."""
    small = problems.linear_gaussian()
    trainer = SlotNPE(small.prior, slot_nn(small), show_progress_bars=False)
    trainer.train_online(
        small.simulator, num_simulations=38_400, recipe="paper", validate_every=15
    )
    yield "training", plots.plot_training(trainer.history)


def given_k(problem: problems.Problem, k: int) -> VariableKPrior:
    """The prior at one cardinality."""
    weights = torch.zeros(problem.prior.max_cardinality + 1)
    weights[k] = 1.0
    return problem.prior.with_cardinality(weights)


def signal(problem: problems.Problem, seed: int, k: int) -> tuple[Tensor, Tensor]:
    """A true row and its data."""
    theta = given_k(problem, k).sample((1,), generator_for(seed, 0))
    return theta, problem.simulator(theta, generator_for(seed, 1))


def write(name: str, figure: Figure, folder: Path) -> None:
    """Save a figure 800 pixels wide, with few colours."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=800 / figure.get_size_inches()[0])
    image = Image.open(path).convert("RGB")
    image.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, help="folder for figures of every kind")
    folder = parser.parse_args().all
    torch.set_num_threads(1)
    for name, figure in readme_figures():
        write(name, figure, folder or README)
    for name, figure in other_figures() if folder else ():
        write(name, figure, folder)
