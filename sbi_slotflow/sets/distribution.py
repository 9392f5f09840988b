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
from torch.nn.functional import one_hot

from ..seeding import generator_for
from .classes import ClassLayout
from .layout import ThetaLayout

__all__ = ["SetDistribution", "counts_of_class"]

_NUM_COUNTED = 4_000


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

    def class_cardinality(self, of: str) -> Categorical:
        """Return q(K_c | x) of one class ``of``, batch shape ``(B,)``.

        It is estimated by 4,000 draws of a fixed seed, where draws have no weights.

        Raises:
            ValueError: If there is no such class.
        """
        counts_of_class(self.layout, torch.zeros(1, self.layout.size), of)
        device = self.cardinality().logits.device
        generator = generator_for(0, device=device)
        rows = self.sample((_NUM_COUNTED,), generator=generator)
        return Categorical(probs=counts_of_class(self.layout, rows, of).mean(0))

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate the log density of sets.

        Args:
            theta: Rows of shape ``(S, B, E)``, components in any order.

        Returns:
            Log densities of shape ``(S, B)``, -inf outside the prior's support.
        """


def counts_of_class(layout: ThetaLayout, rows: Tensor, of: str) -> Tensor:
    """One-hot numbers ``(..., K_c max + 1)`` of components of a class, float64.

    Raises:
        ValueError: If there is no such class.
    """
    if not isinstance(layout, ClassLayout):
        raise ValueError(
            f"of must be None where components have no classes, got {of!r}."
        )
    own = layout.of_class(of)
    count = own.cardinality(layout.view(rows, of))
    return one_hot(count, own.max_cardinality + 1).double()
