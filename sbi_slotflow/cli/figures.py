"""Figures of one signal's posterior."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..demo_report import UNITS
from ..plots import (
    plot_cardinality,
    plot_corner,
    plot_reconstruction,
    plot_spectrum,
)
from ..problems import Sinusoids
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
    sines = isinstance(model.problem, Sinusoids)
    figures: dict[str, Figure] = {"cardinality": plot_cardinality(answers.probs[0])}
    if model.problem is not None:
        figures["reconstruction"] = plot_reconstruction(model.problem, rows, x)
        if sines:
            figures["spectrum"] = plot_spectrum(model.problem, rows, x)
    k = int(layout.cardinality(rows).mode().values)
    if k or layout.num_shared:
        figures["corner"] = plot_corner(rows, layout, k, units=UNITS if sines else None)
    paths = []
    for name, figure in figures.items():
        path = out.with_suffix(f".{name}.png")
        with aside(path) as new:
            figure.savefig(new, dpi=150)
        paths.append(path)
    return paths
