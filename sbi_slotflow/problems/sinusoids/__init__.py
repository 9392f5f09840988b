"""Everything that knows a sinusoid; reached through the hooks of a problem."""

from .grid import Grid
from .line_spectrum import LineSpectrum, line_spectrum
from .polar import PolarChart
from .problem import Sinusoids, sinusoids

__all__ = [
    "Grid",
    "LineSpectrum",
    "PolarChart",
    "Sinusoids",
    "line_spectrum",
    "sinusoids",
]
