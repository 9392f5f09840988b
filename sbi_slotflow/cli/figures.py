"""Figures of one signal's posterior."""

from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..plots import plot_cardinality, plot_corner, plot_reconstruction, plot_spectrum
from .answers import Answers
from .models import Model
from .results_file import write_figure

__all__ = ["figure_paths", "write_figures"]

_NAMES = ("cardinality", "reconstruction", "spectrum", "corner")


def figure_paths(out: Path) -> dict[str, Path]:
    """Where the figures of a result lie, by name."""
    return {name: out.with_suffix(f".{name}.png") for name in _NAMES}


def write_figures(model: Model, x: Tensor, answers: Answers, out: Path) -> list[Path]:
    """Write figures beside a result.

    Args:
        model: The model.
        x: The signal, shape ``(1, T)``.
        answers: Its posterior.
        out: The result; ``result.nc`` has ``result.corner.png`` and so on.

    Returns:
        Their paths.
    """
    layout, rows = model.posterior.prior.layout, answers.draws[0]
    figures: dict[str, Figure] = {"cardinality": plot_cardinality(answers.probs[0])}
    if model.problem is not None:
        figures["reconstruction"] = plot_reconstruction(model.problem, rows, x)
        with suppress(ValueError):  # not every x has a spectrum
            figures["spectrum"] = plot_spectrum(model.problem, rows, x)
    units = None if model.problem is None else model.problem.units
    k = int(layout.cardinality(rows).mode().values)
    if k or layout.num_shared:
        figures["corner"] = plot_corner(rows, layout, k, units=units)
    paths = []
    for name, figure in figures.items():
        path = figure_paths(out)[name]
        write_figure(figure, path)
        paths.append(path)
    return paths
