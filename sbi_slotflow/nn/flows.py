r"""The conditional flow that all slots share.

.. math::
    \log q(u | c) = \log N(f(u; c); 0, I) + \log|\det \partial f / \partial u|

f alternates rational-quadratic spline couplings (Durkan et al. 2019) with affine ones
and random permutations (section 3.4 of the paper). In front of them, next to the data,
an optional :class:`LocationScale` layer predicts a full Gaussian from the context, so
that the couplings only learn what is not Gaussian.

Many rows share few contexts (all samples of a slot see the same one), so a context
travels as its distinct values and an index: :class:`RowContext`. A network then
projects each distinct context once.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.coupling import (
    AffineCouplingTransform,
    CouplingTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from nflows.transforms.permutations import RandomPermutation
from torch import Tensor, nn

__all__ = ["ConditionalFlow", "LocationScale", "RowContext"]

_MAX_LOG_SCALE = 10.0
# Rows of a batch without gradients: their hidden layers stay in a processor's cache.
_MAX_ROWS = 32768


class RowContext(NamedTuple):
    """Contexts of N rows: n distinct values and which of them each row sees."""

    values: Tensor  # Distinct contexts, (n, C)
    which: Tensor  # Which of them each row sees, (N,)
    # What each row sees besides, (N, P); None for nothing, or zeros
    own: Tensor | None = None

    def rows(self, start: int, stop: int) -> "RowContext":
        """The contexts of rows ``start..stop``."""
        own = None if self.own is None else self.own[start:stop]
        return RowContext(self.values, self.which[start:stop], own)

    def spread(self, projected: Tensor) -> Tensor:
        """Give each row what was made of its value, ``(n, ...)`` to ``(N, ...)``."""
        if len(projected) == 1:
            return projected.expand(len(self.which), *projected.shape[1:])
        return projected.index_select(0, self.which)


class ConditionalFlow(nn.Module):
    """Normalizing flow over F coordinates given a context ``(C,)``.

    Even layers are splines, the identity outside of [-bound, bound], odd ones affine;
    with F = 1 they act on the context alone. A ``"projected"`` network adds the context
    once, in its first layer; a ``"residual"`` one is nflows' ``ResidualNet``, which
    sees it in every block. ``own_features`` is the length of what each row sees besides
    its context. ``from_identity`` starts at the identity, where the input is nearly
    normal already.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        hidden_features: int = 64,
        num_layers: int = 4,
        num_bins: int = 8,
        tail_bound: float = 5.0,
        num_blocks: int = 1,
        network: Literal["projected", "residual"] = "projected",
        location_scale: bool = True,
        own_features: int = 0,
        from_identity: bool = False,
    ) -> None:
        super().__init__()
        self.features = features

        def make_network(in_features: int, out_features: int) -> nn.Module:
            net = _ProjectedNet if network == "projected" else _GatheredResidualNet
            widths = in_features, out_features, hidden_features, context_features
            return net(*widths, num_blocks, own_features)

        affine = _AffineCoupling if from_identity else AffineCouplingTransform
        tails: dict[str, Any] = {"tails": "linear", "tail_bound": tail_bound}
        layers: list[Transform] = []
        if location_scale:
            layers.append(
                LocationScale(features, context_features, hidden_features, own_features)
            )
        for i in range(num_layers):
            if features > 1:
                layers.append(RandomPermutation(features))
            mask = torch.arange(features) % 2 == (0 if features == 1 else 1)
            if i % 2 == 0:
                layers.append(_SplineCoupling(mask, make_network, num_bins, **tails))
            else:
                layers.append(affine(mask, make_network))
            if from_identity:
                _start_at_identity(layers[-1], num_bins)
        self.transform = CompositeTransform(layers)

    def log_prob(self, u: Tensor, context: RowContext) -> Tensor:
        """Evaluate log densities ``(N,)`` of coordinates ``(N, F)``."""
        if torch.is_grad_enabled() or len(u) <= _MAX_ROWS:
            return self._log_prob(u, context)
        parts = [
            self._log_prob(u[i : i + _MAX_ROWS], context.rows(i, i + _MAX_ROWS))
            for i in range(0, len(u), _MAX_ROWS)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def sample(
        self, context: RowContext, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw coordinates ``(N, F)``, one sample for each row."""
        num = len(context.which)
        noise = context.values.new_empty(num, self.features)
        noise.normal_(generator=generator)
        parts = [
            self.transform.inverse(
                noise[i : i + _MAX_ROWS], context.rows(i, i + _MAX_ROWS)
            )[0]
            for i in range(0, num, _MAX_ROWS)
        ]
        return torch.cat(parts) if parts else noise

    def _log_prob(self, u: Tensor, context: RowContext) -> Tensor:
        if len(u) == 0:
            return u.new_zeros(0)
        noise, log_det = self.transform(u, context)
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return normal + log_det


class LocationScale(Transform):
    r"""A Gaussian predicted from the context, :math:`u = \mu(c) + \Sigma(c) L(c) z`.

    Sigma is diagonal, the exponential of a bounded log-scale; L is lower triangular
    with ones on its diagonal. It starts near the identity.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        hidden_features: int,
        own_features: int = 0,
    ) -> None:
        super().__init__()
        self.features = features
        out = 2 * features + features * (features - 1) // 2
        last = nn.Linear(hidden_features, out)
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(context_features, hidden_features), nn.GELU(), last
        )
        self.from_own: nn.Linear | None = None
        if own_features:
            self.from_own = nn.Linear(own_features, out, bias=False)
            nn.init.zeros_(self.from_own.weight)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Tensor, context: RowContext
    ) -> tuple[Tensor, Tensor]:
        """Map u to z."""
        shift, log_scale, lower = self._coefficients(context)
        values = (inputs - shift) * torch.exp(-log_scale)
        return self._with_lower(values, -lower, None), -log_scale.sum(-1)

    def inverse(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Tensor, context: RowContext
    ) -> tuple[Tensor, Tensor]:
        """Map z to u."""
        shift, log_scale, lower = self._coefficients(context)
        values = self._with_lower(inputs, lower, inputs)
        return shift + torch.exp(log_scale) * values, log_scale.sum(-1)

    def _with_lower(
        self, values: Tensor, lower: Tensor, known: Tensor | None
    ) -> Tensor:
        """Add a strict lower triangle times what is known: None, the result itself."""
        entries, columns = iter(lower.unbind(-1)), []
        for i, value in enumerate(values.unbind(-1)):
            for before in columns if known is None else known.unbind(-1)[:i]:
                value = value + next(entries) * before
            columns.append(value)
        return torch.stack(columns, -1)

    def _coefficients(self, context: RowContext) -> tuple[Tensor, Tensor, Tensor]:
        raw = context.spread(self.network(context.values))
        if self.from_own is not None and context.own is not None:
            raw = raw + self.from_own(context.own)
        shift, log_scale, lower = raw.split(
            [self.features, self.features, raw.shape[-1] - 2 * self.features], dim=-1
        )
        log_scale = _MAX_LOG_SCALE * torch.tanh(log_scale / _MAX_LOG_SCALE)
        return shift, log_scale, lower


class _SplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """nflows' spline coupling with its inverse solved in float64.

    The inverse is a root of a quadratic whose discriminant can round below zero in
    float32, on which nflows fails an assertion.
    """

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not inverse:
            return super()._piecewise_cdf(inputs, transform_params, inverse)
        outputs, log_det = super()._piecewise_cdf(
            inputs.double(), transform_params.double(), inverse
        )
        return outputs.to(inputs.dtype), log_det.to(inputs.dtype)


class _AffineCoupling(AffineCouplingTransform):
    """nflows' affine coupling with a scale on either side of one."""

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.split(self.num_transform_features, dim=1)
        return (3 * torch.tanh(raw / 3)).exp(), shift


class _ProjectedNet(nn.Module):
    """Residual network that projects each distinct context once."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int,
        context_features: int,
        num_blocks: int,
        own_features: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_features = hidden_features  # nflows scales splines' softmax by it
        self.from_context = nn.Linear(context_features, hidden_features)
        self.from_own, self.from_inputs = (
            nn.Linear(features, hidden_features, bias=False) if features else None
            for features in (own_features, in_features)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Linear(hidden_features, hidden_features))
            for _ in range(num_blocks)
        )
        self.last = nn.Sequential(nn.GELU(), nn.Linear(hidden_features, out_features))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.last[-1]  # pyright: ignore[reportReturnType]

    def forward(self, inputs: Tensor, context: RowContext) -> Tensor:
        hidden = context.spread(self.from_context(context.values))
        if self.from_inputs is not None:
            hidden = torch.addmm(hidden, inputs, self.from_inputs.weight.T)
        if self.from_own is not None and context.own is not None:
            hidden = torch.addmm(hidden, context.own, self.from_own.weight.T)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


class _GatheredResidualNet(nn.Module):
    """nflows' ``ResidualNet`` behind a :class:`RowContext`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int,
        context_features: int,
        num_blocks: int,
        own_features: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_features, self.own_features = hidden_features, own_features
        self.network = ResidualNet(
            in_features,
            out_features,
            hidden_features,
            context_features + own_features,
            num_blocks,
        )

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.network.final_layer

    def forward(self, inputs: Tensor, context: RowContext) -> Tensor:
        values = context.spread(context.values)
        if self.own_features:
            own = context.own
            if own is None:
                own = values.new_zeros(len(values), self.own_features)
            values = torch.cat([values, own], -1)
        return self.network(inputs, values)


@torch.no_grad()
def _start_at_identity(layer: Transform, num_bins: int) -> None:
    """Set a coupling's last layer so that it changes nothing yet."""
    assert isinstance(layer, CouplingTransform)
    last = layer.transform_net.output
    last.weight.zero_()
    last.bias.zero_()
    if isinstance(layer, _SplineCoupling):
        # Slopes of one, where nflows has softplus(raw) + 1e-3.
        slopes = last.bias.view(layer.num_transform_features, -1)[:, 2 * num_bins :]
        slopes.fill_(math.log(math.expm1(1 - 1e-3)))
