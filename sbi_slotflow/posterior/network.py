r"""The trans-dimensional posterior q(K, Theta, s | x), sbi's ``DirectPosterior``.

Slots draw inside the prior's support by construction. Only a least separation is not
built in, see :mod:`sbi_slotflow.posterior.separated`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sbi.inference.posteriors import DirectPosterior
from torch import Tensor
from torch.distributions import Categorical

from ..nn.charts import Chart
from ..nn.estimator import SlotDensityEstimator
from ..seeding import draw_seed, generator_for
from ..sets.prior import VariableKPrior
from .separated import SeparatedSets

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

    from .refined import RefinedPosterior

__all__ = ["SlotPosterior"]


class SignalModel(Protocol):
    """What :meth:`SlotPosterior.reconstruct` needs of a simulator."""

    def signal(self, theta: Tensor) -> Tensor:
        """Return the noise-free signals of theta rows."""
        ...


class ObservationWarning(Protocol):
    """What :meth:`SlotPosterior.set_training_reference` takes."""

    def warn(self, x: Tensor) -> None:
        """Warn if an observation is unlike the training data."""
        ...


class SlotPosterior(DirectPosterior):
    """Posterior over the cardinality and the components.

    Args:
        posterior_estimator: A trained estimator.
        prior: Prior over the same theta rows.
        simulator: Simulator with a method ``signal``, for :meth:`reconstruct`.
        max_sampling_batch_size: Most rows (draws times observations) drawn at once.
        device: Device of the estimator, which stays where it is if None.

    Attributes:
        model_card: How the estimator was trained, if that is known.

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
        posterior_estimator.eval()
        super().__init__(
            posterior_estimator,
            prior,
            max_sampling_batch_size=max_sampling_batch_size,
            device=device,
            **kwargs,
        )
        self.simulator = simulator
        self.training_reference: ObservationWarning | None = None
        self.model_card: Mapping[str, Any] | None = None
        self._purpose = "It draws sets of components of unknown size."

    def cardinality(self, x: Tensor | None = None) -> Categorical:
        """Return q(K | x).

        Args:
            x: One observation ``(T,)`` or ``(1, T)``, or a batch ``(B, T)``; the
                default x if None.

        Returns:
            A categorical over 0..Kmax, with batch shape ``(B,)`` for a batch of more
            than one.
        """
        batch = self._batch(x)
        with torch.no_grad():
            log_k = self.posterior_estimator.log_prob_cardinality(batch)
        return Categorical(logits=log_k.squeeze(0) if len(batch) == 1 else log_k)

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

    def given(self, x: Tensor) -> SeparatedSets:
        """Return the distribution over sets given observations ``(B, T)``."""
        return SeparatedSets(
            self.posterior_estimator.eval().given(self._batch(x)),
            self.prior,
            self.max_sampling_batch_size,
        )

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample_shape: Sequence[int] = torch.Size(),
        x: Tensor | None = None,
        k: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draw from the posterior of one observation.

        Args:
            sample_shape: Shape of the draws.
            x: Observation ``(T,)`` or ``(1, T)``; the default x if None.
            k: Cardinality to condition on.
            generator: Source of randomness; torch's global generator if None.
            kwargs: sbi's options of rejection sampling and progress bars, which have
                nothing to do here.

        Returns:
            Theta rows in canonical order, shape ``(*sample_shape, E)``.

        Raises:
            ValueError: If x is a batch or malformed, or k out of range.
        """
        batch = self._one(x, "sample", "; use .sample_batched()")
        if self.training_reference is not None:
            self.training_reference.warn(batch)
        return self.sample_batched(sample_shape, batch, k, generator)[..., 0, :]

    @torch.no_grad()
    def sample_batched(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample_shape: Sequence[int],
        x: Tensor,
        k: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draw from the posteriors of B observations.

        Args:
            sample_shape: Shape of the draws for each observation.
            x: Observations, shape ``(B, T)``.
            k: Cardinality to condition on.
            generator: Source of randomness; torch's global generator if None.
            kwargs: sbi's options of rejection sampling and progress bars, which have
                nothing to do here.

        Returns:
            Theta rows in canonical order, shape ``(*sample_shape, B, E)``.

        Raises:
            ValueError: If x is malformed or k out of range.
        """
        batch = self._batch(x)
        self._check_k(k)
        return self.given(batch).sample(sample_shape, k, generator)

    def log_prob(
        self,
        theta: Tensor,
        x: Tensor | None = None,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        leakage_correction_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """Evaluate the log density of sets given one observation.

        Args:
            theta: Rows of shape ``(S, E)`` or ``(E,)``, components in any order.
            x: Observation; the default x if None.
            norm_posterior: Whether to divide by the probability that a draw keeps the
                least separation (a Monte Carlo estimate, see :meth:`log_acceptance`;
                exactly 1 without a separation).
            track_gradients: Whether the result can be differentiated.
            leakage_correction_params: Ignored; nothing leaks.

        Returns:
            Log densities ``(S,)``, -inf outside the prior's support.
        """
        batch = self._one(x, "log_prob", "; use .log_prob_batched()")
        rows = torch.atleast_2d(torch.as_tensor(theta)).unsqueeze(-2)
        values = self.log_prob_batched(rows, batch, norm_posterior, track_gradients)
        return values.squeeze(-1)

    def log_prob_batched(
        self,
        theta: Tensor,
        x: Tensor,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        leakage_correction_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """Evaluate log densities ``(S, B)`` of rows ``(S, B, E)`` or ``(B, E)``.

        See :meth:`log_prob`.
        """
        batch = self._batch(x)
        theta = torch.as_tensor(theta).to(self._device)
        if theta.ndim == 2:
            theta = theta.unsqueeze(0)
        self.prior.layout.validate(theta)
        with torch.set_grad_enabled(track_gradients):
            return self.given(batch).log_prob(theta, norm_posterior)

    @torch.no_grad()
    def log_acceptance(
        self,
        x: Tensor | None = None,
        cardinalities: Sequence[int] | None = None,
        num_draws: int = 10_000,
    ) -> Tensor:
        """Estimate log a_K(x): how likely components given K keep the separation.

        Args:
            x: Observations ``(B, T)``; the default x if None.
            cardinalities: Cardinalities to do it for; all if None.
            num_draws: Draws for each K, from a fixed seed; the relative error of a_K is
                about ``sqrt((1 / a_K - 1) / num_draws)``.

        Returns:
            Shape ``(B, Kmax + 1)``; zero for other cardinalities, for K < 2 and where
            no separation is asked for.
        """
        batch = self._batch(x)
        return self.given(batch).log_acceptance(cardinalities, num_draws)

    @torch.no_grad()
    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor | None = None,
        num_init_samples: int = 1_000,
        **kwargs: Any,
    ) -> Tensor:
        """Return the most probable K, then the densest of the draws given it.

        Densities of sets of different size have different units, so the most probable
        K is chosen first.

        Args:
            x: Observation; the default x if None.
            num_init_samples: Number of draws, from a fixed seed.
            kwargs: sbi's options of gradient ascent, which have nothing to do here.

        Returns:
            One theta row, shape ``(1, E)``.
        """
        batch = self._batch(x)
        k = int(self.cardinality(batch).probs.argmax())
        draws = self.sample(
            (num_init_samples,),
            batch,
            k=k,
            generator=generator_for(0, device=batch.device),
        )
        values = self.log_prob(draws, batch, norm_posterior=False)
        return draws[values.argmax()].unsqueeze(0)

    def refine(
        self,
        log_likelihood: Callable[[Tensor, Tensor], Tensor],
        x: Tensor | None = None,
        num_samples: int = 10_000,
        **options: Any,
    ) -> "RefinedPosterior | list[RefinedPosterior]":
        """Turn this posterior into the exact one; see :func:`sbi_slotflow.refine`.

        Args:
            log_likelihood: Maps rows ``(..., E)`` and observations ``(..., T)`` that
                broadcast to log p(x | theta).
            x: One observation or a batch ``(B, T)``; the default x if None.
            num_samples: Draws for each observation.
            options: ``method``, ``defensive``, ``generator``.

        Returns:
            The refined posterior, or a list of them for a batch.
        """
        from . import refine

        return refine(self, log_likelihood, self._batch(x), num_samples, **options)

    def reconstruct(
        self, samples: Tensor, simulator: SignalModel | None = None
    ) -> Tensor:
        """Return the noise-free signals ``(..., T)`` of draws ``(..., E)``.

        Args:
            samples: Theta rows.
            simulator: Simulator with a method ``signal``; the posterior's own if None.

        Raises:
            ValueError: If there is no simulator.
        """
        simulator = simulator or self.simulator
        if simulator is None:
            raise ValueError(
                "reconstruct needs a simulator with a method signal(theta): pass "
                "simulator=..., or build the posterior from slot_nn(problem)."
            )
        return simulator.signal(samples)

    def to_datatree(
        self,
        num_samples: int = 4_000,
        x: Tensor | None = None,
        generator: torch.Generator | None = None,
        samples: Tensor | None = None,
        *,
        true_theta: Tensor | None = None,
        log_prob: bool = True,
        num_predictive: int = 100,
        num_prior: int = 1_000,
        attrs: Mapping[str, Any] | None = None,
    ) -> "DataTree":
        """Return draws as an ArviZ tree; see :func:`~sbi_slotflow.to_datatree`.

        Args:
            num_samples: Number of draws.
            x: One observation; the default x if None.
            generator: Source of randomness; a new one, whose seed is kept in the
                attributes, if None.
            samples: Draws ``(S, E)`` to use instead of new ones.
            true_theta: A true theta row, if known.
            log_prob: Whether to evaluate the draws' log density. The network of the
                paper has none, and its trees have none either.
            num_predictive: Draws in ``posterior_predictive``, if the posterior has a
                simulator; 0 for none.
            num_prior: Draws of the prior; 0 for none.
            attrs: Further attributes of the tree.

        Raises:
            ValueError: If x is a batch, or samples do not fit the layout.
        """
        from .datatree import to_datatree

        generator = generator or generator_for(draw_seed(None), device=self._device)
        batch = self._one(x, "to_datatree")
        if samples is None:
            samples = self.sample((num_samples,), batch, generator=generator)
        values = None
        if log_prob and self.posterior_estimator.chart.is_density:
            values = self.log_prob(samples, batch).unsqueeze(0)
        if generator.device.type != "cpu":
            generator_on_cpu = generator_for(draw_seed(generator))
        else:
            generator_on_cpu = generator
        prior = None
        if num_prior:
            prior = self.prior.sample((num_prior,), generator=generator_on_cpu)
        return to_datatree(
            samples,
            self.prior.layout,
            x=batch[0],
            true_theta=true_theta,
            log_prob=values,
            simulator=self.simulator,
            num_predictive=num_predictive,
            prior_samples=prior,
            generator=generator_on_cpu,
            model_card=self.model_card,
            attrs={"seed": str(generator.initial_seed()), **(attrs or {})},
        )

    def catalogue(
        self,
        x: Tensor | None = None,
        *,
        num_samples: int = 4_000,
        generator: torch.Generator | None = None,
        samples: Tensor | None = None,
        ci_prob: float = 0.9,
        min_probability: float = 0.1,
        true_theta: Tensor | None = None,
    ) -> "Dataset":
        """Turn draws into a list of sources; see :func:`~sbi_slotflow.build_catalogue`.

        Args:
            x: One observation; the default x if None.
            num_samples: Number of draws.
            generator: Source of randomness; torch's global generator if None.
            samples: Draws ``(S, E)`` to use instead of new ones.
            ci_prob: Probability inside the credible intervals.
            min_probability: Sources that are less probable are not listed.
            true_theta: A true theta row, if known.

        Returns:
            A dataset with a row a source; ``to_dataframe()`` makes a table of it.

        Raises:
            ValueError: If x is a batch, or an argument is malformed or out of range.
        """
        from ..catalogue import build_catalogue

        if samples is None:
            batch = self._one(x, "catalogue")
            if num_samples < 1:
                raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
            samples = self.sample((num_samples,), batch, generator=generator)
        return build_catalogue(
            samples,
            self.prior.layout,
            ci_prob=ci_prob,
            min_probability=min_probability,
            true_theta=true_theta,
        )

    @property
    def chart(self) -> Chart:
        """The components' chart."""
        return self.posterior_estimator.chart

    def _batch(self, x: Tensor | None) -> Tensor:
        """Return observations as a checked batch ``(B, T)`` on the device."""
        x = self._x_else_default_x(None) if x is None else torch.as_tensor(x)
        if x.ndim == 1:
            x = x.unsqueeze(0)
        x = x.to(self._device)
        if x.dtype == torch.float64:  # numpy's default
            x = x.float()
        self.posterior_estimator.check_condition(x)
        return x

    def _one(self, x: Tensor | None, method: str, advice: str = "") -> Tensor:
        """Return one observation ``(1, T)``."""
        batch = self._batch(x)
        if len(batch) != 1:
            raise ValueError(
                f".{method}() takes one observation, got a batch of {len(batch)}"
                f"{advice}."
            )
        return batch

    def _check_k(self, k: int | None) -> None:
        largest = self.prior.max_cardinality
        if k is not None and not (isinstance(k, int) and 0 <= k <= largest):
            raise ValueError(f"k must be an integer in 0..{largest}, got {k!r}.")
