r"""Networks of fixed capacity with masks: the other two rows of the paper's table 1.

:class:`Saturated` is in the manner of CoSMIC flows (Davies et al. 2025): one flow over
all Kmax components, whatever K is, with the dimensions beyond K masked. The flow is
autoregressive in canonical order in every layer, so its first dimensions are a density
on their own,

.. math:: q(\theta_1..\theta_K | x, K) = \prod_{d \le DK} q(u_d | u_{<d}, x, K),

and a mask costs nothing. Kmax components are paid for, though.

:class:`FixedCapacity` is in the manner of MONet (Burgess et al. 2019): Kmax outputs,
each with a probability to be there and a density of its own, independent of the others
given x and blind to K.

Neither is a re-implementation of those works, which are about other problems; both have
the same encoder as the other rivals.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import zuko
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.nn import functional

from sbi_slotflow.seeding import forked_rng, generator_for

from .base import Answer, Embedding, Rival, Training, train
from .coordinates import Coordinates

__all__ = ["FixedCapacity", "Saturated"]

_HIDDEN, _LAYERS, _BINS = 64, 3, 8
_LOG_NORMAL = 0.9189385332046727  # half of log(2 pi)


def autoregressive(features: int, context: int) -> nn.ModuleList:
    """Spline layers, all in the order of the features."""
    return nn.ModuleList(
        zuko.flows.MaskedAutoregressiveTransform(
            features,
            context,
            order=torch.arange(features),  # pyright: ignore[reportArgumentType]
            univariate=zuko.transforms.MonotonicRQSTransform,
            shapes=[torch.Size((n,)) for n in (_BINS, _BINS, _BINS - 1)],
            hidden_features=(_HIDDEN, _HIDDEN),
        )
        for _ in range(_LAYERS)
    )


def log_densities(layers: nn.ModuleList, u: Tensor, context: Tensor) -> Tensor:
    """Log density of each feature given those before it, of the shape of u."""
    total = torch.zeros_like(u)
    for layer in layers:
        transform: Any = layer(context)
        if hasattr(transform, "meta"):  # not with a single feature
            transform = transform.meta(u)
        u, log_det = transform.base.call_and_ladj(u)
        total = total + log_det
    return total - 0.5 * u.square() - _LOG_NORMAL


def draw(layers: nn.ModuleList, features: int, context: Tensor) -> Tensor:
    """Draw features ``(N, features)``."""
    u = torch.randn(len(context), features)
    for layer in reversed(layers):
        u = layer(context).inv(u)
    return u


class _Network(ConditionalDensityEstimator):
    """An embedding and something on it, for sbi's trainer; targets are [u, K]."""

    def __init__(self, embedding: Embedding, coordinates: Coordinates, num: int):
        shapes = torch.Size((coordinates.size + 1,)), torch.Size((num,))
        super().__init__(embedding, *shapes)
        self.coordinates = coordinates
        self.num_sizes = coordinates.layout.max_cardinality + 1

    def sizes(self, k: Tensor) -> Tensor:
        """K one-hot."""
        return functional.one_hot(k, self.num_sizes).float()

    @abstractmethod
    def terms(self, embedded: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Log q(K | x) and log q(u | K, x), each ``(B,)``."""

    def loss(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Negative log density ``(B,)``."""
        k = input[:, -1].long()
        return -sum(self.terms(self.net(condition), input[:, :-1], k), start=0 * k)

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Log densities ``(1, B)``."""
        rows = input.reshape(-1, input.shape[-1])
        return -self.loss(rows, condition).unsqueeze(0)

    def sample(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: object
    ) -> Tensor:
        """Not used: rivals draw by themselves."""
        raise NotImplementedError


class _SaturatedNetwork(_Network):
    def __init__(self, embedding: Embedding, coordinates: Coordinates, num: int):
        super().__init__(embedding, coordinates, num)
        self.to_k = nn.Sequential(
            nn.Linear(embedding.num_features, 64),
            nn.GELU(),
            nn.Linear(64, self.num_sizes),
        )
        context = embedding.num_features + self.num_sizes
        self.layers = autoregressive(coordinates.size, context)

    def log_k(self, embedded: Tensor) -> Tensor:
        return self.to_k(embedded).log_softmax(-1)

    def terms(self, embedded: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        log_k = self.log_k(embedded).gather(-1, k.unsqueeze(-1)).squeeze(-1)
        return log_k, self.given_k(embedded, u, k)

    def given_k(self, embedded: Tensor, u: Tensor, k: Tensor) -> Tensor:
        context = torch.cat([embedded, self.sizes(k)], -1)
        each = log_densities(self.layers, u, context)
        return torch.where(self.coordinates.active(k), each, 0.0).sum(-1)

    def draw(self, embedded: Tensor, k: Tensor) -> Tensor:
        context = torch.cat([embedded, self.sizes(k)], -1)
        return draw(self.layers, self.coordinates.size, context)


class _FixedNetwork(_Network):
    def __init__(self, embedding: Embedding, coordinates: Coordinates, num: int):
        super().__init__(embedding, coordinates, num)
        slots = self.num_sizes - 1
        self.to_presence = nn.Sequential(
            nn.Linear(embedding.num_features, 64), nn.GELU(), nn.Linear(64, slots)
        )
        self.components = autoregressive(
            coordinates.width, embedding.num_features + slots
        )
        self.shared = autoregressive(coordinates.num_shared, embedding.num_features)

    def log_k(self, embedded: Tensor) -> Tensor:
        """Log probability of the number of slots that are there."""
        presence = self.to_presence(embedded).sigmoid()
        probs = torch.ones_like(presence[:, :1])
        for p in presence.split(1, -1):
            absent = functional.pad(probs * (1 - p), (0, 1))
            probs = absent + functional.pad(probs * p, (1, 0))
        return probs.clamp(min=1e-12).log()

    def terms(self, embedded: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        there = self.coordinates.layout.mask(k).float()
        presence = functional.binary_cross_entropy_with_logits(
            self.to_presence(embedded), there, reduction="none"
        )
        return -presence.sum(-1), self.given_k(embedded, u, k)

    def given_k(self, embedded: Tensor, u: Tensor, k: Tensor) -> Tensor:
        """Density of the first K slots' components."""
        num, width = self.coordinates.num_shared, self.coordinates.width
        value = log_densities(self.shared, u[:, :num], embedded).sum(-1)
        slots = u[:, num:].unflatten(-1, (-1, width))
        each = log_densities(
            self.components, slots.flatten(0, 1), self._contexts(embedded)
        ).sum(-1)
        mask = self.coordinates.layout.mask(k)
        return value + torch.where(mask, each.reshape(mask.shape), 0.0).sum(-1)

    def draw(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors, those that are there first, and how many are."""
        num, width = len(embedded), self.coordinates.width
        shared = draw(self.shared, self.coordinates.num_shared, embedded)
        u = draw(self.components, width, self._contexts(embedded))
        u = u.reshape(num, -1, width)
        there = torch.bernoulli(self.to_presence(embedded).sigmoid()).bool()
        order = (~there).int().argsort(dim=-1, stable=True)
        u = u.gather(1, order.unsqueeze(-1).expand_as(u))
        return torch.cat([shared, u.flatten(1)], -1), there.sum(-1)

    def _contexts(self, embedded: Tensor) -> Tensor:
        slots = torch.eye(self.num_sizes - 1)
        num = len(embedded)
        every = embedded.repeat_interleave(len(slots), 0)
        return torch.cat([every, slots.repeat(num, 1)], -1)


class _Masked(Rival):
    """What both have in common."""

    trains: ClassVar[bool] = True
    kind: ClassVar[type[_Network]]

    def _learn(self, training: Training) -> None:
        self.coordinates = Coordinates(self.problem)
        embedding = Embedding(self.problem, training.x)
        network = self.kind(embedding, self.coordinates, self.problem.num_data)
        vectors, k, _ = self.coordinates.vectors(training.theta)
        targets = torch.cat([vectors, k.unsqueeze(-1).float()], -1)
        self.estimator: Any = train(network, targets, training.x, training.epochs)

    @torch.no_grad()
    def probs(self, x: Tensor) -> Tensor:
        """p(K | x)."""
        return self.estimator.log_k(self.estimator.net(x)).softmax(-1).double()

    @torch.no_grad()
    def log_prob_given_k(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log densities given K."""
        every = self.problem.layout.cardinality(theta)
        values = torch.zeros(len(theta), dtype=torch.float64)
        for size in every.unique().tolist():
            chosen = every == size
            embedded = self.estimator.net(x[chosen])
            values[chosen] = self.coordinates.sum_over_labellings(
                theta[chosen],
                lambda u, k: self.estimator.given_k(embedded, u, k),  # noqa: B023
            )
        return values

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self.estimator


class Saturated(_Masked):
    """One masked flow over all Kmax components."""

    kind = _SaturatedNetwork

    @torch.no_grad()
    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Draw K, then all Kmax components."""
        probs = self.probs(x.unsqueeze(0))[0]
        embedded = self.estimator.net(x.unsqueeze(0)).expand(num, -1)
        with forked_rng(generator_for(seed)):
            k = torch.multinomial(probs, num, replacement=True)
            vectors = self.estimator.draw(embedded, k)
        return Answer(probs, self.coordinates.rows(vectors, k))


class FixedCapacity(_Masked):
    """Kmax independent outputs, each there or not."""

    kind = _FixedNetwork

    @torch.no_grad()
    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Draw each output, then whether it is there."""
        embedded = self.estimator.net(x.unsqueeze(0)).expand(num, -1)
        with forked_rng(generator_for(seed)):
            vectors, k = self.estimator.draw(embedded)
        return Answer(self.probs(x.unsqueeze(0))[0], self.coordinates.rows(vectors, k))
