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

import torch
from torch import Tensor, nn

from ..sets.transforms import Bend, Cut, solve_lower
from .flows import ConditionalFlow, RowContext

__all__ = ["LocalDensity", "LocalGaussian"]

# A Gaussian this many deviations off the interval is moved that near, so that what is
# left of it is not steeper than the flow can mend.
_FARTHEST = 3.0
# Draws keep that far from the ends: rounded to float32 they must not be in another
# cell, nor at the other end of the phases.
_SLACK = 2e-4
# Deviations beyond which tails are those of a log-normal: a mode that was fitted too
# narrow, or at the wrong place, costs the logarithm of the distance, not its square.
_BEND = Bend(2.5)
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
        y, log_slope = _BEND.forward(z)
        zeta, log_det = Cut(alpha, beta).forward(y + shift)
        log_det = (log_det + log_slope - scale.log()).sum(-1)
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
            z[:, d] = _BEND.inverse(Cut(alpha, beta).inverse(zeta[:, d]) - shift)
            w[:, d] += scale * z[:, d]
        slack = (0.25 * (high - low)).clamp(0.0, _SLACK)
        return torch.maximum(torch.minimum(w, high - slack), low + slack), z


class LocalGaussian(nn.Module):
    r"""The Gaussian of a component, predicted from its context.

    .. math::
        m = \mu(c) + B(c)\,p, \qquad C = \mathrm{diag}(e^{s(c)})\, L(c)

    p are the local coordinates of the component before, zero if it is far. The centres
    about which angles are unwrapped are predicted as directions.

    Args:
        features: Number D of coordinates.
        context_features: Length of a context.
        num_circular: Number P of coordinates, after the first, that are angles.
        hidden_features: Width of the network.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        num_circular: int,
        hidden_features: int = 128,
    ) -> None:
        super().__init__()
        self.features, self.num_circular = features, num_circular
        below = features * (features - 1) // 2
        self._sizes = [features, features, below, features * features]
        self._sizes.append(2 * max(1, num_circular))
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
        """Centres of the angles, shape ``(n, P)``, of contexts ``(n, C)``."""
        direction = self.network(contexts)[:, -self._sizes[-1] :].double()
        x, y = direction.unflatten(-1, (-1, 2))[:, : self.num_circular].unbind(-1)
        return torch.atan2(y, x + 1e-9)


def _interval(
    mean: Tensor, scale: Tensor, ends: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift that brings the Gaussian near the interval, and the interval's ends."""
    low, high = ends
    high = torch.maximum(high, low + _LEAST_WIDTH)
    alpha, _ = _BEND.forward((low - mean) / scale)
    beta, _ = _BEND.forward((high - mean) / scale)
    shift = (_FARTHEST - alpha).clamp(max=0.0) + (-_FARTHEST - beta).clamp(min=0.0)
    return shift, alpha + shift, beta + shift
