r"""Markov moves on a population of sets, all particles at once.

- :class:`DifferenceMove` moves a set, one of its components or its shared parameters
  by the scaled difference of two other particles with as many components (ter Braak
  2006), in whitened coordinates: steps have the target's own scale and correlation.
- :class:`ExchangeMove` takes r components out and puts s new ones in, drawn from a
  component density g, or s out and r in; a coin decides. With (r, s) = (0, 1) these
  are births and deaths, with (1, 1) redraws, with (1, 2) splits and merges. For
  densities of sets the ratio is

.. math::
    \frac{\pi(\theta')}{\pi(\theta)}\,
    \frac{\binom{K}{r}\, r!\, \prod_{removed} g}{\binom{K'}{s}\, s!\, \prod_{added} g}
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..nn.charts import Chart
from ..sets.layout import ThetaLayout, ThetaParts
from .component_proposals import ComponentProposal

__all__ = ["DifferenceMove", "ExchangeMove", "Move", "Population", "metropolis"]

EXCHANGES = {"birth or death": (0, 1), "redraw": (1, 1), "split or merge": (1, 2)}
Moving = Literal["set", "component", "shared"]


class Population(NamedTuple):
    """Canonical rows, log density of the proposal, log of prior times likelihood."""

    theta: Tensor
    log_q: Tensor
    log_p: Tensor

    def rows(self, index: Tensor) -> "Population":
        """Some of the particles."""
        return Population(*(part[index] for part in self))

    def log_target(self, beta: float) -> Tensor:
        """The tempered target, (1 - beta) log q + beta log p."""
        # 0 x -inf where the likelihood vanishes
        return torch.lerp(self.log_q, self.log_p, beta).nan_to_num(nan=-math.inf)


class Move(Protocol):
    """Proposes new rows for some particles."""

    name: str

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Propose rows for theta ``(N, E)`` given others that stay ``(M, E)``.

        Returns new rows ``(N, E)``, and the log of the reverse over the forward
        proposal density ``(N,)``, -inf where there is nothing to propose.
        """
        ...


def metropolis(
    population: Population,
    move: Move,
    beta: float,
    evaluate: Callable[[Tensor], Population],
    generator: torch.Generator | None,
) -> tuple[Population, float]:
    """Move one half of the particles given the other, then the other way round.

    ``evaluate`` makes particles of rows. Returns them and the share that was accepted.
    """
    num = len(population.theta)
    order = torch.randperm(num, generator=generator)
    halves = order[: num // 2], order[num // 2 :]
    accepted = 0
    for moving, staying in (halves, halves[::-1]):
        theta, log_ratio = move.propose(
            population.theta[moving], population.theta[staying], generator
        )
        tried = torch.isfinite(log_ratio).nonzero().squeeze(-1)
        if not len(tried):
            continue
        new, old = evaluate(theta[tried]), population.rows(moving[tried])
        log_ratio = log_ratio[tried] + new.log_target(beta) - old.log_target(beta)
        uniform = torch.rand(len(tried), generator=generator, dtype=torch.float64)
        kept = uniform.log() < log_ratio
        target = moving[tried[kept]]
        population = Population(
            *(
                part.index_copy(0, target, fresh[kept])
                for part, fresh in zip(population, new, strict=True)
            )
        )
        accepted += int(kept.sum())
    return population, accepted / max(1, num)


class DifferenceMove:
    """Moves sets along differences of others, see the module.

    ``moving`` is all of a ``"set"``, one ``"component"``, or the ``"shared"``
    parameters, whose chart is None if there are none.
    """

    def __init__(
        self,
        layout: ThetaLayout,
        chart: Chart,
        shared_chart: Chart | None,
        moving: Moving,
    ) -> None:
        self.layout, self.chart, self.shared_chart = layout, chart, shared_chart
        self.moving, self.name = moving, f"difference ({moving})"

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Move`."""
        layout = self.layout
        parts, pool = layout.unpack(theta), layout.unpack(others)
        here, here_shared, log_det = self._coordinates(parts)
        first, second, found = _partners(
            layout.kind(theta), layout.kind(others), generator
        )
        there = self._coordinates(pool)[:2]
        step, step_shared = (part[first] - part[second] for part in there)
        active = parts.mask
        dim = active.sum(-1) * self.chart.num_features + layout.num_shared
        if self.moving == "shared":
            active = torch.zeros_like(active)
            dim = torch.full_like(dim, layout.num_shared)
        elif self.moving == "component":
            weights = active.double()
            weights[:, 0] += (~active.any(-1)).double()
            slot = torch.multinomial(weights, 1, generator=generator)
            active = torch.zeros_like(active).scatter(-1, slot, True) & active
            dim = torch.full_like(dim, self.chart.num_features)
        # Now and then a full difference, which jumps from mode to mode.
        gamma = 2.38 / (2 * dim.clamp(min=1).double()).sqrt()
        gamma = gamma * (0.5 + torch.rand(len(dim), generator=generator))
        leap = torch.rand(len(dim), generator=generator) < 0.1
        gamma = torch.where(leap, torch.ones_like(gamma), gamma)
        active = active.unsqueeze(-1)
        moved = here + torch.where(active, gamma[:, None, None] * step, 0.0)
        moved = self.chart.inverse(moved)
        moved = torch.where(active, moved, parts.components.double())
        shared = parts.shared.double()
        if self.shared_chart is not None and self.moving != "component":
            shared = here_shared + gamma.unsqueeze(-1) * step_shared
            shared = self.shared_chart.inverse(shared)
        new = layout.pack(parts.cardinality, moved, shared)
        log_ratio = log_det - self._coordinates(layout.unpack(new))[2]
        # Steps are symmetric between sets in canonical order.
        found &= (layout.canonical(new) == new).all(-1)
        return new, torch.where(found, log_ratio, -math.inf)

    def _coordinates(self, parts: ThetaParts) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates u of components and shared parameters, and log |du / dtheta|."""
        components, shared = parts.components.double(), parts.shared.double()
        point = self.chart.inverse(components.new_zeros(1, self.chart.num_features))
        active = parts.mask.unsqueeze(-1)
        u, log_det = self.chart.forward(torch.where(active, components, point))
        total = torch.where(parts.mask, log_det, 0.0).sum(-1)
        if self.shared_chart is not None:
            shared, log_det = self.shared_chart.forward(shared)
            total = total + log_det
        return u, shared, total


class ExchangeMove:
    """Takes r components out of a set and puts s drawn from g in, see the module.

    The name is a key of ``EXCHANGES``; ``components`` makes g of the sets that stay.
    """

    def __init__(
        self,
        layout: ThetaLayout,
        name: str,
        components: Callable[[Tensor], ComponentProposal],
    ) -> None:
        self.layout, self.name, self.learn = layout, name, components
        self.counts = EXCHANGES[name]

    def propose(
        self, theta: Tensor, others: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Move`."""
        taken, added = self.counts
        g = self.learn(others)
        coin = torch.rand(len(theta), generator=generator) < 0.5
        new, log_ratio = theta.clone(), theta.new_zeros(len(theta)).double()
        for rows, counts in ((coin, (taken, added)), (~coin, (added, taken))):
            if not rows.any():  # of few particles
                continue
            new[rows], log_ratio[rows] = self._exchange(
                theta[rows], *counts, g, generator
            )
        return new, log_ratio

    def _exchange(
        self,
        theta: Tensor,
        taken: int,
        added: int,
        g: ComponentProposal,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout
        # A random order, so that the last r are a random choice.
        parts = layout.shuffled(theta, generator)
        k = parts.cardinality
        k_new = k - taken + added
        possible = (k >= taken) & (k_new <= layout.max_cardinality)
        k_new = torch.where(possible, k_new, k)
        components = parts.components.clone()
        log_ratio = _log_ways(k, taken) - _log_ways(k_new, added)
        row, there = torch.arange(len(theta)), possible.unsqueeze(-1)
        fresh = g.sample_component(max(1, added) * len(theta), generator).to(components)
        for i in range(taken):
            removed = components[row, (k - 1 - i).clamp(min=0)]
            # Where there is none, any point of the support does.
            removed = torch.where(there, removed, fresh[: len(theta)])
            log_ratio = log_ratio + g.log_prob_component(removed).double()
        for i in range(added):
            place = (k - taken + i).clamp(0, layout.max_cardinality - 1)
            new = fresh[i * len(theta) : (i + 1) * len(theta)]
            components[row, place] = torch.where(there, new, components[row, place])
            log_ratio = log_ratio - g.log_prob_component(new).double()
        rows = layout.pack(k_new, components, parts.shared)
        # Of a class there may be no more.
        possible &= layout.is_well_formed(rows)
        rows = torch.where(possible.unsqueeze(-1), rows, theta)
        return layout.canonical(rows), torch.where(possible, log_ratio, -math.inf)


def _log_ways(k: Tensor, count: int) -> Tensor:
    """Log of k (k - 1) ... (k - count + 1), -inf where it is zero."""
    ways = torch.ones(k.shape, dtype=torch.float64)
    for i in range(count):
        ways = ways * (k - i).clamp(min=0)
    return ways.log()


def _partners(
    k: Tensor, k_others: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Two distinct others with as many components for each row, if there are two."""
    order = k_others.argsort(stable=True)
    largest = int(torch.cat([k, k_others]).max()) + 1
    counts = torch.bincount(k_others, minlength=largest)
    start = (counts.cumsum(0) - counts)[k]
    num = counts[k]
    found = num >= 2
    safe = num.clamp(min=2)
    first = (torch.rand(len(k), generator=generator) * safe).long()
    second = first + 1 + (torch.rand(len(k), generator=generator) * (safe - 1)).long()
    second = second % safe
    last = len(k_others) - 1
    return (
        order[(start + first).clamp(max=last)],
        order[(start + second).clamp(max=last)],
        found,
    )
