"""The domain in which a stream is read: time, frequency or time-frequency.

Each front end maps a stream ``(B, T)`` to channels ``(B, channels, positions)`` for the
convolutions that follow.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["FRONT_ENDS", "FrequencyDomain", "TimeDomain", "TimeFrequencyDomain"]


class FrontEnd(nn.Module):
    """Base of the front ends.

    Args:
        length: Samples T of the stream.
        centre_phase: Whether to refer phases to the middle of the record.

    Attributes:
        channels: Channels of the output.
    """

    channels: int = 1

    def __init__(self, length: int, centre_phase: bool = False) -> None:
        super().__init__()
        self.length = length
        self.centre_phase = centre_phase


class TimeDomain(FrontEnd):
    """The raw stream, one channel."""

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``(B, T)`` to ``(B, 1, T)``."""
        return stream.unsqueeze(-2)


class FrequencyDomain(FrontEnd):
    """Real and imaginary part of the orthonormal FFT, two channels."""

    channels = 2
    turn: Tensor

    def __init__(self, length: int, centre_phase: bool = False) -> None:
        super().__init__(length, centre_phase)
        # A tone at mid-record has spectral phase zero after this turn of each bin.
        bins = torch.arange(length // 2 + 1, dtype=torch.float64)
        angle = 2 * math.pi * bins * ((length - 1) / 2) / length
        self.register_buffer(
            "turn", torch.stack([angle.cos(), angle.sin()]).float(), persistent=False
        )

    def forward(self, stream: Tensor) -> Tensor:
        """Map ``(B, T)`` to ``(B, 2, T // 2 + 1)``."""
        spectrum = torch.fft.rfft(stream, norm="ortho")
        real, imag = spectrum.real, spectrum.imag
        if self.centre_phase:
            cos, sin = self.turn
            real, imag = real * cos - imag * sin, real * sin + imag * cos
        return torch.stack([real, imag], dim=-2)


class TimeFrequencyDomain(FrontEnd):
    """Short-time Fourier transform: real and imaginary bins as channels over time.

    Windows are Hann, about the square root of the record long, half overlapping.
    """

    window: Tensor

    def __init__(self, length: int, centre_phase: bool = False) -> None:
        super().__init__(length, centre_phase)
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


FRONT_ENDS: dict[str, type[FrontEnd]] = {
    "time": TimeDomain,
    "frequency": FrequencyDomain,
    "time-frequency": TimeFrequencyDomain,
}
