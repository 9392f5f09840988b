r"""Exact trans-dimensional posterior of conditionally linear components.

Components have nonlinear parameters nu and amplitudes a (:mod:`.linear`), the noise is
Gaussian, of level sigma once it is made white. Under a working prior
:math:`a_k \sim N(\mu, V)`, the marginal likelihood
:math:`M(\nu, \sigma)` and the conditional :math:`N(a | \nu, \sigma)` have closed
forms. A move proposes nu, draws J sets of amplitudes from that conditional, and is
accepted with the ratio of

.. math::
    W = p(K)\, M(\nu, \sigma)\, p(\sigma)\; \frac{1}{J} \sum_{j=1}^{J} \prod_k
        \frac{p(\nu_k, a_{jk})}{N(a_{jk} | \mu, V)}

times the proposal's own ratio; then one of the J sets is drawn by its weight. W is an
unbiased estimate of the target of (nu, sigma), which is all that Metropolis and
Hastings need (Andrieu and Roberts 2009): the chain is exact for any prior and any J,
and J sets in place of one make it less likely that amplitudes alone reject a move.

All chains make the same kind of move at once, as one batch. Moves work in coordinates u
in the unit cube, the fractions of nu under its prior's marginals:

- *walk*: a component, or two neighbours together, by a normal step whose covariance is
  that of the Cramer-Rao bound at the present state, times a scale;
- *redraw*: a component is replaced by one drawn as for a birth;
- *birth and death*: drawn on a grid by what the residual says of each of its cells, how
  much a component there would add to the marginal likelihood;
- *split and merge*: :math:`u = w u_1 + (1 - w) u_2`, :math:`\delta = u_1 - u_2`, for w
  uniform and a step delta on four scales of the data's resolution;
- *noise*: sigma on a logarithmic scale;
- *shape of the noise*, where that is unknown: one of its parameters, on the scale of
  its prior's fractions, and sigma along with it, as far as it follows from what the
  first fit leaves of the data.

Of several classes a birth and a redraw also choose the class; the other moves keep it,
and only two of one class merge.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..posterior.convergence import convergence_of
from ..posterior.draws import ChainDraws
from ..sets.checks import as_count
from ..sets.prior import VariableKPrior
from .first_fits import pursuit
from .linear import LinearForm
from .marginal_likelihood import State, Target, orthogonal
from .noise import GaussianNoise
from .simulator import WhiteNoise
from .white_space import Background

__all__ = ["collapsed"]

# Scales of splits in units of the resolution, and of walks in those of their bound.
_SPLITS = (0.1, 0.3, 1.0, 3.0)
_STEPS = (0.1, 3.0)
# Powers of the likelihood at one temperature over the one below.
_COOLING = 0.7
# Draws of the prior that are tried where fits are ruled out.
_TRIES = 100
_BAR: dict[str, Any] = {"unit": "draw", "delay": 2, "mininterval": 1, "leave": False}
_MOVES: dict[str, float] = {
    "walk": 0.25,
    "walk of two": 0.15,
    "redraw": 0.1,
    "birth or death": 0.25,
    "split or merge": 0.15,
    "noise": 0.05,
}
# Beside these where the shape of the noise is unknown.
_SHAPE_SHARE = 0.15


@torch.no_grad()
def collapsed(
    prior: VariableKPrior,
    form: LinearForm,
    noise: WhiteNoise | GaussianNoise,
    x: Tensor,
    *,
    background: Background | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    num_chains: int = 8,
    num_levels: int = 6,
    num_draws: int = 500,
    thin: int = 10,
    burn_in: int = 2_000,
) -> ChainDraws:
    """Draw from the posterior; see :func:`sbi_slotflow.rjmcmc.collapsed`.

    Without ``start`` chains begin at fits of the best size, one less and one more, and
    at as few components as the prior allows.
    """
    seed = as_count(seed, "seed", 0) % 2**63
    as_count(num_chains, "num_chains")
    as_count(num_levels, "num_levels")
    as_count(num_draws, "num_draws")
    as_count(thin, "thin")
    as_count(burn_in, "burn_in", 0)
    target = Target(prior, form, noise, x.reshape(-1).double(), background)
    generator = torch.Generator().manual_seed(seed)
    chains = Chains(target, num_chains, num_levels, generator, start)
    rows = []
    steps = range(-(burn_in // thin), num_draws)
    chains.move(burn_in % thin)
    chains.forget_counts()
    for step in tqdm(steps, "Sampling", **_BAR):
        chains.move(thin)
        if step >= 0:
            rows.append(target.rows(chains.state)[:num_chains])
        else:
            chains.forget_counts()
    theta = prior.layout.canonical(torch.stack(rows, 1))
    log_weights = counted(prior, theta)
    shares = {n: a / max(t, 1) for n, (t, a) in chains.counts.items()}
    values = target.log_likelihood(theta)
    found = convergence_of(prior, theta, values, shares, counted=prior.allows(theta))
    found.warn()
    return ChainDraws(
        prior.layout, theta, x.reshape(-1), log_weights, diagnostics=found
    )


def counted(prior: VariableKPrior, theta: Tensor) -> Tensor | None:
    """Log weights of rows: -inf where the prior excludes their K; None for equal ones.

    Raises:
        ValueError: If no row counts.
    """
    possible = prior.allows(theta)
    if possible.all():
        return None
    if not possible.any():
        raise ValueError("no chain came to a cardinality that the prior allows.")
    return torch.where(possible, 0.0, -math.inf).double()


class Proposal(NamedTuple):
    """Where chains want to go.

    ``moved`` (C, n) are the slots whose coordinates may differ, ``log_ratio`` (C,) the
    log of the reverse over the forward proposal density, -inf where there is no
    proposal. ``back`` adds what only the new state tells of the way back.
    """

    mask: Tensor
    u: Tensor
    shared: Tensor
    moved: Tensor
    log_ratio: Tensor
    back: Callable[[State], Tensor] | None = None


class Chains:
    """Chains that move together.

    Attributes:
        state: Where they are.
        counts: For each kind of move, how often it was tried and accepted.
    """

    def __init__(
        self,
        target: Target,
        num: int,
        num_levels: int,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> None:
        self.target, self.generator = target, generator
        self.coordinates = target.coordinates
        self.num, self.num_levels = num, num_levels
        self.rows = torch.arange(num * num_levels)
        self.moves: dict[str, Callable[[], Proposal]] = {
            "walk": lambda: self._walk(1),
            "walk of two": lambda: self._walk(2),
            "redraw": self._redraw,
            "birth or death": self._birth_or_death,
            "split or merge": self._split_or_merge,
            "noise": self._noise,
        }
        self.shares = dict(_MOVES)
        if target.whitening.shape is not None:
            self.moves["noise shape"] = self._noise_shape
            self.shares["noise shape"] = _SHAPE_SHARE
        self.counts: dict[str, list[int]] = {}
        self.forget_counts()
        self.odd = False
        self.state = self._start(start)
        shared = self.state.shared[:1]
        left = target.solve(self.state).residual[:1]
        self._left = target.whitening.coloured(left, shared)[0]

    def forget_counts(self) -> None:
        """Count moves from now on."""
        self.counts = {name: [0, 0] for name in (*self.shares, "exchange")}

    def move(self, num: int) -> None:
        """Make moves of kinds drawn at random, and exchange temperatures."""
        for _ in range(num):
            self._move()

    def _move(self) -> None:
        shares = torch.tensor(list(self.shares.values()))
        kind = int(torch.multinomial(shares, 1, generator=self.generator))
        name = list(self.shares)[kind]
        proposal = self.moves[name]()
        legal = torch.isfinite(proposal.log_ratio)
        new = self.target.updated(self.state, *proposal[:4])
        solution = self.target.solve(new)
        new = self.target.complete(new, solution, self.generator)
        log_ratio = new.level - self.state.level + proposal.log_ratio
        if proposal.back is not None:
            log_ratio = log_ratio + proposal.back(new)
        uniform = torch.rand(
            len(log_ratio), generator=self.generator, dtype=torch.float64
        )
        # A chain outside the support takes what lies inside; NaN is no.
        accepted = legal & (uniform.log() < log_ratio) & torch.isfinite(new.level)
        self._take(new, accepted)
        self._count(name, legal[: self.num], accepted[: self.num])
        self._exchange()

    def _take(self, new: State, accepted: Tensor) -> None:
        for old, fresh in zip(self.state, new, strict=True):
            old[accepted] = fresh[accepted]

    def _count(self, name: str, tried: Tensor, accepted: Tensor) -> None:
        self.counts[name][0] += int(tried.sum())
        self.counts[name][1] += int(accepted.sum())

    def _exchange(self) -> None:
        """Exchange the states of neighbouring temperatures, amplitudes drawn anew.

        Even and odd neighbours take turns: states then travel through the temperatures
        instead of diffusing (Syed et al. 2022).
        """
        if self.num_levels < 2:
            return
        self.odd = not self.odd
        level = self.rows // self.num
        up = (level - int(self.odd)) % 2 == 0
        partner = torch.where(up, self.rows + self.num, self.rows - self.num)
        exists = (partner >= 0) & (partner < len(self.rows))
        partner = torch.where(exists, partner, self.rows)
        new = State(*(part[partner] for part in self.state))
        new = new._replace(beta=self.state.beta)
        new = self.target.complete(new, self.target.solve(new), self.generator)
        gain = new.level - self.state.level
        log_ratio = gain + gain[partner]
        uniform = self._uniform(len(self.rows))
        uniform = uniform[torch.minimum(self.rows, partner)]  # one for both
        accepted = exists & (uniform.log() < log_ratio) & torch.isfinite(log_ratio)
        self._take(new, accepted)
        self._count("exchange", exists, accepted)

    def _start(self, rows: Tensor | None) -> State:
        """The first state: at some rows ``(n, E)``, in turn, or at fits."""
        target, num = self.target, len(self.rows)
        beta = _COOLING ** torch.arange(self.num_levels).double()
        beta = beta.repeat_interleave(self.num)
        if rows is not None:
            rows = rows[self.rows % len(rows)].double()
            shared = target.layout.unpack(rows).shared
            empty = target.empty(num, shared)._replace(beta=beta)
            state = self._at(rows, empty)
        else:
            fits = pursuit(target)
            probs = target.bridged.cardinality_probs
            allowed = [k for k in range(len(fits)) if probs[k] > 0]
            best = min(allowed, key=lambda k: fits[k].criterion)
            sizes = [
                min(allowed, key=lambda k: abs(k - size))
                for size in (best, best - 1, best + 1, 0)
            ]
            parts = [fits[sizes[i % 4]].state for i in range(num)]
            state = State(*(torch.cat(part) for part in zip(*parts, strict=True)))
            state = state._replace(beta=beta)
            state = target.complete(state, target.solve(state), self.generator)
        for _ in range(_TRIES):  # starts that the prior rules out
            hopeless = torch.isneginf(state.level)
            if not hopeless.any():
                return state
            prior = target.prior.sample((num,), self.generator)
            other = self._at(prior.double(), state)
            for old, fresh in zip(state, other, strict=True):
                old[hopeless] = fresh[hopeless]
        raise ValueError(
            "no start was found that the prior allows: are amplitudes of the size that "
            "the data ask for within its bounds, and separations possible?"
        )

    def _at(self, rows: Tensor, state: State) -> State:
        """A state at rows ``(C, E)``, with amplitudes by the data."""
        target = self.target
        parts = target.layout.unpack(rows)
        u = target.coordinates.fractions(target.form.nonlinear(parts.components))
        u = torch.where(parts.mask.unsqueeze(-1), u, 0.5)
        slots = torch.arange(u.shape[1]).expand(len(rows), -1)
        new = target.updated(state, parts.mask, u, parts.shared, slots)
        return target.complete(new, target.solve(new), self.generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def _one_of(self, mask: Tensor) -> Tensor:
        """A random slot of each mask ``(C, n)``; any where it has none."""
        weights = mask.double() + (~mask.any(-1, keepdim=True)).double()
        return torch.multinomial(weights, 1, generator=self.generator).squeeze(1)

    def _with(self, slot: Tensor, value: Tensor) -> Tensor:
        u = self.state.u.clone()
        u[self.rows, slot] = value
        return u

    def _inside(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``(C, ..., N)`` wrapped, and which chains' lie in the cube."""
        u = torch.where(self._of(self.coordinates.circular, u), u % 1, u)
        return u, ((u >= 0) & (u <= 1)).flatten(1).all(1)

    def _walk(self, num: int) -> Proposal:
        state = self.state
        if num == 1:
            possible = state.cardinality > 0
            slots = self._one_of(state.mask).unsqueeze(1)
            log_ratio = torch.where(possible, 0.0, -math.inf).double()
        else:
            log_pairs = self._log_pairs(state)
            possible = torch.isfinite(log_pairs).flatten(1).any(1)
            slots = self._pair(log_pairs)
            picked = _picked(log_pairs, slots)
            log_ratio = torch.where(possible, -picked, -math.inf)
        root = self._bound(state, slots)
        low, high = (math.log(step) for step in _STEPS)
        scale = (low + (high - low) * self._uniform(len(slots))).exp()
        noise = self._normal(len(slots), root.shape[-1])
        here = state.u[self.rows.unsqueeze(1), slots]
        noise = noise * self._of(self.coordinates.free, here).expand_as(here).flatten(1)
        step = torch.linalg.solve_triangular(root.mT, noise.unsqueeze(-1), upper=True)
        step = step.squeeze(-1) * scale.unsqueeze(-1)
        there, inside = self._inside(here + step.reshape(here.shape))
        log_ratio = torch.where(inside, log_ratio, -math.inf)
        there = torch.where(inside[:, None, None], there, here)
        u = state.u.clone()
        u[self.rows.unsqueeze(1), slots] = there

        def back(new: State) -> Tensor:
            root_back = self._bound(new, slots)
            noise_back = (root_back.mT @ step.unsqueeze(-1)).squeeze(-1)
            noise_back = noise_back / scale.unsqueeze(-1)
            value = 0.5 * (noise.square() - noise_back.square()).sum(-1)
            value = value + _log_diagonal(root_back) - _log_diagonal(root)
            if num == 2:
                value = value + _picked(self._log_pairs(new), slots)
            return value

        return Proposal(state.mask, u, state.shared, slots, log_ratio, back)

    def _redraw(self) -> Proposal:
        state = self.state
        slot = self._one_of(state.mask)
        weights = self._log_weights(self._without(slot))
        new = self.target.grid.draw(weights, self.generator)
        old = state.u[self.rows, slot]
        log_ratio = self._log_birth(weights, old) - self._log_birth(weights, new)
        log_ratio = torch.where(state.cardinality > 0, log_ratio, -math.inf)
        u = self._with(slot, new)
        return Proposal(state.mask, u, state.shared, slot.unsqueeze(1), log_ratio)

    def _birth_or_death(self) -> Proposal:
        state = self.state
        birth = self._uniform(len(self.rows)) < 0.5
        slot = torch.where(birth, self._one_of(~state.mask), self._one_of(state.mask))
        chosen = state.mask[self.rows, slot]
        legal = birth != chosen  # a birth needs a free slot, a death a component
        base = torch.where(birth.unsqueeze(1), state.mask, self._without(slot))
        weights = self._log_weights(base)
        new = self.target.grid.draw(weights, self.generator)
        value = torch.where(birth.unsqueeze(1), new, state.u[self.rows, slot])
        k = base.sum(-1) + 1.0
        log_ratio = k.double().log() + self._log_birth(weights, value)
        log_ratio = torch.where(birth, -log_ratio, log_ratio)
        log_ratio = torch.where(legal, log_ratio, -math.inf)
        mask = base.clone()
        mask[self.rows, slot] = birth
        u = self._with(slot, value)
        return Proposal(mask, u, state.shared, slot.unsqueeze(1), log_ratio)

    def _split_or_merge(self) -> Proposal:
        state, rows = self.state, self.rows
        split = self._uniform(len(rows)) < 0.5
        log_pairs = self._log_pairs(state)
        pair = self._pair(log_pairs)
        swap = self._uniform(len(rows)) < 0.5
        pair = torch.where(swap.unsqueeze(1), pair.flip(1), pair)
        single = torch.stack([self._one_of(state.mask), self._one_of(~state.mask)], 1)
        slots = torch.where(split.unsqueeze(1), single, pair)
        k = state.cardinality
        pairs = torch.isfinite(log_pairs).flatten(1).any(1)
        legal = torch.where(split, (k > 0) & (k < state.mask.shape[1]), pairs)
        first, second = slots.unbind(1)
        weight = self._uniform(len(rows), 1)
        here, other = state.u[rows, first], state.u[rows, second]
        step = self._step(here)
        gap = self._gap(here, other)
        apart, inside = self._inside(
            torch.stack([here + (1 - weight) * step, here - weight * step], 1)
        )
        merged = self._inside((here - (1 - weight) * gap).unsqueeze(1))[0][:, 0]
        # Around a circle only steps of less than half a turn can be told apart.
        around = (step.abs() < 0.5) | ~self._of(self.coordinates.circular, here)
        inside = (inside & around.all(1)) | ~split
        two = split & inside
        u = state.u.clone()
        u[rows, first] = torch.where(two.unsqueeze(1), apart[:, 0], merged)
        u[rows, first] = torch.where(
            (split & ~inside).unsqueeze(1), here, u[rows, first]
        )
        u[rows, second] = torch.where(two.unsqueeze(1), apart[:, 1], other)
        mask = state.mask.clone()
        mask[rows, second] = split
        fresh = state._replace(mask=mask, u=u)
        total = log_pairs.flatten(1).logsumexp(1)
        total_after = self._log_pairs(fresh).flatten(1).logsumexp(1)
        log_split = k.double().log() - math.log(2) - total_after
        log_merge = math.log(2) + total - (k - 1.0).double().log()
        log_ratio = torch.where(split, log_split, log_merge)
        log_ratio = torch.where(legal & inside, log_ratio, -math.inf)
        return Proposal(mask, u, state.shared, slots, log_ratio)

    def _noise(self) -> Proposal:
        state, noise = self.state, self.target.noise
        shared, log_ratio = state.shared.clone(), torch.zeros_like(state.level)
        if noise.sigma is None:
            low, high = (math.log(step) for step in _STEPS)
            scale = (low + (high - low) * self._uniform(len(shared))).exp()
            scale = scale * 2.4 / math.sqrt(2 * len(self.target.x))
            log_ratio = scale * self._normal(len(shared))
            shared[:, noise.shared_index] *= log_ratio.exp()
        slots = torch.zeros(len(shared), 0, dtype=torch.long)
        return Proposal(state.mask, state.u, shared, slots, log_ratio)

    def _noise_shape(self) -> Proposal:
        state, noise = self.state, self.target.noise
        shape = self.target.whitening.shape
        assert shape is not None
        marginals, num = shape.marginals, len(shape.indices)
        before = state.shared[:, shape.indices]
        columns = zip(marginals, before.unbind(-1), strict=True)
        fraction = torch.stack([m.fraction(value) for m, value in columns], -1)
        # T numbers tell a fraction to about one over their root, or not at all.
        scale = len(self.target.x) ** (-0.5 * self._uniform(len(before)))
        which = (num * self._uniform(len(before), 1)).long()
        step = (scale * self._normal(len(before))).unsqueeze(-1)
        moved = fraction.scatter_add(1, which, step)
        inside = ((moved > 0) & (moved < 1)).all(-1)
        moved = torch.where(inside.unsqueeze(-1), moved, fraction)
        columns = zip(marginals, moved.unbind(-1), strict=True)
        after = torch.stack([m.quantile(value) for m, value in columns], -1)
        log_ratio = sum(
            m.log_density(before[:, d]) - m.log_density(after[:, d])
            for d, m in enumerate(marginals)
        )
        shared = state.shared.clone()
        shared[:, shape.indices] = after
        if noise.sigma is None:
            drift = self._log_level(after) - self._log_level(before)
            shared[:, noise.shared_index] *= drift.exp()
            log_ratio = log_ratio + drift
        log_ratio = torch.where(inside, torch.as_tensor(log_ratio), -math.inf)
        slots = torch.arange(state.mask.shape[1]).expand(len(before), -1)
        return Proposal(state.mask, state.u, shared, slots, log_ratio)

    def _log_level(self, values: Tensor) -> Tensor:
        """Log of the level that the first fit's residual has, given shapes."""
        shape, num = self.target.whitening.shape, len(self._left)
        assert shape is not None
        counts = shape.noise.multiplicity(num).to(values)
        ratio = shape.noise.power(self._left) / shape.variances(values, num)
        return 0.5 * (ratio @ counts / counts.sum()).clamp(min=1e-300).log()

    def _without(self, slot: Tensor) -> Tensor:
        mask = self.state.mask.clone()
        mask[self.rows, slot] = False
        return mask

    def _log_weights(self, mask: Tensor) -> Tensor:
        """Where a component is missing, given those of a mask."""
        others = self.state._replace(mask=mask)
        residual, sigma = self.target.solve(others).residual, self.target.scale(others)
        residual = self.target.whitening.as_usual(residual, others.shared)
        return self.target.grid.log_weights(residual, sigma, self.target.room(others))

    def _log_birth(self, weights: Tensor, u: Tensor) -> Tensor:
        return self.target.grid.log_prob(weights, u)

    def _bound(self, state: State, slots: Tensor) -> Tensor:
        """Root of the Fisher information of the coordinates of slots ``(C, n)``."""
        rows, size = self.rows.unsqueeze(1), self.target.num_nonlinear
        u = state.u[rows, slots].flatten(0, 1)
        amplitudes = state.amplitudes[rows, slots].flatten(0, 1)
        shared = state.shared.repeat_interleave(slots.shape[1], 0)
        slopes = self.target.derivatives(u, amplitudes, shared)
        slopes = slopes.reshape(len(rows), slots.shape[1] * size, -1)
        basis = state.basis[rows, slots].flatten(1, 2)
        slopes = orthogonal(slopes, basis)
        sigma = self.target.scale(state)[:, None, None]
        information = slopes @ slopes.mT / sigma.square()
        # A coordinate of which the data say nothing is uniform, of variance 1/12.
        information = information + 12 * torch.eye(information.shape[-1]).to(slopes)
        return torch.linalg.cholesky_ex(information)[0]

    def _of(self, table: Tensor, u: Tensor) -> Tensor:
        """What a table of classes has for components at u."""
        return self.coordinates.of(table, u)

    def _step(self, u: Tensor) -> Tensor:
        """Draw steps ``(C, N)`` of splits of components at u."""
        scales = torch.tensor(_SPLITS, dtype=torch.float64)
        index = (self._uniform(len(self.rows)) * len(scales)).long()
        scale = scales[index].unsqueeze(1) * self._of(self.target.resolution, u)
        return self._normal(*u.shape) * scale * self._of(self.coordinates.free, u)

    def _gap(self, first: Tensor, second: Tensor) -> Tensor:
        gap = first - second
        around = gap - gap.round()
        return torch.where(self._of(self.coordinates.circular, first), around, gap)

    def _log_pairs(self, state: State) -> Tensor:
        """Log density of the step between each two components, ``(C, Kmax, Kmax)``.

        Of those of one class: others do not merge.
        """
        resolution = self._of(self.target.resolution, state.u).expand_as(state.u)
        resolution, label = resolution.unsqueeze(2), self.coordinates.label(state.u)
        gap = self._gap(state.u.unsqueeze(2), state.u.unsqueeze(1)) / resolution
        scales = torch.tensor(_SPLITS, dtype=torch.float64)
        square = gap.square().sum(-1, keepdim=True) / scales.square()
        num = self._of(self.coordinates.free, state.u).expand_as(state.u).sum(-1)
        volume = scales.log() + 0.5 * math.log(2 * math.pi)
        volume = num[:, :, None, None] * volume
        value = (-0.5 * square - volume).logsumexp(-1) - math.log(len(scales))
        value = value - resolution.log().sum(-1)
        both = state.mask.unsqueeze(2) & state.mask.unsqueeze(1)
        both = both & (label.unsqueeze(2) == label.unsqueeze(1))
        return torch.where(both.triu(1), value, -math.inf)

    def _pair(self, log_pairs: Tensor) -> Tensor:
        """Draw pairs ``(C, 2)``; any two where there is none."""
        size = log_pairs.shape[-1]
        probs = log_pairs.flatten(1).softmax(1)
        index = torch.multinomial(
            probs.nan_to_num(nan=1.0), 1, generator=self.generator
        )
        first = index // size
        second = torch.where(index % size == first, (first + 1) % size, index % size)
        return torch.cat([first, second], 1)


def _picked(log_pairs: Tensor, pair: Tensor) -> Tensor:
    """Log probability ``(C,)`` with which pairs ``(C, 2)`` are drawn."""
    low, high = pair.amin(1), pair.amax(1)
    each = log_pairs[torch.arange(len(pair)), low, high]
    return each - log_pairs.flatten(1).logsumexp(1)


def _log_diagonal(root: Tensor) -> Tensor:
    return torch.diagonal(root, dim1=-2, dim2=-1).log().sum(-1)
