r"""Whether chains of sets have converged, and whether the prior is what holds them.

Chains of different cardinality are compared by numbers that every set has: K, the log
likelihood, the shared parameters, and the locations in ascending order, where the i-th
location of a set with fewer components is the upper end of the axis. For each of them
split R-hat (Vehtari et al. 2021) compares the variance between halves of chains with
that within, on ranks, and the effective sample size tells how many independent draws
they are worth. A chain that is stuck has no variance within, and so an infinite R-hat.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sets.checks import warn_user
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior

__all__ = ["Convergence", "NotConverged", "PilesUp", "convergence_of"]

LARGEST_RHAT = 1.05
FEWEST_EFFECTIVE = 100
# A parameter piles up on a bound if that share of its draws lies in the outer part of
# its prior, where without data 2 % would.
_OUTER, _MOST_OUTER = 0.01, 0.5
# Most draws of a chain that are compared: more change nothing and take time.
_MOST_DRAWS = 2_000
# Fewest draws of a chain that are compared.
_FEWEST_DRAWS = 4
_ADVICE = (
    "Run longer chains (num_draws, thin, burn_in), more of them (num_chains) or more "
    "temperatures (num_levels), or begin elsewhere."
)


class NotConverged(UserWarning):
    """Chains of a sampler do not agree, or hold too few independent draws."""


class PilesUp(UserWarning):
    """Most draws lie on a bound of the prior, which may be too narrow for the data."""


@dataclass(frozen=True)
class Convergence:
    """Diagnostics of chains.

    Attributes:
        rhat: Split R-hat by name; infinite where chains are stuck in different places.
        ess: Effective number of draws by name, of all chains together.
        at_bounds: Share of draws at the largest K that the prior allows, and by name
            in the outer hundredth of a parameter's prior at either end.
        acceptance: Share of each kind of move that was accepted.
        jumps: How many moves that change K were accepted, where draws differ in K;
            None where they do not, or where it is not known.

    Example:
        >>> good = Convergence({"K": 1.001}, {"K": 850.0})
        >>> good.converged, good.worst_rhat
        (True, 1.001)
        >>> Convergence({"K": 1.4}, {"K": 12.0}).converged
        False
    """

    rhat: Mapping[str, float]
    ess: Mapping[str, float]
    at_bounds: Mapping[str, float] = field(default_factory=dict)
    acceptance: Mapping[str, float] = field(default_factory=dict)
    jumps: int | None = None

    @property
    def worst_rhat(self) -> float:
        """Largest R-hat."""
        return max(self.rhat.values(), default=math.nan)

    @property
    def least_ess(self) -> float:
        """Smallest effective number of draws."""
        return min(self.ess.values(), default=math.nan)

    @property
    def converged(self) -> bool:
        """Whether every R-hat is at most 1.05 and every effective number 100.

        And where draws differ in K, whether K changed 100 times: else the shares of K
        are those of the start, which halves of chains have in common.
        """
        agree = self.worst_rhat <= LARGEST_RHAT and self.least_ess >= FEWEST_EFFECTIVE
        return agree and (self.jumps is None or self.jumps >= FEWEST_EFFECTIVE)

    @property
    def _complaints(self) -> list[str]:
        """What is wrong, by its number."""
        worst = max(self.rhat, key=lambda name: _size(self.rhat[name]))
        least = min(self.ess, key=lambda name: -_size(-self.ess[name]))
        found = []
        if not self.rhat[worst] <= LARGEST_RHAT:
            found.append(
                f"R-hat of {worst} is {self.rhat[worst]:.3g} (at most {LARGEST_RHAT})"
            )
        if not self.ess[least] >= FEWEST_EFFECTIVE:
            found.append(
                f"{least} has {self.ess[least]:.0f} effective draws (at least "
                f"{FEWEST_EFFECTIVE})"
            )
        if self.jumps is not None and self.jumps < FEWEST_EFFECTIVE:
            found.append(f"K changed {self.jumps} times (at least {FEWEST_EFFECTIVE})")
        return found

    @property
    def statistics(self) -> dict[str, float]:
        """All numbers by name."""
        parts = {"rhat": self.rhat, "ess": self.ess, "at_bound": self.at_bounds}
        parts["acceptance"] = self.acceptance
        return {
            f"{part}_{name}": value
            for part, values in parts.items()
            for name, value in values.items()
        }

    def warn(self, advice: str = _ADVICE) -> None:
        """Warn of what is wrong, by its number.

        Args:
            advice: What to do where chains have not converged.

        Warns:
            NotConverged: If chains have not converged.
            PilesUp: If half of the draws lie on a bound of the prior.
        """
        if not self.converged:
            text = ", ".join(self._complaints)
            warn_user(f"chains have not converged: {text}. {advice}", NotConverged)
        piled = {n: s for n, s in self.at_bounds.items() if s > _MOST_OUTER}
        if piled:
            each = ", ".join(f"{name} ({share:.0%})" for name, share in piled.items())
            warn_user(
                f"draws pile up on bounds of the prior: {each}. What lies beyond, more "
                "components for one, it does not allow: is it as wide as you mean it?",
                PilesUp,
            )


def convergence_of(
    prior: VariableKPrior,
    theta: Tensor,
    log_likelihood: Tensor | None = None,
    acceptance: Mapping[str, float] | None = None,
    *,
    independent: bool = False,
    jumps: int | None = None,
    counted: Tensor | None = None,
) -> Convergence:
    """Diagnose chains of theta rows.

    Args:
        prior: The prior.
        theta: Rows in canonical order, shape ``(chains, draws, E)``.
        log_likelihood: Of each row, shape ``(chains, draws)``; left out if None.
        acceptance: Share of each kind of move that was accepted.
        independent: Whether the draws of a chain are in no order, as particles are:
            then each counts as one.
        jumps: How many moves that change K were accepted, if that is known.
        counted: Which draws count, bool ``(chains, draws)``; all if None. Of each chain
            as many are looked at as the one with fewest has.
    """
    layout = prior.layout
    if counted is not None and not counted.all():
        fewest = int(counted.sum(-1).min())
        if fewest < _FEWEST_DRAWS:
            ends = {"K": math.inf}, {"K": float(fewest)}
            return Convergence(*ends, {}, dict(acceptance or {}), jumps)
        index = torch.stack([_evenly(each, fewest) for each in counted])
        theta = theta.gather(1, index.unsqueeze(-1).expand(-1, -1, theta.shape[-1]))
        if log_likelihood is not None:
            log_likelihood = log_likelihood.gather(1, index)
    stride = math.ceil(theta.shape[1] / _MOST_DRAWS)
    some = theta[:, ::stride]
    classes = _classes(prior, some)
    numbers = {
        count: member.layout.cardinality(rows).double()
        for count, _, member, rows in classes
    }
    counts = set(numbers)
    if log_likelihood is not None:
        numbers["log_likelihood"] = log_likelihood[:, ::stride].double()
    for i, name in enumerate(layout.shared_names):
        numbers[name] = layout.unpack(some).shared[..., i].double()
    for _, dot, member, rows in classes:
        numbers |= _places(member, rows, dot)
    values = torch.stack(list(numbers.values())).cpu().numpy()
    if independent:  # particles lie beside their copies
        values = values[..., torch.randperm(values.shape[-1], generator=_fixed())]
    # K may well be certain, and what follows from it. No place and no level is.
    still = [name in counts or name == "log_likelihood" for name in numbers]
    may_rest = np.array(still) | (values == 1.0).all((1, 2))  # nor what is absent
    rhat, ess = _rhat(values, may_rest), _effective(values)
    return Convergence(
        dict(zip(numbers, rhat.tolist(), strict=True)),
        dict(zip(numbers, ess.tolist(), strict=True)),
        _at_bounds(prior, theta),
        dict(acceptance or {}),
        None if all(np.ptp(numbers[n].numpy()) == 0 for n in counts) else jumps,
    )


def _rhat(
    values: NDArray[np.float64], may_rest: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Split R-hat of quantities ``(Q, chains, draws)``.

    It is infinite where each chain stays where it is, but 1 where all chains stay at
    one value, if that ``may_rest`` ``(Q,)``.
    """
    from arviz_stats.base.array import array_stats  # brings xarray

    with np.errstate(all="ignore"):
        rhat = array_stats.rhat(values, chain_axis=1, draw_axis=2)
    constant = (np.ptp(values, axis=(1, 2)) == 0) & may_rest
    stuck = (np.ptp(values, axis=2) == 0).all(1)  # each chain in its own place
    return np.where(constant, 1.0, np.where(stuck, np.inf, rhat))


def _effective(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from arviz_stats.base.array import array_stats

    with np.errstate(all="ignore"):
        return np.asarray(array_stats.ess(values, chain_axis=1, draw_axis=2))


def _classes(
    prior: VariableKPrior, theta: Tensor
) -> list[tuple[str, str, VariableKPrior, Tensor]]:
    """Name of K, what stands before other names, prior and rows of each class."""
    if not isinstance(prior, MultiClassPrior):
        return [("K", "", prior, theta)]
    pairs = zip(prior.classes.items(), prior.layout.views(theta), strict=True)
    return [(f"K_{name}", f"{name}.", member, rows) for (name, member), rows in pairs]


def _places(prior: VariableKPrior, theta: Tensor, dot: str) -> dict[str, Tensor]:
    """Ordered locations of rows ``(chains, draws, E)`` of one class."""
    layout = prior.layout
    parts, place = layout.unpack(theta), layout.order_by
    marginal, location = prior.component_marginals[place], layout.component_names[place]
    places = marginal.fraction(parts.components[..., place].double())
    places = torch.where(parts.mask, places, 1.0)
    numbers = {}
    for i in range(int(parts.cardinality.max())):
        numbers[f"{dot}{location}_{i + 1}"] = places[..., i]
    return numbers


def _at_bounds(prior: VariableKPrior, theta: Tensor) -> dict[str, float]:
    """Share of draws on each bound; see :class:`Convergence`."""
    layout, found = prior.layout, {}
    shared = layout.unpack(theta).shared
    columns = [
        (name, marginal, shared[..., i])
        for i, (name, marginal) in enumerate(
            zip(layout.shared_names, prior.shared_marginals or (), strict=True)
        )
    ]
    classes = zip(_classes(prior, theta), prior.probs_by_class, strict=True)
    for (count, dot, member, rows), probs in classes:
        layout = member.layout
        parts, largest = layout.unpack(rows), int(probs.nonzero().max())
        if probs[largest] < _MOST_OUTER:  # or it may well be there by itself
            share = (parts.cardinality == largest).double().mean()
            found[f"{count} = {largest}"] = float(share)
        if not parts.mask.any():
            continue
        active, periods = parts.components[parts.mask], layout.component_periods
        named = zip(layout.component_names, member.component_marginals, strict=True)
        columns += [
            (dot + name, marginal, active[:, i])
            for i, (name, marginal) in enumerate(named)
            if not math.isfinite(periods[i])  # a circle has no ends
        ]
    for name, marginal, values in columns:
        fraction = marginal.fraction(values.double())
        for end, share in (("low", fraction < _OUTER), ("high", fraction > 1 - _OUTER)):
            found[f"{name} ({end})"] = float(share.double().mean())
    return found


def _evenly(counted: Tensor, num: int) -> Tensor:
    """Places of ``num`` of the draws of a chain that count."""
    places = counted.nonzero().flatten()
    return places[torch.linspace(0, len(places) - 1, num).round().long()]


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value
