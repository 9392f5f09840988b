r"""Planets in radial velocities.

.. math::
    v(t) = \gamma + \sum_{k=1}^{K} A_k \left[ \cos(\nu_k(t) + \omega_k)
        + e_k \cos \omega_k \right], \qquad
    E - e \sin E = \frac{2 \pi t}{P} + M_0, \quad
    \tan \frac{\nu}{2} = \sqrt{\frac{1 + e}{1 - e}} \tan \frac{E}{2}

nu is the true anomaly, E the eccentric one, M_0 the mean one at t = 0, the middle of
the records, where it is known independently of the period. theta is
[K, level, gamma, (P, A, e, omega, M_0)_1, ...], ascending in the period P; the errors
that come with the velocities are multiplied by level.
"""

import math
from collections.abc import Callable

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Distribution

from ..sets.checks import as_count
from ..sets.prior import VariableKPrior
from .base import log_uniform, uniform
from .series import Series, SeriesSimulator

__all__ = ["kepler", "keplerian", "observing_nights", "radial_velocity"]

# Steps for Kepler's equation before the last one, which alone is differentiated.
_STEPS = 4
_TWO_PI = 2 * math.pi


def kepler(mean_anomaly: Tensor, eccentricity: Tensor) -> Tensor:
    r"""Solve :math:`E - e \sin E = M` for the eccentric anomaly E.

    Args:
        mean_anomaly: M in [-pi, pi].
        eccentricity: e in [0, 1), of a shape that broadcasts with M.

    Returns:
        E, of the broadcast shape, to rounding for e up to 0.99. First and second
        derivatives pass.

    Example:
        >>> E = kepler(torch.tensor([1.0]), torch.tensor([0.5]))
        >>> round(float(E - 0.5 * E.sin()), 6)
        1.0
    """
    mean, e = mean_anomaly.detach(), eccentricity.detach()
    found = mean + e * torch.sin(mean) / (
        1 - torch.sin(mean + e) + torch.sin(mean)
    ).abs().clamp(min=0.5)
    for _ in range(_STEPS):
        found = _halley(found, mean, e)
    # A step whose error is cubic has the first two derivatives of the solution.
    return _halley(found, mean_anomaly, eccentricity)


def _halley(found: Tensor, mean_anomaly: Tensor, eccentricity: Tensor) -> Tensor:
    """One step of Halley's method for Kepler's equation."""
    sine, cosine = eccentricity * found.sin(), eccentricity * found.cos()
    miss, slope = found - sine - mean_anomaly, 1 - cosine
    # The slope is small near the pericentre of long ellipses.
    return found - miss / (slope - 0.5 * miss * sine / slope)


def keplerian(components: Tensor, times: Tensor) -> Tensor:
    """Velocities ``(..., T)`` of planets (P, A, e, omega, M_0) ``(..., 5)``."""
    period, size, e, omega, phase = components.unsqueeze(-1).unbind(-2)
    turns = times / period + phase / _TWO_PI
    mean_anomaly = _TWO_PI * (turns - turns.round().detach())
    anomaly = kepler(mean_anomaly, e)
    cosine, sine = anomaly.cos(), anomaly.sin()
    share = 1 - e * cosine
    along, across = (cosine - e) / share, (1 - e * e).sqrt() * sine / share
    return size * ((along + e) * omega.cos() - across * omega.sin())


def observing_nights(
    num_epochs: int = 60, span: float = 400.0, fewest: int | None = None
) -> Callable[[int, torch.Generator], Tensor]:
    """Make schedules of nights, half a year on and half a year off.

    Args:
        num_epochs: Epochs T at most.
        span: Days from the first to the last.
        fewest: Epochs at least; all if None.

    Returns:
        A schedule: times in days about the middle and errors in m/s, log-uniform in
        1-3, shape ``(n, T, 2)``; epochs that are left out have an error of 0.
    """
    as_count(num_epochs, "num_epochs")
    least = num_epochs if fewest is None else as_count(fewest, "fewest")

    def draw(num: int, generator: torch.Generator) -> Tensor:
        shape = num, num_epochs
        level = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        start = torch.rand(num, 1, generator=generator, dtype=torch.float64)
        nights = level[0] * span
        # Half of the year is left: days of it are pressed together.
        season = (nights / 365.25 + start) % 1
        nights = nights - (365.25 * (season - 0.5)).clamp(min=0.0)
        # At night, within a tenth of a day.
        times = nights.clamp(min=0.0).floor() + 0.1 * level[1] - 0.5 * span
        errors = (math.log(3.0) * level[2]).exp()
        counts = torch.randint(least, num_epochs + 1, (num, 1), generator=generator)
        there = torch.arange(num_epochs) < counts
        return torch.stack([times, torch.where(there, errors, 0.0)], -1)

    return draw


def radial_velocity(
    *,
    max_cardinality: int = 3,
    schedule: Callable[[int, torch.Generator], Tensor] | None = None,
    periods: tuple[float, float] = (3.0, 300.0),
    cells: int = 256,
) -> Series:
    """Make the planet problem.

    ============  =========================  ==========
    parameter     prior                      unit
    ============  =========================  ==========
    K             uniform, 0..Kmax
    level         log-uniform, 0.7-2         the errors
    gamma         uniform, -50 to 50         m/s
    period        log-uniform, 3-300         days
    semi          log-uniform, 1-50          m/s
    eccentricity  uniform, 0-0.6
    omega, M0     uniform, 0-2 pi            radians
    ============  =========================  ==========

    Args:
        max_cardinality: Largest cardinality Kmax, at least one.
        schedule: Draws times in days and errors in m/s, ``(n, T, 2)``;
            :func:`observing_nights` with 60 epochs if None.
        periods: Shortest and longest period, in days.
        cells: Cells of the period.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = radial_velocity()
        >>> theta = problem.prior.sample((5,))
        >>> problem.simulator(theta).shape
        torch.Size([5, 60, 3])
    """
    as_count(max_cardinality, "max_cardinality")
    if not 0 < periods[0] < periods[1] < math.inf:
        raise ValueError(f"periods must ascend and be positive, got {periods}.")
    angle = uniform(0.0, _TWO_PI)
    parts: list[Distribution] = [
        log_uniform(*periods),
        log_uniform(1.0, 50.0),
        uniform(0.0, 0.6),
        angle,
        angle,
    ]
    shared: list[Distribution] = [log_uniform(0.7, 2.0), uniform(-50.0, 50.0)]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0] * (max_cardinality + 1),
        shared=MultipleIndependent(shared, validate_args=False),
        order_by=0,
        component_names=("period", "semi", "eccentricity", "omega", "M0"),
        shared_names=("level", "gamma"),
        periods={"omega": _TWO_PI, "M0": _TWO_PI},
    )

    def offset(shared: Tensor, times: Tensor) -> Tensor:
        return shared[..., 1:2] + torch.zeros_like(times)

    simulator = SeriesSimulator(
        keplerian,
        observing_nights() if schedule is None else schedule,
        prior.layout,
        background=offset,
        level=0,
    )
    return Series(
        "radial velocity",
        prior,
        simulator,
        cells=cells,
        linear=("semi", "omega"),
        polar=True,
        disc=("eccentricity", "omega", "M0"),
    )
