"""Figures of trans-dimensional posteriors.

Every function returns a ``matplotlib.figure.Figure`` of its own, to save with
``figure.savefig(path)``. None shows it, none touches pyplot or ``rcParams``.
"""

from .cardinality import plot_cardinality
from .corner import plot_corner
from .signals import plot_reconstruction, plot_spectrum

__all__ = [
    "plot_cardinality",
    "plot_corner",
    "plot_reconstruction",
    "plot_spectrum",
]
