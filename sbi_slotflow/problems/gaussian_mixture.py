r"""Gaussian mixtures on a line, such as velocities of galaxies.

.. math::
    p(v | \Theta) = \sum_{k=1}^{K} \pi_k\, N(v; \mu_k, \sigma_k^2), \qquad
    \pi \sim \mathrm{Dirichlet}(\alpha, \ldots, \alpha)

theta is [K, (mu, sigma, w)_1, ...], ascending in mu; the shares pi_k are the weights
w_k over their sum, see :mod:`sbi_slotflow.problems.points`.
"""

from dataclasses import dataclass

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Distribution, Gamma, Normal

from ..sets.checks import as_count
from ..sets.prior import VariableKPrior
from .base import log_uniform, uniform
from .points import Mixture, Points, PointsSimulator

__all__ = ["gaussian_mixture"]


@dataclass(frozen=True)
class _OneNormal:
    """Normal laws of components (mean, deviation, weight)."""

    def __call__(self, components: Tensor) -> Distribution:
        mean, deviation, _ = components.unbind(-1)
        return Normal(mean, deviation, validate_args=False)


def gaussian_mixture(
    *,
    num_points: int = 82,
    fewest: int | None = None,
    max_cardinality: int = 6,
    location: tuple[float, float] = (5.0, 40.0),
    scale: tuple[float, float] = (0.2, 8.0),
    concentration: float = 1.0,
) -> Points:
    """Make a Gaussian mixture, K uniform on 1..Kmax.

    The defaults suit the velocities of galaxies in 1,000 km/s (Roeder 1990).

    Args:
        num_points: Points of a set, at most.
        fewest: Points at least; all if None.
        max_cardinality: Largest cardinality Kmax.
        location: Ends of the uniform prior of a component's mean.
        scale: Ends of the log-uniform prior of its standard deviation.
        concentration: alpha of the Dirichlet prior of the shares.

    Returns:
        The problem: parameters ``mean``, ``deviation`` and ``weight``.

    Raises:
        TypeError, ValueError: If an argument is malformed.

    Example:
        >>> problem = gaussian_mixture(num_points=10)
        >>> problem.simulator(problem.prior.sample((3,))).shape
        torch.Size([3, 10, 2])
    """
    if not concentration > 0:
        raise ValueError(f"concentration must be positive, got {concentration}.")
    for name, (low, high), least in (
        ("location", location, -torch.inf),
        ("scale", scale, 0.0),
    ):
        if not least < low < high < torch.inf:
            raise ValueError(f"{name} must be an interval, got ({low}, {high}).")
    weight = Gamma(torch.tensor([float(concentration)]), torch.ones(1))
    prior = VariableKPrior(
        MultipleIndependent([uniform(*location), log_uniform(*scale), weight]),
        [0.0] + [1.0] * as_count(max_cardinality, "max_cardinality"),
        component_names=("mean", "deviation", "weight"),
    )
    simulator = PointsSimulator(
        Mixture(_OneNormal(), weight=2), prior, num_points, fewest
    )
    return Points(
        "gaussian_mixture",
        prior,
        simulator,
        weight="weight",
        places=("mean",),
        scales=("deviation",),
    )
