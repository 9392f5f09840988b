r"""Coverage of credible intervals (the paper's figure 6).

The central interval of probability :math:`\alpha` of a matched component's parameter
holds the truth if :math:`|2u - 1| \le \alpha` with u the truth's normalised rank (see
:mod:`~sbi_slotflow.calibration.draws`). So the coverage at all levels at once,

.. math::
    C(\alpha) = \Pr\big(|2u - 1| \le \alpha\big),

is the ECDF of :math:`|2u - 1|`, and :math:`C(\alpha) = \alpha` if the posterior is
right. Curves pool all components; their intervals come from a bootstrap of pairs, since
components of one pair depend on each other. The verdict needs independent numbers: it
takes a component (and, where parameters are pooled, a parameter) of each pair at random
and is exact. A last curve, "all at once", is the coverage of the ball

.. math::
    \sum_{k,d} (\theta_{k,d} - m_{k,d})^2 / s_{k,d}^2 \le r^2

with the posterior's means m and standard deviations s given K.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .check import Array, Check, pit, rank_p_value
from .draws import CalibrationDraws, MatchedComponents, above_rounding
from .sbc import FEWEST_RANKS, component_ranks, picked_component

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Coverage", "CoverageCurve", "coverage"]

LEVELS = np.arange(1, 20) / 20
"""Probabilities of the intervals: 0.05, 0.1, ..., 0.95."""

# Okabe and Ito's colours, then dashes.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":")
_NUM_BOOTSTRAPS = 500
_BIAS_FROM = 0.1  # the paper's range of levels is 0.1 to 0.95


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Coverage at each of the levels.

    Attributes:
        coverage: Share of truths inside, shape ``(19,)``.
        num: Number of pairs.
        bias: Mean over the levels from 0.1 of coverage less level: positive where
            intervals are too wide.
        bias_interval: Its 90 % bootstrap interval.
        absolute_bias: Largest absolute difference at a level from 0.1.
        absolute_bias_interval: Its 90 % interval, from the bootstrap distribution of
            the largest deviation between two curves.
    """

    coverage: Array
    num: int
    bias: float
    bias_interval: tuple[float, float]
    absolute_bias: float
    absolute_bias_interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Coverage(Check):
    """Coverage of credible intervals.

    Attributes:
        parameters: Curves by parameter, over all K.
        cardinalities: Curves by K, over all parameters; ``"mixed"`` is over all K,
            ``"all at once"`` that of whole sets.
    """

    title: ClassVar[str] = "Coverage of credible intervals"
    explanation: ClassVar[str] = (
        "Share of truths inside central credible intervals, less the intervals' "
        "probability. Below zero: intervals are too narrow; above: too wide. Shaded: "
        "90 % bootstrap intervals at each level."
    )

    parameters: Mapping[str, CoverageCurve]
    cardinalities: Mapping[str, CoverageCurve]
    errors: Mapping[str, Array]

    @property
    def numbers(self) -> dict[str, Any]:
        """Bias of every curve, and its interval."""
        levels = LEVELS.round(2).tolist()
        return {
            name: {
                **asdict(curve),
                "coverage": dict(zip(levels, curve.coverage.tolist(), strict=True)),
            }
            for name, curve in {**self.parameters, **self.cardinalities}.items()
        }

    def plot(self) -> "Figure":
        """Plot coverage less level, by parameter and by K."""
        from ..plots.style import Figure, dress

        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        self._draw(left, self.parameters)
        x_label = "probability of the interval"
        dress(left, x_label, "coverage - probability", "by parameter")
        self._draw(right, self.cardinalities)
        dress(right, x_label, "", "by number of components")
        lines = left.lines + right.lines
        bound = max(0.06, *(1.1 * np.abs(line.get_ydata()).max() for line in lines))
        left.set_ylim(-bound, bound)
        return figure

    def _draw(self, axes: "Axes", curves: Mapping[str, CoverageCurve]) -> None:
        from ..plots.style import SMALL

        axes.axhline(0.0, color="black", lw=0.6)
        looks = cycle(product(_DASHES, _COLOURS))
        for (dashes, colour), (name, curve) in zip(looks, curves.items(), strict=False):
            mixed = name == "mixed"
            if mixed or len(curves) <= 4:
                ends = self.errors[name] - LEVELS
                axes.fill_between(LEVELS, *ends, color=colour, alpha=0.15, lw=0)
            style = {"color": colour, "ls": dashes, "lw": 2.2 if mixed else 1.3}
            axes.plot(LEVELS, curve.coverage - LEVELS, label=name, **style)
        ncols = 2 if len(curves) > 3 else 1
        axes.legend(fontsize=SMALL, frameon=False, ncols=ncols, loc="best")


def coverage(draws: CalibrationDraws, *, false_alarm_rate: float = 0.01) -> Coverage:
    """Measure the coverage of credible intervals given the true K."""
    generator = draws.generator(2)
    matched = MatchedComponents(draws)
    counts = draws.cardinality
    components = _centrality(component_ranks(matched, generator))
    truth, given_k, _ = matched.shared
    shared = _centrality(torch.from_numpy(pit(truth, given_k, generator)))
    mask = matched.mask
    picked = components[torch.arange(draws.num), picked_component(counts, generator)]

    parameters, cardinalities, errors = {}, {}, {}
    p_values: dict[str, float] = {}

    def add(
        group: dict[str, CoverageCurve], name: str, values: Tensor, used: Tensor,
        test: Tensor,
    ) -> None:  # fmt: skip
        some = used.any(-1)
        if some.sum() >= FEWEST_RANKS:
            group[name], errors[name] = _curve(values[some], used[some], generator)
            p_values[name] = rank_p_value(test[some].numpy())

    for d, name in enumerate(draws.layout.component_names):
        add(parameters, name, components[..., d], mask, picked[:, d])
    for s, name in enumerate(draws.layout.shared_names):
        one = shared[:, s]
        add(parameters, name, one.unsqueeze(-1), torch.ones(draws.num, 1).bool(), one)

    everything = torch.cat([components.flatten(1), shared], dim=-1)
    size = components.shape[-1]
    used = torch.cat(
        [mask.repeat_interleave(size, -1), torch.ones(shared.shape).bool()], dim=-1
    )
    one = _one_of(torch.cat([picked, shared], dim=-1), counts, size, generator)
    for k in counts.unique().tolist():
        here = (counts == k).unsqueeze(-1)
        add(cardinalities, f"K = {k}", everything, used & here, one)
    add(cardinalities, "mixed", everything, used, one)
    truth, given_k = _radii(matched)
    ball = torch.from_numpy(pit(truth, given_k, generator)).unsqueeze(-1)
    any_used = used.any(-1, keepdim=True)
    add(cardinalities, "all at once", ball, any_used, ball.squeeze(-1))
    if not p_values:
        raise ValueError(
            f"draws must hold at least {FEWEST_RANKS} pairs with a parameter, got "
            f"{int(any_used.sum())}."
        )
    return Coverage(p_values, false_alarm_rate, parameters, cardinalities, errors)


def _centrality(ranks: Tensor) -> Tensor:
    """Probability of the smallest central interval that holds the truth."""
    return (2 * ranks - 1).abs()


def _one_of(
    values: Tensor, counts: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """One parameter of each pair, not a component's where K = 0."""
    share = torch.rand(len(values), generator=generator, dtype=torch.float64)
    first = torch.where(counts > 0, 0, size)
    number = values.shape[-1] - first
    index = first + (share * number).long()
    index = index.clamp(max=values.shape[-1] - 1)
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _radii(matched: MatchedComponents) -> list[Tensor]:
    """Squared standardised distance from the mean, of truth and draws."""
    *both, guides = matched.shared
    centre = guides.mean(0)
    spread = (guides - centre).square().mean(0).sqrt()
    spread = above_rounding(spread, guides.abs().amax(0))
    return [
        own.square().sum((-2, -1)) + ((shared - centre) / spread).square().sum(-1)
        for own, shared in zip(matched.deviations, both, strict=True)
    ]


def _curve(
    values: Tensor, used: Tensor, generator: torch.Generator
) -> tuple[CoverageCurve, Array]:
    """Curve and the ends of its 90 % intervals, ``(2, 19)``, of numbers ``(n, M)``."""
    levels = torch.from_numpy(LEVELS)
    inside = (values.unsqueeze(-1) <= levels) & used.unsqueeze(-1)
    hits, tries = inside.sum(1).double(), used.sum(1).double()
    found = hits.sum(0) / tries.sum()
    num = len(values)
    weights = torch.stack([
        torch.bincount(torch.randint(num, (num,), generator=generator), minlength=num)
        for _ in range(_NUM_BOOTSTRAPS)
    ]).double()  # fmt: skip
    again = (weights @ hits) / (weights @ tries).clamp(min=1).unsqueeze(-1)
    from_here = levels >= _BIAS_FROM - 1e-9
    ends = torch.tensor([0.05, 0.95], dtype=torch.float64)
    bias = float((found - levels)[from_here].mean())
    low, high = (again - levels)[:, from_here].mean(-1).quantile(ends).tolist()
    largest = float((found - levels)[from_here].abs().max())
    margin = float((again - found)[:, from_here].abs().amax(-1).quantile(0.9))
    around = (max(0.0, largest - margin), largest + margin)
    curve = CoverageCurve(found.numpy(), num, bias, (low, high), largest, around)
    return curve, again.quantile(ends, dim=0).numpy()
