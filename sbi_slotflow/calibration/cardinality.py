r"""Reliability of q(K | x) (the paper's figure 5 and more).

If q(K | x) is right, the true K of each pair is a draw from it. So numbers that score
q against the truth are compared with what they are for K drawn from q itself, x by x:

- the mean log score :math:`\log q(K_i | x_i)`: too low if q is too sure, too high if it
  is not sure enough;
- the Brier score :math:`\sum_k (q(k | x_i) - 1[k = K_i])^2`;
- the expected calibration error of the most probable K (Naeini et al. 2015), in bins of
  equally many pairs;
- the sum of K less its expectation, which sees too many or too few components.

p-values count simulated numbers that are as extreme, so they are exact for any n. The
same can be done under another prior of K: pairs are kept with a probability that turns
their K into draws from it, and scored with ``posterior.with_cardinality_prior``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..seeding import draw_seed
from ..sets.checks import as_probabilities, as_weights
from .check import Array, Check, upper_p_value
from .draws import CalibrationDraws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CardinalityReliability", "ReliabilityBins", "cardinality_reliability"]

_NUM_SIMULATIONS = 9_999
_NUM_BINS = 10
_MOST_LABELLED = 12  # cells of the confusion matrix across that hold a number
# Entries of simulated counts held at once.
_CHUNK = 2_000_000


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Pairs (x, k) in bins of q(k | x).

    Attributes:
        predicted: Mean q(k | x) in each bin.
        observed: Share of pairs in which k is the true K.
        low: Lower end of where 95 % of such shares lie if q is right.
        high: Upper end.
    """

    predicted: Array
    observed: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class CardinalityReliability(Check):
    """How far q(K | x) can be relied upon.

    Attributes:
        scores: Scores by name, and under ``"expected"`` their means if q is right.
        confusion: Counts ``(Kmax + 1, Kmax + 1)``, true K by most probable K.
        bins: The reliability diagram.
        weights: Prior of K under which the pairs were scored.
    """

    title: ClassVar[str] = "Reliability of q(K | x)"
    explanation: ClassVar[str] = (
        "Left: how often K has a value to which q(K | x) gave some probability; bars "
        "are where 95 % of the points lie if q is right. A line flatter than the "
        "diagonal: too sure; steeper: not sure enough. Right: the most probable K "
        "against the true one, rows adding up to 1."
    )

    scores: dict[str, dict[str, float]]
    confusion: NDArray[np.int64]
    bins: ReliabilityBins
    weights: Array

    @property
    def accuracy(self) -> float:
        """Share of pairs in which the most probable K is the true one."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def numbers(self) -> dict[str, Any]:
        """Scores, accuracy and the confusion matrix."""
        return {
            **self.scores,
            "accuracy": self.accuracy,
            "confusion": self.confusion.tolist(),
            "cardinality_prior": self.weights.tolist(),
            "num": int(self.confusion.sum()),
        }

    def plot(self) -> "Figure":
        """Plot the reliability diagram and the confusion matrix."""
        from ..plots.style import DATA, POSTERIOR, SMALL, Figure, dress

        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        bins = self.bins
        left.plot([0, 1], [0, 1], color="black", lw=0.6)
        left.vlines(bins.predicted, bins.low, bins.high, color=DATA, lw=6, alpha=0.4)
        left.plot(bins.predicted, bins.observed, "o-", color=POSTERIOR, ms=4, lw=1.2)
        left.set(xlim=(0, 1), ylim=(-0.02, 1.02), aspect="equal")
        value, expected = self.scores["calibration error"].values()
        title = f"calibration error {value:.3f} (if right {expected:.3f})"
        dress(left, "predicted q(K | x)", "observed share", title)
        share = self.confusion / self.confusion.sum(-1, keepdims=True).clip(1)
        right.imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower")
        size = len(share)
        style = {"ha": "center", "va": "center", "fontsize": SMALL if size < 8 else 7}
        for true, predicted in np.argwhere(share >= 0.005):
            if size <= _MOST_LABELLED:
                value = share[true, predicted]
                colour = "white" if value > 0.5 else "black"
                text = f"{value:.2f}".removeprefix("0")
                right.text(predicted, true, text, color=colour, **style)
        right.set(xticks=range(size), yticks=range(size))
        title = f"most probable K is right in {100 * self.accuracy:.1f} %"
        dress(right, "most probable K", "true K", title)
        return figure


def cardinality_reliability(
    draws: CalibrationDraws,
    *,
    probs: Tensor | None = None,
    weights: Tensor | None = None,
    false_alarm_rate: float = 0.01,
) -> CardinalityReliability:
    """Score q(K | x) against true K.

    Args:
        draws: Pairs.
        probs: q(K | x) for the data of ``draws``, shape ``(n, Kmax + 1)``;
            ``draws.probs`` if None.
        weights: Prior of K under which ``probs`` hold, where it is not the problem's.
            Shape ``(Kmax + 1,)``; some pairs are left out so that K has this prior.
        false_alarm_rate: Of the check.

    Raises:
        ValueError: If a shape is wrong or too few pairs are left.
    """
    generator = draws.generator(3 if weights is None else 4)
    probs = draws.probs if probs is None else probs
    if probs.shape != draws.probs.shape:
        raise ValueError(
            f"probs must have shape {tuple(draws.probs.shape)}, got "
            f"{tuple(probs.shape)}."
        )
    probs = as_probabilities(probs, "probs")
    counts = draws.cardinality
    prior = torch.bincount(counts, minlength=probs.shape[-1]).double()
    prior = prior / prior.sum()
    if weights is not None:
        kept = _reweighted(counts, weights, draws.cardinality_prior, generator)
        counts, probs = counts[kept], probs[kept]
        prior = weights.double() / weights.sum()
    if len(counts) < 20:
        raise ValueError(f"draws must leave at least 20 pairs, got {len(counts)}.")
    rng = np.random.default_rng(draw_seed(generator))
    q, k = probs.numpy(), counts.numpy()
    step = max(1, _CHUNK // len(q))
    sizes = np.diff([*range(0, _NUM_SIMULATIONS, step), _NUM_SIMULATIONS]).tolist()
    parts = [_scores(q, _drawn(q, num, rng)) for num in sizes]
    p_values, scores = {}, {}
    for name, found in _scores(q, k[None]).items():
        value, null = float(found[0]), np.concatenate([part[name] for part in parts])
        # Rounding must not make equal scores differ.
        slack = 1e-9 * max(1.0, abs(value)) if np.isfinite(value) else 0.0
        p_values[name] = upper_p_value(value - slack, null)
        if name != "calibration error":  # the others have two sides
            below = upper_p_value(-value - slack, -null)
            p_values[name] = min(1.0, 2 * min(p_values[name], below))
        scores[name] = {"value": value, "expected": float(null.mean())}
    size = probs.shape[-1]
    confusion = np.zeros((size, size), dtype=np.int64)
    np.add.at(confusion, (k, q.argmax(-1)), 1)
    return CardinalityReliability(
        p_values, false_alarm_rate, scores, confusion, _binned(q, k, rng), prior.numpy()
    )


def _scores(q: Array, k: NDArray[np.int64]) -> dict[str, Array]:
    """Scores ``(R,)`` of R sets of true K, ``(R, n)``, under q."""
    num, index = len(q), np.arange(len(q))
    with np.errstate(divide="ignore"):
        log_q = np.log(q)
    confidence, chosen = q.max(-1), q[index, k]
    bins = max(1, min(_NUM_BINS, num // 20))
    bin_of = np.empty(num, dtype=np.int64)
    bin_of[confidence.argsort(kind="stable")] = index * bins // num
    member = np.eye(bins)[bin_of]
    right = (k == q.argmax(-1)).astype(np.float64)
    gap = np.abs(right @ member - confidence @ member)
    return {
        "log score": log_q[index, k].mean(-1),
        "Brier score": ((q**2).sum(-1) - 2 * chosen + 1).mean(-1),
        "calibration error": gap.sum(-1) / num,
        "bias of K": (q @ np.arange(q.shape[-1]) - k).mean(-1),
    }


def _drawn(q: Array, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw K from each q, shape ``(num, n)``."""
    edges = q.cumsum(-1)
    edges /= edges[:, -1:]
    share = rng.random((num, len(q)))
    k = np.zeros((num, len(q)), dtype=np.int64)
    for column in edges.T[:-1]:
        k += share >= column
    return k


def _reweighted(
    counts: Tensor, weights: Tensor, prior: Tensor, generator: torch.Generator
) -> Tensor:
    """Which pairs to keep so that K has another prior."""
    new, prior = as_weights(weights, len(prior)), prior.double()
    if ((new > 0) & (prior == 0)).any():
        raise ValueError("weights must be zero where the problem excludes a K.")
    ratio = torch.where(prior > 0, new / prior, 0.0)
    share = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return share < (ratio / ratio.max())[counts]


def _binned(
    q: Array, k: NDArray[np.int64], rng: np.random.Generator
) -> ReliabilityBins:
    """Reliability of all (x, k) in bins of q of equal width."""
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    index = np.clip(np.searchsorted(edges, q.ravel(), side="right") - 1, 0, 9)
    size = np.bincount(index, minlength=_NUM_BINS)
    used = size > 0

    def shares(true: NDArray[np.int64]) -> Array:
        hit = np.eye(q.shape[-1])[true].ravel()
        return (np.bincount(index, hit, minlength=_NUM_BINS) / size.clip(1))[used]

    null = np.stack([shares(row) for row in _drawn(q, 200, rng)])
    low, high = np.quantile(null, [0.025, 0.975], axis=0)
    total = np.bincount(index, q.ravel(), minlength=_NUM_BINS)
    predicted = (total / size.clip(1))[used]
    return ReliabilityBins(predicted, shares(k), low, high)
