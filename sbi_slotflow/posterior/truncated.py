r"""The prior where a posterior has its mass, to simulate a further round from.

.. math::
    r(\theta) = \frac{q(\theta | x)}{p(\theta)}, \qquad
    \tilde p(\theta) = \frac{p(\theta)\, 1[r(\theta) \ge t]}{p(A)}, \qquad
    A = \{\theta : r(\theta) \ge t\}

with t the quantile of r at which a share :math:`\epsilon` of q lies below. Of all
regions that hold the rest of q, A has the least prior probability (Neyman and Pearson).
It is the ratio that decides, not q: densities of sets of different size have different
units, their ratio to the prior has none, so that one threshold serves all K.

Within A the truncated prior is proportional to the prior. Where A holds the posterior,
simulations from either have the same posterior of x, and a network may be trained on
all rounds together, by the loss of the first.

Drawing from the prior and keeping what lies in A, as sbi's ``RestrictedPrior`` does,
keeps p(A), which may be 1e-9. Draws of q, kept with probability t / r where r is at
least t, have the same distribution,

.. math::
    q\, \frac{t}{r} = t\, p \quad \text{in } A, \qquad
    \text{and a share } t\, p(A) = \mathrm{E}_q[ t / r;\, A ]

of them is kept: at least the share of q that lies between t and e t, divided by e,
which has to do with :math:`\epsilon` and not with how narrow q is. So draws come from
q if t > 1, from the prior otherwise. Where few are kept still, those in A are chosen by
their weights 1 / r, some more than once, with a warning.

Source: Deistler, Goncalves, Macke 2022 (truncated sequential estimation).

Where there is a likelihood, ``posterior.refine`` needs no further round.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from sbi.utils import RestrictedPrior
from torch import Tensor
from torch.distributions import constraints

from ..seeding import draw_seed, generator_for
from ..sets.checks import Numbers, Shape, as_count, as_floats, as_shape, warn_user
from ..sets.prior import VariableKPrior
from .base import Posterior
from .weights import systematic

__all__ = ["FewCandidates", "TruncatedPrior"]

# Rows whose densities are evaluated at once.
_STEP = 10_000
# Draws of the posterior below the threshold, at least: it is known to a third then.
_FEWEST_BELOW = 10


class FewCandidates(UserWarning):
    """Draws of a truncated prior repeat each other."""


class TruncatedPrior(RestrictedPrior):
    """A prior, truncated to where a posterior of one observation has its mass.

    Made by :meth:`~.refinable.Refinable.truncated_prior`. sbi's trainers take it
    as ``proposal``, and use the loss of the first round.

    Attributes:
        prior: The prior that is truncated.
        posterior: The posterior.
        x: The observation, shape ``(1, *event)``.
        log_threshold: Log of t, the least ratio of posterior and prior densities.
        acceptance_rate: Estimate of p(A), the prior's probability of the region.
    """

    acceptance_rate: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        posterior: Posterior,
        x: Tensor,
        quantile: float = 1e-3,
        num_draws: int = 20_000,
        max_candidates: int = 2_000_000,
    ) -> None:
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {quantile}.")
        least = math.ceil(_FEWEST_BELOW / quantile)
        if as_count(num_draws, "num_draws") < least:
            raise ValueError(
                f"num_draws must be at least {least} for quantile={quantile}, so that "
                f"{_FEWEST_BELOW} draws lie below it, got {num_draws}."
            )
        self.max_candidates = as_count(max_candidates, "max_candidates")
        self.prior: VariableKPrior = posterior.prior
        self.posterior, self.x = posterior, x
        super().__init__(self.prior, self.contains, posterior)
        with torch.no_grad():
            self._sets = posterior.given(x)
            generator = generator_for(0, device=x.device)
            parts = [
                self.log_ratio(self._from_posterior(num, generator))
                for num in _steps(num_draws)
            ]
        ratios = torch.cat(parts)
        self.log_threshold = float(ratios.sort().values[int(quantile * num_draws)])
        inside = ratios[ratios >= self.log_threshold]
        log_rate = torch.logsumexp(-inside, 0) - math.log(num_draws)
        self.acceptance_rate = log_rate.exp().clamp(max=1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself, as it never changes: sbi copies a proposal at every step."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is remembered of x."""
        return {k: v for k, v in self.__dict__.items() if k != "_sets"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Ask the posterior again."""
        self.__dict__.update(state)
        with torch.no_grad():
            self._sets = self.posterior.given(self.x)

    @property
    def event_shape(self) -> torch.Size:
        """Shape ``(E,)`` of a row."""
        return self.prior.event_shape

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The rows of A, in any order."""
        return _Region(self)

    @torch.no_grad()
    def log_ratio(self, theta: Numbers) -> Tensor:
        """Log of r, posterior over prior, of rows ``(..., E)``; float64, ``(...)``.

        It is -inf outside the prior's support.
        """
        rows = as_floats(theta, "theta")
        flat = rows.reshape(-1, rows.shape[-1])
        parts = []
        for some in flat.split(_STEP):
            log_prior = self.prior.log_prob(some).double()
            there = some.unsqueeze(1).to(self.x.device)
            log_q = self._sets.log_prob(there)[:, 0].double().to(log_prior.device)
            value = log_q - log_prior
            parts.append(torch.where(torch.isfinite(log_prior), value, -torch.inf))
        values = torch.cat(parts) if parts else flat.new_zeros(0).double()
        return values.reshape(rows.shape[:-1])

    def contains(self, theta: Numbers) -> Tensor:
        """Tell which rows ``(..., E)`` lie in A."""
        return self.log_ratio(theta) >= self.log_threshold

    @torch.no_grad()
    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample_shape: Shape = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows in canonical order.

        Args:
            sample_shape: Shape of the draws, or their number.
            generator: Source of randomness; torch's global generator if None.

        Returns:
            Float32 rows of shape ``(*sample_shape, E)``.

        Raises:
            RuntimeError: If none of ``max_candidates`` candidates lies in A.

        Warns:
            FewCandidates: If so few were kept that rows had to be repeated.
        """
        shape = as_shape(sample_shape)
        num = shape.numel()
        own = generator_for(draw_seed(generator), device=self.x.device)
        chance = generator_for(draw_seed(generator))
        by_posterior = self.log_threshold > 0
        rows, log_weights, kept = [], [], []
        found = tried = 0
        while found < num and tried < self.max_candidates:
            # As many as are wanted still, judged by what was kept so far.
            wanted = 1.5 * (num - found) * (tried + 1) / (found + 1)
            step = int(min(max(wanted, 100), _STEP, self.max_candidates - tried))
            if by_posterior:
                candidates = self._from_posterior(step, own)
            else:
                candidates = self.prior.sample((step,), own)
            log_ratio = self.log_ratio(candidates).cpu()
            inside = log_ratio >= self.log_threshold
            log_w = (self.log_threshold - log_ratio[inside]) * by_posterior
            u = torch.rand(log_w.shape, dtype=log_w.dtype, generator=chance)
            rows.append(candidates.cpu()[inside])
            log_weights.append(log_w)
            kept.append(u.log() < log_w)
            found, tried = found + int(kept[-1].sum()), tried + step
        if not num:
            return torch.zeros(*shape, *self.event_shape)
        pool, log_w = torch.cat(rows), torch.cat(log_weights)
        if found >= num:
            drawn = pool[torch.cat(kept)][:num]
        else:
            drawn = self._repeated(pool, log_w, num, tried, chance)
        return drawn.reshape(*shape, *self.event_shape).to(self.x.device)

    def _from_posterior(self, num: int, generator: torch.Generator) -> Tensor:
        return self._sets.sample((num,), generator=generator)[:, 0]

    def _repeated(
        self,
        pool: Tensor,
        log_weights: Tensor,
        num: int,
        tried: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Choose rows by their weights, some more than once, and say so."""
        if not len(pool):
            raise RuntimeError(
                f"none of {tried} draws of the prior lies where the posterior has "
                "its mass: raise max_candidates, or take a larger quantile."
            )
        weights = log_weights.softmax(0)
        ess = float(1 / weights.square().sum())
        warn_user(
            f"{tried} candidates gave {ess:.0f} effective draws of the {num} that were "
            "asked for, so that rows repeat: take a larger quantile, raise "
            "max_candidates, or ask for fewer.",
            FewCandidates,
        )
        chosen = systematic(weights, num, generator)
        return pool[chosen[torch.randperm(num, generator=generator)]]


class _Region(constraints.Constraint):
    """Where a :class:`TruncatedPrior` has a density."""

    is_discrete = True
    event_dim = 1

    def __init__(self, truncated: TruncatedPrior) -> None:
        self.truncated = truncated

    def check(self, value: Numbers) -> Tensor:
        """Return a boolean for every row, shape ``value.shape[:-1]``."""
        return self.truncated.contains(value)


def _steps(num: int) -> Sequence[int]:
    full, rest = divmod(num, _STEP)
    return [_STEP] * full + [rest] * (rest > 0)
