r"""Spectra of records from which the strongest periodic components are taken, in turn.

A component of frequency f is, for what a network is told, a Gaussian process: H
harmonics whose amplitudes have zero mean and deviations that fall off,

.. math::
    C_f(t, t') = \sum_{h=1}^{H} (\rho^{h - 1} A)^2 \cos 2 \pi h f (t - t'), \qquad
    M = \left( 1 + \sum_j C_{f_j} \right)^{-1}

in units of the errors, and with a mean that may be anything. M takes out what is known,
and a further sinusoid explains :math:`\Delta\chi^2(f) = v^\top N^{-1} v` with
:math:`v = W^\top M y` and :math:`N = W^\top M W`, W its cosine and sine. The frequency
that explains most is the next to be taken; A is its amplitude. Those found before move
a little, each given the others. Weak components then show beside strong ones, and how
much each further one explains tells their number.

Example:
    >>> time = torch.linspace(-50.0, 50.0, 40, dtype=torch.float64)
    >>> value = 9 * (6.28 * 0.11 * time).cos() + 5 * (6.28 * 0.31 * time).sin()
    >>> x = torch.stack([time, value, torch.ones(40)], -1)[None]
    >>> found = prewhitened(x, torch.arange(0.05, 0.45, 0.004).double(), num=2)
    >>> [round(float(f), 2) for f in found.frequencies[0]]
    [0.11, 0.31]

See Also:
    :class:`.encoders.PeriodogramTokens`, which reads the spectra.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["NUM_NUMBERS", "Prewhitened", "prewhitened"]

# Harmonics H of a component, and how their usual amplitudes fall off.
_HARMONICS, _DECAY = 4, 0.5
# Highest peaks of a spectrum that are told, and how far apart peaks are in points.
_PEAKS, _APART = 4, 5
# Frequencies that are tried between two of the grid's, at first and later.
_FINE, _POLISH = 17, 9
NUM_NUMBERS = 4 + 2 * _PEAKS
"""Numbers that tell of each spectrum."""


class Prewhitened(NamedTuple):
    """B records with 0 to J components taken out."""

    power: Tensor  # What a sinusoid explains, float32, (B, J + 1, F)
    frequencies: Tensor  # Those taken out, (B, J)
    numbers: Tensor  # What tells of each spectrum, (B, J + 1, NUM_NUMBERS)


def prewhitened(x: Tensor, frequencies: Tensor, num: int) -> Prewhitened:
    """Take ``num`` components out of records ``(B, T, 3)``.

    Frequencies ``(F,)`` are the grid of the spectra.
    """
    record = _Record(x)
    grid = record.waves(frequencies.expand(len(x), -1), 1)
    # How far a frequency of the grid is from its farther neighbour, as a share of it.
    apart = functional.pad(frequencies.log().diff().abs(), (1, 1))
    apart = torch.maximum(apart[1:], apart[:-1])
    steps: list[Tensor] = []
    found: list[Tensor] = []
    columns: list[Tensor] = []
    cost = size = record.data.new_zeros(len(x))
    power, numbers = [], []
    for j in range(num + 1):
        weigh, log_det = record.without(columns)
        left = (weigh @ record.data.unsqueeze(-1)).squeeze(-1)
        chi = (record.data * left).sum(-1).clamp(min=0.0)
        spectrum, _ = _explained(grid[:, :, 0], weigh, left)
        power.append(spectrum)
        before, cost = cost, chi + log_det
        gain = before - cost if j else torch.zeros_like(cost)
        numbers.append(_numbers(spectrum, chi, record.count, log_det, gain, size))
        if j == num:
            break
        place = spectrum.argmax(-1)
        steps.append(apart[place])
        best = record.nearby(frequencies[place], weigh, left, steps[-1], _FINE)
        new, size = record.columns(best, weigh, left)
        found, columns = [*found, best], [*columns, new]
        for i in range(j + 1 if j else 0):
            others = columns[:i] + columns[i + 1 :]
            weigh, _ = record.without(others)
            left = (weigh @ record.data.unsqueeze(-1)).squeeze(-1)
            found[i] = record.nearby(found[i], weigh, left, 0.5 * steps[i], _POLISH)
            columns[i], size = record.columns(found[i], weigh, left)
    nothing = x.new_zeros(len(x), 0, dtype=torch.float64)
    return Prewhitened(
        torch.stack(power, 1),
        torch.stack(found, 1) if found else nothing,
        torch.stack(numbers, 1),
    )


class _Record:
    """Records over their errors, less their means."""

    def __init__(self, x: Tensor) -> None:
        self.time, value, error = x.double().unbind(-1)
        there = error > 0
        weight = torch.where(there, 1 / torch.where(there, error, 1.0), 0.0)
        norm = weight.norm(dim=-1, keepdim=True)
        unit = weight / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        data = value * weight
        self.data = (data - (data * unit).sum(-1, keepdim=True) * unit).float()
        self.count = there.sum(-1).clamp(min=1).float()
        # Weights of about one.
        self.weight = unit.float() * self.count.sqrt().unsqueeze(-1)
        unit = unit.float()
        identity = torch.eye(x.shape[1]).to(unit)
        self.project = identity - unit.unsqueeze(-1) * unit.unsqueeze(-2)

    def waves(self, frequencies: Tensor, num: int) -> Tensor:
        """Cosines and sines ``(B, F, num, 2, T)`` of harmonics of ``(B, F)``."""
        turns = self.time.unsqueeze(1) * frequencies.unsqueeze(-1)
        # Whole turns say nothing, and float32 is fast.
        angle = (2 * math.pi * (turns - turns.round())).float()
        first = angle.cos(), angle.sin()
        each = [first]
        for _ in range(num - 1):
            cosine, sine = each[-1]
            turned = cosine * first[0] - sine * first[1]
            each.append((turned, sine * first[0] + cosine * first[1]))
        waves = torch.stack([torch.stack(pair, 2) for pair in each], 2)
        return waves * self.weight[:, None, None, None]

    def without(self, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
        """M ``(B, T, T)`` of components ``(B, m, T)`` each, and log det of 1 + C."""
        if not columns:
            return self.project, torch.zeros_like(self.count)
        known = torch.cat(columns, 1) @ self.project
        gram = torch.eye(known.shape[1]).to(known) + known @ known.mT
        factor = torch.linalg.cholesky(gram)
        half = torch.linalg.solve_triangular(factor, known, upper=False)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.project - half.mT @ half, log_det

    def columns(
        self, frequency: Tensor, weigh: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Harmonics ``(B, 2 H, T)`` of usual amplitudes, and what the first explains.

        The second is of shape ``(B,)``.
        """
        waves = self.waves(frequency.unsqueeze(-1), _HARMONICS)
        power, norm = _explained(waves[:, :, 0], weigh, left)
        usual = (2 * (power + 1) / norm.clamp(min=1e-3)).sqrt()
        falls = _DECAY ** torch.arange(_HARMONICS).to(usual)
        waves = waves[:, 0] * (usual * falls)[..., None, None]
        return waves.flatten(1, 2), power[:, 0]

    def nearby(
        self, frequency: Tensor, weigh: Tensor, left: Tensor, reach: Tensor, num: int
    ) -> Tensor:
        """The frequency within a share ``(B,)`` of one that explains most, ``(B,)``."""
        away = torch.linspace(-1.0, 1.0, num).to(frequency)
        tried = frequency.unsqueeze(-1) * (reach.unsqueeze(-1) * away).exp()
        power, _ = _explained(self.waves(tried, 1)[:, :, 0], weigh, left)
        return tried.gather(1, power.argmax(-1, keepdim=True)).squeeze(-1)


def _explained(waves: Tensor, weigh: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """What waves ``(B, F, 2, T)`` explain ``(B, F)``, and their squared norms."""
    cosine, sine = waves.unbind(2)
    left = left.unsqueeze(-1)
    c, s = (cosine @ left).squeeze(-1), (sine @ left).squeeze(-1)
    through = cosine @ weigh
    cc, cs = (through * cosine).sum(-1), (through * sine).sum(-1)
    ss = ((sine @ weigh) * sine).sum(-1)
    det = (cc * ss - cs * cs).clamp(min=1e-3)
    power = (ss * c * c - 2 * cs * c * s + cc * s * s) / det
    return power.clamp(min=0.0), cc + ss


def _numbers(
    spectrum: Tensor,
    chi: Tensor,
    count: Tensor,
    log_det: Tensor,
    gain: Tensor,
    size: Tensor,
) -> Tensor:
    """Numbers of about unit size that tell of a spectrum, ``(B, NUM_NUMBERS)``."""
    chi = chi.clamp(min=1e-6)
    around = functional.max_pool1d(spectrum.unsqueeze(1), _APART, 1, _APART // 2)
    peaks = torch.where(spectrum == around[:, 0], spectrum, 0.0)
    short = max(0, _PEAKS - peaks.shape[-1])
    peaks = functional.pad(peaks, (0, short)).topk(_PEAKS, -1).values
    parts = [
        0.5 * (chi / count).log(),
        0.3 * log_det.log1p(),
        (0.2 * gain).asinh(),
        0.5 * size.log1p(),
        *(0.5 * peaks.log1p()).unbind(-1),
        *(peaks / chi.unsqueeze(-1)).unbind(-1),
    ]
    return torch.stack(parts, -1)
