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
from typing import NamedTuple

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .linear import LinearForm
from .noise import GaussianNoise
from .simulator import WhiteNoise
from .white_space import Background

__all__ = ["Grid", "Solution", "State", "Target", "bridged", "orthogonal"]

# Sets of amplitudes of an estimate of the target.
_SETS = 8
# Most numbers in the signals of the grid, and most cells of it.
_MOST_NUMBERS, _MOST_CELLS = 2**23, 2**12
# Prior draws whose signals tell the data's resolution, and the working prior.
_PROBES, _MOMENTS = 64, 10_000
# Of births: shares of the prior, of the tempered and of the full evidence.
_SHARES, _TEMPER = (0.2, 0.3, 0.5), 0.3
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
        self.x = noise.unit_white(x - background.constant)
        self.columns = noise.unit_white(background.columns)
        self.layout = prior.layout
        self.marginals = [prior.component_marginals[i] for i in form.others]
        periods = [self.layout.component_periods[i] for i in form.others]
        self.circular = torch.tensor(
            [
                math.isfinite(p) and math.isclose(m.bounds[1] - m.bounds[0], p)
                for p, m in zip(periods, self.marginals, strict=True)
            ]
        )
        generator = torch.Generator().manual_seed(0)
        self._prepare_background()
        self.bridged = bridged(prior)
        only = torch.zeros(len(prior.cardinality_probs))
        only[1] = 1.0
        probes = prior.with_cardinality(only).sample((_MOMENTS,), generator)
        components = self.layout.unpack(probes.double()).components[:, 0]
        form.check(components[:_PROBES])
        amplitudes = form.amplitudes(components)
        self.location = amplitudes.mean(0)
        self.precision = torch.cov(amplitudes.T).reshape(2 * (len(self.location),))
        self.precision = torch.linalg.inv(self.precision).contiguous()
        self.working = torch.distributions.MultivariateNormal(
            self.location, precision_matrix=self.precision, validate_args=False
        )
        u = self.fractions(form.nonlinear(components[:_PROBES]))
        self.resolution = self._resolution(u)
        self.grid = Grid(self)

    @property
    def num_nonlinear(self) -> int:
        """Number N of nonlinear parameters."""
        return len(self.marginals)

    def place(self, u: Tensor) -> Tensor:
        """Nonlinear parameters of coordinates ``(..., N)``."""
        columns = zip(self.marginals, u.unbind(-1), strict=True)
        return torch.stack([m.quantile(value) for m, value in columns], -1)

    def fractions(self, nonlinear: Tensor) -> Tensor:
        """The inverse of :meth:`place`."""
        columns = zip(self.marginals, nonlinear.unbind(-1), strict=True)
        return torch.stack([m.fraction(value) for m, value in columns], -1)

    def signals(self, u: Tensor) -> Tensor:
        """The basis ``(..., M, T)`` at coordinates ``(..., N)``, made white."""
        return self.noise.unit_white(self.form.basis(self.place(u)))

    def derivatives(self, u: Tensor, amplitudes: Tensor) -> Tensor:
        """Of signals by coordinates ``(C, N)``, amplitudes fixed, ``(C, N, T)``."""
        step = _SMALL * self.resolution
        steps = torch.diag(step)
        ends = torch.stack([u.unsqueeze(-2) + steps, u.unsqueeze(-2) - steps])
        ends = ends.clamp(1e-9, 1 - 1e-9)
        width = torch.diagonal(ends[0] - ends[1], dim1=-2, dim2=-1).unsqueeze(-1)
        amplitudes = amplitudes.unsqueeze(-2).expand(*ends.shape[:-1], -1)
        components = self.form.components(self.place(ends), amplitudes)
        above, below = self.form.signals(components)
        return self.noise.unit_white(above - below) / width

    def scale(self, state: State) -> Tensor:
        """Noise level ``(C,)``, as a power of the likelihood makes it."""
        return self.noise.scale(state.shared) / state.beta.sqrt()

    def solve(self, state: State) -> Solution:
        """Integrate the amplitudes out."""
        mask = state.mask
        num, size = mask.shape[0], mask.shape[1] * len(self.location)
        active = mask.unsqueeze(-1).expand(-1, -1, len(self.location)).reshape(num, -1)
        weight = self.scale(state).reciprocal().square()
        gram = state.gram.reshape(num, size, size) * weight[:, None, None]
        gram = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), gram, 0.0)
        right = state.right.reshape(num, size) * weight.unsqueeze(-1)
        right = torch.where(active, right, 0.0)
        slots = torch.eye(mask.shape[1], dtype=torch.float64)
        before = torch.kron(slots, self.precision)
        location = self.location.repeat(mask.shape[1])
        if len(self.columns):
            cross = state.basis.reshape(num, size, -1) @ self.columns.mT
            cross = torch.where(active.unsqueeze(-1), cross, 0.0)
            below = (self.columns @ self.columns.mT).expand(num, -1, -1)
            upper = torch.cat([gram, cross * weight[:, None, None]], -1)
            lower = torch.cat([cross.mT, below], -1) * weight[:, None, None]
            gram = torch.cat([upper, lower], -2)
            inner = (self.columns @ self.x).expand(num, -1) * weight.unsqueeze(-1)
            right = torch.cat([right, inner], -1)
            before = torch.block_diag(before, self.around.precision_matrix)
            location = torch.cat([location, self.around.loc])
        right = right + before @ location
        root, failed = torch.linalg.cholesky_ex(gram + before)
        every = torch.cholesky_solve(right.unsqueeze(-1), root).squeeze(-1)
        off = (every - location).unsqueeze(1)
        mean = every[:, :size].reshape(num, mask.shape[1], -1)
        background = every[:, size:]
        used = torch.where(mask.unsqueeze(-1), mean, 0.0)
        residual = self.x - torch.einsum("ckm,ckmt->ct", used, state.basis)
        residual = residual - background @ self.columns
        misfit = weight * residual.square().sum(-1)
        misfit = misfit + (off @ before @ off.mT).flatten()
        volume = torch.linalg.slogdet(before)[1]
        volume = volume - 2 * torch.diagonal(root, dim1=-2, dim2=-1).log().sum(-1)
        scale = self.noise.scale(state.shared).log() + 0.5 * math.log(2 * math.pi)
        scale = -2 * len(self.x) * state.beta * scale
        value = 0.5 * (scale + volume - misfit)
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
        components = self.form.components(self.place(u), draws)
        mask = state.mask.unsqueeze(1)
        each = self.form.log_det(components) + self.working.log_prob(draws)
        for marginal, i in zip(self.marginals, self.form.others, strict=True):
            each = each + marginal.log_density(components[..., i])
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
        components = self.form.components(self.place(state.u), state.amplitudes)
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
            basis[chain, slot] = self.signals(u[chain, slot])
        for slot in moved.unbind(1):
            cross = torch.einsum("cmt,ckpt->cmkp", basis[chain, slot], basis)
            gram[chain, slot] = cross
            gram[chain, :, :, slot] = cross.permute(0, 2, 3, 1)
            right[chain, slot] = basis[chain, slot] @ self.x
        rest = state.amplitudes, state.beta, state.level
        return State(mask, u, shared, basis, gram, right, *rest)

    def empty(self, num: int, shared: Tensor) -> State:
        """A state of ``num`` chains without components."""
        most, size = self.layout.max_cardinality, len(self.location)
        zeros = torch.zeros(num, most, size, dtype=torch.float64)
        return State(
            torch.zeros(num, most, dtype=torch.bool),
            zeros.new_full((num, most, len(self.marginals)), 0.5),
            shared.expand(num, -1),
            zeros.new_zeros(num, most, size, len(self.x)),
            zeros.new_zeros(num, most, size, most, size),
            zeros,
            zeros,
            zeros.new_ones(num),
            zeros.new_full((num,), -math.inf),
        )

    def _prepare_background(self) -> None:
        """Choose the working prior of the background's amplitudes."""
        if not len(self.columns):
            return
        mean, covariance = self.background.mean, self.background.covariance
        self.around = torch.distributions.MultivariateNormal(
            mean, covariance, validate_args=False
        )

    def _resolution(self, u: Tensor) -> Tensor:
        """Steps in u that change a signal by about itself, ``(N,)``."""
        basis = self.signals(u)
        spread = basis.new_full((u.shape[-1],), 1e-3)
        for _ in range(3):  # the step of the derivative depends on what is sought
            self.resolution = spread
            each = []
            for m in range(basis.shape[1]):
                unit = torch.eye(basis.shape[1], dtype=torch.float64)[m]
                slope = self.derivatives(u, unit.expand(len(u), -1))
                slope = orthogonal(slope, basis)
                length = basis[:, m].norm(dim=-1, keepdim=True)
                each.append(length / slope.norm(dim=-1))
            spread = torch.stack(each).flatten(0, 1).nanquantile(0.3, dim=0)
            spread = spread.clamp(1e-7, 0.5)
        return spread


class Grid:
    r"""Cells of the unit cube, and what a component in each of them explains.

    With amplitudes turned so that their working prior is N(mu, 1) and their Gram
    matrix diagonal, Lambda, a component in a cell multiplies the marginal likelihood of
    a residual r, others held, by the product over m of

    .. math::
        (1 + \Lambda / \sigma^2)^{-1/2} \exp\left(
        \frac{(b^T r / \sigma^2 + \mu)^2}{2 (1 + \Lambda / \sigma^2)}
        - \frac{\mu^2}{2} \right)
    """

    def __init__(self, target: Target) -> None:
        numbers = len(target.x) * len(target.location)
        most = max(16, min(_MOST_CELLS, _MOST_NUMBERS // numbers))
        wanted = (1 / target.resolution).ceil()
        while wanted.prod() > most:
            largest = wanted.argmax()
            wanted[largest] = (0.9 * wanted[largest]).floor()
        self.shape = wanted.long()
        axes = [(torch.arange(int(n)).double() + 0.5) / n for n in wanted]
        centres = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        basis = target.signals(centres)
        root = torch.linalg.cholesky(torch.linalg.inv(target.precision))
        basis = root.mT @ basis
        self.power, turn = torch.linalg.eigh(basis @ basis.mT)
        self.basis = (turn.mT @ basis).flatten(0, 1)
        self.mean = torch.linalg.solve(root, target.location) @ turn
        self.strides = torch.tensor(
            [int(self.shape[i + 1 :].prod()) for i in range(len(self.shape))]
        )

    def log_weights(self, residual: Tensor, sigma: Tensor) -> Tensor:
        """Log probabilities ``(C, G)`` of the cells given residuals ``(C, T)``."""
        weight = sigma.reciprocal().square()[:, None, None]
        inner = (residual @ self.basis.T).reshape(len(residual), *self.power.shape)
        precision = 1 + self.power * weight
        gain = (inner * weight + self.mean).square() / precision - self.mean.square()
        gain = 0.5 * (gain - precision.log()).sum(-1)
        parts = torch.stack(
            [
                torch.full_like(gain, -math.log(gain.shape[-1])),
                (_TEMPER * gain).log_softmax(-1),
                gain.log_softmax(-1),
            ]
        )
        shares = torch.tensor(_SHARES, dtype=torch.float64).log()
        return (parts + shares[:, None, None]).logsumexp(0)

    def centre(self, cell: Tensor) -> Tensor:
        """Coordinates ``(C, N)`` of the middle of cells ``(C,)``."""
        return (cell.unsqueeze(-1) // self.strides % self.shape + 0.5) / self.shape

    def draw(self, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw coordinates ``(C, N)``."""
        cell = torch.multinomial(log_weights.exp(), 1, generator=generator)
        index = cell // self.strides % self.shape
        inside = torch.rand(index.shape, generator=generator, dtype=torch.float64)
        return (index + inside) / self.shape

    def log_prob(self, log_weights: Tensor, u: Tensor) -> Tensor:
        """Log density ``(C,)`` of coordinates ``(C, N)``."""
        index = (u * self.shape).long().clamp(min=0)
        index = torch.minimum(index, self.shape - 1)
        cell = (index * self.strides).sum(-1, keepdim=True)
        return log_weights.gather(1, cell).squeeze(1) + self.shape.log().sum()


def bridged(prior: VariableKPrior) -> VariableKPrior:
    """The prior with some weight on cardinalities between those that it allows.

    K changes by one in a move: a chain passes through them, and its draws there do not
    count.
    """
    probs = prior.cardinality_probs
    allowed = probs.nonzero().flatten()
    between = torch.arange(len(probs))
    between = (between > allowed.min()) & (between < allowed.max()) & (probs == 0)
    if not between.any():
        return prior
    return prior.with_cardinality(torch.where(between, probs[allowed].mean(), probs))


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
