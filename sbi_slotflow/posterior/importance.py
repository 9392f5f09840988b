r"""Importance weights of sets, with a proposal that can see a missing component.

Draws of q that lack a component all fit alike, and plain weights look perfect. So a
share :math:`\epsilon` of the draws gets one more component c from the prior:

.. math::
    q'(\theta) = (1 - \epsilon\, e_K)\, q(\theta)
        + \epsilon\, e_{K - 1}
        \sum_{j \in J(\theta)} q(\theta \setminus j)\, p_c(\theta_j)

If something is missing some of these fit far better, and the weights' tail shows it.
e_K is 1 for the cardinalities below Kmax that q deems possible at all.

q may cost much more than the likelihood, so J has only those components without which
the set is still plausible: by posterior density times p_c, within :math:`e^{-15}` of
the one that is missed least. A draw whose own additional component is not among them is
not counted, so that q' is the density of those that are.

Where components come from a population, p_c is its density given the shared parameters
that the set has, without c as with it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import forked_rng
from ..sets.distribution import SetDistribution
from ..sets.layout import ThetaLayout, ThetaParts
from ..sets.prior import VariableKPrior
from .component_proposals import PriorComponents

__all__ = [
    "EvenedSets",
    "LogLikelihood",
    "WithExtraComponent",
    "entries",
    "likelihood_of",
]

LogLikelihood = Callable[[Tensor, Tensor], Tensor]

# Probability from which a cardinality is deemed possible.
_POSSIBLE = 1e-3
# Nats by which a component may be missed more than another and still be in J.
_IN_DOUBT = 15.0


class EvenedSets(SetDistribution):
    r"""A distribution whose cardinality is, for a share of the draws, an even one.

    .. math::
        q(\theta | x) \left( 1 - \epsilon + \epsilon\, \frac{u_K}{q(K | x)} \right)

    u is even over the cardinalities that are possible at all. One of less than a
    hundredth then has draws enough to tell what it weighs.

    Args:
        sets: The distribution q.
        share: Share epsilon of the draws.
    """

    def __init__(self, sets: SetDistribution, share: float) -> None:
        self.sets, self.share = sets, share
        self.layout, self.num_observations = sets.layout, sets.num_observations
        self._probs = sets.cardinality().probs
        possible = (self._probs >= _POSSIBLE).to(self._probs)
        self._even = possible / possible.sum(-1, keepdim=True)
        ratio = torch.where(possible > 0, self._even / self._probs, 0.0).double()
        self._log_ratio = (1 - share + share * ratio).log()

    def cardinality(self) -> Categorical:
        """Return the draws' cardinalities, batch shape ``(B,)``."""
        return Categorical(torch.lerp(self._probs, self._even, self.share))

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows; see :meth:`SetDistribution.sample`."""
        rows = self.sets.sample(sample_shape, k, generator)
        if k is not None:
            return rows
        rows = rows.reshape(-1, *rows.shape[-2:])
        num, device = len(rows), rows.device
        level = torch.rand(rows.shape[:2], generator=generator, device=device)
        counts = torch.full_like(level, -1, dtype=torch.int64)
        if num:
            draws = torch.multinomial(
                self._even, num, replacement=True, generator=generator
            )
            counts = torch.where(level < self.share, draws.mT, counts)
        for count in counts[counts >= 0].unique().tolist():
            here = counts == count
            most = int(here.sum(0).max())
            new = self.sets.sample((most,), count, generator)
            place = here.cumsum(0) - 1
            row, observation = here.nonzero(as_tuple=True)
            rows[row, observation] = new[place[row, observation], observation]
        return rows.reshape(*sample_shape, *rows.shape[1:])

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log densities, float64; see :meth:`SetDistribution.log_prob`."""
        k = self.layout.cardinality(theta).expand(len(theta), self.num_observations)
        return self.sets.log_prob(theta).double() + entries(self._log_ratio, k)


class WithExtraComponent:
    """The proposal q' of q given B observations, see the module.

    ``log_target`` maps rows ``(S, B, E)`` to the log of the unnormalised posterior.
    """

    def __init__(
        self,
        proposal: SetDistribution,
        prior: VariableKPrior,
        share: float,
        log_target: Callable[[Tensor], Tensor],
    ) -> None:
        self.proposal, self.prior, self.share = proposal, prior, share
        self.log_target = log_target
        # Cardinalities that may get one more component, (B, Kmax + 1).
        self._extended = proposal.cardinality().probs >= _POSSIBLE
        self._extended[:, prior.max_cardinality] = False

    def sample(
        self, num: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw rows ``(num, B, E)``, and tell which of them count ``(num, B)``.

        Rows may break the least separation.
        """
        layout = self.prior.layout
        theta = self.proposal.sample(torch.Size((num,)), generator=generator)
        parts = layout.unpack(theta)
        with forked_rng(generator):
            chosen = torch.rand(theta.shape[:-1], device=theta.device) < self.share
            extra = self.prior.draw_component(parts.shared.flatten(0, -2))
        chosen &= entries(self._extended, parts.cardinality)
        extra = extra.reshape(*chosen.shape, -1).to(theta)
        slots = torch.arange(layout.max_cardinality, device=theta.device)
        place = (slots == parts.cardinality.unsqueeze(-1)) & chosen.unsqueeze(-1)
        extra, place = extra.unsqueeze(-2), place.unsqueeze(-1)
        components = torch.where(place, extra, parts.components)
        k = parts.cardinality + chosen.long()
        more = layout.pack(k, components, parts.shared)
        # Of a class there may be no more: such a draw does not count.
        room = layout.is_well_formed(more)
        theta = layout.canonical(torch.where(room.unsqueeze(-1), more, theta))
        own = (layout.unpack(theta).components == extra).all(-1)
        counted = (own & self._in_doubt(theta, chosen)).any(-1)
        return theta, (counted & room) | ~chosen

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log q' of rows ``(S, B, E)``, float64, shape ``(S, B)``."""
        log_q = self.proposal.log_prob(theta).double()
        if not self.share:
            return log_q
        layout = self.prior.layout
        k = layout.cardinality(theta)
        keep = torch.where(entries(self._extended, k), 1 - self.share, 1.0).double()
        longer = entries(self._extended, k - 1) & (k > 0)
        in_doubt = self._in_doubt(theta, longer)
        rest = self._of_shorter(self.proposal.log_prob, theta, in_doubt)
        extra = self._log_component(layout.unpack(theta))
        terms = rest + extra + math.log(self.share)
        return torch.cat([(log_q + keep.log()).unsqueeze(-1), terms], -1).logsumexp(-1)

    def _in_doubt(self, theta: Tensor, rows: Tensor) -> Tensor:
        """The sets J of some ``rows`` ``(S, B)``, ``(S, B, Kmax)``; others empty."""
        layout = self.prior.layout
        parts = layout.unpack(theta)
        present = parts.mask & rows.unsqueeze(-1)
        if not (present.sum(-1) > 1).any():
            return present
        rest = self._of_shorter(self.log_target, theta, present)
        value = rest + self._log_component(parts)
        return present & (value >= value.amax(-1, keepdim=True) - _IN_DOUBT)

    def _of_shorter(
        self, function: Callable[[Tensor], Tensor], theta: Tensor, which: Tensor
    ) -> Tensor:
        """Values ``(S, B, Kmax)`` of rows without one of their components.

        Float64; -inf for components that are not among ``which``.
        """
        num, batch, most = which.shape
        asked = which.movedim(-1, 0).reshape(most * num, batch)
        out = torch.full(asked.shape, -torch.inf, dtype=torch.float64).to(theta.device)
        size = int(asked.sum(0).max()) if num else 0
        # What is asked of each observation first, and as many as the most has.
        order = (~asked).byte().argsort(dim=0, stable=True)[:size]
        for part in order.split(max(1, num)):
            index = (part % num).unsqueeze(-1).expand(-1, -1, theta.shape[-1])
            rows = _without(self.prior.layout, theta.gather(0, index), part // num)
            out = out.scatter(0, part, function(rows).double())
        out = torch.where(asked, out, -torch.inf)
        return out.unflatten(0, (most, num)).movedim(0, -1)

    def _log_component(self, parts: ThetaParts) -> Tensor:
        if self.prior.population is not None:
            return self.prior.log_density_of_components(parts).double()
        components = parts.components
        flat = components.reshape(-1, components.shape[-1])
        inside = self.prior.component_marginals.middle(flat)
        zero = (flat == 0).all(-1, keepdim=True)  # padding, which is not used
        flat = torch.where(zero, inside, flat)
        log_p = PriorComponents(self.prior.component).log_prob_component(flat)
        return log_p.double().reshape(components.shape[:-1])


def entries(table: Tensor, k: Tensor) -> Tensor:
    """Entries ``(S, B)`` of a table ``(B or 1, Kmax + 1)`` at k ``(S, B)``."""
    return table.expand(k.shape[-1], -1).gather(-1, k.clamp(min=0).mT).mT


def _without(layout: ThetaLayout, theta: Tensor, index: Tensor) -> Tensor:
    """Rows without component ``index``; unchanged where it is padding."""
    parts = layout.unpack(theta)
    slots = torch.arange(layout.max_cardinality, device=theta.device)
    source = slots + (slots >= index.unsqueeze(-1))
    source = source.clamp(max=layout.max_cardinality - 1)
    source = source.unsqueeze(-1).expand_as(parts.components)
    k = parts.cardinality - (index < parts.cardinality).long()
    return layout.pack(k, parts.components.gather(-2, source), parts.shared)


def likelihood_of(
    log_likelihood: LogLikelihood, x: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return log p(x | theta) of given x as a checked function of theta; float64.

    A likelihood that has a method ``given(x)`` is asked for it once, so that it may
    tabulate what it needs of x.
    """
    given = getattr(log_likelihood, "given", None)
    evaluate = given(x) if given else lambda theta: log_likelihood(theta, x)

    def checked(theta: Tensor) -> Tensor:
        values = torch.as_tensor(evaluate(theta)).double()
        if values.shape != theta.shape[:-1]:
            raise ValueError(
                f"log_likelihood must return shape {tuple(theta.shape[:-1])} for theta "
                f"of shape {tuple(theta.shape)}, got {tuple(values.shape)}."
            )
        bad = torch.isnan(values) | torch.isposinf(values)
        if bad.any():
            raise ValueError(
                "log_likelihood must not be NaN or +inf, got it for "
                f"{int(bad.sum())} of {bad.numel()} rows."
            )
        return values

    return checked
