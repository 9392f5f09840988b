"""Figures of one signal's posterior."""

from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..plots import plot_cardinality, plot_corner, plot_reconstruction, plot_spectrum
from .answers import Answers
from .models import Model
from .results_file import aside

__all__ = ["write_figures"]


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
        path = out.with_suffix(f".{name}.png")
        with aside(path) as new:
            figure.savefig(new, dpi=150)
        paths.append(path)
    return paths
