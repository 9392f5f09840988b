r"""The network's distribution over sets, given data.

.. math::
    q(K, \Theta, s | x) = q(K | x)\, q(\Theta | x, K)\, q(s | \Theta, x, K)

x is encoded once, when the distribution is built; everything else that is found out
about it (fitted modes, weighed cell sets) is kept in the same object.

See Also:
    :meth:`SlotDensityEstimator.given`, which builds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from ..sets.distribution import SetDistribution
from ..sets.layout import ThetaLayout, ThetaParts
from .charts import Chart
from .encoders import Encoding, Observations
from .heads import SharedGivenX
from .spec import Matching

__all__ = ["NetworkSets", "SetHead", "SetsGivenK"]


class SetsGivenK(ABC):
    """q(Theta, s | x, K) of B observations: what a component head makes of them."""

    shared: SharedGivenX | None

    @abstractmethod
    def log_terms(self, parts: ThetaParts, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate log q(Theta | x, K) and log q(s | Theta, x, K) of N sets, ``(N,)``.

        ``owner`` ``(N,)`` is the observation of each; the first density is with respect
        to Lebesgue measure on the canonical region.
        """

    @abstractmethod
    def sample(
        self, mask: Tensor, owner: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw N sets with active components ``mask`` ``(N, Kmax)``.

        Components ``(N, Kmax, D)`` are in any order, inactive ones hold anything;
        shared parameters ``(N, S)`` are None if there are none.
        """

    def log_shared(
        self, parts: ThetaParts, owner: Tensor, like: Tensor, level: Tensor | None
    ) -> Tensor:
        """The second of :meth:`log_terms`: 0 if there are no shared parameters."""
        if self.shared is None:
            return torch.zeros_like(like)
        return self.shared.log_prob(
            parts.shared, owner, parts.cardinality, level, parts.components
        )

    def sample_shared(
        self,
        owner: Tensor,
        mask: Tensor,
        components: Tensor,
        generator: torch.Generator | None,
        level: Tensor | None = None,
    ) -> Tensor | None:
        """The second of :meth:`sample`."""
        if self.shared is None:
            return None
        count = mask.sum(-1)
        return self.shared.sample(owner, count, generator, level, components)


class SetHead(nn.Module, ABC):
    """Density of a set of components."""

    chart: Chart
    keeps_separation: bool = False  # whether every draw keeps the least separation

    def given(
        self, encoding: Encoding, data: Observations, shared: SharedGivenX | None
    ) -> SetsGivenK:
        """Return q(Theta, s | x, K) of B observations; ``shared`` is q(s | x, K)."""
        return self.in_training(encoding, data, shared, "permanent")

    @abstractmethod
    def in_training(
        self,
        encoding: Encoding,
        data: Observations,
        shared: SharedGivenX | None,
        matching: Matching,
    ) -> SetsGivenK:
        """Return what training maximises; see :meth:`given`.

        Nothing is pruned, weighed or remembered, and gradients pass. Of independent
        slots, ``matching="permanent"`` is the density itself (exact up to K = 12, see
        :func:`log_permanent`); ``"hungarian"`` and ``"ordered"`` take the log density
        of one assignment of components to slots.
        """


class NetworkSets(SetDistribution):
    """What an estimator believes given B observations."""

    def __init__(
        self,
        layout: ThetaLayout,
        log_cardinality: Tensor,
        head: SetHead,
        sets: Callable[[], SetsGivenK],
        weigh: Callable[[SetsGivenK, Tensor], Tensor] | None = None,
    ) -> None:
        self.layout, self.num_observations = layout, len(log_cardinality)
        self._by_network, self._weigh = log_cardinality, weigh
        self.keeps_separation, self._chart = head.keeps_separation, head.chart
        self._make_sets, self._keeps_graph = sets, torch.is_grad_enabled()

    @cached_property
    def _sets(self) -> SetsGivenK:
        """What the head makes of x, when first asked for: p(K | x) needs none of it."""
        with torch.set_grad_enabled(self._keeps_graph):
            return self._make_sets()

    @cached_property
    def log_cardinality(self) -> Tensor:
        """Log q(K | x), ``(B, Kmax + 1)``: the classifier's, or by evidence."""
        if self._weigh is None:
            return self._by_network
        with torch.no_grad():
            return self._weigh(self._sets, self._by_network)

    def cardinality(self) -> Categorical:
        """Return q(K | x); see :meth:`SetDistribution.cardinality`."""
        return Categorical(logits=self.log_cardinality)

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw theta rows; see :meth:`SetDistribution.sample`."""
        shape = torch.Size(sample_shape)
        if k is None:
            counts = self.draw_cardinality(shape.numel(), generator)
        else:
            device = self.log_cardinality.device
            counts = torch.full((shape.numel(), self.num_observations), k).to(device)
        rows = self.draw(self.owners(shape.numel()), counts.reshape(-1), generator)
        return rows.reshape(*shape, self.num_observations, self.layout.size)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate log densities; see :meth:`SetDistribution.log_prob`.

        A batch of one, of theta or of x, goes with any batch of the other.
        """
        chart = self._chart
        if not chart.is_density:
            raise NotImplementedError(
                f"log_prob does not exist in the {chart.kind!r} chart: it puts "
                f"{self.layout.num_component_params} parameters on a surface in "
                f"{chart.num_features} dimensions, where the flow's likelihood is "
                "no density of theta. Use the default slot_nn() for densities."
            )
        shape, observations = theta.shape[:-1], self.num_observations
        batch = max(shape[-1], observations)
        theta = theta.expand(-1, batch, -1)
        owner = torch.arange(observations, device=theta.device).expand(batch)
        owner = owner.expand(len(theta), batch).reshape(-1)
        parts = self.layout.unpack(theta.reshape(-1, self.layout.size))
        value = self.log_cardinality[owner, parts.cardinality]
        for term in self._sets.log_terms(parts, owner):
            value = value + term
        return value.reshape(len(theta), batch)

    def owners(self, num: int) -> Tensor:
        """Observations of ``num`` draws of each, shape ``(num B,)``."""
        every = torch.arange(self.num_observations, device=self.log_cardinality.device)
        return every.repeat(num)

    @torch.no_grad()
    def draw_cardinality(
        self, num: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw K from q(K | x), shape ``(num, B)``."""
        probs = self.log_cardinality.exp()
        if num == 0:
            return torch.zeros(0, len(probs), dtype=torch.int64, device=probs.device)
        return torch.multinomial(probs, num, replacement=True, generator=generator).mT

    @torch.no_grad()
    def draw(
        self,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw N theta rows given K, in canonical order."""
        mask = self.layout.mask(cardinality)
        components, shared = self._sets.sample(mask, owner, generator)
        return self.layout.canonical(self.layout.pack(cardinality, components, shared))
