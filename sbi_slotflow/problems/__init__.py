"""Problems: prior, simulator and likelihood that belong together."""

from .base import Problem
from .linear_gaussian import LinearGaussian, linear_gaussian
from .sinusoids import Sinusoids, sinusoids

__all__ = ["LinearGaussian", "Problem", "Sinusoids", "linear_gaussian", "sinusoids"]
