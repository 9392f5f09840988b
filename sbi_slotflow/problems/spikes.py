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
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor
from torch.distributions import (
    Distribution,
    ExpTransform,
    TransformedDistribution,
    Uniform,
)

from ..nn.registry import register
from ..sets.marginals import Marginals
from ..sets.prior import VariableKPrior
from .least_squares import AdditiveFit
from .noise import WhiteNoise
from .simulator import AdditiveSimulator
from .trace import Trace

__all__ = ["SpikeFit", "SpikeSignal", "Spikes", "spikes"]

_CELLS = 64
_WIDTH = (0.006, 0.03)
_AMPLITUDE = (0.5, 2.0)
_SIGMA = (0.1, 0.5)


@dataclass(frozen=True)
class SpikeSignal:
    """Gaussian pulses of components (time, width, amplitude).

    Attributes:
        num_samples: Number T of samples.
    """

    num_samples: int

    @property
    def times(self) -> Tensor:
        """Sample times, float64, shape ``(T,)``."""
        return torch.arange(self.num_samples, dtype=torch.float64) / self.num_samples

    def __call__(self, components: Tensor) -> Tensor:
        """Map components ``(..., 3)`` to signals ``(..., T)``."""
        time, width, amplitude = components.unsqueeze(-1).unbind(-2)
        deviation = (self.times.to(components) - time) / width
        return amplitude * torch.exp(-0.5 * deviation.square())


@register("fit")
@dataclass(frozen=True)
class SpikeFit(AdditiveFit):
    """Least squares of a :class:`SpikeSignal`, which a file can describe."""

    kind: ClassVar[str] = "spikes"

    @property
    def spec(self) -> dict[str, Any]:
        """Description from which :meth:`from_spec` rebuilds the fit."""
        assert isinstance(self.component_signal, SpikeSignal)
        assert isinstance(self.marginals, Marginals)
        return {
            "kind": self.kind,
            "num_samples": self.component_signal.num_samples,
            **self.marginals.spec,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "SpikeFit":
        """Rebuild a fit from :attr:`spec`."""
        return cls(SpikeSignal(spec["num_samples"]), Marginals.from_spec(spec))


@dataclass(frozen=True)
class Spikes(Trace):
    """The spike problem."""

    def build_fit(self) -> SpikeFit:
        """Return the least squares of pulses."""
        return SpikeFit(SpikeSignal(self.num_data), self.prior.component_marginals)


def spikes(*, num_samples: int = 512, max_cardinality: int = 6) -> Spikes:
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
        max_cardinality: Largest cardinality Kmax.

    Raises:
        ValueError: If ``num_samples`` is no multiple of 64 or ``max_cardinality`` is
            less than one.
    """
    if num_samples < 1 or num_samples % _CELLS:
        raise ValueError(
            f"num_samples must be a positive multiple of {_CELLS}, got {num_samples}."
        )
    if max_cardinality < 1:
        raise ValueError(f"max_cardinality must be at least 1, got {max_cardinality}.")
    low, high = _column(_WIDTH)
    parts: list[Distribution] = [
        Uniform(torch.zeros(1), torch.ones(1)),
        TransformedDistribution(Uniform(low.log(), high.log()), [ExpTransform()]),
        Uniform(*_column(_AMPLITUDE)),
    ]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [1.0] * (max_cardinality + 1),
        shared=BoxUniform(*_column(_SIGMA)),
        order_by=0,
        component_names=("time", "width", "amplitude"),
        shared_names=("sigma",),
    )
    simulator = AdditiveSimulator(SpikeSignal(num_samples), WhiteNoise(), prior.layout)
    return Spikes("spikes", prior, simulator, _CELLS)


def _column(bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return torch.tensor([bounds[0]]), torch.tensor([bounds[1]])
