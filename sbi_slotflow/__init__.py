"""Trans-dimensional simulation-based inference, a plugin to sbi.

Infer how many components are in a signal and their parameters, p(K, Theta | x).

Names are imported when they are first asked for (PEP 562), so that importing the
package costs nothing; the first of them brings torch and sbi.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import calibration, metrics, plots, problems, rjmcmc
    from .catalogue import build_catalogue
    from .datatree import to_datatree
    from .draws import PosteriorDraws
    from .layout import ThetaLayout
    from .model_cards import model_card
    from .nn import (
        CircleChart,
        PolarChart,
        SlotDensityEstimator,
        WhiteningChart,
        slot_nn,
    )
    from .noise import WhiteNoise
    from .posterior import SlotPosterior
    from .pretrained import load_pretrained
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
    "plots",
    "problems",
    "refine",
    "rjmcmc",
    "slot_nn",
    "to_datatree",
]

# Where each name is defined; "" for modules of that name.
_HOMES = {
    "AdditiveSimulator": "simulator",
    "CircleChart": "nn",
    "PolarChart": "nn",
    "PosteriorDraws": "draws",
    "Problem": "problems",
    "RefinedPosterior": "refinement",
    "SlotDensityEstimator": "nn",
    "SlotNPE": "training",
    "SlotPosterior": "posterior",
    "ThetaLayout": "layout",
    "VariableKPrior": "prior",
    "WhiteNoise": "noise",
    "WhiteningChart": "nn",
    "build_catalogue": "catalogue",
    "calibration": "",
    "load_pretrained": "pretrained",
    "metrics": "",
    "model_card": "model_cards",
    "plots": "",
    "problems": "",
    "refine": "refinement",
    "rjmcmc": "",
    "slot_nn": "nn",
    "to_datatree": "datatree",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if not home:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
