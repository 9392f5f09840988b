r"""Pulses in a noisy trace.

.. math::
    x(t) = \sum_{k=1}^{K} A_k \exp\left( -\frac{(t - t_k)^2}{2 w_k^2} \right)
        + \epsilon, \qquad \epsilon \sim N(0, \sigma^2)

The trace covers a unit of time, [0, 1) without its end. theta is
[K, sigma, (t, w, A)_1, ..., (t, w, A)_Kmax], ascending in t. Pulses may lie on top of
one another, and the weakest drown in the noise, so that K is truly uncertain.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Independent

from ..nn.spec import register
from ..sets.checks import as_count
from ..sets.prior import VariableKPrior
from .base import log_uniform, uniform
from .placed import Trace
from .simulator import AdditiveSimulator, WhiteNoise

__all__ = ["SpikeSignal", "spikes"]

_CELLS = 64


@register("signal")
@dataclass(frozen=True)
class SpikeSignal:
    """Gaussian pulses of components (time, width, amplitude), at T samples."""

    num_samples: int

    kind: ClassVar[str] = "pulses"

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which a file rebuilds the signal."""
        return {"kind": self.kind, "num_samples": self.num_samples}

    @property
    def times(self) -> Tensor:
        """Sample times, float64, shape ``(T,)``."""
        return torch.arange(self.num_samples, dtype=torch.float64) / self.num_samples

    def __call__(self, components: Tensor) -> Tensor:
        """Map components ``(..., 3)`` to signals ``(..., T)``."""
        time, width, amplitude = components.unsqueeze(-1).unbind(-2)
        deviation = (self.times.to(components) - time) / width
        return amplitude * torch.exp(-0.5 * deviation.square())


def spikes(*, num_samples: int = 512, max_cardinality: int = 6) -> Trace:
    """Make the spike problem.

    ==========  ====================  ===============
    parameter   prior                 unit
    ==========  ====================  ===============
    K           uniform, 0..Kmax
    sigma       uniform, 0.1-0.5
    time        uniform, 0-1          the trace
    width       log-uniform,          the trace
                0.006-0.03
    amplitude   uniform, 0.5-2
    ==========  ====================  ===============

    Args:
        num_samples: Samples T of the trace, a multiple of 64.
        max_cardinality: Largest cardinality Kmax, at least one.

    Raises:
        ValueError: If an argument is out of range.
    """
    if num_samples < 1 or num_samples % _CELLS:
        raise ValueError(
            f"num_samples must be a positive multiple of {_CELLS}, got {num_samples}."
        )
    as_count(max_cardinality, "max_cardinality")
    parts = [uniform(0.0, 1.0), log_uniform(0.006, 0.03), uniform(0.5, 2.0)]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0] * (max_cardinality + 1),
        shared=Independent(uniform(0.1, 0.5), 1),
        order_by=0,
        component_names=("time", "width", "amplitude"),
        shared_names=("sigma",),
    )
    simulator = AdditiveSimulator(SpikeSignal(num_samples), WhiteNoise(), prior.layout)
    return Trace("spikes", prior, simulator, _CELLS, linear=("amplitude",))
