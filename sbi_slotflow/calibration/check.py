r"""What every check returns, and an exact test of whether ranks are uniform.

The probability integral transform of a true value among L draws, randomised for ties,

.. math::
    u = \frac{\#\{\text{draws below}\} + V (\#\{\text{draws equal}\} + 1)}{L + 1},
    \qquad V \sim U(0, 1),

is uniform if truth and draws come from one distribution. For n such numbers the order
statistic :math:`u_{(i)}` is Beta(i, n - i + 1). The test of equal local levels (Aldor-
Noiman et al. 2013) takes the smallest two-sided tail probability,

.. math::
    T = \min_i 2 \min\{F_i(u_{(i)}), 1 - F_i(u_{(i)})\},

and its band is the simultaneous band of Saeilynoja, Buerkner and Vehtari (2022) that
``arviz_stats.ecdf_utils`` simulates. Here the probability that uniform numbers stay
inside the band is exact, so there is a p-value: a Poisson process is carried from one
edge of the band to the next (Moscovich and Nadler 2017).

Bands have little power against ranks that are a bit too wide or too narrow everywhere.
Therefore :func:`rank_p_value` adds Neyman's smooth test of two components (Neyman
1937), the mean and the variance of the ranks,

.. math::
    S = \frac{12}{n} \Big[\sum_i u_i - \tfrac12\Big]^2
        + \frac{5}{n} \Big[\sum_i 6 (u_i - \tfrac12)^2 - \tfrac12\Big]^2,

with its null distribution from 20,000 simulations, and returns twice the smaller of the
two p-values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import betainc, betaincinv, gammaln
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Check",
    "RankCheck",
    "check_rate",
    "critical_level",
    "ecdf_band",
    "pit",
    "rank_p_value",
    "uniformity_p_value",
    "upper_p_value",
]

Array = NDArray[np.float64]

_COLUMNS = 3  # panels in a row of a figure
_NUM_SIMULATIONS = 20_000
# Simulated numbers held at once.
_CHUNK = 1_000_000


def check_rate(rate: float) -> None:
    """Raise ValueError unless a false-alarm rate lies between 0 and 1."""
    if not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate must lie between 0 and 1, got {rate}.")


@dataclass(frozen=True, eq=False)
class Check(ABC):
    """Base of the results.

    Attributes:
        p_values: A p-value for each quantity that was tested.
        false_alarm_rate: Probability that an exact posterior fails the check, at most
            (Bonferroni: each of the m p-values is held against this rate over m).
    """

    title: ClassVar[str]
    """What is checked, in a few words."""
    explanation: ClassVar[str]
    """How to read the figure, in a sentence or two."""

    p_values: Mapping[str, float]
    false_alarm_rate: float

    def __post_init__(self) -> None:
        check_rate(self.false_alarm_rate)
        if not self.p_values:
            raise ValueError("p_values must hold at least one p-value, got none.")

    @property
    def level(self) -> float:
        """Level that each p-value is held against."""
        return self.false_alarm_rate / len(self.p_values)

    @property
    def p_value(self) -> float:
        """The smallest p-value, corrected for their number."""
        return min(1.0, len(self.p_values) * min(self.p_values.values()))

    @property
    def passed(self) -> bool:
        """Whether no p-value is at or below :attr:`level`."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the quantities at or below :attr:`level`."""
        return tuple(name for name, p in self.p_values.items() if p <= self.level)

    @property
    @abstractmethod
    def numbers(self) -> Mapping[str, Any]:
        """What was measured, ready for JSON."""

    @abstractmethod
    def plot(self) -> "Figure":
        """Return the check's figure."""

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and the numbers, ready for JSON."""
        return {
            "title": self.title,
            "passed": self.passed,
            "p_value": self.p_value,
            "false_alarm_rate": self.false_alarm_rate,
            "p_values": dict(self.p_values),
            "failures": list(self.failures),
            "numbers": dict(self.numbers),
        }

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        word = "passed" if self.passed else f"FAILED ({', '.join(self.failures)})"
        rate = f"false-alarm rate {self.false_alarm_rate:.2g}"
        return f"{word}, p = {self.p_value:.2g} ({rate})"

    def __str__(self) -> str:
        return f"{self.title}: {self.verdict}"


@dataclass(frozen=True, eq=False)
class RankCheck(Check):
    """Numbers that are uniform on (0, 1) if the posterior is right.

    Attributes:
        ranks: The numbers by quantity, each ``(n,)``.
    """

    x_label: ClassVar[str] = "rank of the truth"
    explanation: ClassVar[str] = (
        "The line is the ECDF of the truth's rank among posterior draws, less the "
        "diagonal. Sloping up at both ends: too narrow; down at both ends: too wide; "
        "all on one side: shifted. Vermilion: failed, by the band or by the ranks' "
        "mean and variance."
    )

    ranks: Mapping[str, Array]

    @classmethod
    def of(cls, ranks: Mapping[str, Array], false_alarm_rate: float) -> Self:
        """Test each quantity's ranks."""
        p_values = {name: rank_p_value(u) for name, u in ranks.items()}
        return cls(p_values, false_alarm_rate, ranks)

    @property
    def numbers(self) -> dict[str, Any]:
        """Mean rank, and its variance over that of uniform ranks."""
        return {
            name: {
                "num": len(u),
                "mean_rank": float(u.mean()),
                "variance_ratio": float(12 * ((u - 0.5) ** 2).mean()),
            }
            for name, u in self.ranks.items()
        }

    def plot(self) -> "Figure":
        """Plot the ECDF of each quantity's ranks, less the diagonal."""
        from ..plots.style import POSTERIOR, SHADES, TRUTH, Figure, dress

        total = len(self.ranks)
        rows, columns = -(-total // _COLUMNS), min(total, _COLUMNS)
        size = (2.6 * columns + 0.4, 2.0 * rows + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes in panels[total:]:
            axes.set_visible(False)
        for i, (name, u) in enumerate(self.ranks.items()):
            axes, num = panels[i], len(u)
            points, lower, upper = ecdf_band(num, 0.5 * self.level)
            below, above = lower - points, upper - points
            axes.fill_between(
                points, below, above, step="post", color=SHADES[0.9], lw=0
            )
            grid = np.concatenate([[0.0], np.sort(u), [1.0]])
            gap = np.concatenate([np.arange(num + 1), [num]]) / num - grid
            colour = TRUTH if name in self.failures else POSTERIOR
            axes.step(grid, gap, where="post", lw=1.2, color=colour)
            axes.axhline(0.0, color="black", lw=0.6)
            x_label = self.x_label if i + columns >= total else ""
            y_label = "ECDF difference" if i % columns == 0 else ""
            dress(axes, x_label, y_label, f"{name} (n = {num})")
            widest = max(np.abs(gap).max(), above.max(), -below.min(), num**-0.5)
            axes.set(xlim=(0, 1), ylim=(-1.15 * widest, 1.15 * widest))
        return figure


def pit(truth: Tensor, draws: Tensor, generator: torch.Generator | None) -> Array:
    """Rank truths among their draws, as numbers in (0, 1); ties in random order.

    Args:
        truth: True values, shape ``(...)``.
        draws: Draws, shape ``(L, ...)``.
        generator: Source of the order of ties, on the CPU.

    Returns:
        Float64 array ``(...)``, uniform if truth and draws are exchangeable.

    Raises:
        ValueError: If the shapes do not fit or there is no draw.
    """
    if draws.ndim < 1 or not len(draws) or draws.shape[1:] != truth.shape:
        raise ValueError(
            f"draws must have shape (L, *{tuple(truth.shape)}) with L >= 1, got "
            f"{tuple(draws.shape)}."
        )
    below = (draws < truth).sum(0).double().cpu()
    equal = (draws == truth).sum(0).double().cpu()
    jitter = torch.rand(truth.shape, generator=generator, dtype=torch.float64)
    return ((below + jitter * (equal + 1)) / (len(draws) + 1)).numpy()


def uniformity_p_value(values: Array) -> float:
    """Test whether independent numbers are uniform on [0, 1]."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must have shape (n,), n >= 1, got {values.shape}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("values must lie in [0, 1].")
    rank = np.arange(1, len(values) + 1)
    reverse = len(values) + 1 - rank
    ordered = np.sort(values)
    lower = betainc(rank, reverse, ordered)
    upper = betainc(reverse, rank, 1 - ordered)
    return _p_value(2 * float(np.minimum(lower, upper).min()), len(values))


def upper_p_value(value: float, null: Array) -> float:
    """Share of a number and those simulated for it that are at least as large."""
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def rank_p_value(values: Array) -> float:
    """Test whether ranks are uniform, by their ECDF and by their mean and variance."""
    band = uniformity_p_value(values)
    smooth = _smooth(np.asarray(values)[None])[0] * (1 - 1e-12)
    return min(1.0, 2 * min(band, upper_p_value(smooth, _smooth_null(len(values)))))


def _smooth(values: Array) -> Array:
    """Neyman's statistic of samples ``(R, n)``, shape ``(R,)``."""
    centred = values - 0.5
    mean = np.sqrt(12) * centred.sum(-1)
    variance = np.sqrt(5) * (6 * centred**2 - 0.5).sum(-1)
    return (mean**2 + variance**2) / values.shape[-1]


@lru_cache(maxsize=64)
def _smooth_null(num: int) -> Array:
    """Simulated values of Neyman's statistic."""
    rng = np.random.default_rng(num)
    step = max(1, _CHUNK // num)
    parts = [
        _smooth(rng.random((min(step, _NUM_SIMULATIONS - start), num)))
        for start in range(0, _NUM_SIMULATIONS, step)
    ]
    return np.concatenate(parts)


@lru_cache(maxsize=256)
def critical_level(num: int, rate: float) -> float:
    """Local level whose band n uniform numbers leave with a given probability."""

    def excess(log_level: float) -> float:
        return float(np.log(_p_value(np.exp(log_level), num) / rate))

    # Between the union bound and the level of a single number.
    low, high = float(np.log(rate / (2 * num))), float(np.log(rate)) + 1e-6
    root = root_scalar(excess, bracket=(low, high), xtol=1e-3).root
    return float(np.exp(root))


def ecdf_band(num: int, rate: float) -> tuple[Array, Array, Array]:
    """Simultaneous band of the ECDF of n uniform numbers."""
    half = 0.5 * critical_level(num, rate)
    first, last = _edges(half, num)
    points = np.unique(np.concatenate([[0.0, 1.0], first, last]))
    lower = np.searchsorted(last, points, side="right") / num
    upper = np.minimum(1.0, np.searchsorted(first, points, side="right") / num)
    return points, lower, upper


def _edges(half: float, num: int) -> tuple[Array, Array]:
    """Ends of each order statistic's interval of probability 1 - 2 half."""
    rank = np.arange(1, num + 1)
    reverse = num + 1 - rank
    return betaincinv(rank, reverse, half), 1 - betaincinv(reverse, rank, half)


def _p_value(level: float, num: int) -> float:
    """Probability that a uniform sample's T is at most a level."""
    if level <= 0:
        return 0.0
    if level >= 1:
        return 1.0
    return float(np.clip(1 - _inside(*_edges(0.5 * level, num)), 0.0, num * level))


def _inside(first: Array, last: Array) -> float:
    """Probability that ``first[i] <= u_(i) <= last[i]`` for all i."""
    num = len(first)
    times = np.sort(np.concatenate([first, last]))
    # Allowed counts at each time: those whose interval is over, and has begun before.
    low = np.searchsorted(last, times, side="right")
    high = np.searchsorted(first, times, side="left")
    steps = np.diff(times, prepend=0.0, append=1.0) * num
    log_factorial = gammaln(np.arange(num + 2) + 1.0)
    counts = np.arange(num + 1)

    def poisson(rate: float, size: int) -> Array:
        if rate <= 0:
            return np.eye(1, size)[0]
        k = counts[:size]
        return np.exp(k * np.log(rate) - rate - log_factorial[:size])

    state, start = np.ones(1), 0
    for step, least, most in zip(steps[:-1], low, high, strict=True):
        if most < least:
            return 0.0
        moved = np.convolve(state, poisson(step, most - start + 1))
        state = moved[least - start : most - start + 1]
        start = least
    arrive = poisson(steps[-1], num - start + 1)[::-1][: len(state)]
    total = -num + num * np.log(num) - log_factorial[num]
    return float(state @ arrive / np.exp(total))
