r"""Sets as vectors of one length, for flows that know no sets.

Components stand in canonical order, each in the problem's chart, where the prior is
standard normal and bounds are none; shared parameters likewise. What a method fills the
padding with is its own affair. A vector is sorted again where it becomes a set, so the
density of a set is the sum over its labellings,

.. math::
    q(\{\theta_1..\theta_K\})
        = \sum_\pi q(\theta_{\pi(1)}, \ldots, \theta_{\pi(K)}),

taken in full: the rivals have a few components.
"""

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from sbi_slotflow.nn.charts import WhiteningChart
from sbi_slotflow.problems import Problem

__all__ = ["Coordinates"]


class Coordinates:
    """Maps rows to vectors [shared, component 1, ..., component Kmax] and back.

    Args:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        self.layout, self.chart = problem.layout, problem.build_chart()
        self.shared_chart = WhiteningChart(problem.prior.shared_marginals)
        self.num_shared = self.layout.num_shared
        self.width = self.chart.num_features
        self.size = self.num_shared + self.layout.max_cardinality * self.width

    def vectors(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``(N, size)``, padded with zeros, K and log-Jacobians ``(N,)``."""
        parts = self.layout.unpack(self.layout.canonical(theta).double())
        inside = self.chart.some_point(parts.components)
        filled = torch.where(parts.mask.unsqueeze(-1), parts.components, inside)
        u, log_det = self.chart.forward(filled)
        u = torch.where(parts.mask.unsqueeze(-1), u, 0.0)
        log_det = torch.where(parts.mask, log_det, 0.0).sum(-1)
        shared, shared_det = self.shared_chart.forward(parts.shared)
        vectors = torch.cat([shared, u.flatten(1)], -1).float()
        return vectors, parts.cardinality, log_det + shared_det

    def active(self, k: Tensor) -> Tensor:
        """Entries that K uses, boolean, shape ``(N, size)``."""
        components = self.layout.mask(k).repeat_interleave(self.width, -1)
        shared = components.new_ones(len(k), self.num_shared)
        return torch.cat([shared, components], -1)

    def rows(self, vectors: Tensor, k: Tensor) -> Tensor:
        """Canonical rows ``(N, E)`` of vectors ``(N, size)``."""
        shared = self.shared_chart.inverse(vectors[:, : self.num_shared])
        u = vectors[:, self.num_shared :].unflatten(-1, (-1, self.width))
        return self.layout.canonical(self.layout.pack(k, self.chart.inverse(u), shared))

    def sum_over_labellings(
        self, theta: Tensor, log_density: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Log density ``(N,)`` of sets, all of one K, with respect to theta.

        Args:
            theta: Rows ``(N, E)``.
            log_density: Log density of vectors ``(N, size)`` given their K ``(N,)``,
                padding left out.
        """
        vectors, k, log_det = self.vectors(theta)
        shared = vectors[:, : self.num_shared]
        u = vectors[:, self.num_shared :].unflatten(-1, (-1, self.width))
        num = int(k[0])
        values = []
        for order in permutations(range(num)):
            index = [*order, *range(num, u.shape[1])]
            values.append(
                log_density(torch.cat([shared, u[:, index].flatten(1)], -1), k)
            )
        return torch.stack(values).logsumexp(0).double() + log_det
