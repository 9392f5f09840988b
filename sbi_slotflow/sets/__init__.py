"""Sets of components: rows, priors over them, and what parameters are."""

from .layout import ThetaLayout, ThetaParts
from .prior import VariableKPrior

__all__ = ["ThetaLayout", "ThetaParts", "VariableKPrior"]
