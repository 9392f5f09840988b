r"""The trans-dimensional posterior q(K, Theta, s | x), sbi's ``DirectPosterior``.

Slots draw inside the prior's support by construction. Only a least separation is not
built in, see :mod:`sbi_slotflow.posterior.separated`.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from sbi.inference.posteriors import DirectPosterior
from torch import Tensor

from ..nn.charts import Chart
from ..nn.estimator import SlotDensityEstimator
from ..sets.distribution import SetDistribution
from ..sets.prior import VariableKPrior
from .datatree import SignalModel
from .refine import Refinable
from .separated import SeparatedSets

__all__ = ["SlotPosterior"]


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
        self.training_reference: ObservationWarning | None = None
        self._purpose = "It draws sets of components of unknown size."

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
        sets = estimator.given(x.to(estimator.x_scale))
        return SeparatedSets(sets, self.prior, self.max_sampling_batch_size)

    def with_cardinality_prior(
        self, weights: Sequence[float] | Tensor
    ) -> "SlotPosterior":
        r"""Return the posterior under another prior of K, without retraining.

        .. math::
            q_{new}(K | x) \propto q(K | x)\, p_{new}(K) / p_{train}(K)

        Args:
            weights: Weights of K = 0..Kmax; zero excludes a cardinality.

        Raises:
            ValueError: If the weights are malformed, or give weight to a cardinality
                that training excluded.
        """
        estimator = deepcopy(self.posterior_estimator)
        estimator.set_cardinality_prior(weights)
        new = SlotPosterior(
            estimator,
            self.prior.with_cardinality(weights),
            simulator=self.simulator,
            max_sampling_batch_size=self.max_sampling_batch_size,
            device=self._device,
        )
        new.set_training_reference(self.training_reference)
        new.model_card = self.model_card
        if self.default_x is not None:
            new.set_default_x(self.default_x)
        return new

    def set_training_reference(
        self, reference: ObservationWarning | None
    ) -> "SlotPosterior":
        """Let :meth:`sample` warn, in one line, of an x unlike the training data.

        Args:
            reference: :class:`~sbi_slotflow.calibration.TrainingReference`, or None to
                switch the warning off. Without one, sampling does no more work.

        Returns:
            The posterior itself.
        """
        self.training_reference = reference
        return self

    def _log_prob(
        self, distribution: SetDistribution, theta: Tensor, norm_posterior: bool
    ) -> Tensor:
        assert isinstance(distribution, SeparatedSets)
        theta = theta.to(self.posterior_estimator.x_scale)
        return distribution.log_prob(theta, norm_posterior)

    def _given_one(
        self, x: Any, method: str, advice: str = ""
    ) -> tuple[SetDistribution, Tensor]:
        sets, batch = super()._given_one(x, method, advice)
        if self.training_reference is not None:
            self.training_reference.warn(batch)
        return sets, batch
