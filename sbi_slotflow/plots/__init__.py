"""Figures of trans-dimensional posteriors.

Every function returns a ``matplotlib.figure.Figure`` of its own, to save with
``figure.savefig(path)``. None shows it, none touches pyplot or ``rcParams``.
"""

from .cardinality import plot_cardinality, plot_width_scaling, posterior_widths
from .corner import plot_corner, plot_source_corners
from .signals import plot_reconstruction, plot_spectrum
from .training import plot_training

__all__ = [
    "plot_cardinality",
    "plot_corner",
    "plot_reconstruction",
    "plot_source_corners",
    "plot_spectrum",
    "plot_training",
    "plot_width_scaling",
    "posterior_widths",
]
