r"""Where does a record hold what its prior does not make?

Each stream of x is measured by its own noise floor: the powers of its spectrum (Hann's
window) by their median, and the squares of its samples by theirs, once a filter has
taken away what the prior makes. That multiplies the transform by
:math:`1 / \max(1, r(f))`, r the mean of the plain spectrum's power over its median in
training data. The numbers v are the logarithms of the largest and the mean of both in
narrow blocks and the mean in wide ones; kurtosis and first autocorrelations of what the
filter leaves; powers and floors of the streams. The score follows from the largest

.. math::
    t = (v - q_{0.9}) / (q_{0.99} - q_{0.9}),

q the quantiles in training data, which no unit changes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["LEAST", "Scan", "tail"]

LEAST = 32  # samples below which a stream is not scanned
_NARROW, _STRETCHES, _WIDE = 128, 64, 16
_LAGS = (1, 2, 3)
_CHUNK = 1_000
_TINY = 1e-300  # below any square of a float32


def tail(values: Tensor) -> Tensor:
    """Origin and unit ``(2, ...)`` of the upper tail of values ``(N, ...)``."""
    ends = torch.quantile(values, values.new_tensor([0.9, 0.99]), dim=0)
    # The values are logarithms or correlations.
    return torch.stack([ends[0], (ends[1] - ends[0]).clamp(min=1e-6)])


class Scan(NamedTuple):
    """What is usual in the streams of training data.

    Attributes:
        lengths: Samples of each stream, int64, shape ``(S,)``.
        gains: The filters' factors, stream after stream.
        limits: Origin and unit of each number's tail, shape ``(2, F)``.
        ends: The same of the largest t, shape ``(2,)``.
    """

    lengths: Tensor
    gains: Tensor
    limits: Tensor
    ends: Tensor

    @classmethod
    def fit(cls, x: Tensor, lengths: Sequence[int]) -> "Scan":
        """Learn from training data ``(N, T)``, N a hundred or more."""
        gains = []
        for stream in x.detach().cpu().split(list(lengths), dim=-1):
            power = torch.fft.rfft(stream.double()).abs().square()
            gains.append(1 / _over_median(power)[0].mean(0).clamp(min=1))
        plain = torch.tensor([0.0, 1.0])
        scan = cls(torch.tensor(lengths), torch.cat(gains).float(), plain, plain)
        numbers = torch.cat([scan.numbers(part) for part in x.split(_CHUNK)])
        scan = scan._replace(limits=tail(numbers).float())
        return scan._replace(ends=tail(scan.scores(x)))

    def scores(self, x: Tensor) -> Tensor:
        """Largest t of data ``(B, T)``, by its own tail; float64, shape ``(B,)``."""
        (origin, unit), (start, step) = self.limits, self.ends
        parts = [(self.numbers(part) - origin) / unit for part in x.split(_CHUNK)]
        return (torch.cat([part.amax(-1) for part in parts]) - start) / step

    def numbers(self, x: Tensor) -> Tensor:
        """All that is looked at, float64, shape ``(B, F)``."""
        lengths = self.lengths.tolist()
        gains = self.gains.double().split([n // 2 + 1 for n in lengths])
        powers, signed, floors = [], [], []
        streams = x.detach().cpu().double().split(lengths, -1)
        for stream, gain in zip(streams, gains, strict=True):
            size = stream.shape[-1]
            if size < LEAST:
                continue
            windowed = stream * torch.hann_window(size, dtype=stream.dtype)
            power = torch.fft.rfft(windowed).abs().square()
            powers += _blocks(_over_median(power)[0], _NARROW)
            left = torch.fft.irfft(torch.fft.rfft(stream) * gain, n=size)
            square, floor = _over_median(left.square())
            powers += _blocks(square, _STRETCHES)
            floors.append(floor.log())
            signed.append((stream.square().mean(-1, keepdim=True) + _TINY).log())
            # At the ends a filter leaves of a loud signal what is no noise.
            left = left[..., size // 32 : -(size // 32)]
            left = left / (left.square().mean(-1, keepdim=True) + _TINY).sqrt()
            powers.append(left.pow(4).mean(-1, keepdim=True))
            lagged = [left[..., lag:] * left[..., :-lag] for lag in _LAGS]
            signed += [product.mean(-1, keepdim=True) for product in lagged]
        signed += floors[:1] + [floor - floors[0] for floor in floors[1:]]
        ends = torch.cat(signed, dim=-1)
        return torch.cat([(torch.cat(powers, -1) + _TINY).log(), ends, -ends], dim=-1)


def _over_median(power: Tensor) -> tuple[Tensor, Tensor]:
    floor = power.median(-1, keepdim=True).values + _TINY
    return power / floor, floor


def _blocks(power: Tensor, num: int) -> list[Tensor]:
    """The largest and the mean in narrow blocks, and the mean in wide ones."""
    width = -(-power.shape[-1] // num)
    narrow = pad(power, (0, -power.shape[-1] % width)).unflatten(-1, (-1, width))
    mean = narrow.mean(-1)
    wide = pad(mean, (0, -mean.shape[-1] % _WIDE)).unflatten(-1, (-1, _WIDE)).mean(-1)
    return [mean, wide] if width == 1 else [narrow.amax(-1), mean, wide]
