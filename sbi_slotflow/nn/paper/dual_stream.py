"""The paper's encoder of a long and a short record (section 3.1)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..encoders import Encoding, Pool, SelfAttention, projection
from ..registry import register
from .domains import FrontEnd, make_front_end

__all__ = ["DualStreamEncoder"]


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
        for name, value in (
            ("domains", domains),
            ("strides", strides),
            ("bands", bands),
        ):
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
            front_end = make_front_end(
                domains[i],
                lengths[i],
                centre_phase,
                None if band is None else (band[0], band[1]),
            )
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
