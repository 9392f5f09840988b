r"""Posteriors with a density: refined, or put under another prior.

.. math::
    p_{new}(\theta | x) = \frac{1}{Z(x)}\, q(\theta | x)\,
        \frac{p_{new}(\theta)}{p_{train}(\theta)}, \qquad
    Z(x) = \mathrm{E}_{q(\theta | x)} \frac{p_{new}(\theta)}{p_{train}(\theta)}

Priors, amplitudes, separations and cardinalities alike, are known in closed form, so
that another one costs draws and no training. It is as good as q is where the new prior
lies: k-hat and the effective number of draws say how much of q that is. Nothing that
the training prior excludes can come back.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import generator_for
from ..sets.checks import Numbers, as_count, warn_user
from ..sets.distribution import SetDistribution
from ..sets.prior import VariableKPrior, check_covered
from .base import Posterior
from .draws import (
    FEWEST_EFFECTIVE,
    LARGEST_K_HAT,
    DrawnSets,
    RefinedPosterior,
    UnreliableWeights,
)
from .importance import LogLikelihood
from .refine import refine
from .weights import pareto_smoothed, worst_pareto_k

__all__ = ["Refinable", "ReweightedPosterior", "ReweightedSets"]

_NUM_DRAWS = 10_000


class ReweightedSets(SetDistribution):
    """A distribution over sets given B observations, weighed to another prior.

    Draws are chosen among ``num_draws`` of a fixed seed, by their weights; they are
    made when first asked for.
    """

    def __init__(
        self,
        sets: SetDistribution,
        old: VariableKPrior,
        new: VariableKPrior,
        num_draws: int = _NUM_DRAWS,
    ) -> None:
        self.sets, self.old, self.new, self.num_draws = sets, old, new, num_draws
        self.layout, self.num_observations = new.layout, sets.num_observations

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``(S, B, E)``, smoothed log weights ``(S, B)`` and k-hat ``(B,)``."""
        with torch.no_grad():
            shape, generator = (self.num_draws,), generator_for(0)
            rows = self.sets.sample(shape, generator=generator)
            raw = self._log_ratio(rows)
        smoothed = [pareto_smoothed(column) for column in raw.unbind(1)]
        k = self.layout.cardinality(rows)
        pairs = zip(raw.unbind(1), k.unbind(1), smoothed, strict=True)
        worst = [worst_pareto_k(*pair) for pair in pairs]
        hopeless = [b for b, one in enumerate(raw.T) if not torch.isfinite(one).any()]
        if hopeless:
            raise ValueError(
                f"no draw given observation {hopeless[0]} has a positive density under "
                "the new prior: the data ask for sets that it excludes."
            )
        log_weights = torch.stack([one.log_weights for one in smoothed], 1)
        return rows, log_weights, torch.tensor(worst)

    @property
    def ess(self) -> Tensor:
        """Kish's effective number of draws given each observation, ``(B,)``."""
        return 1 / self.pool[1].softmax(0).square().sum(0)

    def cardinality(self) -> Categorical:
        """Return p(K | x) under the new prior, batch shape ``(B,)``."""
        each = [sets.cardinality().logits[0] for sets in self._drawn_sets]
        return Categorical(logits=torch.stack(each))

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows of equal weight; see :meth:`SetDistribution.sample`."""
        each = [sets.sample(sample_shape, k, generator) for sets in self._drawn_sets]
        return torch.cat(each, -2)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log densities; Z(x) is the mean weight of the draws."""
        size = torch.tensor(float(self.num_draws)).log()
        log_z = self.pool[1].logsumexp(0) - size
        ratio = self._log_ratio(theta)
        value = self.sets.log_prob(theta).double() + ratio - log_z
        return torch.where(torch.isfinite(ratio), value, -torch.inf)

    @cached_property
    def _drawn_sets(self) -> list[DrawnSets]:
        rows, log_weights, _ = self.pool
        pairs = zip(rows.unbind(1), log_weights.softmax(0).unbind(1), strict=True)
        return [DrawnSets(self.layout, *pair) for pair in pairs]

    def _log_ratio(self, theta: Tensor) -> Tensor:
        """Log of the new over the old prior ``(S, B)``, float64."""
        new, old = (p.log_prob(theta).double() for p in (self.new, self.old))
        return torch.where(torch.isfinite(new), new - old, -torch.inf)


class Refinable(Posterior):
    """A posterior with a density: it can be refined and put under another prior."""

    def refine(
        self,
        log_likelihood: LogLikelihood,
        x: Numbers | None = None,
        num_samples: int = 10_000,
        **options: Any,
    ) -> RefinedPosterior | list[RefinedPosterior]:
        """Turn this posterior into the exact one; see :func:`sbi_slotflow.refine`."""
        return refine(self, log_likelihood, x, num_samples, **options)

    @overload
    def with_prior(self, prior: VariableKPrior) -> "ReweightedPosterior": ...

    @overload
    def with_prior(
        self, prior: VariableKPrior, x: Numbers, num_samples: int = 10_000
    ) -> RefinedPosterior: ...

    def with_prior(
        self,
        prior: VariableKPrior,
        x: Numbers | None = None,
        num_samples: int = 10_000,
    ) -> "ReweightedPosterior | RefinedPosterior":
        r"""Return the posterior under another prior, without training.

        .. math:: q_{new}(\theta | x) \propto q(\theta | x)\,
            p_{new}(\theta) / p_{train}(\theta)

        Args:
            prior: Prior over the same layout, within the support of this posterior's:
                other amplitudes, separations or cardinalities.
            x: One observation, to get its weighted draws with ``ess`` and
                ``pareto_k``; a posterior for any observation if None.
            num_samples: Number of draws that are weighed, if x is given.

        Raises:
            TypeError, ValueError: If the prior is of another kind or layout, or not
                covered by this posterior's.

        Warns:
            UnreliableWeights: If k-hat exceeds 0.7 or fewer than 100 draws are
                effective.

        Example:
            >>> from sbi_slotflow import problems
            >>> problem = problems.linear_gaussian()
            >>> posterior = problem.exact_posterior()
            >>> fewer = problem.prior.with_cardinality([8, 4, 2, 1])
            >>> posterior.with_prior(fewer).cardinality(torch.zeros(2, 6)).batch_shape
            torch.Size([2])
        """
        if x is None:
            return ReweightedPosterior(self, prior)
        num_samples = as_count(num_samples, "num_samples")
        batch = self._one(x, "with_prior", "; leave x out")
        return reweighted(self, prior, batch[0], num_samples)


class ReweightedPosterior(Refinable):
    """A posterior under another prior, for any observation.

    Attributes:
        posterior: The posterior under the prior of its training.
        prior: The new prior.
    """

    def __init__(self, posterior: Posterior, prior: VariableKPrior) -> None:
        check_covered(prior, posterior.prior)
        self.posterior, self.prior = posterior, prior
        self.simulator, self.model_card = posterior.simulator, posterior.model_card
        self._x, self._device = posterior._x, posterior._device

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.posterior.event_shape

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` exists."""
        return self.posterior.has_density

    def given(self, x: Tensor) -> ReweightedSets:
        """Return the distribution over sets given observations ``(B, *event)``."""
        sets = self.posterior.given(x)
        found = ReweightedSets(sets, self.posterior.prior, self.prior)
        for ess, pareto_k in zip(found.ess.tolist(), found.pool[2], strict=True):
            _warn(ess, float(pareto_k), found.num_draws)
        return found


def reweighted(
    posterior: Posterior,
    prior: VariableKPrior,
    x: Tensor,
    num_samples: int,
) -> RefinedPosterior:
    """Weigh draws given one observation ``(*event)`` to another prior."""
    check_covered(prior, posterior.prior)
    with torch.no_grad():
        sets = posterior.given(x.unsqueeze(0))
    found = ReweightedSets(sets, posterior.prior, prior, num_samples)
    rows, log_weights, pareto_k = found.pool
    result = RefinedPosterior(
        prior.layout,
        rows[:, 0].unsqueeze(0),
        x,
        log_weights[:, 0].unsqueeze(0),
        pareto_k=float(pareto_k[0]),
    )
    _warn(result.ess, result.pareto_k, num_samples)
    return result


def _warn(ess: float, pareto_k: float, num: int) -> None:
    if pareto_k <= LARGEST_K_HAT and ess >= FEWEST_EFFECTIVE:
        return
    warn_user(
        f"the weights to the new prior cannot be relied on: k-hat = {pareto_k:.2f} "
        f"(should be below {LARGEST_K_HAT}), {ess:.0f} of {num} draws are effective "
        f"(should be above {FEWEST_EFFECTIVE}). The new prior lies where the training "
        "prior has little weight: refine(prior=...) with a likelihood, or train anew.",
        UnreliableWeights,
    )
