r"""Tests of accuracy with random points (TARP, Lemos, Coogan et al. 2023).

The share of posterior draws that are closer to a reference point r than the truth is,

.. math::
    f = \Pr_{\theta' \sim q(\cdot | x)}\big(d(\theta', r) < d(\theta, r)\big),

is uniform if q is right, for any r that does not know the truth. With the distance
between sets of :func:`set_distance` it tests K, components
and shared parameters together. ``sbi.diagnostics.run_tarp`` takes that distance too and
gives the same curve for the same draws and references; here ties are randomised and the
verdict is that of :mod:`~sbi_slotflow.calibration.check`.

References are draws from the prior, a draw from the posterior itself that is used for
nothing else, and one given the true K, ranked with draws given K. The closer the
reference, the more the ranks depend on the posterior's width.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..seeding import generator_for
from ..sets.layout import ThetaLayout
from ..sets.matching import hungarian
from ..sets.prior import VariableKPrior
from .check import Array, RankCheck, pit
from .draws import CalibrationDraws, above_rounding

__all__ = ["TARP", "SetDistance", "set_distance", "tarp"]

# Pairs of sets handled at once.
_CHUNK = 20_000
_NUM_SCALE_DRAWS = 2_000


@dataclass(frozen=True)
class SetDistance:
    r"""Distance between sets of different size (OSPA, Schuhmacher et al. 2008).

    .. math::
        d(X, Y)^2 = \frac{1}{n} \left[ \min_\pi \sum_{i \le m} \min(c,
            \|x_i - y_{\pi(i)}\|)^2 + c^2 (n - m) \right] + \|s_X - s_Y\|^2,
        \quad m \le n \text{ the two cardinalities}

    Parameters are divided by ``scale`` first. It is a metric on sets; labels and the
    padding of the rows do not matter.

    Attributes:
        layout: Layout of theta.
        scale: Scale of each component parameter, shape ``(D,)``.
        shared_scale: Scale of each shared parameter, shape ``(S,)``.
        cutoff: Penalty c of a missing component, in units of the scales.
        jitter: Uniform noise up to this is added, to break ties. Sets of one size all
            have the same distance to an empty set, and TARP counts ties as misses.
        generator: Source of the jitter.
    """

    layout: ThetaLayout
    scale: Tensor
    shared_scale: Tensor
    cutoff: float = 2.0
    jitter: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: generator_for(0))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances of rows.

        Raises:
            ValueError: If ``b`` holds a fractional K: sbi's ``run_tarp`` rescales
                theta unless ``z_score_theta=False``. The references ``a`` may hold
                one (sbi draws them uniformly); it is rounded.
        """
        if (b[..., 0] != b[..., 0].round()).any():
            raise ValueError(
                "theta holds a fractional cardinality; call run_tarp with "
                "z_score_theta=False, the distance has scales of its own."
            )
        a, b = torch.broadcast_tensors(a, b)
        shape, size = a.shape[:-1], self.layout.size
        first, second = (self.layout.unpack(r.reshape(-1, size)) for r in (a, b))
        gaps = first.components.unsqueeze(-2) - second.components.unsqueeze(-3)
        cost = (gaps / self.scale.to(a)).square().sum(-1).clamp(max=self.cutoff**2)
        # One missing component costs c^2, two missing ones nothing.
        one, both = first.mask.unsqueeze(-1), second.mask.unsqueeze(-2)
        cost = torch.where(one & both, cost, self.cutoff**2)
        cost = torch.where(one | both, cost, 0.0)
        # Cells of padding cost nothing, so the whole matrix is matched.
        order = hungarian(-cost, torch.full((len(cost),), cost.shape[-1]))
        best = cost.gather(-1, order.unsqueeze(-1)).sum((-2, -1))
        larger = torch.maximum(first.cardinality, second.cardinality).clamp(min=1)
        shared = (first.shared - second.shared) / self.shared_scale.to(a)
        squared = best / larger + shared.square().sum(-1)
        noise = torch.rand(shape, generator=self.generator).to(a)
        return squared.sqrt().reshape(shape) + self.jitter * noise


def set_distance(
    layout: ThetaLayout, theta: Tensor, cutoff: float = 2.0, seed: int = 0
) -> SetDistance:
    """Make a set distance for ``run_tarp(..., distance=..., z_score_theta=False)``.

    Raises:
        ValueError: If theta is malformed or holds fewer than two components.
    """
    layout.validate(theta)
    parts = layout.unpack(theta)
    active = parts.components[parts.mask]
    if len(active) < 2:
        raise ValueError("theta must hold at least two components to give a scale.")
    shared = parts.shared.flatten(0, -2)
    spread = shared.std(0) if layout.num_shared else shared.new_zeros(0)
    return SetDistance(
        layout,
        above_rounding(active.std(0), active.abs().amax(0)),
        above_rounding(spread, shared.abs().amax(0)),
        cutoff,
        jitter=1e-5,
        generator=generator_for(seed),
    )


class TARP(RankCheck):
    """Coverage of balls around random references: ``ranks`` are the shares f."""

    title: ClassVar[str] = "TARP with a distance between sets"
    x_label: ClassVar[str] = "credibility"
    explanation: ClassVar[str] = (
        "The line is the expected coverage of balls around reference points, less "
        "their credibility. Panels say what the reference points are drawn from."
    )


def tarp(
    draws: CalibrationDraws,
    prior: VariableKPrior,
    *,
    distance: SetDistance | None = None,
    false_alarm_rate: float = 0.01,
) -> TARP:
    """Test the coverage of balls around random references."""
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
        parts = rows.split(max(1, _CHUNK // draws.num))
        others = torch.cat([distance(reference, part) for part in parts])
        found[name] = pit(distance(reference, draws.theta), others, generator)
    return TARP.of(found, false_alarm_rate)
