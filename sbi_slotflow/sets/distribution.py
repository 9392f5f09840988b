r"""A distribution over sets of components, given data: what every posterior returns.

.. math::
    q(K, \Theta, s | x) = q(K | x)\, q(s, \{\theta_1..\theta_K\} | x, K)

It is built for B observations and does not change afterwards: whatever is remembered of
them (encodings, modes, evidences) belongs to the object, so that several threads may
use it, or several objects, at once.

See Also:
    :class:`~sbi_slotflow.posterior.base.Posterior`, which makes one for each x.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical

from .layout import ThetaLayout

__all__ = ["SetDistribution"]


class SetDistribution(ABC):
    """Distribution over theta rows given B observations.

    Attributes:
        layout: Layout of theta.
        num_observations: Number B of observations.
    """

    layout: ThetaLayout
    num_observations: int

    @abstractmethod
    def cardinality(self) -> Categorical:
        """Return q(K | x) over 0..Kmax, batch shape ``(B,)``."""

    @abstractmethod
    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw theta rows in canonical order.

        Args:
            sample_shape: Shape of the draws for each observation.
            k: Cardinality to condition on; drawn from q(K | x) if None.
            generator: Source of randomness; torch's global generator if None.

        Returns:
            Rows of shape ``(*sample_shape, B, E)``.
        """

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate the log density of sets.

        Args:
            theta: Rows of shape ``(S, B, E)``, components in any order.

        Returns:
            Log densities of shape ``(S, B)``, -inf outside the prior's support.
        """
