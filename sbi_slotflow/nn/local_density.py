r"""Density of one component in its anchor's cell.

A Gaussian of the local coordinates w (:mod:`.local_transform`) is given from outside,
:math:`w = m + C z` with C lower triangular. Its tails are made heavy by a function g
that is the identity up to 2.5 deviations and logarithmic beyond, and each coordinate,
given those before, is cut off at its ends,

.. math::
    \zeta_d = \Phi^{-1}\left(
        \frac{\Phi(g(z_d)) - \Phi(\alpha_d)}{\Phi(\beta_d) - \Phi(\alpha_d)}
        \right),
    \qquad [\alpha_d, \beta_d] = g((\text{ends} - m_d) / C_{dd})

so that a component near the end of its cell, two in one cell, or an amplitude at its
bound need nothing special, and no draw leaves the prior's support. A flow over zeta
then learns what is not Gaussian.
"""

import math

import torch
from torch import Tensor, nn

from .flows import ConditionalFlow, RowContext

__all__ = ["LocalDensity", "LocalGaussian", "solve_lower"]

# A Gaussian this many deviations off the interval is moved that near, so that what is
# left of it is not steeper than the flow can mend.
_FARTHEST = 3.0
# Draws keep that far from the ends: rounded to float32 they must not be in another
# cell, nor at the other end of the phases.
_SLACK = 2e-4
_EDGE, _LEAST_MASS = 1e-30, 1e-300
# Deviations beyond which tails are those of a log-normal: a peak that was fitted too
# narrow, or at the wrong place, costs the logarithm of the distance, not its square.
_BEND = 2.5
_LEAST_WIDTH = 1e-9
_LEAST_SCALE = 1e-6


class LocalDensity(nn.Module):
    """A truncated Gaussian and a flow.

    Args:
        features: Number D of coordinates, the offset first.
        context_features: Length of a context.
        own_features: Length of what each row sees besides.
        options: Further options of the :class:`ConditionalFlow`.
    """

    def __init__(
        self, features: int, context_features: int, own_features: int, **options: object
    ) -> None:
        super().__init__()
        self.flow = ConditionalFlow(
            features,
            context_features,
            own_features=own_features,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def log_prob(
        self,
        w: Tensor,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
    ) -> Tensor:
        """Evaluate the log density of N rows.

        Args:
            w: Coordinates between the ends, shape ``(N, D)``, float64.
            mean: Means, shape ``(N, D)``.
            factor: Lower triangular factors C, shape ``(N, D, D)``.
            ends: Least and largest coordinates, each of shape ``(N, D)``.
            context: Contexts of the rows.

        Returns:
            Float32 log densities ``(N,)``.
        """
        z = solve_lower(factor, w - mean)
        scale = factor.diagonal(dim1=-2, dim2=-1)
        # Each coordinate's mean given those before it.
        centre = w - scale * z
        shift, alpha, beta = _interval(centre, scale, ends)
        y, slope = _compress(z)
        zeta, log_det = _cut(y + shift, alpha, beta)
        log_det = (log_det + slope.log() - scale.log()).sum(-1)
        return self.flow.log_prob(zeta.float(), context) + log_det.float()

    @torch.no_grad()
    def sample(
        self,
        mean: Tensor,
        factor: Tensor,
        ends: tuple[Tensor, Tensor],
        context: RowContext,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw coordinates ``(N, D)`` and the z ``(N, D)`` behind them."""
        zeta = self.flow.sample(context, generator).double()
        z, w = torch.zeros_like(zeta), mean.clone()
        low, high = ends
        for d in range(zeta.shape[-1]):
            scale = factor[:, d, d]
            w[:, d] += (factor[:, d, :d] * z[:, :d]).sum(-1)
            limits = low[:, d], high[:, d]
            shift, alpha, beta = _interval(w[:, d], scale, limits)
            z[:, d] = _expand(_uncut(zeta[:, d], alpha, beta) - shift)
            w[:, d] += scale * z[:, d]
        slack = (0.25 * (high - low)).clamp(0.0, _SLACK)
        return torch.maximum(torch.minimum(w, high - slack), low + slack), z


class LocalGaussian(nn.Module):
    r"""The Gaussian of a component, predicted from its context.

    .. math::
        m = \mu(c) + B(c)\,p, \qquad C = \mathrm{diag}(e^{s(c)})\, L(c)

    p are the local coordinates of the component before, zero if it is far. A phase's
    centre, about which it is unwrapped, is predicted as a direction.

    Args:
        features: Number D of coordinates.
        context_features: Length of a context.
        has_phase: Whether the second coordinate is a phase.
        hidden_features: Width of the network.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        has_phase: bool,
        hidden_features: int = 128,
    ) -> None:
        super().__init__()
        self.features, self.has_phase = features, has_phase
        below = features * (features - 1) // 2
        self._sizes = [features, features, below, features * features, 2]
        last = nn.Linear(hidden_features, sum(self._sizes))
        nn.init.normal_(last.weight, std=1e-2)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(context_features, hidden_features), nn.GELU(), last
        )
        self.register_buffer("below", torch.tril_indices(features, features, -1))

    def forward(self, context: RowContext) -> tuple[Tensor, Tensor]:
        """Return means ``(N, D)`` and factors ``(N, D, D)``, float64."""
        raw = self.network(context.values).double()[context.which]
        shift, log_scale, lower, mixing, _ = raw.split(self._sizes, -1)
        if context.own is not None:
            mixing = mixing.unflatten(-1, (self.features, -1))
            own = context.own.double().unsqueeze(-1)
            shift = shift + (mixing @ own).squeeze(-1)
        factor = torch.eye(self.features).to(raw).repeat(len(raw), 1, 1)
        rows, columns = self.get_buffer("below")
        factor[:, rows, columns] = lower
        scale = (10 * torch.tanh(log_scale / 10)).exp() + _LEAST_SCALE
        return shift, factor * scale.unsqueeze(-1)

    def centre(self, contexts: Tensor) -> Tensor:
        """Centres of the phases, shape ``(n,)``, of contexts ``(n, C)``."""
        direction = self.network(contexts)[:, -2:].double()
        return torch.atan2(direction[:, 1], direction[:, 0] + 1e-9)


def solve_lower(factor: Tensor, values: Tensor) -> Tensor:
    """Solve C z = v for lower triangular C ``(N, D, D)``, v ``(N, D)``."""
    return torch.linalg.solve_triangular(
        factor, values.unsqueeze(-1), upper=False
    ).squeeze(-1)


def _interval(
    mean: Tensor, scale: Tensor, ends: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift that brings the Gaussian near the interval, and the interval's ends."""
    low, high = ends
    high = torch.maximum(high, low + _LEAST_WIDTH)
    alpha, _ = _compress((low - mean) / scale)
    beta, _ = _compress((high - mean) / scale)
    shift = (_FARTHEST - alpha).clamp(max=0.0) + (-_FARTHEST - beta).clamp(min=0.0)
    return shift, alpha + shift, beta + shift


def _compress(z: Tensor) -> tuple[Tensor, Tensor]:
    """Take the logarithm of what goes beyond :data:`_BEND`; the slope beside it."""
    beyond = (z.abs() - _BEND).clamp(min=0.0)
    bent = z.sign() * (_BEND + beyond.log1p())
    return torch.where(beyond > 0, bent, z), 1 / (1 + beyond)


def _expand(y: Tensor) -> Tensor:
    """Inverse of :func:`_compress`."""
    beyond = (y.abs() - _BEND).clamp(min=0.0)
    return torch.where(beyond > 0, y.sign() * (_BEND + beyond.expm1()), y)


def _cut(z: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Map a truncated normal variable to a normal one; log derivative beside it."""
    # Worked in the tail on z's side of zero, where shares keep their digits.
    flip = torch.where(z > 0, -1.0, 1.0).to(z)
    here, low, high = (_ndtr(flip * end) for end in (z, alpha, beta))
    mass = _mass(alpha, beta)
    below, above = ((share - here).abs() / mass for share in (low, high))
    nearer = torch.special.ndtri(torch.minimum(below, above).clamp(_EDGE, 0.5))
    cut = torch.where(below < above, nearer, -nearer)
    log_det = 0.5 * (cut.square() - z.square()) - mass.log()
    return cut, log_det


def _uncut(cut: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Inverse of :func:`_cut`."""
    mass = _mass(alpha, beta)
    below = _ndtr(alpha) + mass * _ndtr(cut)
    above = _ndtr(-beta) + mass * _ndtr(-cut)
    nearer = torch.special.ndtri(torch.minimum(below, above))
    z = torch.where(below < above, nearer, -nearer)
    return torch.minimum(torch.maximum(z, alpha), beta)


def _ndtr(z: Tensor) -> Tensor:
    """Share of a normal variable below z; torch's own is zero below -8.3."""
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * z)


def _mass(alpha: Tensor, beta: Tensor) -> Tensor:
    """Share of a normal variable between two ends."""
    flip = torch.where(alpha + beta > 0, -1.0, 1.0).to(alpha)
    share = _ndtr(flip * beta) - _ndtr(flip * alpha)
    return share.abs().clamp(min=_LEAST_MASS)
