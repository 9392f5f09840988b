r"""The paper's architecture as options of :class:`~sbi_slotflow.slot_nn`.

Where the paper's text and its authors' code differ, this preset follows

- the text: couplings (the code has masked autoregressive layers with reversed instead
  of random permutations);
- the text: signals are cosines (the code generates sines); the encoder does not care,
  the simulator does;
- both: convolution strides 2, 2, 1 with kernels 8, 8, 5 (section 3.1; section 3.6 has
  kernel 8 and stride 2 throughout);
- the code: a global context of 2 x 256, which with the flow's residual networks gives
  the 31 million parameters (eq. 12 has 256);
- the code: frequencies are centred on the middle of the band, 2.75 Hz (the text says so
  too, but its formula subtracts 2.7);
- the text: weights w_phi = 2 and w_f = 3, Hungarian matching, the flow's loss averaged
  over components, no K in the slot contexts, tail bound 2 (which the weighted phase
  circle touches);
- neither for the noise: instead of regressing a sampled sigma, sigma has a density
  trained by likelihood, read from convolutions of its own.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..sets.marginals import Marginal
from .charts import Chart, check_angle
from .encoders import Encoding, Pool, SelfAttention, mlp, rms
from .spec import register

__all__ = ["PAPER", "CircleChart", "DualStreamEncoder", "make_front_end"]

_TWO_PI = 2 * math.pi

PAPER: dict[str, Any] = {
    "chart": "circle",
    "matching": "hungarian",
    "slots": "global",
    "phase_weight": 2.0,
    "frequency_weight": 3.0,
    "condition_on_cardinality": False,
    "mean_flow_loss": True,
    "hidden_features": 256,
    "trunk_features": None,
    "flow_layers": 8,
    "flow_hidden_features": 768,
    "flow_bins": 48,
    "flow_blocks": 2,
    "flow_network": "residual",
    "tail_bound": 2.0,
    "location_scale": False,
    "z_score_x": False,
    "encoder_options": {
        "channels": (32, 64, 128),
        "kernels": (8, 8, 5),
        "strides": ((2, 2, 1), (2, 2, 1)),
        "context_features": 512,
        "noise_stack": True,
        "residual": False,
        "centre_phase": False,
        "bands": None,
    },
}
"""Fields of :class:`~sbi_slotflow.slot_nn`."""


@register("chart")
class CircleChart(Chart):
    r"""The paper's coordinates on a circle.

    .. math::
        u = [A,\; w_\phi \cos\phi,\; w_\phi \sin\phi,\; w_f (f - f_0)]

    This is eq. 22 of the paper, with f_0 the middle of the band. A three-parameter
    component lies on a surface in R^4, so the flow's likelihood is unbounded above and
    is no density of (A, phi, f): :attr:`is_density` is False.

    Args:
        marginals: Prior marginals of amplitude, phase and frequency, in this order.
        phase_weight: Weight w_phi.
        frequency_weight: Weight w_f.

    Raises:
        ValueError: If there are not three parameters or the second is no phase.
    """

    kind = "circle"
    is_density = False

    def __init__(
        self,
        marginals: Sequence[Marginal],
        phase_weight: float = 2.0,
        frequency_weight: float = 3.0,
    ) -> None:
        super().__init__(marginals)
        if len(self.marginals) != 3:
            raise ValueError(
                "CircleChart needs the three parameters (amplitude, phase, frequency), "
                f"got {len(self.marginals)}."
            )
        check_angle(self.marginals[1])
        self.phase_weight, self.frequency_weight = phase_weight, frequency_weight
        low, high = self.marginals[2].bounds
        self.centre = 0.5 * (low + high)

    @property
    def num_features(self) -> int:
        """Four coordinates."""
        return 4

    def forward(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Map components to coordinates; the log-Jacobian is reported as zero."""
        amplitude, phase, frequency = components.unbind(-1)
        u = torch.stack(
            [
                amplitude,
                self.phase_weight * phase.cos(),
                self.phase_weight * phase.sin(),
                self.frequency_weight * (frequency - self.centre),
            ],
            dim=-1,
        )
        return u, torch.zeros_like(amplitude)

    def inverse(self, u: Tensor) -> Tensor:
        """Project onto the surface: the radius of the phase's point is dropped."""
        amplitude, x, y, frequency = u.unbind(-1)
        frequency = frequency / self.frequency_weight + self.centre
        phase = torch.atan2(y, x) % _TWO_PI
        values = torch.stack([amplitude, phase, frequency], -1)
        return self.marginals.clamp(values)

    def _options(self) -> dict[str, Any]:
        return {
            "phase_weight": self.phase_weight,
            "frequency_weight": self.frequency_weight,
        }


# First and last Fourier bin to keep, or None for all.
Band = tuple[int, int] | None


class FrontEnd(nn.Module):
    """Maps a stream ``(B, T)`` to ``(B, channels, positions)``, for convolutions.

    This one keeps the raw stream, as one channel.
    """

    channels: int = 1

    def __init__(self, length: int, centre_phase: bool, band: Band) -> None:
        super().__init__()
        self.length, self.centre_phase, self.band = length, centre_phase, band

    def forward(self, stream: Tensor) -> Tensor:
        return stream.unsqueeze(-2)


class _FrequencyDomain(FrontEnd):
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
        unit = rms(stream)
        power = (outside / unit[:, None, None]).square().mean((-2, -1))
        level = 0.5 * (power + 1e-12).log() + unit.log()
        inside = parts[..., first : last + 1]
        level = level[:, None, None].expand(-1, 1, inside.shape[-1])
        return torch.cat([inside, level], dim=-2)


class _TimeFrequencyDomain(FrontEnd):
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
    "time": FrontEnd,
    "frequency": _FrequencyDomain,
    "time-frequency": _TimeFrequencyDomain,
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
    """The paper's encoder of a long and a short record of one signal (section 3.1).

    Each stream passes through three convolutions, sinusoidal positions (eq. 6) and
    self-attention (eq. 7), and is pooled by mean, maximum and attention (eq. 8). The
    cardinality reads the first stream only (eq. 9); the slots read both (eq. 11-12).

    Args:
        lengths: Samples of each stream, in the order in which x concatenates them.
        domains: Domain in which each stream is read: ``"frequency"`` (real and
            imaginary part of the FFT), ``"time"`` or ``"time-frequency"`` (short-time
            Fourier transform).
        channels, kernels, strides: Of the three convolutions; strides of each stream.
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
        width, pooled = channels[-1], 3 * channels[-1]
        self.stacks = nn.ModuleList(stack(i) for i in streams)
        self.attentions = nn.ModuleList(attention() for _ in streams)
        self.pools = nn.ModuleList(Pool(width) for _ in streams)
        self.to_context = mlp(pooled * len(streams), context_features, context_features)
        self.cardinality_attention = attention()
        self.cardinality_pool = Pool(width)
        self.to_cardinality = mlp(pooled, hidden_features, hidden_features)
        self.noise_stack = stack(0) if noise_stack else None
        if noise_stack:
            self.noise_pool = Pool(width)
            self.to_noise = mlp(pooled, hidden_features, hidden_features)

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
