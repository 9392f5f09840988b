r"""Local C2ST (Linhart et al. 2023): is the posterior right at one observation?

A classifier learns to tell true :math:`(\theta, x)` from :math:`(\theta', x)` with
:math:`\theta' \sim q(\cdot | x)`. If q is right it cannot, and its output d is 1/2 for
every draw from the posterior of the observation :math:`x_o`. The statistic

.. math::
    t = \frac{1}{M} \sum_m \big(d(\theta_m, x_o) - \tfrac12\big)^2,
    \qquad \theta_m \sim q(\cdot | x_o),

is compared with that of classifiers for which truth and draw of each pair were swapped
by the toss of a coin, which changes nothing if q is right: the p-value is exact. (sbi's
``LC2ST`` permutes rows of different pairs instead, and reseeds torch; its functions
that train and evaluate a classifier are used here.)

Sets of different size cannot be compared entry by entry. The classifier sees the normal
scores of a row's ranks among the posterior's draws, of K, of sums and extremes that
don't depend on labels, and of the smallest gap. Of x it sees the mean and the standard
deviation of K and the logarithm of the root mean square: that is what "local" means
here. It is a logistic regression on these numbers and their products.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..seeding import generator_for
from ..sets.checks import as_count, as_observation
from .check import Array, Check, check_rate, pit, upper_p_value
from .draws import BatchedPosterior, CalibrationDraws
from .sbc import reduce_fns, set_numbers

if TYPE_CHECKING:
    from ..plots.style import Figure

__all__ = ["LocalC2ST", "local_c2st"]

_REGULARISATION = 0.1  # inverse strength C


@dataclass(frozen=True, eq=False)
class LocalC2ST(Check):
    """A classifier two-sample test at one observation.

    Attributes:
        statistic: Mean square of the classifier's output less 1/2.
        null: The same for classifiers trained on swapped pairs.
    """

    title: ClassVar[str] = "Local C2ST at one observation"
    explanation: ClassVar[str] = (
        "How well a classifier can tell truths from posterior draws near this "
        "observation, against classifiers that have nothing to learn."
    )

    statistic: float
    null: Array

    @property
    def numbers(self) -> dict[str, Any]:
        """The statistic, and the mean and the 95 % quantile of its null."""
        return {
            "statistic": self.statistic,
            "null_mean": float(self.null.mean()),
            "null_95": float(np.quantile(self.null, 0.95)),
            "num_null": len(self.null),
        }

    def plot(self) -> "Figure":
        """Plot the statistic in the histogram of its null distribution."""
        from matplotlib.patches import Patch

        from ..plots.style import DATA, TRUTH, Figure, dress, legend_above

        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.hist(self.null, bins=30, color=DATA)
        line = axes.axvline(self.statistic, color=TRUTH, lw=2, label="found")
        legend_above(figure, [Patch(color=DATA, label="if right"), line])
        dress(axes, "mean squared distance of the output from 1/2", "classifiers")
        return figure


def local_c2st(
    posterior: BatchedPosterior,
    x: Tensor,
    draws: CalibrationDraws,
    *,
    num_null: int = 399,
    false_alarm_rate: float = 0.01,
) -> LocalC2ST:
    """Test the posterior of one observation.

    Args:
        posterior: The posterior that ``draws`` come from.
        x: The observation, shape ``(T,)`` or ``(1, T)``.
        draws: Pairs and draws to train the classifier on.
        num_null: Number of classifiers for the null distribution; the p-value is at
            least 1 / (num_null + 1).
        false_alarm_rate: Of the check.

    Raises:
        ValueError: If x is not one observation of the pairs' length, or ``num_null`` is
            too small for the false-alarm rate.
    """
    from sbi.diagnostics.lc2st import eval_lc2st, train_lc2st
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler
    from threadpoolctl import threadpool_limits

    event = draws.x.shape[1:]
    x = as_observation(x, event.numel()).reshape(1, *event)
    num_null = as_count(num_null, "num_null")
    check_rate(false_alarm_rate)
    if (num_null + 1) * false_alarm_rate < 1:
        raise ValueError(
            f"num_null must be at least {int(np.ceil(1 / false_alarm_rate)) - 1} for a "
            f"false-alarm rate of {false_alarm_rate}, got {num_null}."
        )
    generator = draws.generator(6)
    num = len(draws.draws) - 1
    device: Any = getattr(posterior, "_device", "cpu")
    rows = posterior.sample_batched(
        (2 * num,),
        x.to(device),
        generator=generator_for(draws.seed, 1, 7, device=device),
    ).cpu()
    probs = torch.atleast_2d(posterior.cardinality(x.to(device)).probs).double().cpu()

    pool = draws.draws[1:]
    truth = _scores(draws, draws.theta.unsqueeze(0), pool, generator)[0]
    other = _scores(draws, draws.draws[:1], pool, generator)[0]
    here = _scores(draws, rows[:num], rows[num:], generator).squeeze(1)
    about, about_here = _about(draws.probs, draws.x), _about(probs, x)

    classifier: Any = make_pipeline(
        PolynomialFeatures(2, include_bias=False),
        StandardScaler(),
        LogisticRegression(C=_REGULARISATION, max_iter=200),
    )

    def statistic(p: Tensor, q: Tensor) -> float:
        trained = train_lc2st(p, q, about, about, classifier)
        found = eval_lc2st(here, about_here, trained)
        assert isinstance(found, float)
        return found

    with threadpool_limits(limits=1):
        found = statistic(other, truth)
        null = np.empty(num_null)
        for i in range(num_null):
            swap = torch.rand(len(truth), 1, generator=generator) < 0.5
            null[i] = statistic(
                torch.where(swap, truth, other), torch.where(swap, other, truth)
            )
    p_values = {"observation": upper_p_value(found, null)}
    return LocalC2ST(p_values, false_alarm_rate, found, null)


def _scores(
    draws: CalibrationDraws, rows: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Normal scores ``(M, n, G)`` of rows ``(M, n, E)`` among ``(L, n, E)``."""
    values, among = _numbers(draws, rows), _numbers(draws, pool)
    scores = []
    for value, other in zip(values, among, strict=True):
        ranks = [pit(one, other, generator) for one in value]
        scores.append(torch.special.ndtri(torch.from_numpy(np.stack(ranks))))
    return torch.stack(scores, dim=-1)


def _numbers(draws: CalibrationDraws, rows: Tensor) -> list[Tensor]:
    """Numbers of sets, each ``(M, n)``."""
    flat = rows.flatten(0, -2)
    found = [f(flat, None).reshape(rows.shape[:-1]) for f in reduce_fns(draws.layout)]
    return [*found, *set_numbers(rows, draws.layout).values()]


def _about(probs: Tensor, x: Tensor) -> Tensor:
    """What the classifier sees of x, shape ``(n, 3)``."""
    k = torch.arange(probs.shape[-1], dtype=torch.float64)
    mean = probs @ k
    spread = (probs @ k.square() - mean.square()).clamp(min=0).sqrt()
    power = x.double().square().flatten(1).mean(-1)
    return torch.stack([mean, spread, 0.5 * (power + 1e-300).log()], dim=-1)
