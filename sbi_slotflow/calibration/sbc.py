r"""Simulation-based calibration of sets (Talts et al. 2018, Modrak et al. 2023).

The truth is ranked among posterior draws, one number at a time. Two kinds of numbers
make sense when K varies and labels are arbitrary:

- :func:`sbc`: numbers that don't depend on labels. Among draws from q(K, Theta, s | x):
  K, total power, the lowest component, shared parameters and the log-likelihood; among
  draws given the true K: the mean over components of each parameter, and the smallest
  gap between components, which see whether components depend on each other as they
  should.
- :func:`sbc_components`: each parameter of a component, matched with reference points
  (:mod:`~sbi_slotflow.calibration.draws`). A component of each pair is picked at
  random, so that the ranks are independent. Where K > 1 the products of different
  components' standardised deviations are ranked too, :math:`\sum_{j<k} z_j z_k`, which
  see correlations that are missing.

Ranks are randomised for ties and tested as in :mod:`~sbi_slotflow.calibration.check`;
the verdict is exact for any number of pairs. :func:`reduce_fns` makes the numbers that
exist for every K for sbi's own tool::

    run_sbc(thetas, xs, posterior, reduce_fns=reduce_fns(prior.layout))
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..seeding import generator_for
from ..sets.checks import as_count
from ..sets.layout import ThetaLayout
from ..sets.separation import smallest_gap
from .check import Array, RankCheck, pit
from .draws import CalibrationDraws, MatchedComponents

__all__ = [
    "FEWEST_RANKS",
    "ComponentSBC",
    "CountInBand",
    "JitteredCardinality",
    "Lowest",
    "Reduction",
    "SetSBC",
    "SharedParameter",
    "TotalPower",
    "reduce_fns",
    "sbc",
    "sbc_components",
]


class Reduction(ABC):
    """Base: a number of each row, ``(N, E)`` to ``(N,)``, with a ``name``.

    It is of one component parameter. Rows with K = 0 come below all others; what would
    tie comes in random order.
    """

    _name: ClassVar[str]

    def __init__(self, layout: ThetaLayout, parameter: str, seed: int = 0) -> None:
        known = layout.component_names
        if parameter not in known:
            raise ValueError(
                f"parameter must be one of {list(known)}, got {parameter!r}."
            )
        self.layout, self.name = layout, self._name.format(parameter)
        self._index, self._generator = known.index(parameter), generator_for(seed)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        parts = self.layout.unpack(theta)
        # Numbers in [0, 1), new ones at every call.
        jitter = torch.rand(len(theta), generator=self._generator)
        return self._number(parts.components[..., self._index], parts.mask, jitter)

    @abstractmethod
    def _number(self, values: Tensor, mask: Tensor, jitter: Tensor) -> Tensor: ...


class JitteredCardinality(Reduction):
    """K plus a uniform number in [0, 1): where K's would tie, ranks are random."""

    _name = "K"

    def __init__(self, layout: ThetaLayout, seed: int = 0) -> None:
        super().__init__(layout, layout.component_names[0], seed)

    def _number(self, values: Tensor, mask: Tensor, jitter: Tensor) -> Tensor:
        return mask.sum(-1) + jitter


class TotalPower(Reduction):
    r"""Sum of squares of one component parameter, :math:`\sum_k \theta_{k,d}^2`."""

    _name = "power of {}"

    def _number(self, values: Tensor, mask: Tensor, jitter: Tensor) -> Tensor:
        power = torch.where(mask, values.double().square(), 0.0).sum(-1)
        return torch.where(mask.any(-1), power, jitter - 1.0)


class Lowest(Reduction):
    """Smallest value of one component parameter."""

    _name = "lowest {}"

    def _number(self, values: Tensor, mask: Tensor, jitter: Tensor) -> Tensor:
        least = torch.where(mask, values, torch.inf).amin(-1)
        below = torch.finfo(values.dtype).min * (0.5 + 0.5 * jitter)
        return torch.where(mask.any(-1), least, below)


class CountInBand(Reduction):
    """Number of components with a parameter in [low, high), jittered like K."""

    _name = "number with {} in a band"

    def __init__(
        self,
        layout: ThetaLayout,
        parameter: str,
        low: float,
        high: float,
        seed: int = 0,
    ) -> None:
        super().__init__(layout, parameter, seed)
        self.low, self.high = low, high

    def _number(self, values: Tensor, mask: Tensor, jitter: Tensor) -> Tensor:
        inside = mask & (values >= self.low) & (values < self.high)
        return inside.sum(-1) + jitter


class SharedParameter:
    """One shared parameter of each row, ``(N, E)`` to ``(N,)``."""

    def __init__(self, layout: ThetaLayout, parameter: str) -> None:
        self.layout, self.name = layout, parameter
        self._index = layout.shared_names.index(parameter)

    def __call__(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Reduce rows ``(N, E)`` to ``(N,)``."""
        return self.layout.unpack(theta).shared[..., self._index]


def reduce_fns(
    layout: ThetaLayout,
    power: str | None = None,
    band: tuple[float, float] | None = None,
) -> list[Reduction | SharedParameter]:
    """Make a list of reductions for ``run_sbc``.

    Args:
        layout: Layout of theta.
        power: Parameter whose total power is ranked; the first one if None.
        band: Band of the ``order_by`` parameter in which components are counted; none
            if None.

    Returns:
        Jittered K, total power, lowest ``order_by`` parameter, number in the band, and
        each shared parameter, in this order.
    """
    order = layout.component_names[layout.order_by]
    functions: list[Reduction | SharedParameter] = [
        JitteredCardinality(layout),
        TotalPower(layout, power or layout.component_names[0]),
        Lowest(layout, order),
    ]
    if band is not None:
        functions.append(CountInBand(layout, order, *band))
    functions += [SharedParameter(layout, name) for name in layout.shared_names]
    return functions


FEWEST_RANKS = 20
"""Fewest pairs that a quantity is tested on."""

# Entries of expanded data held at once.
_CHUNK = 8_000_000

LogLikelihood = Callable[[Tensor, Tensor], Tensor]


class SetSBC(RankCheck):
    """What :func:`sbc` returns."""

    title: ClassVar[str] = "Simulation-based calibration of sets"


class ComponentSBC(RankCheck):
    """What :func:`sbc_components` returns."""

    title: ClassVar[str] = "Simulation-based calibration of matched components"


def sbc(
    draws: CalibrationDraws,
    *,
    log_likelihood: LogLikelihood | None = None,
    num_likelihood_draws: int = 50,
    false_alarm_rate: float = 0.01,
) -> SetSBC:
    """Rank numbers of the set that don't depend on labels.

    Args:
        draws: Pairs and draws.
        log_likelihood: Maps rows ``(L, n, E)`` and data ``(n, T)`` to log p(x | theta);
            not ranked if None.
        num_likelihood_draws: Draws among which its value at the truth is ranked.
        false_alarm_rate: Of the check.
    """
    num_likelihood_draws = as_count(num_likelihood_draws, "num_likelihood_draws")
    generator = draws.generator(0)
    layout, theta = draws.layout, draws.theta
    ranks: dict[str, Array] = {}
    for function in reduce_fns(layout):
        truth = function(theta, draws.x)
        values = function(draws.draws.flatten(0, 1), draws.x)
        values = values.reshape(draws.draws.shape[:-1])
        ranks[function.name] = pit(truth, values, generator)
    if log_likelihood is not None:
        rows = draws.draws[:num_likelihood_draws]
        rows = torch.cat([theta.unsqueeze(0), rows])
        step = max(1, _CHUNK // (len(rows) * draws.x[0].numel()))
        pieces = zip(rows.split(step, dim=1), draws.x.split(step), strict=True)
        values = torch.cat([log_likelihood(*piece) for piece in pieces], dim=1)
        ranks["log-likelihood"] = pit(values[0], values[1:], generator)
    several = draws.cardinality > 1
    if several.sum() >= FEWEST_RANKS:
        truths, values = (set_numbers(r, layout) for r in (theta, draws.given_k))
        for name, truth in truths.items():
            among = values[name][:, several]
            ranks[f"{name} given K"] = pit(truth[several], among, generator)
    return SetSBC.of(ranks, false_alarm_rate)


def sbc_components(
    draws: CalibrationDraws, *, false_alarm_rate: float = 0.01
) -> ComponentSBC:
    """Rank the parameters of matched components, given the true K."""
    generator = draws.generator(1)
    matched = MatchedComponents(draws)
    ranks = component_ranks(matched, generator)
    picked = picked_component(draws.cardinality, generator)
    some, several = draws.cardinality > 0, draws.cardinality > 1
    if some.sum() < FEWEST_RANKS:
        raise ValueError(
            f"draws must hold at least {FEWEST_RANKS} pairs with a component, got "
            f"{int(some.sum())}."
        )
    index = torch.arange(draws.num)
    chosen = ranks[index, picked][some].numpy()
    names = draws.layout.component_names
    found = {name: chosen[:, d] for d, name in enumerate(names)}
    if several.sum() >= FEWEST_RANKS:
        truth, given_k = (_products(part) for part in matched.deviations)
        products = pit(truth[several], given_k[:, several], generator)
        for d, name in enumerate(names):
            found[f"pairs of {name}"] = products[:, d]
    return ComponentSBC.of(found, false_alarm_rate)


def component_ranks(matched: MatchedComponents, generator: torch.Generator) -> Tensor:
    """Ranks of all matched components' parameters, float64, ``(n, Kmax, D)``."""
    truth, given_k, _ = matched.components
    return torch.from_numpy(pit(truth, given_k, generator))


def picked_component(cardinality: Tensor, generator: torch.Generator) -> Tensor:
    """Index of a component of each set, uniform on its K; 0 where K = 0."""
    share = torch.rand(len(cardinality), generator=generator, dtype=torch.float64)
    return (share * cardinality).long()


def _products(deviation: Tensor) -> Tensor:
    """Sum over pairs of components of their deviations' products, ``(..., n, D)``."""
    return 0.5 * (deviation.sum(-2).square() - deviation.square().sum(-2))


def set_numbers(rows: Tensor, layout: ThetaLayout) -> dict[str, Tensor]:
    """Numbers of sets of one size, which mean something from K = 2 on."""
    parts = layout.unpack(rows)
    total = torch.where(parts.mask.unsqueeze(-1), parts.components.double(), 0.0)
    mean = total.sum(-2) / parts.cardinality.clamp(min=1).unsqueeze(-1)
    numbers = {
        f"mean {name}": mean[..., d]
        for d, name in enumerate(layout.component_names)
        if name not in layout.periods
    }
    if layout.max_cardinality > 1:
        key = parts.components[..., layout.order_by]
        numbers["smallest gap"] = smallest_gap(key, parts.mask)
    return numbers
