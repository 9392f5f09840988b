r"""An encoder of sets of points: their order and their padding say nothing.

Points p_i attend to L tokens t_l and tokens to points, in turns, so that the cost grows
with n L and not with n squared (inducing points, Lee et al. 2019):

.. math::
    t \leftarrow t + \mathrm{attend}(t; [p, t]), \qquad
    p \leftarrow p + \mathrm{attend}(p; t)

Sums over points are all that is made of them, so that x and any reordering of its
points have the same embedding, up to rounding. The number of points is told, as means
do not know it.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..sets.points import filled_points
from .encoders import Encoding, Pool, mlp
from .spec import register

__all__ = ["AttendTo", "PointEncoder", "waves"]

# Halvings of the longest wave, which is 4 units.
_WAVES = 5
_ROUNDS = 2


def waves(z: Tensor) -> Tensor:
    """Coordinates ``(..., d)`` beside sines and cosines of them, ``(..., 11 d)``.

    A network of few layers tells values apart by them that lie close together.
    """
    turns = z.unsqueeze(-1) * (0.5 * math.pi * 2.0 ** torch.arange(_WAVES)).to(z)
    turns = turns.flatten(-2)
    return torch.cat([z, turns.sin(), turns.cos()], -1)


class AttendTo(nn.Module):
    """What queries find among keys by attention, added to them, and a mix of channels.

    Each query belongs to an observation; each observation has keys of its own.
    """

    def __init__(
        self, width: int, key_features: int | None = None, num_heads: int = 4
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"width must be a multiple of {num_heads} heads, got {width}."
            )
        seen = width if key_features is None else key_features
        self.num_heads = num_heads
        self.norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(seen)
        self.query = nn.Linear(width, width)
        self.key_value, self.out = nn.Linear(seen, 2 * width), nn.Linear(width, width)
        self.mix = nn.Sequential(nn.LayerNorm(width), *mlp(width, 2 * width, width))

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        there: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Map queries ``(N, T, C)``; see :meth:`read`, of keys ``(N, L, C')``."""
        return self.read(queries, self.prepared(keys), there, causal)

    def prepared(self, keys: Tensor) -> Tensor:
        """What is looked at of keys ``(B, L, C')``, shape ``(2, B, H, L, C / H)``."""
        pairs = self.key_value(self.key_norm(keys))
        pairs = pairs.unflatten(-1, (2, self.num_heads, -1))
        return pairs.permute(2, 0, 3, 1, 4)

    def read(
        self,
        queries: Tensor,
        prepared: Tensor,
        there: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Map queries ``(N, T, C)`` to the same shape.

        ``prepared`` is of N observations, or of one. ``there`` ``(N, L)`` tells which
        keys count, all if None; ``causal`` lets the i-th query see the keys up to i.
        """
        asked = self.query(self.norm(queries)).unflatten(-1, (self.num_heads, -1))
        key, value = (
            part.expand(len(queries), -1, -1, -1) for part in prepared.unbind(0)
        )
        mask = None if there is None else there[:, None, None, :]
        found = nn.functional.scaled_dot_product_attention(
            asked.transpose(1, 2), key, value, mask, is_causal=causal
        )
        queries = queries + self.out(found.transpose(1, 2).flatten(-2))
        return queries + self.mix(queries)


@register("encoder")
class PointEncoder(nn.Module):
    """Encoder of sets of points ``(B, n, d + 1)``, see :mod:`sbi_slotflow.sets.points`.

    Args:
        num_points: Points n of a set, at most.
        num_entries: Entries d + 1 of each.
        location: A usual point, d numbers.
        scale: How far points usually are from it, d numbers.
        width: Length of tokens.
        hidden_features: Length of the pooled embeddings.
        num_tokens: Number L of tokens.
    """

    kind: ClassVar[str] = "points"
    # x is read in its own units, whatever they are, and may have gaps.
    reads_records = reads_any_scale = True
    # Tokens have no place, so that slots know each other by what was drawn before.
    usual_slots: ClassVar[str] = "ordered"

    def __init__(
        self,
        num_points: int,
        num_entries: int,
        location: Sequence[float],
        scale: Sequence[float],
        width: int = 64,
        hidden_features: int = 128,
        num_tokens: int = 16,
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "num_points": num_points,
            "num_entries": num_entries,
            "location": list(location),
            "scale": list(scale),
            "width": width,
            "hidden_features": hidden_features,
            "num_tokens": num_tokens,
        }
        dim = num_entries - 1
        self.shape, self.num_data = (num_points, num_entries), num_points * num_entries
        for name, numbers in (("location", location), ("scale", scale)):
            values = torch.tensor(numbers, dtype=torch.float64)
            if len(values) != dim:
                raise ValueError(f"{name} must be {dim} numbers, got {numbers}.")
            self.register_buffer(name, values, persistent=False)
        self.lift = mlp((2 * _WAVES + 1) * dim, 2 * width, width)
        self.tokens = nn.Parameter(torch.randn(num_tokens, width))
        self.gather, self.spread = (
            nn.ModuleList(AttendTo(width) for _ in range(num))
            for num in (_ROUNDS + 1, _ROUNDS)
        )
        self.last, self.pool = nn.LayerNorm(width), Pool(width)
        widths = 3 * width + 1, hidden_features, hidden_features
        self.to_context, self.to_cardinality = mlp(*widths), mlp(*widths)

    @staticmethod
    def filled(x: Tensor) -> Tensor:
        """Data without NaN, see :func:`~sbi_slotflow.sets.points.filled_points`."""
        return filled_points(x)

    def forward(self, x: Tensor) -> Encoding:
        """Embed sets ``(B, n, d + 1)``, of any n."""
        if x.ndim != 3 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"x must have shape (B, n, {self.shape[1]}), got {tuple(x.shape)}."
            )
        there = x[..., -1] > 0
        location, scale = (self.get_buffer(name) for name in ("location", "scale"))
        z = ((x[..., :-1].double() - location) / scale).to(self.tokens)
        # Far out only the logarithm is told, so that numbers stay of order one.
        z = torch.where(z.abs() <= 3, z, z.sign() * (3 + (z.abs() / 3).clamp(1).log()))
        points = self.lift(waves(z))
        tokens = self.tokens.expand(len(x), -1, -1)
        always = there.new_ones(len(x), tokens.shape[1])
        seen = torch.cat([there, always], -1)
        for i, gather in enumerate(self.gather):
            tokens = gather(tokens, torch.cat([points, tokens], 1), seen)
            if i < len(self.spread):
                points = self.spread[i](points, tokens)
        tokens = self.last(tokens)
        number = there.sum(-1, keepdim=True).to(tokens)
        number = (number + 1).log() - math.log(self.shape[0] + 1)
        pooled = torch.cat([self.pool(tokens), number], -1)
        context = self.to_context(pooled)
        return Encoding(context, self.to_cardinality(pooled), context, tokens)
