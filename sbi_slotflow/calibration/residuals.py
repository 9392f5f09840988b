r"""Posterior-predictive checks of signals: what is left of x.

With one posterior draw :math:`\tilde\theta` for each x, the residual
:math:`r = x - s(\tilde\theta)` is noise of the model if the posterior and the model are
right: :math:`(\tilde\theta, x)` has the distribution of :math:`(\theta, x)` (Johnson
2007). So numbers of r, made white if the noise model knows how, have exactly the
distribution that they have for noise simulated at :math:`\tilde\theta`, and their
ranks among such noise are uniform. For each stream of x these are

- power: the mean square,
- whiteness: the sum of squared autocorrelations at lags up to 10 (Box and Pierce 1970),
- peak: the largest ordinate of the periodogram over its mean (Fisher 1929), which sees
  a tone that was left out.

On simulated x this tests the posterior, on observed x the model too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..problems.base import Problem
from ..problems.noise import PoissonNoise
from ..sets.checks import as_count, check_finite
from .check import Array, Check, pit, rank_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ResidualStream", "Residuals", "residuals"]

_MOST_LAGS = 10
_MOST_BANDS = 24
# Entries of simulated noise held at once.
_CHUNK = 8_000_000


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """Residuals of one stream, averaged over observations.

    Attributes:
        frequency: Middle of each band, in cycles per sample, shape ``(F,)``.
        spectrum: Residuals' power in each band over that of the model's noise.
        spectrum_range: Where 95 % of such numbers lie if all is right, ``(2, F)``.
        autocorrelation: At lags 1, 2, ..., shape ``(L,)``.
        autocorrelation_range: Likewise, ``(2, L)``.
    """

    frequency: Array
    spectrum: Array
    spectrum_range: Array
    autocorrelation: Array
    autocorrelation_range: Array


@dataclass(frozen=True, eq=False)
class Residuals(Check):
    """Posterior-predictive checks of residuals.

    Attributes:
        ranks: Ranks among simulated noise, by statistic and stream, each ``(n,)``.
        streams: Mean spectrum and autocorrelation of each stream.
    """

    title: ClassVar[str] = "Residuals of signals"
    explanation: ClassVar[str] = (
        "Spectrum of what is left of x after a posterior draw's signal is taken away, "
        "over that of the model's noise, and its autocorrelation. Shaded: 95 % of what "
        "the model's noise gives."
    )

    ranks: dict[str, Array]
    streams: tuple[ResidualStream, ...]

    @property
    def numbers(self) -> dict[str, Any]:
        """Mean ranks, spectra and autocorrelations."""
        found: dict[str, Any] = {
            name: {"num": len(u), "mean_rank": float(u.mean())}
            for name, u in self.ranks.items()
        }
        shown = ("spectrum", "autocorrelation")
        found["streams"] = [
            {name: getattr(stream, name).tolist() for name in shown}
            for stream in self.streams
        ]
        return found

    def plot(self) -> "Figure":
        """Plot the residuals' spectrum and autocorrelation, a row for each stream."""
        from ..plots.style import POSTERIOR, SHADES, Figure, dress

        num = len(self.streams)
        figure = Figure(figsize=(8.0, 2.5 * num + 0.3), layout="constrained")
        panels = figure.subplots(num, 2, squeeze=False)
        for i, ((left, right), stream) in enumerate(
            zip(panels, self.streams, strict=True)
        ):
            label = "" if num == 1 else f", stream {i + 1}"
            at, style = stream.frequency, {"color": POSTERIOR, "ms": 3, "lw": 1}
            left.fill_between(at, *stream.spectrum_range, color=SHADES[0.9], lw=0)
            left.plot(at, stream.spectrum, "o-", **style)
            left.axhline(1.0, color="black", lw=0.6)
            last = i == num - 1
            x_label = "frequency (cycles per sample)" if last else ""
            dress(left, x_label, "power / noise", f"spectrum{label}")
            lags = np.arange(1, len(stream.autocorrelation) + 1)
            low, high = stream.autocorrelation_range
            right.vlines(lags, low, high, color=SHADES[0.9], lw=9)
            right.plot(lags, stream.autocorrelation, "o", color=POSTERIOR, ms=4)
            right.axhline(0.0, color="black", lw=0.6)
            right.set(xticks=lags, xlim=(0.4, len(lags) + 0.6))
            dress(right, "lag (samples)" if last else "", "autocorrelation", label[2:])
        return figure


def residuals(
    theta: Tensor,
    x: Tensor,
    problem: Problem,
    *,
    num_noise: int = 49,
    streams: Sequence[int] | None = None,
    seed: int = 0,
    false_alarm_rate: float = 0.01,
) -> Residuals:
    """Compare residuals with the model's noise.

    Args:
        theta: One posterior draw for each observation, shape ``(n, E)``.
        x: Observations, shape ``(n, T)``.
        problem: Problem whose simulator has ``signal`` and ``noise``.
        num_noise: Simulations of the noise for each observation.
        streams: Lengths of the streams of x; those of ``problem.streams`` if None.
        seed: Seed of the noise.
        false_alarm_rate: Of the check.

    Raises:
        TypeError: If the simulator has no ``signal`` or ``noise``.
        ValueError: If shapes don't fit.
    """
    simulator: Any = problem.simulator
    for name in ("signal", "noise"):
        if not hasattr(simulator, name):
            raise TypeError(
                f"problem.simulator must have {name}, got {type(simulator).__name__}."
            )
    x = x.flatten(1) if x.ndim > 2 else x
    if theta.ndim != 2 or x.ndim != 2 or len(theta) != len(x) or not len(x):
        raise ValueError(
            "theta and x must have shapes (n, E) and (n, T), n >= 1, got "
            f"{tuple(theta.shape)} and {tuple(x.shape)}."
        )
    num_noise = as_count(num_noise, "num_noise")
    check_finite(theta, "theta")
    check_finite(x)
    if streams is None:
        streams = [stream.num_samples for stream in problem.streams]
    lengths = list(streams)
    if sum(lengths) != x.shape[-1] or min(lengths) < 4:
        raise ValueError(
            f"streams must be lengths of at least 4 that add up to {x.shape[-1]}, got "
            f"{lengths}."
        )
    generator = torch.Generator().manual_seed(seed)
    theta, x = theta.detach().cpu(), x.detach().cpu()
    step = max(1, _CHUNK // (num_noise * x.shape[-1]))
    measured = []
    for rows, data in zip(theta.split(step), x.split(step), strict=True):
        signal = simulator.signal(rows).flatten(1)
        shape = (num_noise, *signal.shape)
        shared = problem.layout.unpack(rows).shared.expand(num_noise, -1, -1)
        # Counts, for one, depend on the signal.
        noise = simulator.noise.sample(
            signal.expand(shape).flatten(0, 1), shared.flatten(0, 1), generator
        )
        both = torch.cat([(data - signal).unsqueeze(0), noise.reshape(shape)]).double()
        both = _white(simulator.noise, both, signal, shared[:1])
        measured.append([_measure(part) for part in both.split(lengths, dim=-1)])
    ranks: dict[str, Array] = {}
    found = []
    for i in range(len(lengths)):
        parts = [block[i] for block in measured]
        joined = [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]
        label = "" if len(lengths) == 1 else f", stream {i + 1}"
        for name, values in zip(("power", "whiteness", "peak"), joined, strict=False):
            ranks[name + label] = pit(values[0], values[1:], generator)
        found.append(_averaged(*joined[3:]))
    p_values = {name: rank_p_value(u) for name, u in ranks.items()}
    return Residuals(p_values, false_alarm_rate, ranks, tuple(found))


def _white(noise: Any, both: Tensor, signal: Tensor, shared: Tensor) -> Tensor:
    """Residuals ``(R, n, T)`` where noise of the model is white, if it can be.

    What shows there is seen in noise of any colour; its ranks are right in any case.
    """
    if hasattr(noise, "whiten"):
        return noise.whiten(both, shared.double())
    if isinstance(noise, PoissonNoise):
        largest = signal.amax(-1, keepdim=True).clamp(min=1.0).double()
        return both / torch.maximum(signal.double(), 1e-3 * largest).sqrt()
    return both


def _measure(noise: Tensor) -> tuple[Tensor, ...]:
    """Measure noise ``(R, n, T)``.

    Power, whiteness and peak, each ``(R, n)``, then the power in bands of frequency
    and the autocorrelation, ``(R, n, F)`` and ``(R, n, L)``.
    """
    size = noise.shape[-1]
    power = noise.square().mean(-1)
    positive = power.clamp(min=1e-300)
    ordinates = torch.fft.rfft(noise)[..., 1:].abs().square()
    peak = ordinates.amax(-1) / ordinates.mean(-1).clamp(min=1e-300)
    lags = min(_MOST_LAGS, max(1, size // 4))
    padded = torch.fft.rfft(noise, n=2 * size).abs().square()
    products = torch.fft.irfft(padded)[..., 1 : lags + 1] / size
    correlation = products / positive.unsqueeze(-1)
    parts = ordinates.tensor_split(min(_MOST_BANDS, size // 2), dim=-1)
    bands = torch.stack([part.mean(-1) for part in parts], -1)
    return power, correlation.square().sum(-1), peak, bands, correlation


def _averaged(bands: Tensor, correlation: Tensor) -> ResidualStream:
    """Averages over observations of ``(1 + R, n, F)`` and ``(1 + R, n, L)``."""
    expected = bands[1:].mean(0, keepdim=True).clamp(min=1e-300)
    spectrum = (bands / expected).mean(1).numpy()
    lagged = correlation.mean(1).numpy()
    num = spectrum.shape[-1]
    ends = [0.025, 0.975]
    return ResidualStream(
        (np.arange(num) + 0.5) / (2 * num),
        spectrum[0],
        np.quantile(spectrum[1:], ends, axis=0),
        lagged[0],
        np.quantile(lagged[1:], ends, axis=0),
    )
