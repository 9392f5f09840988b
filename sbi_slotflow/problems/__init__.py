"""Problems: prior, simulator and likelihood that belong together."""

from .additive_fit import AdditiveFit
from .base import Problem
from .line_spectrum import LineSpectrum, line_spectrum
from .linear_gaussian import LinearGaussian, linear_gaussian
from .sine_grid import Grid
from .sinusoids import Sinusoids, sinusoids
from .spikes import Spikes, spikes
from .trace import Trace

__all__ = [
    "AdditiveFit",
    "Grid",
    "LineSpectrum",
    "LinearGaussian",
    "Problem",
    "Sinusoids",
    "Spikes",
    "Trace",
    "line_spectrum",
    "linear_gaussian",
    "sinusoids",
    "spikes",
]
