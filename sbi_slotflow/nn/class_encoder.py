"""Encoders of several classes, whose tokens look at each other."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .encoders import Encoding, Pool, SelfAttention, encode, mlp
from .spec import build, register

__all__ = ["ClassEncoder"]


@register("encoder")
class ClassEncoder(nn.Module):
    """Encoders of several classes, whose tokens then look at each other.

    Args:
        members: An encoder for each class that keeps tokens, or its spec.
        hidden_features: Width of pooled embeddings.
        num_heads: Heads of the attention among tokens of all classes.
    """

    kind: ClassVar[str] = "classes"

    def __init__(
        self,
        members: Sequence[nn.Module | dict[str, Any]],
        hidden_features: int = 128,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        parts: list[Any] = [
            build("encoder", part) if isinstance(part, dict) else part
            for part in members
        ]
        self.members = nn.ModuleList(parts)
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "members": [part.spec for part in parts],
            "hidden_features": hidden_features,
            "num_heads": num_heads,
        }
        widths = {part.spec["width"] for part in parts}
        if len(widths) != 1:
            raise ValueError(f"members must have one width, got {sorted(widths)}.")
        width: int = widths.pop()
        self.labels = nn.Parameter(0.1 * torch.randn(len(parts), width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = SelfAttention(width, num_heads, residual=False)
        self.mix = mlp(width, 2 * width, width)
        self.pool = Pool(width)
        pooled = 3 * width + hidden_features * len(parts)
        self.to_context = mlp(pooled, hidden_features, hidden_features)
        self.to_cardinality = mlp(pooled, hidden_features, hidden_features)

    @property
    def reads_records(self) -> bool:
        """Whether x is records of time, value and error."""
        return any(getattr(part, "reads_records", False) for part in self.members)

    def forward(self, x: Tensor) -> Encoding:
        """Embed x ``(B, *event)``."""
        found = [encode(member, x) for member in self.members]
        tokens = torch.cat(
            [
                cast(Tensor, each.tokens) + label
                for each, label in zip(found, self.labels, strict=True)
            ],
            1,
        )
        tokens = tokens + self.attention(self.norms[0](tokens))
        tokens = self.norms[2](tokens + self.mix(self.norms[1](tokens)))
        contexts = [each.context for each in found]
        pooled = torch.cat([self.pool(tokens), *contexts], -1)
        context = self.to_context(pooled)
        shared = torch.cat([context, *(each.shared for each in found)], -1)
        edges = self._edges(found)
        return Encoding(context, self.to_cardinality(pooled), shared, tokens, edges)

    @staticmethod
    def _edges(found: Sequence[Encoding]) -> Tensor | None:
        """Edges of all cells, one class after the other."""
        if all(each.edges is None for each in found):
            return None
        columns, first = [], 0
        for each in found:
            tokens, edges = cast(Tensor, each.tokens), each.edges
            if edges is None:
                edges = torch.arange(tokens.shape[1] + 1.0, dtype=torch.float64)
                edges = edges.to(tokens.device).expand(len(tokens), -1)
            columns.append((edges + first)[:, 1 if columns else 0 :])
            first += tokens.shape[1]
        return torch.cat(columns, -1)
