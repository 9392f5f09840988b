"""The domain in which a stream is read: time, frequency or time-frequency.

Each front end maps a stream ``(B, T)`` to channels ``(B, channels, positions)`` for the
convolutions that follow.
"""

import math

import torch
from torch import Tensor, nn

__all__ = [
    "FrequencyDomain",
    "FrontEnd",
    "TimeDomain",
    "TimeFrequencyDomain",
    "make_front_end",
]


class FrontEnd(nn.Module):
    """Base of the front ends.

    Args:
        length: Samples T of the stream.
        centre_phase: Whether Fourier phases are referred to the middle of the record.
        band: First and last bin of a Fourier transform to keep; None keeps all.

    Attributes:
        channels: Channels of the output.
    """

    channels: int = 1

    def __init__(
        self,
        length: int,
        centre_phase: bool = False,
        band: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.centre_phase = centre_phase
        self.band = None if band is None else (int(band[0]), int(band[1]))


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

    def __init__(
        self,
        length: int,
        centre_phase: bool = False,
        band: tuple[int, int] | None = None,
    ) -> None:
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

    def __init__(
        self,
        length: int,
        centre_phase: bool = False,
        band: tuple[int, int] | None = None,
    ) -> None:
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
    domain: str,
    length: int,
    centre_phase: bool = False,
    band: tuple[int, int] | None = None,
) -> FrontEnd:
    """Make the front end of a domain.

    Args:
        domain: ``"time"``, ``"frequency"`` or ``"time-frequency"``.
        length: Samples of the stream.
        centre_phase: See :class:`FrontEnd`.
        band: See :class:`FrontEnd`.

    Raises:
        ValueError: If the domain is unknown or the band does not fit.
    """
    if domain not in _FRONT_ENDS:
        raise ValueError(
            f"domain must be one of {sorted(_FRONT_ENDS)}, got {domain!r}."
        )
    return _FRONT_ENDS[domain](length, centre_phase, band)
