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
    from .nn import SlotDensityEstimator, WhiteningChart, slot_nn
    from .nn.paper import CircleChart
    from .posterior import refine
    from .posterior.datatree import to_datatree
    from .posterior.draws import PosteriorDraws, RefinedPosterior
    from .posterior.network import SlotPosterior
    from .pretrained import load_pretrained, model_card
    from .problems import Problem
    from .problems.noise import GaussianNoise, PoissonNoise
    from .problems.simulator import AdditiveSimulator, WhiteNoise
    from .problems.sinusoids.polar import PolarChart
    from .sets.layout import ThetaLayout
    from .sets.multi_class import MultiClassPrior
    from .sets.prior import VariableKPrior
    from .training import SlotNPE

__version__ = "0.1.0"

__all__ = [
    "AdditiveSimulator",
    "CircleChart",
    "GaussianNoise",
    "MultiClassPrior",
    "PoissonNoise",
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
    "AdditiveSimulator": "problems.simulator",
    "CircleChart": "nn.paper",
    "MultiClassPrior": "sets.multi_class",
    "PolarChart": "problems.sinusoids.polar",
    "PosteriorDraws": "posterior.draws",
    "Problem": "problems",
    "RefinedPosterior": "posterior",
    "SlotDensityEstimator": "nn",
    "SlotNPE": "training",
    "SlotPosterior": "posterior",
    "ThetaLayout": "sets.layout",
    "VariableKPrior": "sets.prior",
    "GaussianNoise": "problems.noise",
    "PoissonNoise": "problems.noise",
    "WhiteNoise": "problems.simulator",
    "WhiteningChart": "nn",
    "build_catalogue": "catalogue",
    "calibration": "",
    "load_pretrained": "pretrained",
    "metrics": "",
    "model_card": "pretrained",
    "plots": "",
    "problems": "",
    "refine": "posterior",
    "rjmcmc": "",
    "slot_nn": "nn",
    "to_datatree": "posterior.datatree",
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
