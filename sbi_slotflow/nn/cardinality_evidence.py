r"""p(K | x) from the evidence of sets of cells.

.. math::
    p(K | x) \propto p(K)\, K!\, c^K z_K^{-1} \sum_a Z_a

Z are the integrals of likelihood and prior over the cells a of K components
(:func:`.modes.log_evidence`), which know the prior up to a constant c of each
component; :math:`z_K` is the probability that K components keep the least separation.
Where the noise level is unknown, Z holds the likelihood at the level of the residual,
:math:`v^{-T/2}`, in place of its integral over d linear parameters and the level,

.. math::
    \int \frac{d\sigma}{\sigma^{T - d}} e^{-T v / 2 \sigma^2} p(\sigma)
    \approx \tfrac12\, \Gamma(\tfrac{T - d - 1}{2})
        \left( \tfrac{T v}{2} \right)^{-\frac{T - d - 1}{2}} p(\hat\sigma)\,
        P(\sigma \in \text{bounds})

exact where components are linear in their parameters and p is flat over the level's
width. A network's classifier says which K are looked at, and keeps a share.

See Also:
    :mod:`.cell_sets`, where the sets are found and weighed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sets.marginals import Marginal
from ..sets.separation import log_separation_constant
from .cell_sets import CellSets
from .local import LocalTransform

__all__ = ["CardinalityEvidence"]

# Probability, of the highest, from which a K is looked at.
_WORTH_LOOKING = 1e-3


@dataclass(frozen=True)
class CardinalityEvidence:
    """What turns evidence of sets of cells into p(K | x).

    Attributes:
        chart: Local coordinates of components.
        log_prior: Log p(K), shape ``(Kmax + 1,)``; -inf for none.
        counts: Numbers T of data of each observation, ``(B,)``, less those that a
            background takes.
        noise: Prior of the noise level; None if it is known.
        share: Share of the classifier in p(K | x).
    """

    chart: LocalTransform
    log_prior: Tensor
    counts: Tensor
    noise: Marginal | None
    share: float

    def __call__(self, sets: CellSets, log_network: Tensor) -> Tensor:
        """Log p(K | x), shape ``(B, Kmax + 1)``, beginning with the classifier's."""
        rows = [self._one(sets, b, row) for b, row in enumerate(log_network)]
        return torch.stack(rows).to(log_network)

    def _one(self, sets: CellSets, observation: int, log_network: Tensor) -> Tensor:
        value = torch.full_like(log_network, -torch.inf, dtype=torch.float64)
        seen = torch.zeros_like(log_network, dtype=torch.bool)
        possible = self.log_prior.isfinite()
        wanted = log_network >= log_network.max() + math.log(_WORTH_LOOKING)
        while (new := wanted & possible & ~seen).any():
            for k in new.nonzero().flatten().tolist():
                value[k] = self.log_prior[k] + self._log_evidence(sets, observation, k)
            seen |= new
            likely = value >= value.max() + math.log(_WORTH_LOOKING)
            # What a likely K has beside it is looked at too.
            beside = torch.nn.functional.pad(likely, (1, 1))
            wanted = beside[:-2] | beside[2:]
        evidence = value.log_softmax(-1)
        if not self.share:
            return evidence
        return torch.logaddexp(
            evidence + math.log1p(-self.share),
            log_network.double() + math.log(self.share),
        )

    def _log_evidence(self, sets: CellSets, observation: int, k: int) -> Tensor:
        evidence, level, size, outside = sets.evidence(observation, k)
        if self.noise is not None:
            evidence = evidence + self._log_noise(level, size, self.counts[observation])
        total = evidence.logsumexp(-1) - torch.log1p(-outside)
        constant = k * self.chart.log_constant
        axis = self.chart.axis
        apart = log_separation_constant(
            torch.tensor(k), axis.separation, float(axis.num_cells)
        )
        return total + constant + math.lgamma(k + 1) - float(apart)

    def _log_noise(self, level: Tensor, size: Tensor, count: Tensor) -> Tensor:
        """What the noise level's integral adds to the evidence of sets ``(S,)``."""
        assert self.noise is not None
        half = 0.5 * (count.double() - size - 1).clamp(min=1.0)
        value = torch.lgamma(half) - half * (0.5 * count.double()).log() + level
        # The level's logarithm is nearly normal.
        centre = level + 0.5 * (0.5 * count.double() / half).log()
        width = (4 * half).rsqrt()
        low, high = self.noise.bounds
        ends = [
            torch.special.ndtr((math.log(end) - centre) / width)
            if 0 < end < math.inf
            else torch.full_like(centre, float(end > 0))
            for end in (low, high)
        ]
        inside = (ends[1] - ends[0]).clamp(min=1e-300).log()
        least = self.noise.quantile(torch.tensor([1e-3, 1 - 1e-3], dtype=torch.float64))
        return (
            value
            + inside
            + self.noise.log_density(
                centre.exp().clamp(float(least[0]), float(least[1]))
            )
        )
