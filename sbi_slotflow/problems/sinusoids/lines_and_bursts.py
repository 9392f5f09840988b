r"""Spectral lines and bursts in one noisy trace.

.. math::
    x(t) = \sum_{k=1}^{K_{line}} A_k \cos(2 \pi f_k t + \phi_k)
        + \sum_{k=1}^{K_{burst}} h_k \exp\left(-\frac{(t - t_k)^2}{2 w_k^2}\right)
        + \epsilon, \qquad \epsilon \sim N(0, \sigma^2)

The trace has 20 s at 25.6 Hz. A line fills the trace and one cell of frequency, a burst
fills all low frequencies and a few cells of time: neither is found well while the other
is taken for noise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Independent

from ...nn.spec import register
from ...sets.checks import as_count
from ...sets.prior import VariableKPrior
from ..base import log_uniform, uniform
from ..classes import Classes
from ..placed import Trace
from ..simulator import AdditiveSimulator, WhiteNoise
from .grid import Grid
from .problem import sinusoids

__all__ = ["BurstSignal", "lines_and_bursts"]

_GRID = Grid(20.0, 25.6)
_CELLS = 64
_SIGMA = (0.5, 1.0)


@register("signal")
@dataclass(frozen=True)
class BurstSignal:
    """Gaussian bursts of components (time, width, height), on a grid of times."""

    duration: float
    num_samples: int

    kind: ClassVar[str] = "bursts"

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which a file rebuilds the signal."""
        return {
            "kind": self.kind,
            "duration": self.duration,
            "num_samples": self.num_samples,
        }

    def __call__(self, components: Tensor) -> Tensor:
        """Map components ``(..., 3)`` to signals ``(..., T)``."""
        time, width, height = components.unsqueeze(-1).unbind(-2)
        step = self.duration / self.num_samples
        times = step * torch.arange(self.num_samples, dtype=torch.float64)
        away = (times.to(components) - time) / width
        return height * torch.exp(-0.5 * away.square())


def lines_and_bursts(*, max_lines: int = 3, max_bursts: int = 2) -> Classes:
    """Make the problem of lines and bursts.

    =========  ==========  ======================  =======
    class      parameter   prior                   unit
    =========  ==========  ======================  =======
    line       K           uniform, 0..max_lines
    line       amplitude   log-uniform, 0.2-2
    line       phase       uniform, 0-2 pi         rad
    line       frequency   uniform, 0.5-4          Hz
    burst      K           uniform, 0..max_bursts
    burst      time        uniform, 0-20           s
    burst      width       log-uniform, 0.1-0.5    s
    burst      height      log-uniform, 1-8
    shared     sigma       uniform, 0.5-1
    =========  ==========  ======================  =======

    Args:
        max_lines: Largest number of lines, at least one.
        max_bursts: Largest number of bursts, at least one.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = lines_and_bursts()
        >>> problem.layout.names[:4]
        ['K_line', 'K_burst', 'sigma', 'line.amplitude_1']
        >>> problem.simulator(problem.prior.sample((2,))).shape
        torch.Size([2, 512])
    """
    as_count(max_lines, "max_lines")
    as_count(max_bursts, "max_bursts")
    lines = sinusoids(
        "crowded",
        grids=_GRID,
        cardinality=[1.0] * (max_lines + 1),
        amplitude=(0.2, 2.0),
        frequency=(0.5, 4.0),
        sigma=_SIGMA,
    )
    parts = [
        uniform(0.0, _GRID.duration),
        log_uniform(0.1, 0.5),
        log_uniform(1.0, 8.0),
    ]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0] * (max_bursts + 1),
        shared=Independent(uniform(*_SIGMA), 1),
        component_names=("time", "width", "height"),
        shared_names=("sigma",),
    )
    signal = BurstSignal(_GRID.duration, _GRID.num_samples)
    simulator = AdditiveSimulator(signal, WhiteNoise(), prior.layout)
    bursts = Trace("bursts", prior, simulator, _CELLS, linear=("height",))
    return Classes("lines_and_bursts", {"line": lines, "burst": bursts})
