r"""The network's distribution over sets, given data.

.. math::
    q(K, \Theta, s | x) = q(K | x)\, q(\Theta | x, K)\, q(s | \Theta, x, K)

x is encoded once, when the distribution is built; everything else that is found out
about it (fitted modes, weighed cell sets) is kept in the same object.

See Also:
    :meth:`SlotDensityEstimator.given`, which builds it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..sets.distribution import SetDistribution

if TYPE_CHECKING:
    from .estimator import SlotDensityEstimator

__all__ = ["NetworkSets"]


class NetworkSets(SetDistribution):
    """What an estimator believes given B observations.

    Args:
        estimator: The estimator, whose weights must not change afterwards.
        x: Observations, shape ``(B, T)``.

    Attributes:
        keeps_separation: Whether draws keep the prior's least separation.
        log_cardinality: log q(K | x), shape ``(B, Kmax + 1)``.

    Raises:
        TypeError, ValueError: If x is malformed.
    """

    def __init__(self, estimator: "SlotDensityEstimator", x: Tensor) -> None:
        self._encoding = estimator.encode(x)
        self._estimator = estimator
        self.layout, self.num_observations = estimator.layout, len(x)
        self.keeps_separation = estimator.keeps_separation
        self.log_cardinality = estimator.cardinality_head(self._encoding.cardinality)

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

        Raises:
            NotImplementedError: If the chart's image is a surface, as in
                ``slot_nn.paper()``: its likelihood is no density of theta.
        """
        chart = self._estimator.chart
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
        estimator, encoding = self._estimator, self._encoding
        value = self.log_cardinality[owner, parts.cardinality]
        components, noise = estimator.component_head.log_prob(parts, encoding, owner)
        value = value + components
        if estimator.shared_head is not None:
            value = value + estimator.shared_head.log_prob(
                parts.shared, encoding.shared, owner, parts.cardinality, noise
            )
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
        """Draw N theta rows given K, in canonical order.

        Args:
            owner: Observation of each row, shape ``(N,)``.
            cardinality: K of each row, shape ``(N,)``.
            generator: Source of randomness.

        Returns:
            Rows of shape ``(N, E)``.
        """
        layout, estimator, encoding = self.layout, self._estimator, self._encoding
        components, noise = estimator.component_head.sample(
            layout.mask(cardinality), encoding, owner, generator
        )
        shared = None
        if estimator.shared_head is not None:
            shared = estimator.shared_head.sample(
                encoding.shared, owner, cardinality, generator, noise
            )
        return layout.canonical(layout.pack(cardinality, components, shared))
