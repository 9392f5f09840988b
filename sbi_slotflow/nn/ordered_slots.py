r"""Components without cells, one after the other in canonical order.

.. math::
    q(\{\theta_1..\theta_K\} | x, K) = \prod_{k=1}^{K}
        q(\ell_k | \theta_{<k}, x, K)\, q(r_k | \ell_k, \theta_{<k}, x, K),
    \qquad \ell_1 < \ldots < \ell_K

l_k is the parameter that orders the components and r_k the others. Slot k attends to
the slots before it, which know the components that were drawn there, and to the
encoder's tokens; in training all slots do so at once, given the true components. In the
coordinate :math:`v = \Phi^{-1}(F(\ell))`, which is standard normal under the prior, the
place is a mixture of normal laws, cut off at the place before:

.. math::
    q(\ell_k | \cdot) = \left| \frac{\mathrm{d} v_k}{\mathrm{d} \ell_k} \right|\,
        \frac{\sum_j \pi_j N(v_k; m_j, s_j^2)}
             {\sum_j \pi_j \Phi((m_j - v_{k-1}) / s_j)}
        \quad \text{for } v_k \geq v_{k-1}

so that draws come in order, and the density of the set integrates to one over the
canonical region, whatever the weights of the network are. One part of the mixture is
the prior, N(0, 1). The others r_k follow a flow that sees the place.

See Also:
    :mod:`.component_head`, whose slots are independent given x and K.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..sets.layout import ThetaParts
from ..sets.transforms import log_normal
from .charts import Chart, WhiteningChart
from .encoders import Encoding, Observations, mlp
from .flows import ConditionalFlow, RowContext
from .heads import SharedGivenX
from .point_encoder import AttendTo, waves
from .set_distribution import SetHead, SetsGivenK
from .spec import Matching

__all__ = ["CutMixture", "OrderedHead"]

_LAYERS, _PARTS = 2, 12
# Logarithms of the parts' deviations lie about the middle, within the reach.
_MIDDLE, _REACH = -2.0, 4.0
# Rows of a batch without gradients.
_MOST_ROWS = 8_192
# Stands for infinity: the place before the first.
_FAR = 1e30
# Least log share of a normal law, and deviations beyond which a share is less.
_LEAST, _FAR_OUT = -690.0, 36.0


@dataclass(frozen=True)
class CutMixture:
    """Mixtures of J normal laws, each cut off below.

    Attributes:
        log_weight: Of the laws, ``(..., J)``, float64.
        mean: Of the same.
        deviation: Of the same.
        bound: Where the mixture begins, ``(...)``.

    Example:
        >>> one = torch.zeros(1, dtype=torch.float64)
        >>> half = CutMixture(one, one, one + 1, one[0])
        >>> round(float(half.log_prob(torch.tensor(0.5)).exp()), 4)  # 2 phi(0.5)
        0.7041
    """

    log_weight: Tensor
    mean: Tensor
    deviation: Tensor
    bound: Tensor

    @property
    def _log_above(self) -> Tensor:
        """Log of each law's weight times its share above the bound."""
        z = (self.mean - self.bound.unsqueeze(-1)) / self.deviation
        return self.log_weight + torch.special.log_ndtr(z)

    def log_prob(self, v: Tensor) -> Tensor:
        """Evaluate the log density ``(...)``, -inf below the bound."""
        z = (v.unsqueeze(-1) - self.mean) / self.deviation
        each = self.log_weight + log_normal(z) - self.deviation.log()
        value = each.logsumexp(-1) - self._log_above.logsumexp(-1)
        return torch.where(v >= self.bound, value, -math.inf)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw from each mixture of batch shape ``(N,)``."""
        shares = self._log_above.softmax(-1)
        which = torch.multinomial(shares, 1, generator=generator)
        mean, deviation = (
            part.gather(-1, which).squeeze(-1) for part in (self.mean, self.deviation)
        )
        low = (self.bound - mean) / deviation
        uniform = torch.rand(low.shape, generator=generator, dtype=torch.float64)
        uniform = uniform.to(low).clamp(1e-16, 1 - 1e-16)
        log_share = torch.special.log_ndtr(-low) + uniform.log()
        z = -_quantile(log_share)
        # Far out, where the share underflows, the square is nearly exponential.
        far = (low.clamp(min=0.0).square() - 2 * uniform.log()).sqrt()
        z = torch.where(low > _FAR_OUT, far, torch.maximum(z, low))
        return mean + deviation * z


def _quantile(log_share: Tensor) -> Tensor:
    """Phi^-1 of a share of which the logarithm is known, from the nearer end."""
    log_share = log_share.clamp(_LEAST, -1e-300)
    low = torch.special.ndtri(log_share.exp())
    high = -torch.special.ndtri(-torch.expm1(log_share))
    return torch.where(log_share < -math.log(2), low, high)


class OrderedHead(SetHead):
    """Slots that are drawn in order, see the module.

    Args:
        chart: The components' transform; each parameter on its own.
        order_by: Index of the parameter that orders components.
        probe: Embeddings of some observations, for their sizes.
        max_cardinality: Largest cardinality Kmax.
        trunk_features: Length of a slot's state.
        flow: Options of the flow of the other parameters.

    Raises:
        ValueError: If the encoder keeps no tokens, or the chart mixes parameters.
    """

    def __init__(
        self,
        chart: Chart,
        order_by: int,
        probe: Encoding,
        max_cardinality: int,
        trunk_features: int = 64,
        flow: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if probe.tokens is None:
            raise ValueError(
                "slots='ordered' need an encoder that returns an Encoding with tokens; "
                "use slots='global' with this one."
            )
        if not isinstance(chart, WhiteningChart):
            raise ValueError(
                "slots='ordered' need a chart with a coordinate for each parameter on "
                f"its own, got {chart.kind!r}."
            )
        self.chart, self.order_by, self.largest = chart, order_by, max_cardinality
        num, width = chart.num_features, trunk_features
        self.others = [i for i in range(num) if i != order_by]
        self.start = nn.Linear(probe.context.shape[-1], width)
        self.slot = nn.Embedding(max_cardinality, width)
        self.size = nn.Embedding(max_cardinality + 1, width)
        self.embed = mlp(len(waves(torch.zeros(num))), 2 * width, width)
        self.to_slots = nn.ModuleList(AttendTo(width) for _ in range(_LAYERS))
        features = probe.tokens.shape[-1]
        self.to_tokens = nn.ModuleList(
            AttendTo(width, features) for _ in range(_LAYERS)
        )
        self.to_place = nn.Sequential(
            nn.LayerNorm(width), *mlp(width, 2 * width, 3 * _PARTS + 1)
        )
        self._spread_out()
        self.flow: ConditionalFlow | None = None
        if self.others:
            self.embed_place = mlp(len(waves(torch.zeros(1))), width, width)
            self.then: AttendTo = AttendTo(width, features)
            self.flow = ConditionalFlow(len(self.others), width, **(flow or {}))

    @torch.no_grad()
    def _spread_out(self) -> None:
        """Begin with laws all over the prior, about as wide as their distance."""
        last = self.to_place[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(0.1)
        shares = (torch.arange(_PARTS) + 0.5) / _PARTS
        last.bias[_PARTS + 1 : 2 * _PARTS + 1] = torch.special.ndtri(shares)
        last.bias[2 * _PARTS + 1 :] = math.atanh((math.log(0.4) - _MIDDLE) / _REACH)

    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return the density given x; see :meth:`SetHead.in_training`."""
        return _OrderedSets(self, encoding, shared)

    def scores(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``(..., D)``, float64, of components, and log-Jacobians."""
        columns, total = [], torch.zeros((), dtype=torch.float64)
        values = components.double().unbind(-1)
        for marginal, value in zip(self.chart.marginals, values, strict=True):
            v, log_det = marginal.score.forward(value)
            columns.append(v)
            total = total + log_det
        return torch.stack(columns, -1), total

    def components(self, v: Tensor) -> Tensor:
        """Components ``(..., D)``, float32, of coordinates."""
        pairs = zip(self.chart.marginals, v.double().unbind(-1), strict=True)
        values = torch.stack([m.score.inverse(column) for m, column in pairs], -1)
        return self.chart.marginals.clamp(values.float())

    def begin(self, encoding: Encoding) -> "_Read":
        """Look at what does not depend on any component."""
        assert encoding.tokens is not None
        layers = cast(list[AttendTo], self.to_tokens)
        tokens = [layer.prepared(encoding.tokens) for layer in layers]
        then = None if self.flow is None else self.then.prepared(encoding.tokens)
        return _Read(self.start(encoding.context), tokens, then)

    def place(self, state: Tensor, before: Tensor) -> CutMixture:
        """The law of places, given slots' states ``(..., C)`` and the place before."""
        raw = self.to_place(state).double()
        log_weight, mean, spread = raw.split([_PARTS + 1, _PARTS, _PARTS], -1)
        deviation = (_MIDDLE + _REACH * spread.tanh()).exp()
        pad = torch.nn.functional.pad  # the prior comes last
        return CutMixture(
            log_weight.log_softmax(-1),
            pad(mean, (0, 1), value=0.0),
            pad(deviation, (0, 1), value=1.0),
            before,
        )

    def inputs(
        self, read: "_Read", owner: Tensor, count: Tensor, before: Tensor, slot: int
    ) -> Tensor:
        """What slots from ``slot`` on begin with, of T components before them.

        ``before`` ``(N, T, D)`` are the coordinates of the components before each of
        T slots; those of the first slot do not count. Returns ``(N, T, C)``.
        """
        num = before.shape[1]
        index = torch.arange(slot, slot + num, device=before.device)
        known = self.embed(waves(before.clamp(-6.0, 6.0).to(read.start)))
        known = torch.where((index > 0).unsqueeze(-1), known, 0.0)
        own = read.start[owner] + self.size(count)
        return known + self.slot(index) + own.unsqueeze(1)

    def after(
        self, read: "_Read", owner: Tensor, state: Tensor, place: Tensor
    ) -> Tensor:
        """States ``(N, T, C)`` of slots that know their own place ``(N, T)``."""
        assert read.then is not None
        seen = waves(place.clamp(-6.0, 6.0).to(state).unsqueeze(-1))
        state = state + self.embed_place(seen)
        return self.then.read(state, _of(read.then, owner))


@dataclass(eq=False)
class _Read:
    """What slots look at, of B observations."""

    start: Tensor  # (B, C)
    tokens: list[Tensor]  # Of each layer, see AttendTo.prepared
    then: Tensor | None


def _of(prepared: Tensor, owner: Tensor) -> Tensor:
    """What is prepared for the owners of N rows; one for all if there is but one."""
    return prepared if prepared.shape[1] == 1 else prepared[:, owner]


@dataclass(eq=False)
class _OrderedSets(SetsGivenK):
    """Sets of ordered slots given B observations."""

    head: OrderedHead
    encoding: Encoding
    shared: SharedGivenX | None

    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log densities; see :meth:`SetsGivenK.log_terms`."""
        read = self.head.begin(self.encoding)
        if torch.is_grad_enabled() or len(owner) <= _MOST_ROWS:
            value = self._log_density(read, parts, owner)
        else:
            chunks = zip(
                *(each.split(_MOST_ROWS) for each in (*parts, owner)), strict=True
            )
            value = torch.cat(
                [self._log_density(read, ThetaParts(*c[:4]), c[4]) for c in chunks]
            )
        value = value.to(parts.components)
        return value, self.log_shared(parts, owner, value, None)

    def _log_density(self, read: _Read, parts: ThetaParts, owner: Tensor) -> Tensor:
        head, mask = self.head, parts.mask
        # Padding, and what lies outside, becomes a point of the support.
        inside = head.chart.contains(parts.components)
        middle = head.chart.marginals.middle(parts.components)
        active = (mask & inside).unsqueeze(-1)
        v, log_det = head.scores(torch.where(active, parts.components, middle))
        key = torch.where(mask, v[..., head.order_by], _FAR)
        order = key.argsort(-1).unsqueeze(-1).expand_as(v)
        v, log_det = v.gather(1, order), log_det.gather(1, order[..., 0])
        before = functional.pad(v[:, :-1], (0, 0, 1, 0))
        state = head.inputs(read, owner, mask.sum(-1), before, 0)
        for among, tokens, known in zip(
            head.to_slots, head.to_tokens, read.tokens, strict=True
        ):
            state = among(state, state, causal=True)
            state = tokens.read(state, _of(known, owner))  # pyright: ignore
        place = v[..., head.order_by]
        bound = functional.pad(place[:, :-1], (1, 0), value=-_FAR)
        each = head.place(state, bound).log_prob(place) + log_det
        if head.flow is not None:
            state = head.after(read, owner, state, place)
            row, slot = mask.nonzero(as_tuple=True)
            which = torch.arange(len(row), device=row.device)
            rest = v[row, slot][:, head.others].to(state)
            context = RowContext(state[row, slot], which)
            log_rest = head.flow.log_prob(rest, context).to(each)
            each = each + each.new_zeros(mask.shape).masked_scatter(mask, log_rest)
        total = torch.where(mask, each, 0.0).sum(-1)
        return torch.where((inside | ~mask).all(-1), total, -torch.inf)

    @torch.no_grad()
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sets; see :meth:`SetsGivenK.sample`."""
        read = self.head.begin(self.encoding)
        pairs = zip(mask.split(_MOST_ROWS), owner.split(_MOST_ROWS), strict=True)
        drawn = [self._sample(read, *pair, generator) for pair in pairs]
        components = torch.cat(drawn) if drawn else self._nothing(mask)
        return components, self.sample_shared(owner, mask, components, generator)

    def _nothing(self, mask: Tensor) -> Tensor:
        shape = *mask.shape, self.head.chart.num_features
        return self.encoding.context.new_zeros(shape)

    def _sample(
        self,
        read: _Read,
        mask: Tensor,
        owner: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        head, count = self.head, mask.sum(-1)
        v = self._nothing(mask).double()
        seen: list[list[Tensor]] = [[] for _ in head.to_slots]
        bound = v.new_full((len(mask),), -_FAR)
        for k in range(int(count.max()) if len(mask) else 0):
            before = v[:, max(0, k - 1)].unsqueeze(1)
            state = head.inputs(read, owner, count, before, k)
            for layer, known, earlier in zip(
                zip(head.to_slots, head.to_tokens, strict=True),
                read.tokens,
                seen,
                strict=True,
            ):
                among, tokens = layer
                earlier.append(among.prepared(state))  # pyright: ignore
                state = among.read(state, torch.cat(earlier, -2))  # pyright: ignore
                state = tokens.read(state, _of(known, owner))  # pyright: ignore
            place = head.place(state[:, 0], bound).sample(generator)
            v[:, k, head.order_by] = place
            if head.flow is not None:
                state = head.after(read, owner, state, place.unsqueeze(-1))
                which = torch.arange(len(mask), device=mask.device)
                rest = head.flow.sample(RowContext(state[:, 0], which), generator)
                v[:, k, head.others] = rest.double()
            bound = place
        return head.components(v)
