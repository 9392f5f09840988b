r"""Encoders: from data to the embeddings that the heads and the slots read.

An encoder is any module that maps x ``(B, T)`` to an :class:`Encoding`, or to a tensor
``(B, C)`` that then serves all readers. sbi's embedding nets are of the second kind.

:class:`TokenEncoder` keeps one token for each resolution element of the location axis.
Nothing is pooled away and nothing strided, so that a slot can read where its component
is to a fraction of an element. A front end turns x into channels at every token; a body
of dilated convolutions (in two dimensions where tokens stand on a grid) with two rounds
of self-attention lets tokens explain each other; pooled tokens serve the cardinality
and the shared parameters.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .prewhitening import NUM_NUMBERS, prewhitened
from .spec import build, register

__all__ = [
    "Encoding",
    "MLPEncoder",
    "Observations",
    "PatchTokens",
    "PeriodogramTokens",
    "Pool",
    "SelfAttention",
    "TokenEncoder",
    "TraceTokens",
    "encode",
    "mlp",
    "rms",
]

_DILATIONS = (1, 2, 4, 8, 16, 1)
# The same on a grid, of a few cells a side.
_GRID_DILATIONS = (1, 2, 1, 3, 1, 2)
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
        level = _noise_unit(x)
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


def _noise_unit(x: Tensor) -> Tensor:
    """Log of the noise's level ``(B, 1)``, robust, from jumps along the last axis."""
    # Differences cancel what is smooth; half the median's square is robust.
    flat = x.flatten(1)
    jumps = x.diff(dim=-1).flatten(1).abs().median(-1, keepdim=True).values
    unit = rms(flat).unsqueeze(-1)
    return (jumps / (0.6745 * math.sqrt(2) * unit) + 1e-6).log() + unit.log()


@register("front end")
class PatchTokens(nn.Module):
    """Patches of an image, one for each cell of a grid.

    A patch reaches half a cell beyond its cell on each side, so that a component on a
    cell's edge is seen whole; beyond the image its edge is repeated.

    Args:
        shape: Shape of an image, ``(H, W)`` or ``(channels, H, W)``.
        grid: Rows R and columns C of the grid, divisors of H and W.
    """

    kind: ClassVar[str] = "patches"

    def __init__(self, shape: Sequence[int], grid: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.grid = tuple(shape), (int(grid[0]), int(grid[1]))
        sides = zip(self.shape[-2:], self.grid, strict=True)
        if len(self.shape) not in (2, 3) or any(side % num for side, num in sides):
            raise ValueError(
                "grid must divide the height and width of images of shape "
                f"(H, W) or (channels, H, W), got {self.grid} for {self.shape}."
            )
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "shape": list(self.shape),
            "grid": list(self.grid),
        }
        self.num_tokens, self.num_data = math.prod(self.grid), math.prod(self.shape)
        self.num_levels = 1
        self._cell = tuple(
            side // num for side, num in zip(self.shape[-2:], self.grid, strict=True)
        )
        self._margin = tuple((side + 1) // 2 for side in self._cell)
        self._patch = tuple(
            side + 2 * margin
            for side, margin in zip(self._cell, self._margin, strict=True)
        )
        images = self.shape[0] if len(self.shape) == 3 else 1
        self.channels = 2 * images * math.prod(self._patch) + 3
        rows, columns = (torch.linspace(-1.0, 1.0, num) for num in self.grid)
        position = torch.cartesian_prod(rows, columns)
        self.register_buffer("position", position, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read x ``(B, *shape)``; see :meth:`BandTokens.forward`."""
        level = _noise_unit(x)
        images = x.reshape(len(x), -1, *self.shape[-2:])
        high, wide = self._margin
        padded = functional.pad(images, (wide, wide, high, high), "replicate")
        samples = functional.unfold(padded, self._patch, stride=self._cell).mT
        relative = (samples / level.exp().unsqueeze(-1)).asinh()
        position = self.get_buffer("position").expand(len(x), -1, -1)
        levels = level.unsqueeze(-1).expand(-1, self.num_tokens, -1)
        return torch.cat([samples, relative, position, levels], -1), level, None


@register("front end")
class PeriodogramTokens(nn.Module):
    r"""Least-squares spectrum of records at irregular times, by cells of frequency.

    At each frequency a mean, a cosine and a sine are fitted to the samples, weighted by
    their errors. A token holds, for some frequencies each: what they explain
    (:math:`\Delta\chi^2`), cosine and sine in units of their usual error, and the
    height of the spectral window there. If components are taken out in turn
    (:mod:`.prewhitening`), a token also holds what is explained once one, two ... of
    them are gone, and which of them was there.

    Args:
        num_samples: Samples T of a record.
        num_tokens: Number L of tokens.
        frequencies: Frequencies in the order of the cells, a multiple of L.
        num_removed: How many components are taken out in turn.
    """

    kind: ClassVar[str] = "periodogram"
    reads_records = True

    def __init__(
        self,
        num_samples: int,
        num_tokens: int,
        frequencies: Sequence[float],
        num_removed: int = 0,
    ) -> None:
        super().__init__()
        if not len(frequencies) or len(frequencies) % num_tokens:
            raise ValueError(
                f"frequencies must be a multiple of the {num_tokens} tokens, got "
                f"{len(frequencies)}."
            )
        self.spec: dict[str, Any] = {
            "kind": self.kind,
            "num_samples": num_samples,
            "num_tokens": num_tokens,
            "frequencies": list(frequencies),
        }
        self.num_tokens, self.shape = num_tokens, (num_samples, 3)
        self.num_data, self.num_levels = 3 * num_samples, 2
        self.num_removed, each = num_removed, len(frequencies) // num_tokens
        self.channels = 5 * each + 3
        if num_removed:
            self.spec["num_removed"] = num_removed
            self.channels += num_removed * (each + 1)
            self.num_levels += (num_removed + 1) * NUM_NUMBERS
        values = torch.tensor(frequencies, dtype=torch.float64)
        self.register_buffer("frequencies", values, persistent=False)
        place = torch.linspace(-1.0, 1.0, num_tokens)
        self.register_buffer("position", place, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read x ``(B, T, 3)``; see :meth:`BandTokens.forward`."""
        time, value, error = x.double().unbind(-1)
        there = error > 0
        weight = torch.where(there, torch.where(there, error, 1.0) ** -2, 0.0)
        total = weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        weight = weight / total
        value = value - (weight * value).sum(-1, keepdim=True)
        turns = time.unsqueeze(1) * self.get_buffer("frequencies").unsqueeze(-1)
        # Whole turns say nothing, and float32 is fast.
        turns = (2 * math.pi * (turns - turns.round())).float()
        cosine, sine = turns.cos(), turns.sin()
        sums = torch.stack([weight, weight * value], -1).float()
        (c, yc), (s, ys) = ((wave @ sums).unbind(-1) for wave in (cosine, sine))
        single = weight.float().unsqueeze(-1)
        cc = ((cosine * cosine) @ single).squeeze(-1) - c * c
        cs = ((cosine * sine) @ single).squeeze(-1) - c * s
        ss = ((sine * sine) @ single).squeeze(-1) - s * s
        det = (cc * ss - cs * cs).clamp(min=1e-3)
        a, b = (ss * yc - cs * ys) / det, (cc * ys - cs * yc) / det
        unit = total.float().sqrt()
        power = ((a * yc + b * ys) * unit.square()).clamp(min=0.0)
        waves = [(part * unit / math.sqrt(2)).asinh() for part in (a, b)]
        window = (c.square() + s.square()).sqrt()
        spectrum = torch.stack(
            [power.log1p(), power.sqrt().asinh(), *waves, window], -1
        )
        spectrum = spectrum.unflatten(1, (self.num_tokens, -1)).flatten(2)
        count = there.sum(-1, keepdim=True)
        chi = (weight * total * value.square()).sum(-1, keepdim=True)
        chi = (chi / count.clamp(min=1)).clamp(min=1e-12).log()
        level = torch.cat([0.5 * chi, count.clamp(min=1).log()], -1).float()
        place = self.get_buffer("position").expand(len(x), -1).unsqueeze(-1)
        levels = level.unsqueeze(1).expand(-1, self.num_tokens, -1)
        if not self.num_removed:
            return torch.cat([spectrum, place, levels], -1), level, None
        found = prewhitened(x, self.get_buffer("frequencies"), self.num_removed)
        left = found.power[:, 1:].log1p().unflatten(-1, (self.num_tokens, -1))
        left = left.movedim(1, -1).flatten(2)
        removed = found.frequencies.log().unsqueeze(-1)
        away = (self.get_buffer("frequencies").log() - removed).abs()
        token = away.argmin(-1) // (away.shape[-1] // self.num_tokens)
        there = functional.one_hot(token, self.num_tokens).mT.to(left)
        level = torch.cat([level, found.numbers.flatten(1)], -1)
        return torch.cat([spectrum, place, levels, left, there], -1), level, None


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
        self._event: tuple[int, ...] | None = getattr(front_end, "shape", None)
        # Whether x is records of time, value and error, to be read in their own units.
        self.reads_records = bool(getattr(front_end, "reads_records", False))
        padding = "circular" if getattr(front_end, "circular", False) else "zeros"
        grid: tuple[int, int] | None = getattr(front_end, "grid", None)
        if grid is None:
            blocks = [_Block(width, dilation, padding) for dilation in _DILATIONS]
        else:
            blocks = [_GridBlock(width, step, grid) for step in _GRID_DILATIONS]
        self.blocks = nn.ModuleList(blocks)
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
        """Embed x ``(B, *event)``."""
        if self._event is not None and x.shape[1:] != self._event:
            raise ValueError(
                f"x must have shape (B, *{self._event}), got {tuple(x.shape)}."
            )
        if self._event is None and x.shape[-1] != self.num_data:
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
            padded = functional.pad(normed, (0, 0, reach, reach))
        taps = [padded.narrow(1, i * step, tokens.shape[1]) for i in range(size)]
        weight = weight.permute(0, 2, 1).flatten(1)
        around = functional.linear(torch.cat(taps, -1), weight, bias)
        return tokens + self.mix(around)


class _GridBlock(nn.Module):
    """Residual block: a dilated convolution over the grid, then a mix of channels."""

    def __init__(self, width: int, dilation: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.step = grid, dilation
        self.norm = nn.LayerNorm(width)
        self.around = nn.Linear(9 * width, width)
        self.mix = nn.Sequential(nn.GELU(), *mlp(width, 2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        step, (rows, columns) = self.step, self.grid
        normed = self.norm(tokens).unflatten(1, self.grid)
        padded = functional.pad(normed, (0, 0, step, step, step, step))
        taps = [
            padded[:, i * step : i * step + rows, j * step : j * step + columns]
            for i in range(3)
            for j in range(3)
        ]
        around = self.around(torch.cat(taps, -1)).flatten(1, 2)
        return tokens + self.mix(around)
