"""Tokens of a band: Fourier amplitudes of the records at the cells' frequencies."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

from ...nn.spec import register
from .fit import SineFit
from .grid import Grid, unit_circle
from .pursuit import SinePursuit

__all__ = ["BandTokens", "ChirpTransform"]

# The first record's amplitudes are taken at that many points of each cell; edges lie at
# every other of them, so many at most from even.
_POINTS, _FARTHEST = 10, 4
_FOUND_CHANNELS = 5
# Stands for no residual at all; x is standardised.
_SILENCE = 1e-12


@register("front end")
class BandTokens(nn.Module):
    r"""Fourier amplitudes of several records at the tokens' frequencies.

    Token i stands for the i-th of L equal cells of the band. The first record is read
    at the cell's middle and lower edge, and under a Hann taper, which keeps the leakage
    of far tones out; further, shorter records are read at the middle. Amplitudes come
    as they are and in units of the noise, :math:`\mathrm{asinh}`; the noise level is
    that of the tapered records outside the band.

    Cells' edges lie where the tapered spectrum is least, up to 0.4 of a cell from even.

    With ``pursuit``, that many components at most are first found by matching pursuit
    (:class:`~.pursuit.SinePursuit`): tokens then also show
    which were found in their cell and the residual's amplitudes, and the levels what
    each component earned.

    Records may be complex, their real parts before their imaginary ones. A band that
    is all of their spectrum is a circle.

    Args:
        lengths, rates: Samples, and samples per second, of each record.
        band: Lowest and highest frequency.
        num_tokens: Number L of tokens.
        pursuit: Components to look for beforehand; 0 for none.
        analytic: Whether records are complex.
    """

    kind: ClassVar[str] = "band"
    noise: Tensor
    position: Tensor

    def __init__(
        self,
        lengths: Sequence[int],
        rates: Sequence[float],
        band: Sequence[float],
        num_tokens: int,
        pursuit: int = 0,
        analytic: bool = False,
    ) -> None:
        super().__init__()
        lists = {"lengths": [*lengths], "rates": [*rates], "band": [*band]}
        numbers = {"num_tokens": num_tokens, "pursuit": pursuit, "analytic": analytic}
        self.spec: dict[str, Any] = {"kind": self.kind, **lists, **numbers}
        self.analytic = analytic
        self.circular = analytic and math.isclose(band[1] - band[0], rates[0])
        self.pursue = None
        if pursuit:
            sizes = zip(lengths, rates, strict=True)
            grids = tuple(Grid(num / rate, rate) for num, rate in sizes)
            fit = SineFit(grids, analytic=analytic)
            self.pursue = SinePursuit(fit, (band[0], band[1]), pursuit)
        self._low, self._width = band[0], (band[1] - band[0]) / num_tokens
        self.lengths = tuple((2 if analytic else 1) * length for length in lengths)
        self.num_tokens, self.num_data = num_tokens, sum(self.lengths)
        self._readings = len(lengths) + 2
        self.spectra = nn.ModuleList()
        for i, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
            hann = torch.hann_window(length, dtype=torch.float64)
            if i == 0:
                tapers = torch.stack([torch.ones_like(hann), hann])
                points = band[0], self._width / _POINTS, _POINTS * num_tokens
            else:
                tapers = torch.ones(1, length, dtype=torch.float64)
                points = band[0] + 0.5 * self._width, self._width, num_tokens
            self.spectra.append(ChirpTransform(tapers, rate, *points))
            self._keep(f"taper_{i}", hann)
            bins = torch.arange(length // 2 + 1, dtype=torch.float64) * rate / length
            if analytic:
                bins = torch.fft.fftfreq(length, 1 / rate, dtype=torch.float64)
            margin = 8 * rate / length
            outside = (bins < band[0] - margin) | (bins > band[1] + margin)
            if not outside.any():  # the band is the whole spectrum
                outside = torch.ones_like(outside)
            outside[0] = outside[-1] = False
            # Averages the power outside the band, in units of the noise's.
            share = outside / (outside.sum() * 0.375 * self.lengths[i])
            self._keep(f"outside_{i}", share.repeat_interleave(2).unsqueeze(-1))
        shifts = torch.arange(-_FARTHEST, _FARTHEST + 1, 2, dtype=torch.float64)
        edges = torch.arange(num_tokens + 1, dtype=torch.float64)
        self.register_buffer("edge_shifts", shifts / _POINTS, persistent=False)
        self.register_buffer("even_edges", edges, persistent=False)
        # Noise of a reading's real or imaginary part, in units of sigma.
        noise = [math.sqrt((1 if analytic else 2) / length) for length in lengths]
        noise = [noise[0], noise[0], noise[0] * math.sqrt(1.5), *noise[1:]]
        self._keep("noise", torch.tensor(noise).repeat_interleave(2))
        self._keep("position", torch.linspace(-1.0, 1.0, num_tokens))
        self.num_levels = len(lengths)
        self.channels = 5 * self._readings + len(lengths) + 3
        if pursuit:
            self.num_levels += pursuit + 3
            self.channels += 3 * self._readings + _FOUND_CHANNELS

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels ``(B, L, C)``, levels ``(B, S)`` and edges ``(B, L + 1)`` of x."""
        amplitudes, tapered = self._read(x)
        level = torch.cat(
            [self._noise_level(i, r) for i, r in enumerate(x.split(self.lengths, -1))],
            dim=-1,
        )
        sigma = level.mean(-1).exp()
        levels_everywhere = level.unsqueeze(-1).expand(-1, -1, self.num_tokens)
        shifts = self._edge_shifts(tapered)
        edges = self.get_buffer("even_edges") + shifts
        shifts = shifts.to(x)
        channels = [
            torch.stack([shifts[:, :-1], shifts[:, 1:]], -2),
            amplitudes,
            *self._in_units_of_noise(amplitudes, sigma),
            levels_everywhere,
            self.position.expand(len(x), 1, -1),
        ]
        if self.pursue is not None:
            more, earned = self._pursued(x, edges)
            channels += more
            level = torch.cat([level, earned], -1)
        return torch.cat(channels, dim=-2).mT, level, edges

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes ``(B, 2 R, L)`` of R readings, and the first tapered spectrum."""
        records = zip(self.spectra, x.split(self.lengths, -1), strict=True)
        first, *others = (self._spectrum(*pair) for pair in records)
        flat, tapered = first.unbind(-2)
        middle = slice(_POINTS // 2, None, _POINTS)
        readings = [flat[:, middle], flat[:, ::_POINTS], tapered[:, middle]]
        readings += [other.squeeze(-2) for other in others]
        both = torch.view_as_real(torch.stack(readings, -2)).mT
        return both.flatten(-3, -2), tapered

    def _spectrum(self, transform: nn.Module, record: Tensor) -> Tensor:
        if not self.analytic:
            return transform(record)
        real, imaginary = (transform(part) for part in record.chunk(2, -1))
        # A complex line has all of its power at one frequency.
        return 0.5 * (real + 1j * imaginary)

    def _noise_level(self, i: int, record: Tensor) -> Tensor:
        """Log noise levels ``(B, 1)`` of records, by their spectra outside the band."""
        taper = self.get_buffer(f"taper_{i}")
        if self.analytic:
            spectrum = torch.fft.fft(torch.complex(*record.chunk(2, -1)) * taper)
        else:
            spectrum = torch.fft.rfft(record * taper)
        power = torch.view_as_real(spectrum).flatten(-2).square()
        power = power @ self.get_buffer(f"outside_{i}")
        # Less than a 10,000th of the data's scale, to which x is standardised, is none.
        return 0.5 * (power + 1e-8).log()

    def _in_units_of_noise(
        self, amplitudes: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Amplitudes ``(B, 2 R, L)`` and log powers ``(B, R, L)``."""
        relative = amplitudes / (sigma[:, None, None] * self.noise[:, None])
        power = relative.unflatten(-2, (-1, 2)).square().sum(-2)
        return relative.asinh(), (1 + power).log()

    @torch.no_grad()
    def _pursued(self, x: Tensor, edges: Tensor) -> tuple[list[Tensor], Tensor]:
        """Channels of what the pursuit found and left, and levels ``(B, P + 3)``."""
        assert self.pursue is not None
        pursued = self.pursue(x)
        sigma = pursued.residual.square().mean(-1).sqrt().clamp(min=_SILENCE)
        left = self._in_units_of_noise(self._read(pursued.residual)[0], sigma)
        position = (pursued.frequency - self._low) / self._width
        cell = torch.searchsorted(edges, position.contiguous(), right=True) - 1
        cell = cell.clamp(0, self.num_tokens - 1)
        strength = pursued.phasor.abs() / (sigma * self.noise[0]).unsqueeze(-1)
        place = torch.arange(cell.shape[-1]).to(sigma).expand_as(cell)
        offset, there = position - cell - 0.5, torch.ones_like(strength)
        each = [there, offset, strength.asinh(), pursued.gain.asinh(), 0.1 * place]
        each = torch.stack(each, dim=-2)
        each = torch.where(pursued.found.unsqueeze(-2), each, 0.0)
        found = x.new_zeros(len(x), _FOUND_CHANNELS, self.num_tokens)
        found.scatter_add_(-1, cell.unsqueeze(-2).expand_as(each), each.to(x))
        # What one more component anywhere would be worth, up to a constant.
        worth = (0.5 * left[1][:, 0].exp()).clamp(max=30.0).logsumexp(-1)
        count = 0.1 * pursued.found.sum(-1)
        levels = torch.stack([count, sigma.log(), 0.1 * worth], -1)
        earned = torch.cat([0.3 * pursued.gain.asinh(), levels], -1)
        return [*left, found], earned.to(x)

    @torch.no_grad()
    def _edge_shifts(self, tapered: Tensor) -> Tensor:
        """Edges ``(B, L + 1)`` less even ones, from a spectrum at all points."""
        around = tapered[:, _POINTS - _FARTHEST :].unfold(1, 2 * _FARTHEST + 1, _POINTS)
        power = torch.view_as_real(around[..., ::2]).square().sum(-1)
        shifts = self.get_buffer("edge_shifts")[power.argmin(-1)]
        return nn.functional.pad(shifts, (1, 1))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.float(), persistent=False)


class ChirpTransform(nn.Module):
    r"""Amplitudes of a record on an even grid of frequencies, however fine.

    .. math::
        X_j = \frac{2}{\sum_n w_n} \sum_n w_n x_n\,
            e^{-2\pi i (f_0 + j \Delta)\, \tau_n / r}, \qquad
        \tau_n = n - \tfrac{N - 1}{2}, \quad j = 0 \ldots P - 1

    is, with :math:`j\tau = \tfrac12 [j^2 + \tau^2 - (j - \tau)^2]`, a convolution with
    a chirp between two multiplications (Bluestein 1970; Rabiner, Schafer and Rader
    1969): three short FFTs in place of a matrix of N P numbers.

    Tapers w are float64, of shape ``(W, N)``.
    """

    def __init__(
        self, tapers: Tensor, rate: float, start: float, step: float, num: int
    ) -> None:
        super().__init__()
        length = tapers.shape[-1]
        self.num, self._size = num, int(next_fast_len(length + num - 1) or 0)
        middle = 0.5 * (length - 1)
        tau = torch.arange(length, dtype=torch.float64) - middle
        j = torch.arange(num, dtype=torch.float64)
        scale = 2 / tapers.sum(-1, keepdim=True) * tapers
        before = scale * unit_circle(-(start + 0.5 * step * tau) * tau / rate)
        after = unit_circle(-0.5 * step * j.square() / rate)
        # Where the circular convolution wraps, lags are negative.
        lag = torch.arange(self._size, dtype=torch.float64)
        lag = torch.where(lag < num, lag, lag - self._size) + middle
        kernel = torch.fft.fft(unit_circle(0.5 * step * lag.square() / rate))
        for name, values in (("before", before), ("kernel", kernel), ("after", after)):
            pairs = torch.view_as_real(values).float()
            self.register_buffer(name, pairs, persistent=False)

    def forward(self, record: Tensor) -> Tensor:
        """Map a record ``(B, N)`` to amplitudes ``(B, W, P)``, complex."""
        before, kernel, after = (
            torch.view_as_complex(self.get_buffer(name))
            for name in ("before", "kernel", "after")
        )
        spectrum = torch.fft.fft(record.unsqueeze(-2) * before, n=self._size)
        return torch.fft.ifft(spectrum * kernel)[..., : self.num] * after
