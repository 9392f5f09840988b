r"""Marginal likelihood of conditionally linear components in white Gaussian noise.

The amplitudes of K components, of nonlinear parameters nu, have a working prior
:math:`a_k \sim N(\mu, V)`; B holds the columns :math:`b_m(\nu_k)`:

.. math::
    P = \frac{B^T B}{\sigma^2} + V^{-1}, \qquad
    \hat a = P^{-1} \left( \frac{B^T x}{\sigma^2} + V^{-1} \mu \right), \\
    \log M = -\frac{T}{2} \log 2 \pi \sigma^2 - \frac{|x - B \hat a|^2}{2 \sigma^2}
    - \frac12 |\hat a - \mu|^2_{V^{-1}} - \frac12 \log |V| - \frac12 \log |P|

Noise of another shape is made white first, and columns of a linear background
(:mod:`.white_space`) are amplitudes that are always there, with a working prior of
their own. Everything is in float64 and batched over chains. The residual is computed
itself, not as a difference of energies, so that loud components lose no digits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sets.classes import ClassLayout
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior
from .birth_grid import Grid
from .coordinates import Coordinates
from .linear import LinearForm
from .noise import GaussianNoise
from .simulator import WhiteNoise
from .white_space import Background
from .whitening import Whitening

__all__ = ["Solution", "State", "Target", "Working", "orthogonal"]

# Sets of amplitudes of an estimate of the target.
_SETS = 8
# Prior draws whose signals tell the data's resolution, and the working prior.
_PROBES, _MOMENTS = 64, 10_000
# Step of a derivative, in units of the resolution.
_SMALL = 1e-4


class Solution(NamedTuple):
    """Amplitudes integrated out, for each of C chains.

    ``log_marginal`` (C,) is log M, ``mean`` (C, Kmax, M) and ``root``
    (C, Kmax M, Kmax M) are the conditional's mean and the Cholesky factor of its
    precision, ``residual`` (C, T) is what the mean leaves of the data. Of P columns of
    a background, ``background`` (C, P) is the mean; they are the last of ``root``.
    """

    log_marginal: Tensor
    mean: Tensor
    root: Tensor
    residual: Tensor
    background: Tensor


class State(NamedTuple):
    """Where C chains are.

    ``mask`` (C, Kmax) says which slots hold a component; ``u`` (C, Kmax, N) are their
    coordinates, ``basis`` (C, Kmax, M, T) their signals, ``gram``
    (C, Kmax, M, Kmax, M) and ``right`` (C, Kmax, M) inner products with each other and
    with the data, ``amplitudes`` (C, Kmax, M) what was drawn; ``beta`` (C,) is the
    power of the likelihood in their target, ``level`` (C,) is log W.
    """

    mask: Tensor
    u: Tensor
    shared: Tensor
    basis: Tensor
    gram: Tensor
    right: Tensor
    amplitudes: Tensor
    beta: Tensor
    level: Tensor

    @property
    def cardinality(self) -> Tensor:
        """Number of components of each chain, ``(C,)``."""
        return self.mask.sum(-1)


class Target:
    """The posterior of one observation ``(T,)``, and the geometry of its data."""

    def __init__(
        self,
        prior: VariableKPrior,
        form: LinearForm,
        noise: WhiteNoise | GaussianNoise,
        x: Tensor,
        background: Background | None = None,
    ) -> None:
        self.prior, self.form, self.noise = prior, form, noise
        if background is None:
            nothing = torch.zeros(0, len(x), dtype=torch.float64)
            none = torch.zeros(0, dtype=torch.float64), nothing @ nothing.mT
            background = Background((), nothing, torch.zeros_like(x), *none)
        self.background, self.data = background, x
        self._raw = x - background.constant
        self.whitening = Whitening(noise, prior, self._raw)
        self.x = self.whitening(self._raw)
        self.columns = self.whitening(background.columns)
        self.layout = prior.layout
        members = prior.members
        marginals = [member.component_marginals for member in members]
        self.coordinates = Coordinates(form, marginals)
        generator = torch.Generator().manual_seed(0)
        self._prepare_background()
        self.bridged = prior.bridged()
        drawn = [self._probes(c, generator) for c in range(len(members))]
        self.working = Working(form, drawn)
        self.resolution = torch.ones(len(members), self.coordinates.size).double()
        for c, components in enumerate(drawn):
            u = self.coordinates.fractions(form.nonlinear(components[:_PROBES]))
            self.resolution[c] = self._resolution(u, c)
        self.grid = Grid(self)

    @property
    def num_nonlinear(self) -> int:
        """Number N of coordinates of a component."""
        return self.coordinates.size

    def signals(self, u: Tensor, shared: Tensor | None = None) -> Tensor:
        """The basis ``(..., M, T)`` at coordinates ``(..., N)``, made white.

        Of a noise of unknown shape by the usual one, or by that of rows ``(C, S)``.
        """
        basis = self.form.basis(self.coordinates.place(u))
        return self.whitening(basis, shared)

    def room(self, state: State) -> Tensor | None:
        """Which classes may have one more, ``(C, classes)``; None for a single one."""
        if not isinstance(self.bridged, MultiClassPrior):
            return None
        label = self.coordinates.label(state.u)
        num = len(self.coordinates.forms)
        counts = torch.stack([(state.mask & (label == c)).sum(-1) for c in range(num)])
        # One more of any class, where there is none beyond the last.
        possible = torch.isfinite(self.bridged.log_joint).byte()
        possible = torch.nn.functional.pad(possible, [0, 1] * num) > 0
        counts = torch.minimum(counts, torch.tensor(possible.shape)[:, None] - 2)
        more = counts.unsqueeze(-1) + torch.eye(num, dtype=torch.long).unsqueeze(1)
        return possible[tuple(more)]

    def derivatives(
        self, u: Tensor, amplitudes: Tensor, shared: Tensor | None = None
    ) -> Tensor:
        """Of signals by coordinates ``(C, N)``, amplitudes fixed, ``(C, N, T)``."""
        step = _SMALL * self.coordinates.of(self.resolution, u)
        steps = torch.diag_embed(step)
        ends = torch.stack([u.unsqueeze(-2) + steps, u.unsqueeze(-2) - steps])
        ends = ends.clamp(1e-9, 1 - 1e-9)
        width = torch.diagonal(ends[0] - ends[1], dim1=-2, dim2=-1).unsqueeze(-1)
        amplitudes = amplitudes.unsqueeze(-2).expand(*ends.shape[:-1], -1)
        place = self.coordinates.place(ends)
        above, below = self.form.signals(self.form.components(place, amplitudes))
        return self.whitening(above - below, shared) / width

    def scale(self, state: State) -> Tensor:
        """Noise level ``(C,)``, as a power of the likelihood makes it."""
        return self.noise.scale(state.shared) / state.beta.sqrt()

    def solve(self, state: State) -> Solution:
        """Integrate the amplitudes out."""
        mask = state.mask
        num, size = mask.shape[0], mask.shape[1] * self.working.size
        active = mask.unsqueeze(-1).expand(-1, -1, self.working.size).reshape(num, -1)
        weight = self.scale(state).reciprocal().square()
        gram = state.gram.reshape(num, size, size) * weight[:, None, None]
        gram = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), gram, 0.0)
        right = state.right.reshape(num, size) * weight.unsqueeze(-1)
        right = torch.where(active, right, 0.0)
        before, location = self.working.of_slots(self.coordinates.label(state.u))
        x, columns = self._white(state.shared)
        if len(self.columns):
            cross = state.basis.reshape(num, size, -1) @ columns.mT
            cross = torch.where(active.unsqueeze(-1), cross, 0.0)
            below = (columns @ columns.mT).expand(num, -1, -1)
            upper = torch.cat([gram, cross * weight[:, None, None]], -1)
            lower = torch.cat([cross.mT, below], -1) * weight[:, None, None]
            gram = torch.cat([upper, lower], -2)
            inner = (columns @ x.unsqueeze(-1)).squeeze(-1).expand(num, -1)
            right = torch.cat([right, inner * weight.unsqueeze(-1)], -1)
            before, location = self._with_background(before, location)
        right = right + (before @ location.unsqueeze(-1)).squeeze(-1)
        root, failed = torch.linalg.cholesky_ex(gram + before)
        every = torch.cholesky_solve(right.unsqueeze(-1), root).squeeze(-1)
        off = (every - location).unsqueeze(1)
        mean = every[:, :size].reshape(num, mask.shape[1], -1)
        background = every[:, size:]
        used = torch.where(mask.unsqueeze(-1), mean, 0.0)
        residual = x - torch.einsum("ckm,ckmt->ct", used, state.basis)
        residual = residual - (background.unsqueeze(1) @ columns).squeeze(1)
        misfit = weight * residual.square().sum(-1)
        misfit = misfit + (off @ before @ off.mT).flatten()
        volume = torch.linalg.slogdet(before)[1]
        volume = volume - 2 * torch.diagonal(root, dim1=-2, dim2=-1).log().sum(-1)
        scale = self.noise.scale(state.shared).log() + 0.5 * math.log(2 * math.pi)
        scale = -2 * len(self.x) * state.beta * scale
        value = 0.5 * (scale + volume - misfit)
        if self.whitening.shape is not None:
            log_det = self.whitening.log_det(state.shared, len(self.x))
            value = value - state.beta * log_det
        value = torch.where((failed == 0) & (weight > 0), value, -math.inf)
        return Solution(
            value.nan_to_num(nan=-math.inf, neginf=-math.inf),
            mean,
            root,
            residual,
            background,
        )

    def complete(
        self, state: State, solution: Solution, generator: torch.Generator
    ) -> State:
        """Draw amplitudes, and a background's, and fill in the level."""
        mean = solution.mean
        num, size = len(mean), mean[0].numel()
        each = torch.randn(
            *(num, size + len(self.columns), _SETS),
            generator=generator,
            dtype=torch.float64,
        )
        noise = torch.linalg.solve_triangular(solution.root.mT, each, upper=True).mT
        around = solution.background.unsqueeze(1) + noise[..., size:]
        noise = noise[..., :size].reshape(num, _SETS, *mean.shape[1:])
        draws = mean.unsqueeze(1) + noise
        u = state.u.unsqueeze(1).expand(-1, _SETS, -1, -1)
        place = self.coordinates.place(u)
        components = self.form.components(place, draws)
        mask = state.mask.unsqueeze(1)
        each = self.form.log_det(components)
        each = each + self.working.log_prob(draws, self.coordinates.label(u))
        each = each + self.coordinates.log_density(place)
        k = state.cardinality.unsqueeze(1).expand(-1, _SETS)
        shared = state.shared.unsqueeze(1).expand(-1, _SETS, -1)
        if len(self.columns):
            shared = shared.clone()
            shared[..., list(self.background.indices)] = around
        packed = _active_first(mask.expand(-1, _SETS, -1), components)
        log_weights = self.bridged.log_prob(self.layout.pack(k, packed, shared))
        log_weights = log_weights - torch.where(mask, each, 0.0).sum(-1)
        if len(self.columns):
            log_weights = log_weights - self.around.log_prob(around)
        log_weights = log_weights.nan_to_num(nan=-math.inf, neginf=-math.inf)
        level = log_weights.logsumexp(1) - math.log(_SETS) + solution.log_marginal
        probs = log_weights.softmax(1).nan_to_num(nan=1.0)
        chosen = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        chains = torch.arange(num)
        amplitudes, shared = draws[chains, chosen], shared[chains, chosen]
        return state._replace(amplitudes=amplitudes, shared=shared, level=level)

    def rows(self, state: State) -> Tensor:
        """Theta rows ``(C, E)``."""
        place = self.coordinates.place(state.u)
        components = self.form.components(place, state.amplitudes)
        components = _active_first(state.mask, components)
        return self.layout.pack(state.cardinality, components, state.shared)

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Log p(x | theta) of rows ``(C, S, E)``, a chain at a time."""
        return torch.stack([self._log_likelihood(rows) for rows in theta])

    def _log_likelihood(self, rows: Tensor) -> Tensor:
        parts = self.layout.unpack(rows)
        residual = (self.data - self.background.constant).expand(len(rows), -1)
        beta = parts.shared[:, list(self.background.indices)].double()
        residual = residual - beta @ self.background.columns
        for k in range(int(parts.cardinality.max())):
            signal = self.form.signals(parts.components[:, k])
            active = parts.mask[:, k].unsqueeze(-1)
            residual -= torch.where(active, signal, 0.0)
        return self.noise.log_prob(residual, parts.shared)

    def updated(
        self, state: State, mask: Tensor, u: Tensor, shared: Tensor, moved: Tensor
    ) -> State:
        """The state with other coordinates in the slots ``moved``, ``(C, n)``."""
        chain = torch.arange(len(mask))
        basis, gram, right = (
            state.basis.clone(),
            state.gram.clone(),
            state.right.clone(),
        )
        for slot in moved.unbind(1):
            basis[chain, slot] = self.signals(u[chain, slot], shared)
        x = self._white(shared)[0]
        for slot in moved.unbind(1):
            cross = torch.einsum("cmt,ckpt->cmkp", basis[chain, slot], basis)
            gram[chain, slot] = cross
            gram[chain, :, :, slot] = cross.permute(0, 2, 3, 1)
            right[chain, slot] = (basis[chain, slot] @ x.unsqueeze(-1)).squeeze(-1)
        rest = state.amplitudes, state.beta, state.level
        return State(mask, u, shared, basis, gram, right, *rest)

    def empty(self, num: int, shared: Tensor) -> State:
        """A state of ``num`` chains without components."""
        most, size = self.layout.max_cardinality, self.working.size
        zeros = torch.zeros(num, most, size, dtype=torch.float64)
        return State(
            torch.zeros(num, most, dtype=torch.bool),
            zeros.new_full((num, most, self.num_nonlinear), 0.5),
            shared.expand(num, -1),
            zeros.new_zeros(num, most, size, len(self.x)),
            zeros.new_zeros(num, most, size, most, size),
            zeros,
            zeros,
            zeros.new_ones(num),
            zeros.new_full((num,), -math.inf),
        )

    def _white(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Data and columns of the background, white by rows ``(C, S)``.

        ``(T,)`` and ``(P, T)`` of a known shape, else with the C in front.
        """
        if self.whitening.shape is None:
            return self.x, self.columns
        x = self._raw.expand(len(shared), -1)
        columns = self.background.columns.expand(len(shared), -1, -1)
        return self.whitening(x, shared), self.whitening(columns, shared)

    def _prepare_background(self) -> None:
        """Choose the working prior of the background's amplitudes."""
        if not len(self.columns):
            return
        mean, covariance = self.background.mean, self.background.covariance
        self.around = torch.distributions.MultivariateNormal(
            mean, covariance, validate_args=False
        )

    def _with_background(
        self, before: Tensor, location: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the working prior of the background's amplitudes to that of slots."""
        around, size = self.around.precision_matrix, before.shape[-1]
        num = size + len(around)
        joined = before.new_zeros(*before.shape[:-2], num, num)
        joined[..., :size, :size], joined[..., size:, size:] = before, around
        centre = self.around.loc.expand(*location.shape[:-1], -1)
        return joined, torch.cat([location, centre], -1)

    def _probes(self, c: int, generator: torch.Generator) -> Tensor:
        """Components of one class, from the prior, ``(S, D)``."""
        prior = self.prior.members[c]
        only = torch.zeros(len(prior.cardinality_probs))
        only[1] = 1.0
        probes = prior.with_cardinality(only).sample((_MOMENTS,), generator)
        components = prior.layout.unpack(probes.double()).components[:, 0]
        if isinstance(self.layout, ClassLayout):
            components = self.layout.from_class(components, c)
        self.form.check(components[:_PROBES])
        return components

    def _resolution(self, u: Tensor, c: int) -> Tensor:
        """Steps in u that change a signal of a class by about itself, ``(N,)``."""
        basis, free = self.signals(u), self.coordinates.free[c]
        spread = basis.new_full((u.shape[-1],), 1e-3)
        for _ in range(3):  # the step of the derivative depends on what is sought
            self.resolution[c] = spread
            each = []
            for m in range(self.form.members[c].num_amplitudes):
                unit = torch.eye(basis.shape[1], dtype=torch.float64)[m]
                slope = self.derivatives(u, unit.expand(len(u), -1))
                slope = orthogonal(slope, basis)
                length = basis[:, m].norm(dim=-1, keepdim=True)
                each.append(length / slope.norm(dim=-1))
            spread = torch.stack(each).flatten(0, 1).nanquantile(0.3, dim=0)
            spread = spread.clamp(1e-7, 0.5)
        return torch.where(free, spread, 1.0)


class Working:
    r"""The working prior :math:`N(\mu, V)` of amplitudes, of each class.

    It has the mean and the covariance of draws from the prior. Amplitudes that a class
    has not are standard normal, whatever the data.

    Args:
        form: In what components are linear.
        components: Draws of each class, each ``(S, D)``.
    """

    def __init__(self, form: LinearForm, components: Sequence[Tensor]) -> None:
        self.size = form.num_amplitudes
        self.laws, means, precisions = [], [], []
        for part, drawn in zip(form.members, components, strict=True):
            amplitudes = form.amplitudes(drawn)[..., : part.num_amplitudes]
            mean = amplitudes.mean(0)
            precision = torch.cov(amplitudes.T).reshape(2 * (len(mean),))
            precision = torch.linalg.inv(precision).contiguous()
            law = torch.distributions.MultivariateNormal(
                mean, precision_matrix=precision, validate_args=False
            )
            rest = self.size - len(mean)
            unused = torch.eye(rest, dtype=torch.float64)
            self.laws.append(law)
            means.append(torch.cat([mean, mean.new_zeros(rest)]))
            precisions.append(torch.block_diag(precision, unused))
        self.means, self.precisions = torch.stack(means), torch.stack(precisions)

    def of_slots(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and mean of the amplitudes of slots of classes ``(C, n)``.

        Of shapes ``(C, n M, n M)`` and ``(C, n M)``; of one class without the C.
        """
        num = label.shape[-1]
        slots = torch.eye(num, dtype=torch.float64)
        if len(self.laws) == 1:
            return torch.kron(slots, self.precisions[0]), self.means[0].repeat(num)
        blocks = torch.einsum("kl,ckmn->ckmln", slots, self.precisions[label])
        size = num * self.size
        return blocks.reshape(-1, size, size), self.means[label].flatten(1)

    def log_prob(self, amplitudes: Tensor, label: Tensor) -> Tensor:
        """Log density ``(...)`` of the amplitudes ``(..., M)`` that a class has."""
        if len(self.laws) == 1:
            return self.laws[0].log_prob(amplitudes)
        found = torch.zeros_like(amplitudes[..., 0])
        for c, law in enumerate(self.laws):
            rows = label == c
            found[rows] = law.log_prob(amplitudes[rows][..., : len(law.loc)])
        return found


def orthogonal(slopes: Tensor, basis: Tensor) -> Tensor:
    """What of slopes ``(C, n, T)`` no signal of a basis ``(C, m, T)`` explains."""
    gram = basis @ basis.mT
    largest = torch.diagonal(gram, dim1=-2, dim2=-1).amax(-1)
    ridge = torch.where(largest > 0, 1e-12 * largest, 1.0)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
    root = torch.linalg.cholesky_ex(gram)[0]
    return slopes - torch.cholesky_solve(basis @ slopes.mT, root).mT @ basis


def _active_first(mask: Tensor, components: Tensor) -> Tensor:
    """Components ``(..., Kmax, D)`` with those of the mask first."""
    order = (~mask).long().argsort(dim=-1, stable=True)
    return components.gather(-2, order.unsqueeze(-1).expand_as(components))
