r"""The trans-dimensional posterior q(K, Theta, s | x), sbi's ``DirectPosterior``.

Slots draw inside the prior's support by construction, except for a least separation,
and for bounds of components that follow shared parameters; what is said of the one
holds for the other.
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

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from threading import Lock
from typing import Any, Protocol

import torch
from sbi.inference.posteriors import DirectPosterior
from sbi.utils.sbiutils import within_support
from torch import Tensor
from torch.distributions import Categorical

from ..nn.charts import Chart
from ..nn.estimator import SlotDensityEstimator
from ..nn.set_distribution import NetworkSets
from ..seeding import generator_for
from ..sets.distribution import SetDistribution
from ..sets.prior import VariableKPrior, check_independent
from .datatree import SignalModel
from .importance import entries
from .refinable import Refinable

__all__ = ["LEAST_ACCEPTANCE", "SeparatedSets", "SlotPosterior"]

LEAST_ACCEPTANCE = 1e-3
"""Acceptance below which the prior given K replaces the slots."""
# Draws from which an acceptance is estimated.
_NUM_DRAWS = 10_000
# Rounds of redrawing before acceptances are looked at.
_FIRST_ROUNDS = 5
# Candidates drawn at once while few rows are left.
_MIN_CANDIDATES = 1_024


class SeparatedSets(SetDistribution):
    """A network's distribution ``slots``, truncated to its prior's support.

    At most ``max_rows`` are drawn at once. Acceptances are estimated from a fixed seed
    when first asked for and then kept, so that no result depends on the order of calls.
    """

    def __init__(
        self, slots: NetworkSets, prior: VariableKPrior, max_rows: int
    ) -> None:
        self.slots, self.prior, self.max_rows = slots, prior, max_rows
        self.layout, self.num_observations = prior.layout, slots.num_observations
        self._accepted: dict[int, Tensor] = {}
        self._lock = Lock()

    @property
    def may_collide(self) -> bool:
        """Whether slots can miss a separation or bounds that the prior asks for."""
        if self._bounds_follow:
            return True
        if self.prior.min_separation is None:
            return False
        # Cells stand along an axis, and know nothing of what lies beyond its ends.
        return not self.slots.keeps_separation or self.prior.separated_around

    @property
    def _bounds_follow(self) -> bool:
        population = self.prior.population
        return population is not None and population.bounds_follow_shared

    def _kept(self, rows: Tensor) -> Tensor:
        return self.prior.separated(rows) & self.prior.keeps_bounds(rows)

    def cardinality(self) -> Categorical:
        """See :meth:`SetDistribution.cardinality`."""
        return self.slots.cardinality()

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows that keep the separation; see :meth:`SetDistribution.sample`."""
        shape, batch = torch.Size(sample_shape), self.num_observations
        num, step = shape.numel(), max(1, self.max_rows // batch)
        parts = [
            self._draw(min(step, num - start), k, generator)
            for start in range(0, max(num, 1), step)
        ]
        return torch.cat(parts).reshape(*shape, batch, self.layout.size)

    def log_prob(self, theta: Tensor, norm: bool = True) -> Tensor:
        """Evaluate log densities, with ``norm`` divided by the acceptance a_K(x)."""
        values = self.slots.log_prob(theta)
        if norm and self.may_collide:
            k = self.layout.cardinality(theta).expand(values.shape)
            accepted = entries(self.log_acceptance(k.unique().tolist()), k)
            values = values - accepted
            replaced = accepted < math.log(LEAST_ACCEPTANCE)
            if replaced.any():  # by q(K | x) p(Theta, s | K)
                log_k = entries(self.slots.log_cardinality, k)
                log_prior_k = self.prior.log_cardinality_probs.to(log_k)[k]
                stand_in = log_k + self.prior.log_prob(theta) - log_prior_k
                values = torch.where(replaced, stand_in, values)
        return torch.where(within_support(self.prior, theta), values, -torch.inf)

    @torch.no_grad()
    def log_acceptance(self, cardinalities: Iterable[int]) -> Tensor:
        """Estimate log a_K(x) ``(B, Kmax + 1)`` of some cardinalities.

        It is zero for others, where nothing is asked for, and for K too small to miss
        it: below 2 for a separation, below 1 for bounds. The relative error of a_K is
        about ``sqrt((1 / a_K - 1) / 10_000)``.
        """
        columns = torch.zeros_like(self.slots.log_cardinality)
        if not self.may_collide:
            return columns
        least = 1 if self._bounds_follow else 2
        for k in cardinalities:
            if k < least or not self.prior.cardinality_probs[k] > 0:
                continue
            with self._lock:
                if k not in self._accepted:
                    self._accepted[k] = self._estimated(k)
                columns[:, k] = self._accepted[k]
        return columns

    def _estimated(self, k: int) -> Tensor:
        """Log a_K of the observations, shape ``(B,)``."""
        device = self.slots.log_cardinality.device
        generator = generator_for(0, k, device=device)
        kept = torch.zeros(self.num_observations, device=device)
        step = max(1, self.max_rows // self.num_observations)
        for start in range(0, _NUM_DRAWS, step):
            num = min(step, _NUM_DRAWS - start)
            rows = self.slots.sample((num,), k, generator)
            kept += self._kept(rows).sum(0)
        # Half a draw keeps the logarithm finite where none was kept.
        return ((kept + 0.5) / (_NUM_DRAWS + 0.5)).log()

    def _draw(
        self, num: int, k: int | None, generator: torch.Generator | None
    ) -> Tensor:
        """Draw rows ``(num, B, E)`` that keep the separation."""
        rows = self.slots.sample((num,), k, generator).flatten(0, 1)
        owner, counts = self.slots.owners(num), self.layout.cardinality(rows)
        left = (~self._kept(rows)).nonzero().squeeze(-1)
        rounds = 1
        while len(left):
            if rounds == _FIRST_ROUNDS:
                # Rows whose (x, K) is among those left, and accepted too rarely.
                columns = self.log_acceptance(counts[left].unique().tolist())
                hopeless = (columns < math.log(LEAST_ACCEPTANCE))[owner, counts]
                hopeless = hopeless.nonzero().squeeze(-1)
                rows[hopeless] = self._draw_prior(counts[hopeless], generator)
                left = left[~torch.isin(left, hopeless)]
                if not len(left):
                    break
            left = self._redraw(rows, left, owner, counts, generator)
            rounds += 1
        return rows.unflatten(0, (num, self.num_observations))

    def _redraw(
        self,
        rows: Tensor,
        left: Tensor,
        owner: Tensor,
        counts: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Redraw some rows in place; return those that still fail."""
        # Several candidates for each row, of which the first that is kept counts.
        num = max(1, _MIN_CANDIDATES // len(left))
        tried = left.repeat_interleave(num)
        new = self.slots.draw(owner[tried], counts[tried], generator)
        kept = self._kept(new).reshape(-1, num)
        first = kept.int().argmax(-1)
        chosen = new.reshape(len(left), num, -1)[torch.arange(len(left)), first]
        found = kept.any(-1)
        rows[left[found]] = chosen[found]
        return left[~found]

    def _draw_prior(self, counts: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw rows of given cardinalities from the prior."""
        rows = counts.new_empty(len(counts), self.prior.layout.size).float()
        for k, weights in enumerate(torch.eye(self.prior.max_cardinality + 1)):
            chosen = counts == k
            if not chosen.any():
                continue
            given_k = self.prior.with_cardinality(weights)
            rows[chosen] = given_k.sample((int(chosen.sum()),), generator)
        return rows


class ObservationWarning(Protocol):
    """What :meth:`SlotPosterior.set_training_reference` takes."""

    def warn(self, x: Tensor) -> None:
        """Warn if an observation is unlike the training data."""
        ...


class SlotPosterior(Refinable, DirectPosterior):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Posterior over the cardinality and the components.

    Args:
        posterior_estimator: A trained estimator.
        prior: Prior over the same theta rows.
        simulator: Simulator with a method ``signal``, for :meth:`reconstruct`.
        max_sampling_batch_size: Most rows (draws times observations) drawn at once.
        device: Device of the estimator, which stays where it is if None.

    Raises:
        TypeError: If the estimator or the prior is of another kind.
        ValueError: If their layouts differ.
    """

    prior: VariableKPrior
    posterior_estimator: SlotDensityEstimator

    def __init__(
        self,
        posterior_estimator: SlotDensityEstimator,
        prior: VariableKPrior,
        simulator: SignalModel | None = None,
        max_sampling_batch_size: int = 50_000,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(posterior_estimator, SlotDensityEstimator):
            raise TypeError(
                "posterior_estimator must be a SlotDensityEstimator, got "
                f"{type(posterior_estimator).__name__}."
            )
        if not isinstance(prior, VariableKPrior):
            raise TypeError(
                f"prior must be a VariableKPrior, got {type(prior).__name__}."
            )
        if prior.layout != posterior_estimator.layout:
            raise ValueError(
                "prior and posterior_estimator must share a layout, got "
                f"{prior.layout} and {posterior_estimator.layout}."
            )
        super().__init__(
            posterior_estimator.eval(),
            prior,
            max_sampling_batch_size=max_sampling_batch_size,
            device=device,
            **kwargs,
        )
        self.simulator = simulator
        self.by_evidence = 0.0
        self.training_reference: ObservationWarning | None = None
        self._purpose = "It draws sets of components of unknown size."

    def _without_gaps(self, x: Tensor) -> Tensor:
        estimator = self.posterior_estimator
        return estimator.filled(x) if estimator.reads_records else x

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.posterior_estimator.condition_shape

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` exists; the network of the paper has none."""
        return self.chart.is_density

    @property
    def chart(self) -> Chart:
        """The components' chart."""
        return self.posterior_estimator.chart

    def given(self, x: Tensor) -> SeparatedSets:
        """Return the distribution over sets given observations ``(B, *event)``."""
        estimator = self.posterior_estimator
        if estimator.training:
            estimator.eval()
        sets = estimator.given(x.to(estimator.x_scale), self.by_evidence)
        return SeparatedSets(sets, self.prior, self.max_sampling_batch_size)

    def with_cardinality_prior(
        self, weights: Sequence[float] | Tensor
    ) -> "SlotPosterior":
        r"""Return the posterior under another prior of K, without retraining.

        .. math::
            q_{new}(K | x) \propto q(K | x)\, p_{new}(K) / p_{train}(K)

        ``weights`` are those of K = 0..Kmax; zero excludes a cardinality. ValueError if
        they are malformed, or give weight to a cardinality that training excluded.
        """
        if isinstance(weights, Mapping):
            raise TypeError(
                "weights must be those of all components together, got a mapping. "
                "Those of a class: posterior.with_prior(prior.with_cardinality({...}))."
            )
        estimator = deepcopy(self.posterior_estimator)
        estimator.set_cardinality_prior(weights)
        return self._like(estimator, self.prior.with_cardinality(weights))

    def _like(
        self, estimator: SlotDensityEstimator, prior: VariableKPrior
    ) -> "SlotPosterior":
        """A posterior that knows what this one does."""
        # A copy would share this one's state: sbi's posteriors copy nothing.
        new = SlotPosterior(
            estimator,
            prior,
            simulator=self.simulator,
            max_sampling_batch_size=self.max_sampling_batch_size,
            device=self._device,
        )
        new.set_training_reference(self.training_reference)
        new.model_card = self.model_card
        new.by_evidence = self.by_evidence
        if self.default_x is not None:
            new.set_default_x(self.default_x)
        return new

    def with_evidence(self, share: float = 0.9) -> "SlotPosterior":
        """Return the posterior whose p(K | x) is weighed by evidence.

        The classifier of K says which cardinalities are possible; for each of them the
        likeliest sets of cells are fitted, and their evidence gives p(K | x), nearly
        exact where Laplace's approximation is. No draws are needed. The first question
        about an x takes as long as drawing from all these cardinalities.

        Args:
            share: Share of the evidence in p(K | x), within [0, 1]; the rest is the
                classifier's.

        Raises:
            TypeError: If the share is no number, or the network weighs no sets of
                cells: it needs a problem with cells and a signal that can be fitted.
            ValueError: If the share is out of range.
        """
        if not isinstance(share, Real):
            raise TypeError(f"share must be a number, got {type(share).__name__}.")
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}.")
        check_independent(self.prior, "the evidence of cells")
        if not self.posterior_estimator.has_evidence:
            raise TypeError(
                "this network weighs no sets of cells: evidence needs a problem whose "
                "components have a place, a signal of torch operations, and white or "
                "whitened noise."
            )
        new = self._like(self.posterior_estimator, self.prior)
        new.by_evidence = float(share)
        return new

    def set_training_reference(
        self, reference: ObservationWarning | None
    ) -> "SlotPosterior":
        """Let :meth:`sample` warn, in one line, of an x unlike the training data.

        A :class:`~sbi_slotflow.calibration.TrainingReference` knows; None switches the
        warning off. Returns the posterior.
        """
        self.training_reference = reference
        return self

    def _log_prob(
        self, distribution: SetDistribution, theta: Tensor, norm_posterior: bool
    ) -> Tensor:
        assert isinstance(distribution, SeparatedSets)
        x_scale = self.posterior_estimator.x_scale
        return distribution.log_prob(theta.to(x_scale), norm_posterior)

    def _given_one(
        self, x: Any, method: str, advice: str = ""
    ) -> tuple[SetDistribution, Tensor]:
        sets, batch = super()._given_one(x, method, advice)
        if self.training_reference is not None:
            self.training_reference.warn(batch)
        return sets, batch
