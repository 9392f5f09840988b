r"""Encoders: from data to the embeddings that the heads and the slots read.

An encoder is any module that maps x ``(B, T)`` to an :class:`Encoding`, or to a tensor
``(B, C)`` that then serves all readers. sbi's embedding nets are of the second kind.

:class:`TokenEncoder` keeps one token for each resolution element of the location axis.
Nothing is pooled away and nothing strided, so that a slot can read where its component
is to a fraction of an element. A front end turns x into channels at every token; a body
of dilated convolutions with two rounds of self-attention lets tokens explain each
other; pooled tokens serve the cardinality and the shared parameters.
"""

import math
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .spec import build, register

__all__ = [
    "Encoding",
    "MLPEncoder",
    "Observations",
    "Pool",
    "SelfAttention",
    "TokenEncoder",
    "TraceTokens",
    "encode",
    "mlp",
    "rms",
]

_DILATIONS = (1, 2, 4, 8, 16, 1)
_ATTEND_EVERY = 3


class Encoding(NamedTuple):
    """Embeddings of a batch of observations."""

    context: Tensor  # Read by the slots, (B, C)
    cardinality: Tensor  # Read by the cardinality head, (B, C')
    shared: Tensor  # Read by the shared-parameter head, (B, C'')
    # What attention slots attend to and cells read, (B, L, C'''), if kept
    tokens: Tensor | None = None
    # Edges of the location axis's cells, float64, (B, L + 1); None for width one
    edges: Tensor | None = None


class Observations(NamedTuple):
    """The data themselves, for those who fit them."""

    x: Tensor  # Observations, (B, *event)
    scale: Tensor  # Unit in which networks are told of their levels, ()


def encode(encoder: nn.Module, x: Tensor) -> Encoding:
    """Run an encoder; a plain tensor serves all three readers."""
    embedding = encoder(x)
    if isinstance(embedding, Encoding):
        return embedding
    return Encoding(embedding, embedding, embedding)


@register("encoder")
class MLPEncoder(nn.Module):
    """Fully connected encoder for short, unstructured data of ``num_features``."""

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
        widths = num_layers * [hidden_features]
        self.network = mlp(num_features, *widths, activated=True)

    def forward(self, x: Tensor) -> Tensor:
        """Embed x ``(B, *event)`` as ``(B, hidden_features)``."""
        return self.network(x.flatten(1))


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


def rms(x: Tensor) -> Tensor:
    """Root mean square ``(...)`` of records ``(..., T)``, 1 for one of zeros.

    A unit of the data's own: squares may vanish or overflow in float32.
    """
    level = x.double().square().mean(-1).sqrt().to(x)
    return torch.where(level > 0, level, 1.0)


def mlp(*widths: int, activated: bool = False) -> nn.Sequential:
    """A fully connected network of these widths; ``activated`` ends with a GELU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*(layers if activated else layers[:-1]))


@register("front end")
class TraceTokens(nn.Module):
    """Samples of a trace of length T, a few to each of L tokens; L divides T."""

    kind: ClassVar[str] = "trace"

    def __init__(self, length: int, num_tokens: int) -> None:
        super().__init__()
        if length % num_tokens:
            raise ValueError(
                f"num_tokens must divide the {length} samples, got {num_tokens}."
            )
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "length": length,
            "num_tokens": num_tokens,
        }
        self.num_tokens, self.num_data = num_tokens, length
        self.num_levels = 1
        self.channels = 2 * (length // num_tokens) + 2
        self.register_buffer(
            "position", torch.linspace(-1.0, 1.0, num_tokens), persistent=False
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read x ``(B, T)``; see :meth:`BandTokens.forward`."""
        # Differences cancel what is smooth; half the median's square is robust.
        jumps = x.diff(dim=-1).abs().median(-1, keepdim=True).values
        unit = rms(x).unsqueeze(-1)
        level = (jumps / (0.6745 * math.sqrt(2) * unit) + 1e-6).log() + unit.log()
        samples = x.unflatten(-1, (self.num_tokens, -1))
        relative = (samples / level.exp().unsqueeze(-1)).asinh()
        extras = torch.stack(
            [
                self.get_buffer("position").expand(len(x), -1),
                level.expand(-1, self.num_tokens),
            ],
            dim=-1,
        )
        edges = torch.arange(self.num_tokens + 1.0, dtype=torch.float64)
        edges = edges.to(x.device).expand(len(x), -1)
        return torch.cat([samples, relative, extras], -1), level, edges


@register("encoder")
class TokenEncoder(nn.Module):
    """Encoder that keeps a token for every cell of the location axis.

    Tokens have length ``width``, pooled embeddings ``hidden_features``; the front end
    may be given by its spec.
    """

    kind: ClassVar[str] = "tokens"

    def __init__(
        self,
        front_end: nn.Module | dict[str, Any],
        width: int = 64,
        hidden_features: int = 128,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if isinstance(front_end, dict):
            front_end = build("front end", front_end)
        self.front_end = cast(Any, front_end)
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "front_end": self.front_end.spec,
            "width": width,
            "hidden_features": hidden_features,
            "num_heads": num_heads,
        }
        self.num_data: int = self.front_end.num_data
        channels: int = self.front_end.channels
        levels: int = self.front_end.num_levels
        self.lift = mlp(channels, 2 * width, width)
        padding = "circular" if getattr(front_end, "circular", False) else "zeros"
        self.blocks = nn.ModuleList(
            _Block(width, dilation, padding) for dilation in _DILATIONS
        )
        rounds = range(len(_DILATIONS) // _ATTEND_EVERY)
        self.norms: nn.ModuleList = nn.ModuleList(nn.LayerNorm(width) for _ in rounds)
        self.attentions: nn.ModuleList = nn.ModuleList(
            SelfAttention(width, num_heads, residual=False) for _ in rounds
        )
        self.last = nn.LayerNorm(width)
        self.pool = Pool(width)
        widths = 3 * width + levels, hidden_features, hidden_features
        self.to_context, self.to_cardinality = mlp(*widths), mlp(*widths)

    def forward(self, x: Tensor) -> Encoding:
        """Embed x ``(B, T)``."""
        if x.shape[-1] != self.num_data:
            raise ValueError(f"x must have {self.num_data} entries, got {x.shape[-1]}.")
        channels, level, edges = self.front_end(x)
        tokens = self.lift(channels)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            turn, rest = divmod(i + 1, _ATTEND_EVERY)
            if rest == 0:
                attention = self.attentions[turn - 1]
                tokens = tokens + attention(self.norms[turn - 1](tokens))
        tokens = self.last(tokens)
        pooled = torch.cat([self.pool(tokens), level], -1)
        context = self.to_context(pooled)
        shared = torch.cat([context, level], -1)
        return Encoding(context, self.to_cardinality(pooled), shared, tokens, edges)


class _Block(nn.Module):
    """Residual block: a dilated convolution over the axis, then a mix of channels."""

    def __init__(
        self, width: int, dilation: int, padding: Literal["zeros", "circular"]
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(
            width,
            width,
            5,
            padding=2 * dilation,
            dilation=dilation,
            padding_mode=padding,
        )
        self.mix = nn.Sequential(nn.GELU(), *mlp(width, 2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        # As one matrix product, which is faster than torch's dilated convolution.
        weight, bias = self.convolution.weight, self.convolution.bias
        size, step = weight.shape[-1], self.convolution.dilation[0]
        reach = step * (size // 2)
        normed = self.norm(tokens)
        if self.convolution.padding_mode == "circular":
            padded = torch.cat([normed[:, -reach:], normed, normed[:, :reach]], 1)
        else:
            padded = nn.functional.pad(normed, (0, 0, reach, reach))
        taps = [padded.narrow(1, i * step, tokens.shape[1]) for i in range(size)]
        weight = weight.permute(0, 2, 1).flatten(1)
        around = nn.functional.linear(torch.cat(taps, -1), weight, bias)
        return tokens + self.mix(around)
