"""Trans-dimensional simulation-based inference, a plugin to sbi.

Infer how many components are in a signal and their parameters, p(K, Theta | x).
"""

from . import calibration, metrics, problems
from .catalogue import build_catalogue
from .datatree import to_datatree
from .draws import PosteriorDraws
from .layout import ThetaLayout
from .nn import (
    CircleChart,
    PolarChart,
    SlotDensityEstimator,
    WhiteningChart,
    slot_nn,
)
from .noise import WhiteNoise
from .posterior import SlotPosterior
from .pretrained import load_pretrained, model_card
from .prior import VariableKPrior
from .problems import Problem
from .refinement import RefinedPosterior, refine
from .simulator import AdditiveSimulator
from .training import SlotNPE

__version__ = "0.1.0"

__all__ = [
    "AdditiveSimulator",
    "CircleChart",
    "PolarChart",
    "PosteriorDraws",
    "Problem",
    "RefinedPosterior",
    "SlotDensityEstimator",
    "SlotNPE",
    "SlotPosterior",
    "ThetaLayout",
    "VariableKPrior",
    "WhiteNoise",
    "WhiteningChart",
    "build_catalogue",
    "calibration",
    "load_pretrained",
    "metrics",
    "model_card",
    "problems",
    "refine",
    "slot_nn",
    "to_datatree",
]
