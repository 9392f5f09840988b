r"""Encoders: from data to the embeddings that the heads and the slots read.

An encoder is any module that maps x ``(B, T)`` to an :class:`Encoding`, or to a tensor
``(B, C)`` that then serves all readers. sbi's embedding nets are of the second kind.
"""

from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .spec import register

__all__ = [
    "Encoding",
    "MLPEncoder",
    "Observations",
    "Pool",
    "SelfAttention",
    "encode",
    "projection",
    "trunk_network",
]


class Encoding(NamedTuple):
    """Embeddings of a batch of observations.

    Attributes:
        context: Read by the slots, shape ``(B, C)``.
        cardinality: Read by the cardinality head, shape ``(B, C')``.
        shared: Read by the shared-parameter head, shape ``(B, C'')``.
        tokens: What attention slots attend to, shape ``(B, L, C''')``; None if the
            encoder keeps no tokens.
        edges: Positions of the edges of the location axis's cells, float64, shape
            ``(B, L + 1)``; None for cells of width one.
    """

    context: Tensor
    cardinality: Tensor
    shared: Tensor
    tokens: Tensor | None = None
    edges: Tensor | None = None


class Observations(NamedTuple):
    """The data themselves, for those who fit them.

    Attributes:
        x: Observations, shape ``(B, T)``.
        scale: Unit in which networks are told of their levels, shape ``()``.
    """

    x: Tensor
    scale: Tensor


def encode(encoder: nn.Module, x: Tensor) -> Encoding:
    """Run an encoder; a plain tensor serves all three readers."""
    embedding = encoder(x)
    if isinstance(embedding, Encoding):
        return embedding
    return Encoding(embedding, embedding, embedding)


@register("encoder")
class MLPEncoder(nn.Module):
    """Fully connected encoder for short, unstructured data.

    Args:
        num_features: Length T of x.
        hidden_features: Width of the layers and of the embedding.
        num_layers: Number of hidden layers.
    """

    kind: ClassVar[str] = "mlp"

    def __init__(
        self, num_features: int, hidden_features: int = 64, num_layers: int = 3
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "num_features": num_features,
            "hidden_features": hidden_features,
            "num_layers": num_layers,
        }
        widths = [num_features, *[hidden_features] * num_layers]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Embed x ``(B, T)`` as ``(B, hidden_features)``."""
        return self.network(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention (eq. 7)."""

    def __init__(self, width: int, num_heads: int, residual: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.residual = residual

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, L, C)`` to tokens of the same shape."""
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return tokens + attended if self.residual else attended


class Pool(nn.Module):
    """Mean, maximum and attention pooling (eq. 8): (B, L, C) -> (B, 3 C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens ``(B, L, C)`` to ``(B, 3 C)``."""
        weights = self.score(tokens).softmax(dim=-2)
        attended = (weights * tokens).sum(-2)
        return torch.cat([tokens.mean(-2), tokens.amax(-2), attended], dim=-1)


def projection(in_features: int, out_features: int) -> nn.Module:
    """A network with one hidden layer."""
    return nn.Sequential(
        nn.Linear(in_features, out_features),
        nn.GELU(),
        nn.Linear(out_features, out_features),
    )


def trunk_network(in_features: int, features: int) -> nn.Sequential:
    """The network that makes a component's context."""
    return nn.Sequential(
        nn.Linear(in_features, features),
        nn.GELU(),
        nn.Linear(features, features),
        nn.GELU(),
    )
