"""Problems: prior, simulator and likelihood that belong together."""

from .additive_fit import AdditiveFit
from .base import Problem
from .line_spectrum import LineSpectrum, line_spectrum
from .linear_gaussian import LinearGaussian, linear_gaussian
from .sinusoids import Sinusoids, sinusoids
from .spikes import Spikes, spikes

__all__ = [
    "AdditiveFit",
    "LineSpectrum",
    "LinearGaussian",
    "Problem",
    "Sinusoids",
    "Spikes",
    "line_spectrum",
    "linear_gaussian",
    "sinusoids",
    "spikes",
]
