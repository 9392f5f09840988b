r"""Tests of accuracy with random points (TARP, Lemos, Coogan et al. 2023).

The share of posterior draws that are closer to a reference point r than the truth is,

.. math::
    f = \Pr_{\theta' \sim q(\cdot | x)}\big(d(\theta', r) < d(\theta, r)\big),

is uniform if q is right, for any r that does not know the truth. With the distance
between sets of :func:`~sbi_slotflow.calibration.set_distance` it tests K, components
and shared parameters together. ``sbi.diagnostics.run_tarp`` takes that distance too and
gives the same curve for the same draws and references; here ties are randomised and the
verdict is that of :mod:`~sbi_slotflow.calibration.uniformity`.

References are draws from the prior, a draw from the posterior itself that is used for
nothing else, and one given the true K, ranked with draws given K. The closer the
reference, the more the ranks depend on the posterior's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .check import Check
from .draws import CalibrationDraws
from .set_distance import SetDistance, set_distance
from .uniformity import Array, pit, rank_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TARP", "tarp"]

# Pairs of sets handled at once.
_CHUNK = 20_000
_NUM_SCALE_DRAWS = 2_000


@dataclass(frozen=True, eq=False)
class TARP(Check):
    """Coverage of balls around random references.

    Attributes:
        credibilities: The shares f for each kind of references, each ``(n,)``.
    """

    title: ClassVar[str] = "TARP with a distance between sets"
    explanation: ClassVar[str] = (
        "The line is the expected coverage of balls around reference points, less "
        "their credibility. Panels say what the reference points are drawn from."
    )

    credibilities: Mapping[str, Array]

    @property
    def numbers(self) -> dict[str, Any]:
        """Mean of f, and its variance over that of uniform numbers."""
        return {
            name: {
                "num": len(f),
                "mean": float(f.mean()),
                "variance_ratio": float(12 * ((f - 0.5) ** 2).mean()),
            }
            for name, f in self.credibilities.items()
        }

    def plot(self) -> "Figure":
        """Plot expected coverage less credibility for each kind of references."""
        from .ecdf_plot import plot_ecdf_differences

        return plot_ecdf_differences(
            self.credibilities, self.level, "credibility", self.failures
        )


def tarp(
    draws: CalibrationDraws,
    prior: VariableKPrior,
    *,
    distance: SetDistance | None = None,
    false_alarm_rate: float = 0.01,
) -> TARP:
    """Test the coverage of balls around random references.

    Args:
        draws: Pairs and draws.
        prior: Source of the references, and of the distance's scales.
        distance: Distance between sets; :func:`set_distance` with the prior's scales if
            None.
        false_alarm_rate: Of the check.
    """
    generator = draws.generator(5)
    if distance is None:
        rows = prior.sample((_NUM_SCALE_DRAWS,), generator).cpu()
        distance = set_distance(draws.layout, rows)
    from_prior = prior.sample((draws.num,), generator).cpu()
    cases = {
        "prior": (from_prior, draws.draws),
        "posterior": (draws.draws[0], draws.draws[1:]),
        "posterior given K": (draws.guides[0], draws.given_k),
    }
    found: dict[str, Array] = {}
    for name, (reference, rows) in cases.items():
        truth = distance(reference, draws.theta)
        others = _distances(distance, reference, rows)
        found[name] = pit(truth, others, generator)
    p_values = {name: rank_p_value(f) for name, f in found.items()}
    return TARP(p_values, false_alarm_rate, found)


def _distances(distance: SetDistance, reference: Tensor, rows: Tensor) -> Tensor:
    step = max(1, _CHUNK // rows.shape[1])
    return torch.cat([distance(reference, part) for part in rows.split(step)])
