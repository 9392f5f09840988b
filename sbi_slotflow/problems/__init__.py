"""Problems: prior, simulator and likelihood that belong together."""

from .base import Problem
from .classes import Classes
from .gaussian_mixture import gaussian_mixture
from .least_squares import AdditiveFit
from .linear_gaussian import LinearGaussian, linear_gaussian
from .moments import MomentChart
from .placed import Image, Trace
from .points import Mixture, Points, PointsSimulator
from .radial_velocity import radial_velocity
from .series import Series, SeriesSimulator
from .sinusoids.grid import Grid
from .sinusoids.line_spectrum import LineSpectrum, line_spectrum
from .sinusoids.lines_and_bursts import lines_and_bursts
from .sinusoids.problem import Sinusoids, sinusoids
from .spikes import spikes
from .stars import stars

__all__ = [
    "AdditiveFit",
    "Classes",
    "Grid",
    "Image",
    "LineSpectrum",
    "LinearGaussian",
    "Mixture",
    "MomentChart",
    "Points",
    "PointsSimulator",
    "Problem",
    "Series",
    "SeriesSimulator",
    "Sinusoids",
    "Trace",
    "gaussian_mixture",
    "line_spectrum",
    "linear_gaussian",
    "lines_and_bursts",
    "radial_velocity",
    "sinusoids",
    "spikes",
    "stars",
]
