"""The paper's encoder of a long and a short record (section 3.1).

Each stream passes through three convolutions, sinusoidal positions (eq. 6) and
self-attention (eq. 7), and is pooled by mean, maximum and attention (eq. 8). The
cardinality reads the first stream only (eq. 9); the slots read both (eq. 11-12).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..encoders import Encoding, Pool, SelfAttention, projection
from ..spec import register

__all__ = [
    "DualStreamEncoder",
    "FrequencyDomain",
    "FrontEnd",
    "TimeDomain",
    "TimeFrequencyDomain",
    "make_front_end",
]


# First and last Fourier bin to keep, or None for all.
Band = tuple[int, int] | None


class FrontEnd(nn.Module):
    """Maps a stream ``(B, T)`` to ``(B, channels, positions)``, for convolutions."""

    channels: int = 1

    def __init__(self, length: int, centre_phase: bool, band: Band) -> None:
        super().__init__()
        self.length = length
        self.centre_phase = centre_phase
        self.band = band


class TimeDomain(FrontEnd):
    """The raw stream, one channel."""

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``(B, T)`` to ``(B, 1, T)``."""
        return stream.unsqueeze(-2)


class FrequencyDomain(FrontEnd):
    """Real and imaginary part of the orthonormal FFT, two channels.

    With a ``band``, bins outside it are dropped and a third channel carries the log of
    their root mean square, the noise level, to every bin.
    """

    turn: Tensor

    def __init__(self, length: int, centre_phase: bool, band: Band) -> None:
        super().__init__(length, centre_phase, band)
        self.channels = 2 if band is None else 3
        if band is not None and not 0 <= band[0] < band[1] <= length // 2:
            raise ValueError(
                f"band must be two ascending bins within 0..{length // 2}, got {band}."
            )
        # A tone at mid-record has spectral phase zero after this turn of each bin.
        bins = torch.arange(length // 2 + 1, dtype=torch.float64)
        angle = 2 * math.pi * bins * ((length - 1) / 2) / length
        self.register_buffer(
            "turn", torch.stack([angle.cos(), angle.sin()]).float(), persistent=False
        )

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``(B, T)`` to ``(B, channels, bins)``."""
        spectrum = torch.fft.rfft(stream, norm="ortho")
        parts = torch.stack([spectrum.real, spectrum.imag], dim=-2)
        if self.centre_phase:
            (real, imag), (cos, sin) = parts.unbind(-2), self.turn
            parts = torch.stack([real * cos - imag * sin, real * sin + imag * cos], -2)
        if self.band is None:
            return parts
        first, last = self.band
        outside = torch.cat([parts[..., :first], parts[..., last + 1 :]], dim=-1)
        if not outside.shape[-1]:  # the band is the whole spectrum
            outside = parts
        level = 0.5 * (outside.square().mean((-2, -1)) + 1e-12).log()
        inside = parts[..., first : last + 1]
        level = level[:, None, None].expand(-1, 1, inside.shape[-1])
        return torch.cat([inside, level], dim=-2)


class TimeFrequencyDomain(FrontEnd):
    """Short-time Fourier transform: real and imaginary bins as channels over time.

    Windows are Hann, about the square root of the record long, half overlapping. A
    ``band`` has no effect: its bins are those of the whole record.
    """

    window: Tensor

    def __init__(self, length: int, centre_phase: bool, band: Band) -> None:
        super().__init__(length, centre_phase, band)
        self.width = max(8, 2 * round(math.sqrt(length) / 2))
        self.channels = 2 * (self.width // 2 + 1)
        self.register_buffer("window", torch.hann_window(self.width), persistent=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``(B, T)`` to ``(B, 2 (width // 2 + 1), frames)``."""
        spectrum = torch.stft(
            stream,
            self.width,
            hop_length=self.width // 2,
            window=self.window,
            normalized=True,
            return_complex=True,
        )
        return torch.cat([spectrum.real, spectrum.imag], dim=-2)


_FRONT_ENDS: dict[str, type[FrontEnd]] = {
    "time": TimeDomain,
    "frequency": FrequencyDomain,
    "time-frequency": TimeFrequencyDomain,
}


def make_front_end(
    domain: str, length: int, centre_phase: bool = False, band: Band = None
) -> FrontEnd:
    """Make the front end of a domain."""
    if domain not in _FRONT_ENDS:
        raise ValueError(
            f"domain must be one of {sorted(_FRONT_ENDS)}, got {domain!r}."
        )
    return _FRONT_ENDS[domain](length, centre_phase, band)


@register("encoder")
class DualStreamEncoder(nn.Module):
    """Encoder for a long and a short record of the same signal.

    Args:
        lengths: Samples of each stream, in the order in which x concatenates them.
        domains: Domain in which each stream is read: ``"frequency"`` (real and
            imaginary part of the FFT), ``"time"`` or ``"time-frequency"`` (short-time
            Fourier transform).
        channels: Channels of the three convolutions.
        kernels: Their kernel sizes.
        strides: Their strides, three for each stream.
        num_heads: Attention heads.
        hidden_features: Length of the cardinality embedding.
        context_features: Length of the slots' context (``hidden_features`` if None).
        noise_stack: Whether the shared parameters get convolutions of their own on
            the first stream, as the paper's noise encoder has; otherwise they read
            the context and the cardinality embedding.
        residual: Whether attention is added to its input instead of replacing it.
        centre_phase: Whether a Fourier transform's phase is referred to the middle of
            its stream, where a tone's bins vary smoothly.
        bands: For each stream, the first and last Fourier bin to keep, or None for all.
    """

    kind: ClassVar[str] = "dual_stream"

    def __init__(
        self,
        lengths: Sequence[int],
        domains: Sequence[str] = ("frequency", "time"),
        *,
        channels: Sequence[int] = (32, 64, 128),
        kernels: Sequence[int] = (8, 8, 5),
        strides: Sequence[Sequence[int]] = ((2, 2, 1), (2, 2, 1)),
        num_heads: int = 4,
        hidden_features: int = 256,
        context_features: int | None = None,
        noise_stack: bool = False,
        residual: bool = False,
        centre_phase: bool = False,
        bands: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        super().__init__()
        bands = [None] * len(lengths) if bands is None else bands
        each = {"domains": domains, "strides": strides, "bands": bands}
        for name, value in each.items():
            if len(value) != len(lengths):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(lengths)} "
                    f"streams, got {list(value)}."
                )
        context_features = context_features or hidden_features
        self.lengths = tuple(lengths)
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "lengths": list(lengths),
            "domains": list(domains),
            "channels": list(channels),
            "kernels": list(kernels),
            "strides": [list(s) for s in strides],
            "num_heads": num_heads,
            "hidden_features": hidden_features,
            "context_features": context_features,
            "noise_stack": noise_stack,
            "residual": residual,
            "centre_phase": centre_phase,
            "bands": [None if band is None else list(band) for band in bands],
        }

        def stack(i: int) -> "_ConvStack":
            band = bands[i]
            kept = None if band is None else (int(band[0]), int(band[1]))
            front_end = make_front_end(domains[i], lengths[i], centre_phase, kept)
            return _ConvStack(front_end, channels, kernels, strides[i])

        def attention() -> "SelfAttention":
            return SelfAttention(channels[-1], num_heads, residual)

        streams = range(len(lengths))
        width = channels[-1]
        self.stacks = nn.ModuleList(stack(i) for i in streams)
        self.attentions = nn.ModuleList(attention() for _ in streams)
        self.pools = nn.ModuleList(Pool(width) for _ in streams)
        self.to_context = projection(3 * width * len(streams), context_features)
        self.cardinality_attention = attention()
        self.cardinality_pool = Pool(width)
        self.to_cardinality = projection(3 * width, hidden_features)
        self.noise_stack = stack(0) if noise_stack else None
        if noise_stack:
            self.noise_pool = Pool(width)
            self.to_noise = projection(3 * width, hidden_features)

    def forward(self, x: Tensor) -> Encoding:
        """Embed x ``(B, T)``, the streams concatenated."""
        if x.shape[-1] != sum(self.lengths):
            raise ValueError(
                f"x must have {sum(self.lengths)} entries, streams of "
                f"{list(self.lengths)}, got {x.shape[-1]}."
            )
        streams = x.split(self.lengths, dim=-1)
        tokens = [
            attention(stack(stream))
            for stream, stack, attention in zip(
                streams, self.stacks, self.attentions, strict=True
            )
        ]
        pooled = [pool(t) for pool, t in zip(self.pools, tokens, strict=True)]
        context = self.to_context(torch.cat(pooled, dim=-1))
        cardinality = self.to_cardinality(
            self.cardinality_pool(self.cardinality_attention(tokens[0]))
        )
        if self.noise_stack is None:
            shared = torch.cat([context, cardinality], dim=-1)
        else:
            shared = self.to_noise(self.noise_pool(self.noise_stack(streams[0])))
        return Encoding(context, cardinality, shared, torch.cat(tokens, dim=-2))


class _ConvStack(nn.Module):
    """Three convolutions with GELU, then sinusoidal positions: (B, T) -> (B, L, C)."""

    positions: Tensor

    def __init__(
        self,
        front_end: FrontEnd,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        self.front_end = front_end
        widths = [self.front_end.channels, *channels]
        layers: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            layers += [
                nn.Conv1d(widths[i], widths[i + 1], kernel, stride, kernel // 2),
                nn.GELU(),
            ]
        self.convolutions = nn.Sequential(*layers)
        with torch.no_grad():
            probe = self.convolutions(front_end(torch.zeros(1, front_end.length)))
        self.register_buffer(
            "positions", _positions(probe.shape[-1], channels[-1]), persistent=False
        )

    def forward(self, stream: Tensor) -> Tensor:
        return self.convolutions(self.front_end(stream)).mT + self.positions


def _positions(length: int, width: int) -> Tensor:
    """Sinusoidal positions (eq. 6), shape ``(length, width)``."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length).unsqueeze(-1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :width]
