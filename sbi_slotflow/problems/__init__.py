"""Problems: prior, simulator and likelihood that belong together."""

from .base import Problem, Trace
from .least_squares import AdditiveFit
from .linear_gaussian import LinearGaussian, linear_gaussian
from .sinusoids.grid import Grid
from .sinusoids.line_spectrum import LineSpectrum, line_spectrum
from .sinusoids.problem import Sinusoids, sinusoids
from .spikes import spikes

__all__ = [
    "AdditiveFit",
    "Grid",
    "LineSpectrum",
    "LinearGaussian",
    "Problem",
    "Sinusoids",
    "Trace",
    "line_spectrum",
    "linear_gaussian",
    "sinusoids",
    "spikes",
]
