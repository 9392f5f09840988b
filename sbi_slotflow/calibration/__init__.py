"""Checks of trans-dimensional posteriors against simulated truths.

:func:`report` makes all of them::

    result = report(posterior, problem, n=1_000, seed=0)
    result.passed, result.checks
    result.to_html("calibration.html")

:func:`draw` simulates pairs and draws from their posteriors, for single checks::

    draws = draw(posterior, problem, n=1_000, seed=0)
    check = coverage(draws)
    check.passed, check.p_values, check.plot()

- :func:`sbc`, :func:`sbc_components`: ranks of truths among draws,
- :func:`coverage`: coverage of credible intervals by parameter and by K,
- :func:`cardinality_reliability`: scores of q(K | x),
- :func:`tarp`: balls around random references,
- :func:`local_c2st`: a classifier two-sample test at one observation,
- :func:`residuals`: posterior-predictive checks of signals.

:class:`TrainingReference` tells whether an observation is unlike the training data, and
lets ``posterior.sample`` warn of it.

:mod:`~sbi_slotflow.calibration.faults` makes posteriors wrong in a known way, to see
that a check notices.

:func:`reduce_fns` and :func:`set_distance` serve ``sbi.diagnostics.run_sbc`` and
``run_tarp``.
"""

from . import faults
from .cardinality import (
    CardinalityReliability,
    ReliabilityBins,
    cardinality_reliability,
)
from .check import Check, ecdf_band, pit, rank_p_value, uniformity_p_value
from .coverage import Coverage, CoverageCurve, coverage
from .draws import BatchedPosterior, CalibrationDraws, MatchedComponents, draw
from .local_c2st import LocalC2ST, local_c2st
from .misspecification import Misspecification, TrainingReference, UnlikeTrainingWarning
from .report import Report, report
from .residuals import Residuals, ResidualStream, residuals
from .sbc import (
    ComponentSBC,
    CountInBand,
    JitteredCardinality,
    Lowest,
    Reduction,
    SetSBC,
    SharedParameter,
    TotalPower,
    reduce_fns,
    sbc,
    sbc_components,
)
from .tarp import TARP, SetDistance, set_distance, tarp

__all__ = [
    "TARP",
    "BatchedPosterior",
    "CalibrationDraws",
    "CardinalityReliability",
    "Check",
    "ComponentSBC",
    "CountInBand",
    "Coverage",
    "CoverageCurve",
    "JitteredCardinality",
    "LocalC2ST",
    "Lowest",
    "MatchedComponents",
    "Misspecification",
    "Reduction",
    "ReliabilityBins",
    "Report",
    "ResidualStream",
    "Residuals",
    "SetDistance",
    "SetSBC",
    "SharedParameter",
    "TotalPower",
    "TrainingReference",
    "UnlikeTrainingWarning",
    "cardinality_reliability",
    "coverage",
    "draw",
    "ecdf_band",
    "faults",
    "local_c2st",
    "pit",
    "rank_p_value",
    "reduce_fns",
    "report",
    "residuals",
    "sbc",
    "sbc_components",
    "set_distance",
    "tarp",
    "uniformity_p_value",
]
