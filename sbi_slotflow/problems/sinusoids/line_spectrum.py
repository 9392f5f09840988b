r"""Line spectra: complex exponentials in noise, a test of frequency estimation.

.. math::
    x_n = \sum_{k=1}^{K} A_k\, e^{i (2\pi f_k n + \phi_k)} + \epsilon_n, \qquad
    n = 0 \ldots T - 1,

with complex white noise whose power is that of the signal less ``snr`` decibels,

.. math::
    \mathrm{E}|\epsilon_n|^2 = 2\sigma^2 =
        10^{-\mathrm{snr}/10}\, \frac1T \sum_n |s_n|^2 .

x holds the real parts, then the imaginary ones. theta is
[K, snr, (A, phi, f)_1, ..., (A, phi, f)_Kmax], ascending in f; frequencies, in units of
the sampling rate, lie on the circle [-1/2, 1/2). The noise level follows from theta and
is no parameter of its own, so the likelihood is exact.

The protocol is that of DeepFreq (Izacard, Mohan and Fernandez-Granda 2019), with one
difference: their test signals' lines are neighbours of one another, which
:func:`clustered` draws, where this prior's are uniform given their separation.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    HalfNormal,
    Independent,
    TransformedDistribution,
)

from ...nn.encoders import TokenEncoder
from ...seeding import forked_rng
from ...sets.prior import VariableKPrior
from ..base import uniform
from ..simulator import AdditiveSimulator, white_log_prob
from .fit import SineFit
from .grid import Grid, SineSignal
from .problem import Oscillations

__all__ = [
    "LineSimulator",
    "LineSpectrum",
    "RelativeNoise",
    "clustered",
    "line_spectrum",
]

_FLOOR, _SNR = 0.1, (0.0, 50.0)
_CLUSTER_SPREAD = 0.05


@dataclass(frozen=True)
class RelativeNoise:
    """White noise of a level relative to the signal, the shared parameter, in dB."""

    def scale(self, signal: Tensor, shared: Tensor) -> Tensor:
        """Standard deviation ``(...)`` of the entries of x."""
        ratio = 10 ** (-0.1 * shared[..., 0])
        return (signal.square().mean(-1) * ratio).sqrt()

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal``."""
        noise = torch.empty_like(signal).normal_(generator=generator)
        return noise.mul_(self.scale(signal, shared).unsqueeze(-1))

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Raise NotImplementedError: :class:`LineSimulator` has the likelihood."""
        raise NotImplementedError("the noise level follows from the signal.")


class LineSimulator(AdditiveSimulator):
    """Simulator whose noise follows the signal; see :class:`AdditiveSimulator`."""

    noise: RelativeNoise

    def noise_log_prob(
        self, residual: Tensor, signal: Tensor, shared: Tensor
    ) -> Tensor:
        """Log density of residuals ``(B, T)``; -inf where there is no signal."""
        return white_log_prob(residual, self.noise.scale(signal, shared))


@dataclass(frozen=True)
class LineSpectrum(Oscillations):
    """The line-spectrum problem: complex lines on the circle of frequencies."""

    analytic: ClassVar[bool] = True

    @property
    def reference_time(self) -> float:
        """Middle of the record, that of its first and its last sample."""
        return self.grids[0].middle

    def build_token_encoder(self, pursuit: bool = True, **options: Any) -> TokenEncoder:
        """As :meth:`Oscillations.build_token_encoder`, with a pursuit unless told."""
        return super().build_token_encoder(pursuit, **options)

    def build_fit(self) -> SineFit:
        """Return the least squares of complex exponentials."""
        return SineFit(self.grids, ridge=1e-2, analytic=True)


def line_spectrum(*, num_samples: int = 50, max_cardinality: int = 10) -> LineSpectrum:
    """Make the line-spectrum problem.

    ==========  ==================================  =================
    parameter   prior                               unit
    ==========  ==================================  =================
    K           uniform, 1..Kmax
    snr         uniform, 0-50                       dB
    amplitude   0.1 + absolute value of N(0, 1)
    phase       uniform, 0-2 pi                     rad
    frequency   uniform, -1/2 to 1/2, at least      the sampling rate
                1 / T apart around the circle
    ==========  ==================================  =================

    Args:
        num_samples: Complex samples T.
        max_cardinality: Largest cardinality Kmax.

    Raises:
        ValueError: If ``num_samples`` is less than two or ``max_cardinality`` lines do
            not fit.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}.")
    if not 1 <= max_cardinality < num_samples:
        raise ValueError(
            f"max_cardinality must lie in 1..{num_samples - 1}, where lines fit their "
            f"separation, got {max_cardinality}."
        )
    amplitude = TransformedDistribution(
        HalfNormal(torch.ones(1)), [AffineTransform(_FLOOR, 1.0)]
    )
    parts = [amplitude, uniform(0.0, 2 * math.pi), uniform(-0.5, 0.5)]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        [0.0] + [1.0] * max_cardinality,
        shared=Independent(uniform(*_SNR), 1),
        min_separation=1 / num_samples,
        order_by=2,
        component_names=("amplitude", "phase", "frequency"),
        shared_names=("snr",),
        periods={"phase": 2 * math.pi, "frequency": 1.0},
    )
    grid = Grid(float(num_samples), 1.0)
    signal = SineSignal((grid,), analytic=True)
    simulator = LineSimulator(signal, RelativeNoise(), prior.layout)
    return LineSpectrum("line_spectrum", prior, simulator, (grid,))


def clustered(
    problem: LineSpectrum, num: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw rows whose lines are neighbours, as those of DeepFreq's test signals.

    Each line lies :math:`d + |g|` to either side of the one drawn before, d the least
    separation and g normal with a standard deviation of 0.05; those nearer than d to
    any line are drawn again. All else is as in the prior.

    Returns:
        Theta rows, shape ``(num, E)``.
    """
    layout, least = problem.layout, problem.prior.min_separation or 0.0
    rows = problem.prior.sample((num,), generator)
    parts = layout.unpack(rows)
    with forked_rng(generator):
        places = torch.rand(rows.shape[0], layout.max_cardinality).double() - 0.5
        for k in range(1, layout.max_cardinality):
            left = torch.arange(num)
            while len(left):
                jump = _CLUSTER_SPREAD * torch.randn(len(left)).double()
                jump = jump + least * torch.where(jump < 0, -1.0, 1.0)
                tried = places[left, k - 1] + jump
                gap = (places[left, :k] - tried.unsqueeze(-1) + 0.5) % 1 - 0.5
                places[left, k] = tried
                left = left[(gap.abs() < least).any(-1)]
    components = parts.components.clone()
    components[..., 2] = ((places + 0.5) % 1 - 0.5).float()
    return layout.canonical(layout.pack(parts.cardinality, components, parts.shared))
