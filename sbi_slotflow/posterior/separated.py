r"""Slots under a prior with a least separation.

Independent slots do not know of each other, so their sets are truncated to those that
keep the separation: K is drawn first and the components given K are redrawn until they
keep it, which leaves q(K | x) as it is, and densities are divided by the probability
a_K(x) that a draw is kept:

.. math::
    q(\Theta, s | x, K) = q_{slots}(\Theta, s | x, K)\,
        1[\Theta \text{ is separated}] / a_K(x)

Where a_K(x) is below :data:`LEAST_ACCEPTANCE` two slots claim one component: the
network deems K impossible and has learnt nothing of it. There the prior given K stands
in for the slots.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..nn.encoders import Encoding
from ..nn.estimator import SlotDensityEstimator
from ..seeding import generator_for
from ..sets.prior import VariableKPrior

__all__ = ["LEAST_ACCEPTANCE", "SeparatedSlots"]

LEAST_ACCEPTANCE = 1e-3
"""Acceptance below which the prior given K replaces the slots."""

# Rounds of redrawing before acceptances are looked at.
_FIRST_ROUNDS = 5
# Candidates drawn at once while few rows are left.
_MIN_CANDIDATES = 1_024


class SeparatedSlots:
    """Draws and acceptances of slots under a least separation.

    Args:
        estimator: The estimator.
        prior: Its prior, which knows the separation.
        max_rows: Most rows drawn at once.
    """

    def __init__(
        self, estimator: SlotDensityEstimator, prior: VariableKPrior, max_rows: int
    ) -> None:
        self.estimator, self.prior, self.max_rows = estimator, prior, max_rows

    @property
    def may_collide(self) -> bool:
        """Whether slots can miss a separation that the prior asks for."""
        asked = self.prior.min_separation is not None
        return asked and not self.estimator.keeps_separation

    def draw(
        self,
        num: int,
        encoding: Encoding,
        k: int | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draw rows ``(num, B, E)`` that keep the separation.

        Args:
            num: Draws for each observation.
            encoding: Embeddings of B observations.
            k: Cardinality of all draws; drawn from q(K | x) if None.
            generator: Source of randomness.
        """
        estimator = self.estimator
        batch, device = len(encoding.context), encoding.context.device
        if k is None:
            counts = estimator.draw_cardinality(encoding, num, generator).reshape(-1)
        else:
            counts = torch.full((num * batch,), k, device=device)
        owner = torch.arange(batch, device=device).repeat(num)
        rows = estimator.draw(encoding, owner, counts, generator)
        left = (~self.prior.separated(rows)).nonzero().squeeze(-1)
        rounds = 1
        while len(left):
            if rounds == _FIRST_ROUNDS:
                hopeless = self._hopeless(encoding, owner, counts, left)
                rows[hopeless] = self._draw_prior(counts[hopeless], generator)
                left = left[~torch.isin(left, hopeless)]
                if not len(left):
                    break
            left = self._redraw(rows, left, encoding, owner, counts, generator)
            rounds += 1
        return rows.reshape(num, batch, self.prior.layout.size)

    def log_acceptance(
        self,
        encoding: Encoding,
        cardinalities: Sequence[int] | None = None,
        num_draws: int = 10_000,
    ) -> Tensor:
        """Estimate log a_K(x).

        Args:
            encoding: Embeddings of B observations.
            cardinalities: Cardinalities to do it for; all if None.
            num_draws: Draws for each K, from a fixed seed; the relative error of a_K is
                about ``sqrt((1 / a_K - 1) / num_draws)``.

        Returns:
            Shape ``(B, Kmax + 1)``; zero for other cardinalities, for K < 2 and where
            no separation is asked for.
        """
        prior, batch = self.prior, len(encoding.context)
        columns = encoding.context.new_zeros(batch, prior.max_cardinality + 1)
        if not self.may_collide:
            return columns
        for k in cardinalities or range(prior.max_cardinality + 1):
            if k >= 2 and prior.cardinality_probs[k] > 0:
                columns[:, k] = self._log_acceptance(encoding, k, num_draws)
        return columns

    def _log_acceptance(self, encoding: Encoding, k: int, num_draws: int) -> Tensor:
        batch, device = len(encoding.context), encoding.context.device
        generator = generator_for(0, k, device=device)
        kept = torch.zeros(batch, device=device)
        step = max(1, self.max_rows // batch)
        for start in range(0, num_draws, step):
            num = min(step, num_draws - start)
            owner = torch.arange(batch, device=device).repeat(num)
            counts = torch.full_like(owner, k)
            rows = self.estimator.draw(encoding, owner, counts, generator)
            kept += self.prior.separated(rows).reshape(num, -1).sum(0)
        # Half a draw keeps the logarithm finite where none was kept.
        return ((kept + 0.5) / (num_draws + 0.5)).log()

    def _redraw(
        self,
        rows: Tensor,
        left: Tensor,
        encoding: Encoding,
        owner: Tensor,
        counts: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Redraw some rows in place; return those that still fail."""
        # Several candidates for each row, of which the first that is kept counts.
        num = max(1, _MIN_CANDIDATES // len(left))
        tried = left.repeat_interleave(num)
        new = self.estimator.draw(encoding, owner[tried], counts[tried], generator)
        kept = self.prior.separated(new).reshape(-1, num)
        first = kept.int().argmax(-1)
        chosen = new.reshape(len(left), num, -1)[torch.arange(len(left)), first]
        found = kept.any(-1)
        rows[left[found]] = chosen[found]
        return left[~found]

    def _hopeless(
        self, encoding: Encoding, owner: Tensor, counts: Tensor, left: Tensor
    ) -> Tensor:
        """Rows whose (x, K) is among those of ``left`` and accepts too little."""
        hopeless = torch.zeros(
            len(encoding.context),
            self.prior.max_cardinality + 1,
            dtype=torch.bool,
            device=counts.device,
        )
        for k in cast(list[int], counts[left].unique().tolist()):
            observations = owner[left[counts[left] == k]].unique()
            accepted = self._log_acceptance(encoding.rows(observations), k, 10_000)
            hopeless[observations, k] = accepted.exp() < LEAST_ACCEPTANCE
        return hopeless[owner, counts].nonzero().squeeze(-1)

    def _draw_prior(self, counts: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw rows of given cardinalities from the prior."""
        rows = counts.new_empty(len(counts), self.prior.layout.size).float()
        for k in cast(list[int], counts.unique().tolist()):
            weights = torch.zeros(self.prior.max_cardinality + 1)
            weights[k] = 1.0
            given_k = self.prior.with_cardinality(weights)
            chosen = counts == k
            rows[chosen] = given_k.sample((int(chosen.sum()),), generator)
        return rows
