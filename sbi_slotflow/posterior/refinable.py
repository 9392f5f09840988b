r"""Posteriors with a density: refined, or put under another prior.

.. math::
    p_{new}(\theta | x) = \frac{1}{Z(x)}\, q(\theta | x)\,
        \frac{p_{new}(\theta)}{p_{train}(\theta)}, \qquad
    Z(x) = \mathrm{E}_{q(\theta | x)} \frac{p_{new}(\theta)}{p_{train}(\theta)}

Priors, amplitudes, separations and cardinalities alike, are known in closed form, so
that another one costs draws and no training. It is as good as q is where the new prior
lies: k-hat and the effective number of draws say how much of q that is. Nothing that
the training prior excludes can come back.

Where the new prior excludes most of what q finds, it is mostly by K: sets with one weak
component more than the new prior knows have another K than those that stay. So a few
draws of each K tell first how much of it stays,

.. math::
    m_K = q(K | x)\, \mathrm{E}_{q(\theta | x, K)}
        \frac{p_{new}(\theta)}{p_{train}(\theta)},

and the draws that are weighed have K from :math:`r(K | x) = 0.9\, c \sqrt{m_K} + 0.1\,
c' q(K | x)\, p_{new}(K) / p_{train}(K)` in place of q(K | x), with weights divided by
r / q. The root gives more to a K that q thinks little of than it would get by itself.

A K of which no draw stays is in no weight, and yet may be what the new prior is about.
Of n draws of which s < 10 stay, up to a share (s + 3) / n might have, with the ratio of
priors that sets of the new one have. Where that bound is more than a tenth of all
weight, k-hat is infinite.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..nn.charts import Chart
from ..seeding import draw_seed, generator_for
from ..sets.checks import Numbers, as_count, warn_user
from ..sets.distribution import SetDistribution
from ..sets.prior import VariableKPrior, check_covered
from .base import Posterior, PosteriorOfOne
from .draws import (
    FEWEST_EFFECTIVE,
    LARGEST_K_HAT,
    DrawnSets,
    RefinedPosterior,
    UnreliableWeights,
)
from .importance import LogLikelihood
from .refine import refine
from .truncated import TruncatedPrior
from .weights import pareto_smoothed, systematic, worst_pareto_k

__all__ = [
    "LeaningPosterior",
    "LeaningSets",
    "Refinable",
    "ReweightedPosterior",
    "ReweightedSets",
]

_NUM_DRAWS = 10_000
# Draws of each K that tell how much of it stays, the share of a K from which it is
# asked for, and the share of the draws that does not go by that.
_PILOT, _LEAST_CHANCE, _BY_Q = 200, 1e-6, 0.1
# Draws of a K that are enough to see it, the probability from which it is looked for,
# sets of the new prior that tell the ratio of priors, and the largest share that may
# remain unseen.
_SEEN, _LOOKED_FOR, _TYPICAL, _MOST_UNSEEN = 10, 1e-3, 100, 0.1
# Further draws in the pilot of a K that fewer show.
_SECOND_LOOK = 1_000


class LeaningSets(SetDistribution):
    """The sets of one observation, with K where a new prior leaves most of them.

    Attributes:
        shares: Probabilities r(K | x) of the draws' cardinalities, ``(Kmax + 1,)``.
    """

    num_observations = 1

    def __init__(
        self, sets: SetDistribution, old: VariableKPrior, new: VariableKPrior
    ) -> None:
        self.sets, self.old, self.new, self.layout = sets, old, new, new.layout
        with torch.no_grad():
            logits = sets.cardinality().logits[0]
            self._device, self._log_q = logits.device, logits.double().cpu()
            # Draws of each K in the pilot, and how many of them stayed, (2, Kmax + 1).
            self._tried = torch.zeros(2, len(self._log_q), dtype=torch.float64)
            self.shares = self._found()

    def cardinality(self) -> Categorical:
        """Return r(K | x), batch shape ``(1,)``."""
        return Categorical(logits=self.shares.log().to(self._device)[None])

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows; see :meth:`SetDistribution.sample`."""
        if k is not None:
            return self.sets.sample(sample_shape, k, generator)
        shape, order = torch.Size(sample_shape), generator_for(draw_seed(generator))
        chosen = systematic(self.shares, shape.numel(), order)
        counts = zip(*chosen.unique(return_counts=True), strict=True)
        parts = [self.sets.sample((int(num),), int(k), generator) for k, num in counts]
        rows = torch.cat(parts) if parts else self.sets.sample((0,))
        mixed = torch.randperm(len(rows), generator=order).to(rows.device)
        return rows[mixed].reshape(*shape, 1, self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log densities, float64; see :meth:`SetDistribution.log_prob`."""
        k = self.layout.cardinality(theta)
        lean = self.log_lean.to(theta.device)[k]
        value = self.sets.log_prob(theta).double() + lean
        return torch.where(torch.isfinite(lean), value, -torch.inf)

    @property
    def log_lean(self) -> Tensor:
        """Log of r over q for each K, ``(Kmax + 1,)``, -inf where nothing is drawn."""
        log_r = self.shares.log()
        return torch.where(torch.isfinite(log_r), log_r - self._log_q, -torch.inf)

    def unseen(self, k: Tensor, log_weights: Tensor) -> float:
        """Largest share that a K of hardly any draw may have, see the module.

        ``k`` and ``log_weights`` ``(S,)`` are those of draws and of what is left.
        """
        stayed, largest = torch.isfinite(log_weights), len(self._log_q)
        drawn, left = (
            torch.bincount(each, minlength=largest).double().cpu()
            for each in (k, k[stayed])
        )
        drawn, left = drawn + self._tried[0], left + self._tried[1]
        total = float(log_weights.double().logsumexp(0)) - math.log(len(k))
        asked = (self.new.cardinality_probs > 0).cpu() & (left < _SEEN)
        asked &= self._log_q >= math.log(_LOOKED_FOR)
        shares = [0.0]
        for one in asked.nonzero().flatten().tolist():
            only = torch.zeros(largest)
            only[one] = 1.0
            sets = self.new.with_cardinality(only).sample((_TYPICAL,), generator_for(0))
            ratio = float(log_prior_ratio(sets, self.new, self.old).median())
            rate = (left[one] + 3) / drawn[one].clamp(min=3)
            bound = float(self._log_q[one] + rate.log()) + ratio
            shares.append(1 / (1 + math.exp(min(total - bound, 700.0))))
        return max(shares)

    def _found(self) -> Tensor:
        """Probabilities r(K | x), by the pilot's draws."""
        new, old = (p.cardinality_probs.cpu().double() for p in (self.new, self.old))
        expected = self._log_q.exp() * torch.where(new > 0, new / old, 0.0)
        if not expected.sum() > 0:  # all is excluded, which the weights will tell
            return self._log_q.softmax(0)
        expected = expected / expected.sum()
        expected = torch.where(expected >= _LEAST_CHANCE, expected, 0.0)
        generator = generator_for(0, device=self._device)
        left = torch.zeros_like(expected)
        for k in expected.nonzero().flatten().tolist():
            rows = self.sets.sample((_PILOT,), k, generator)
            log_ratio = log_prior_ratio(rows, self.new, self.old)
            few = torch.isfinite(log_ratio).sum() < _SEEN
            if few and self._log_q[k] >= math.log(_LOOKED_FOR):
                rows = self.sets.sample((_SECOND_LOOK,), k, generator)
                more = log_prior_ratio(rows, self.new, self.old)
                log_ratio = torch.cat([log_ratio, more])
            num, stayed = len(log_ratio), torch.isfinite(log_ratio).sum()
            log_mean = float(log_ratio.logsumexp(0)) - math.log(num)
            left[k] = (self._log_q[k] + log_mean).exp()
            self._tried[:, k] = torch.stack([torch.tensor(num), stayed.cpu()])
        if not left.sum() > 0:
            return expected / expected.sum()
        root = left.sqrt()
        return (1 - _BY_Q) * root / root.sum() + _BY_Q * expected / expected.sum()


def log_prior_ratio(theta: Tensor, new: VariableKPrior, old: VariableKPrior) -> Tensor:
    """Log of the new over the old prior of rows ``(..., E)``, float64."""
    log_new, log_old = (prior.log_prob(theta).double() for prior in (new, old))
    return torch.where(torch.isfinite(log_new), log_new - log_old, -torch.inf)


class ReweightedSets(SetDistribution):
    """A distribution over sets given B observations, weighed to another prior.

    ``sets`` holds a distribution for each observation. Draws are chosen among
    ``num_draws`` of a fixed seed, by their weights; they are made when first asked for.
    """

    def __init__(
        self,
        sets: Sequence[SetDistribution],
        old: VariableKPrior,
        new: VariableKPrior,
        num_draws: int = _NUM_DRAWS,
    ) -> None:
        self.sets, self.old, self.new, self.num_draws = sets, old, new, num_draws
        self.layout, self.num_observations = new.layout, len(sets)

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``(S, B, E)``, smoothed log weights ``(S, B)`` and k-hat ``(B,)``."""
        drawn, weights, unseen = [], [], []
        with torch.no_grad():
            for one in self.sets:
                sets = LeaningSets(one, self.old, self.new)
                rows = sets.sample((self.num_draws,), generator=generator_for(0))
                k = self.layout.cardinality(rows)
                lean = sets.log_lean.to(rows.device)[k]
                drawn.append(rows)
                weights.append(log_prior_ratio(rows, self.new, self.old) - lean)
                unseen.append(sets.unseen(k[:, 0], weights[-1][:, 0]) > _MOST_UNSEEN)
        rows, raw = torch.cat(drawn, 1), torch.cat(weights, 1)
        smoothed = [pareto_smoothed(column) for column in raw.unbind(1)]
        k = self.layout.cardinality(rows)
        pairs = zip(raw.unbind(1), k.unbind(1), smoothed, strict=True)
        worst = torch.tensor([worst_pareto_k(*pair) for pair in pairs])
        worst = worst.masked_fill(torch.tensor(unseen), torch.inf)
        hopeless = [b for b, one in enumerate(raw.T) if not torch.isfinite(one).any()]
        if hopeless:
            raise ValueError(
                f"no draw given observation {hopeless[0]} has a positive density under "
                "the new prior: the data ask for sets that it excludes."
            )
        log_weights = torch.stack([one.log_weights for one in smoothed], 1)
        return rows, log_weights, worst

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
        ratio = log_prior_ratio(theta, self.new, self.old)
        columns = theta.expand(-1, self.num_observations, -1).split(1, 1)
        pairs = zip(self.sets, columns, strict=True)
        values = torch.cat([one.log_prob(rows) for one, rows in pairs], 1)
        value = values.double() + ratio - log_z
        return torch.where(torch.isfinite(ratio), value, -torch.inf)

    @cached_property
    def _drawn_sets(self) -> list[DrawnSets]:
        rows, log_weights, _ = self.pool
        pairs = zip(rows.unbind(1), log_weights.softmax(0).unbind(1), strict=True)
        return [DrawnSets(self.layout, *pair) for pair in pairs]


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
        prior = options.get("prior")
        if not (isinstance(prior, VariableKPrior) and self.has_density):
            return refine(self, log_likelihood, x, num_samples, **options)
        check_covered(prior, self.prior)
        with torch.no_grad():
            each = [LeaningPosterior(self, prior, x) for x in self.observations(x)]
        found = [
            refine(one, log_likelihood, None, num_samples, **options) for one in each
        ]
        results = [one for one in found if isinstance(one, RefinedPosterior)]
        for i, one in enumerate(each):
            if one.misses_a_cardinality():
                results[i] = replace(results[i], pareto_k=math.inf)
                _warn(results[i].ess, math.inf, num_samples)
        return results[0] if len(results) == 1 else results

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

    def truncated_prior(
        self, x: Numbers | None = None, quantile: float = 1e-3, **options: Any
    ) -> TruncatedPrior:
        r"""Return the prior where this posterior has its mass, for a further round.

        .. math:: \tilde p(\theta) \propto p(\theta)\,
            1[q(\theta | x) \ge t\, p(\theta)]

        Simulations from it cost what those from the prior do, and teach a network more
        of this x; :class:`~sbi_slotflow.SlotNPE` takes it as ``proposal``.

        Args:
            x: One observation; the default x if None.
            quantile: Share of the posterior that is cut off, in (0, 1).
            options: ``num_draws`` of the posterior that tell the threshold (20,000),
                and ``max_candidates``, the most that are tried for one sample
                (2,000,000).

        Raises:
            NotImplementedError: If the posterior has no density.
            ValueError: If a number is out of range, or x a batch.

        Example:
            >>> from sbi_slotflow import problems
            >>> problem = problems.linear_gaussian()
            >>> posterior = problem.exact_posterior()
            >>> x = problem.simulator(problem.prior.sample((1,)))[0]
            >>> posterior.truncated_prior(x).sample((5,)).shape
            torch.Size([5, 7])
        """
        if not self.has_density:
            raise NotImplementedError(
                "truncated_prior needs log_prob, which this posterior has not: its "
                "network works on a surface (slot_nn.paper). Use the default slot_nn()."
            )
        batch = self._one(x, "truncated_prior")
        return TruncatedPrior(self, batch, quantile, **options)


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
        sets = [self.posterior.given(one) for one in x.split(1)]
        found = ReweightedSets(sets, self.posterior.prior, self.prior)
        for ess, pareto_k in zip(found.ess.tolist(), found.pool[2], strict=True):
            _warn(ess, float(pareto_k), found.num_draws)
        return found


class LeaningPosterior(Refinable, PosteriorOfOne):
    """The posterior of one observation, as :class:`LeaningSets`: to be refined."""

    def __init__(self, posterior: Posterior, new: VariableKPrior, x: Tensor) -> None:
        self.posterior, self.prior, self.x = posterior, posterior.prior, x
        self.simulator, self.model_card = posterior.simulator, posterior.model_card
        self._device = posterior._device
        self.sets = LeaningSets(posterior.given(x.unsqueeze(0)), self.prior, new)

    @property
    def chart(self) -> Chart:
        """Coordinates of the posterior itself."""
        return self.posterior.chart

    def misses_a_cardinality(self) -> bool:
        """Whether draws may miss what the new prior makes of a K, see the module."""
        with torch.no_grad():
            rows = self.sets.sample((_NUM_DRAWS // 5,), generator=generator_for(1))
        k = self.sets.layout.cardinality(rows)
        ratio = log_prior_ratio(rows, self.sets.new, self.sets.old)
        log_weights = ratio - self.sets.log_lean.to(rows.device)[k]
        return self.sets.unseen(k[:, 0], log_weights[:, 0]) > _MOST_UNSEEN

    def _distribution(self) -> LeaningSets:
        return self.sets


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
    found = ReweightedSets([sets], posterior.prior, prior, num_samples)
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
        "prior has little weight, or keeps hardly a draw of some K: refine(prior=...) "
        "with a likelihood, an exact sampler, or train anew.",
        UnreliableWeights,
    )
