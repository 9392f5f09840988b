r"""Is this x unlike the data that the network was trained on?

A network answers for any x. Whether it has seen the like is judged by numbers s(x): the
entries of a short x themselves; of a long one the logarithms of its power, in total, in
bands of frequency and in stretches of time, its lag-one autocorrelation, kurtosis and
largest excursion. In each of these groups, and in all at once, the logarithm of the
distance of the whitened numbers from their 10th nearest neighbour among training data
is measured. What such averages hide, a tone outside the prior's band say, a scan of the
streams of x sees (:mod:`~sbi_slotflow.calibration.scan`). How unusual x is, d(x), is
the largest of these measures, each counted from where one in ten of the training data
lies above it, in units of the way to where one in a hundred does. The p-value is the
rank of d(x) among training data that were set aside (conformal prediction, Vovk et al.
2005),

.. math::
    p = \frac{1 + \#\{i : d(x_i) \ge d(x)\}}{1 + m},

so :math:`\Pr(p \le \alpha) \le \alpha` for data like the training data, whatever their
distribution. That is a mean over references: one reference's rate of false alarms is a
draw from :math:`\mathrm{Beta}(n, m + 1 - n)`, n the integer part of
:math:`\alpha (m + 1)`. At :math:`\alpha` = 0.001 and m = 2,000, as of the shipped
weights, that is below 0.0024 with a probability of 95 %. (sbi's
``calc_misspecification_mmd`` compares batches of observations; for a single one its
statistic is a mean kernel distance in the space of x, without power where x is long.)
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from ..sets.checks import Numbers, as_count, as_floats, check_finite, warn_user
from ..storage import read_tensors, write_tensors
from .check import Array, Check
from .scan import LEAST, Scan, tail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Misspecification",
    "TrainingReference",
    "UnlikeTrainingWarning",
    "summarise",
]

_FORMAT = "sbi_slotflow.TrainingReference"
_VERSION = 2  # 1 had no scan
_NEIGHBOURS = 10
_SHORT = 32
_NUM_BANDS, _NUM_STRETCHES = 24, 8
_FEWEST = 100
# Observations above which their scores are compared all together.
_MANY = 20
_CHUNK = 1_000
_TINY = 1e-300  # below any square of a float32


class UnlikeTrainingWarning(UserWarning):
    """An observation is unlike the training data."""


def summarise(x: Tensor) -> list[Tensor]:
    """Return groups of numbers s(x), float64, each ``(B, F)``, of data ``(B, T)``.

    The last group holds all of them.
    """
    x = x.detach().cpu().double()
    size = x.shape[-1]
    if size <= _SHORT:
        return [x]
    tiny = _TINY
    power = x.square().mean(-1, keepdim=True) + tiny
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True) + tiny
    spectrum = torch.fft.rfft(x).abs().square()
    bands = spectrum @ _means(spectrum.shape[-1], min(_NUM_BANDS, size // 2))
    stretches = x.square() @ _means(size, _NUM_STRETCHES)
    correlation = (centred[:, 1:] * centred[:, :-1]).mean(-1, keepdim=True) / variance
    kurtosis = (centred.square() / variance).square().mean(-1, keepdim=True) + tiny
    largest = centred.abs().amax(-1, keepdim=True) / variance.sqrt() + tiny
    groups = [
        power.log(),
        (bands / power + tiny).log(),
        (stretches / power + tiny).log(),
        torch.cat([correlation, kurtosis.log(), largest.log()], dim=-1),
    ]
    return [*groups, torch.cat(groups, dim=-1)]


@lru_cache
def _means(size: int, num: int) -> Tensor:
    """Matrix ``(size, num)`` that averages over consecutive parts."""
    matrix = torch.zeros(size, num, dtype=torch.float64)
    for column, part in enumerate(torch.arange(size).tensor_split(num)):
        matrix[part, column] = 1 / len(part)
    return matrix


@dataclass(frozen=True, eq=False)
class Misspecification(Check):
    """Whether observations are like the training data.

    Attributes:
        observations: A p-value for each observation, shape ``(B,)``.
        scores: How unusual each observation is.
        usual: The same of training data, ascending.
    """

    title: ClassVar[str] = "Is x like the training data?"
    explanation: ClassVar[str] = (
        "How far x is from its neighbours and beyond the limits of the training data, "
        "against training data that were set aside."
    )

    observations: Array
    scores: Array
    usual: Array

    @property
    def numbers(self) -> dict[str, Any]:
        """Smallest p-value and share of observations below 0.05."""
        return {
            "num": len(self.observations),
            "smallest_p_value": float(self.observations.min()),
            "share_below_0.05": float((self.observations <= 0.05).mean()),
            "num_reference": len(self.usual),
        }

    def plot(self) -> "Figure":
        """Plot the distances of observations and of training data."""
        from matplotlib.artist import Artist
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        from ..plots.style import DATA, POSTERIOR, TRUTH, Figure, dress, legend_above

        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.subplots()
        values = np.concatenate([self.usual, self.scores])
        most = max(1.0, self.usual.max())
        if values.max() > 3 * most:  # or all that is usual is one bar
            axes.set_xscale("symlog", linthresh=most)
        edges = np.linspace(values.min(), min(values.max(), 3 * most) + 1e-6, 41)
        axes.hist(self.usual, edges.tolist(), density=True, color=DATA, alpha=0.6)
        handles: list[Artist] = [Patch(color=DATA, alpha=0.6, label="training data")]
        if len(self.scores) > _MANY:
            style = {"histtype": "step", "lw": 1.6, "color": POSTERIOR}
            axes.hist(self.scores, edges.tolist(), density=True, **style)
            handles.append(Line2D([], [], color=POSTERIOR, lw=1.6, label="x"))
        else:
            for score in self.scores:
                axes.axvline(score, color=TRUTH, lw=1.5)
            handles.append(Line2D([], [], color=TRUTH, lw=1.5, label="x"))
        legend_above(figure, handles)
        dress(axes, "how unusual (0: one in ten, 1: one in a hundred)", "density")
        return figure


class _Group(NamedTuple):
    """Training data as one group of numbers shows them."""

    mean: Tensor
    whitening: Tensor
    points: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> "_Group":
        mean, unit = features.mean(0), features.std(0)
        still = unit <= 1e-12 * mean.abs()
        # A step of a number that never moves is as far as one can be.
        unit = torch.where(still, 1e-6 * mean.abs() + _TINY, unit)
        moving = torch.where(still, 0.0, (features - mean) / unit)
        _, sizes, axes = torch.linalg.svd(moving, full_matrices=False)
        kept = sizes > 1e-6 * sizes[0]
        whitening = axes[kept].T / (sizes[kept] / len(features) ** 0.5)
        fixed = torch.eye(len(unit), dtype=unit.dtype)[:, still]
        whitening = torch.cat([whitening, fixed], 1) / unit.unsqueeze(-1)
        points = ((features - mean) @ whitening).float()
        # A point is its own nearest neighbour, at distance zero.
        logs = _distances(points, points, _NEIGHBOURS + 1).log()
        return cls(mean, whitening, points, tail(logs))

    def scores(self, features: Tensor) -> Tensor:
        whitened = (features - self.mean) @ self.whitening
        logs = _distances(whitened, self.points, _NEIGHBOURS).log()
        return (logs - self.scale[0]) / self.scale[1]


@dataclass(frozen=True, eq=False)
class TrainingReference:
    """What the training data look like, small enough to travel with a posterior.

    Make one with :meth:`fit` and hand it to ``posterior.set_training_reference``: then
    ``posterior.sample`` warns of an x that is unlike the training data.

    Attributes:
        groups: Training data as each group of numbers shows them.
        usual: Scores of other training data, ascending, shape ``(m,)``.
        num_data: Length T of x.
        level: p-value below which :meth:`warn` warns.
        scan: What is usual in the streams of x; None where x is short, and in files of
            earlier versions.
    """

    groups: tuple[_Group, ...]
    usual: Tensor
    num_data: int
    level: float = 1e-3
    scan: Scan | None = None

    @classmethod
    def fit(
        cls, x: Numbers, level: float = 1e-3, streams: Sequence[int] | None = None
    ) -> "TrainingReference":
        """Describe training data.

        Args:
            x: Data, shape ``(N, T)``; one half gives neighbours, the other usual
                scores, so the least p-value is about 2 / N.
            level: p-value below which :meth:`warn` warns: at most this share of data
                like the training data is warned of.
            streams: Lengths of the records that x is made of, those of
                ``problem.streams``; x is one record if None.

        Raises:
            ValueError: If x has the wrong shape, too few rows for the level, or is not
                finite, or if the streams' lengths do not add up to T.
        """
        x = as_floats(x, "x").detach()
        x = x.flatten(1) if x.ndim > 2 else x
        if x.ndim != 2 or len(x) < _FEWEST:
            raise ValueError(
                f"x must have shape (N, T) with N >= {_FEWEST}, got {tuple(x.shape)}."
            )
        check_finite(x)
        half = len(x) // 2
        least = 1 / (1 + len(x) - half)
        if not least <= level < 1:
            raise ValueError(
                f"level must lie between {least:.2g} (for {len(x)} rows of x) and 1, "
                f"got {level}."
            )
        size = x.shape[-1]
        lengths = [
            as_count(n, "streams") for n in ([size] if streams is None else streams)
        ]
        if sum(lengths) != size:
            raise ValueError(f"streams must add up to {size}, got {lengths}.")
        groups = tuple(_Group.fit(part[:half]) for part in summarise(x))
        scanned = size > _SHORT and max(lengths) >= LEAST
        scan = Scan.fit(x[:half], lengths) if scanned else None
        new = cls(groups, torch.empty(0), size, level, scan)
        return replace(new, usual=new.scores(x[half:]).sort().values)

    def scores(self, x: Numbers) -> Tensor:
        """How unusual observations are, float64, shape ``(B,)``."""
        data = as_floats(x, "x")
        data = data.unsqueeze(0) if data.ndim == 1 else data
        if data.ndim > 2 and data.shape[1:].numel() == self.num_data:
            data = data.flatten(1)  # a batch of images, for example
        if data.ndim != 2 or data.shape[-1] != self.num_data or not len(data):
            expected = f"(B, {self.num_data}) with B >= 1"
            raise ValueError(f"x must have shape {expected}, got {tuple(data.shape)}.")
        check_finite(data)
        parts = zip(self.groups, summarise(data), strict=True)
        scores = [group.scores(part) for group, part in parts]
        if self.scan is not None:
            scores.append(self.scan.scores(data))
        return torch.stack(scores).amax(0)

    def p_values(self, x: Numbers) -> Tensor:
        """p-value of each observation ``(B, T)``, float64, shape ``(B,)``."""
        return self._ranked(self.scores(x))

    def check(self, x: Numbers, *, false_alarm_rate: float = 0.01) -> Misspecification:
        """Test observations.

        Up to 20 are tested one by one. More are tested all together: their scores
        against those of training data (Kolmogorov and Smirnov's test).
        """
        scores = self.scores(x)
        each = self._ranked(scores)
        usual = self.usual.numpy()
        if len(each) > _MANY:
            test: Any = ks_2samp(scores.numpy(), usual)
            p_values = {"all observations": float(test.pvalue)}
        else:
            p_values = {f"observation {i + 1}": p for i, p in enumerate(each.tolist())}
        return Misspecification(
            p_values, false_alarm_rate, each.numpy(), scores.numpy(), usual
        )

    def warn(self, x: Numbers) -> None:
        """Warn, in one line, if an observation's p-value is below the level."""
        least = float(self.p_values(x).min())
        if least < self.level:
            warn_user(
                f"x is unlike the training data (p = {least:.1g}): do not trust this "
                "posterior; posterior.set_training_reference(None) switches this off.",
                UnlikeTrainingWarning,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the reference to a safetensors file."""
        tensors = {
            f"{i}.{name}": value
            for i, group in enumerate(self.groups)
            for name, value in group._asdict().items()
        }
        if self.scan is not None:
            tensors |= {f"scan.{n}": value for n, value in self.scan._asdict().items()}
        meta = {"format": _FORMAT, "version": _VERSION, "num_groups": len(self.groups)}
        meta |= {"num_data": self.num_data, "level": self.level}
        write_tensors(path, {**tensors, "usual": self.usual}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainingReference":
        """Read a reference that :meth:`save` wrote."""
        tensors, meta = read_tensors(path, _FORMAT, _VERSION)
        try:
            groups = tuple(
                _Group(*(tensors[f"{i}.{name}"] for name in _Group._fields))
                for i in range(int(meta["num_groups"]))
            )
            scanned = any(name.startswith("scan.") for name in tensors)
            parts = [tensors[f"scan.{n}"] for n in Scan._fields] if scanned else []
            scan = Scan(*parts) if parts else None
            num, level = int(meta["num_data"]), float(meta["level"])
            usual = tensors["usual"]
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}.") from error
        whole = all(bool(torch.isfinite(t).all()) for t in tensors.values())
        ranked = len(usual) > 0 and bool((usual.diff() >= 0).all())
        if not (whole and ranked and 0 < level < 1):
            raise ValueError(f"{path} is damaged: its numbers are no reference's.")
        return cls(groups, usual, num, level, scan)

    def _ranked(self, scores: Tensor) -> Tensor:
        above = len(self.usual) - torch.searchsorted(self.usual, scores)
        return (1 + above).double() / (1 + len(self.usual))


def _distances(features: Tensor, points: Tensor, neighbour: int) -> Tensor:
    """Distance of whitened features ``(B, F)`` from their n-th nearest points."""
    mode = "donot_use_mm_for_euclid_dist"  # which would round small distances away
    parts = [
        torch.cdist(part, points, compute_mode=mode).topk(neighbour, largest=False)
        for part in features.float().split(_CHUNK)
    ]
    return torch.cat([part.values[:, -1] for part in parts]).double().clamp(min=1e-12)
