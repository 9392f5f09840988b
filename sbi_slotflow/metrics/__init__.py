"""How far one posterior over sets is from another, given draws of both.

:func:`compare` measures everything and prints it beside the run-to-run floor: the same
numbers between two independent runs of the reference. A value at its floor is as good
as the reference can tell.
"""

from .comparison import Comparison, ParameterDistance, ReferencePoints, Samples, compare
from .distances import (
    FEWEST_DRAWS,
    c2st,
    correlation_error,
    jensen_shannon,
    sliced_wasserstein2,
    total_variation,
    wasserstein2,
    whiten,
)

__all__ = [
    "FEWEST_DRAWS",
    "Comparison",
    "ParameterDistance",
    "ReferencePoints",
    "Samples",
    "c2st",
    "compare",
    "correlation_error",
    "jensen_shannon",
    "sliced_wasserstein2",
    "total_variation",
    "wasserstein2",
    "whiten",
]
