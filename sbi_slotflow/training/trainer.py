"""The trainer: sbi's ``NPE`` with online training and a slot posterior."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Self

from sbi.inference import NPE
from sbi.neural_nets.estimators.base import (
    ConditionalDensityEstimator,
    ConditionalEstimatorBuilder,
)
from sbi.sbi_types import Tracker
from sbi.utils import RestrictedPrior
from torch import Tensor
from torch.distributions import Distribution

from ..nn.builder import slot_nn
from ..nn.estimator import SlotDensityEstimator
from ..posterior.base import check_keywords
from ..posterior.network import SlotPosterior
from ..posterior.truncated import TruncatedPrior
from ..sets.checks import Numbers, as_floats, simulate
from ..sets.prior import VariableKPrior
from .online import OnlineSettings, OnlineTraining, RecipeName

__all__ = ["SlotNPE"]


_NO_SLOTS = (
    "density_estimator must build a SlotDensityEstimator, as slot_nn(problem) does, "
    "got {}: a density of rows of fixed length cannot learn sets of varying size."
)
_NO_CORRECTION = (
    "proposal must be the prior, or the prior truncated to where a posterior has its "
    "mass, got {}. Losses that correct for other proposals (the atoms of NPE-C, the "
    "weights of NPE-B, the mixtures of NPE-A) are not for sets of components: draw "
    "theta from posterior.truncated_prior(x), pass that as proposal, and "
    "train(force_first_round_loss=True)."
)


class SlotNPE(NPE):
    """Neural posterior estimation with slots.

    sbi's ``append_simulations(theta, x).train()`` works unchanged; of its sequential
    methods the truncated one does (:meth:`append_simulations`).
    :meth:`train_online` trains on fresh simulations instead, and
    :meth:`build_posterior` returns a :class:`~sbi_slotflow.SlotPosterior`.

    Args:
        prior: Prior over theta rows.
        density_estimator: A builder; ``slot_nn(prior)`` if None. A ``slot_nn`` without
            a problem takes this prior.
        device: Device of the training.
        logging_level, tracker, show_progress_bars: As in sbi.

    Attributes:
        history: Entries of the last :meth:`train_online`, one a validation.

    Raises:
        TypeError: If the prior is not a :class:`~sbi_slotflow.VariableKPrior`, or the
            builder makes, or names, an estimator without slots.
    """

    def __init__(
        self,
        prior: VariableKPrior,
        density_estimator: ConditionalEstimatorBuilder[ConditionalDensityEstimator]
        | None = None,
        device: str = "cpu",
        logging_level: int | str = "WARNING",
        tracker: Tracker | None = None,
        show_progress_bars: bool = True,
    ) -> None:
        if not isinstance(prior, VariableKPrior):
            raise TypeError(
                f"prior must be a VariableKPrior, got {type(prior).__name__}; build it "
                "from the distribution of one component."
            )
        builder = slot_nn() if density_estimator is None else density_estimator
        if not callable(builder):
            raise TypeError(_NO_SLOTS.format(repr(builder)))
        if isinstance(builder, slot_nn) and builder.problem is None:
            builder = replace(builder, problem=prior)
        self._builder = builder
        super().__init__(
            prior=prior,
            density_estimator=self._build,  # pyright: ignore[reportArgumentType]
            device=device,
            logging_level=logging_level,
            tracker=tracker,
            show_progress_bars=show_progress_bars,
        )
        self.history: list[dict[str, float]] = []

    def append_simulations(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        theta: Numbers,
        x: Numbers,
        proposal: Distribution | None = None,
        **kwargs: Any,
    ) -> Self:
        """Keep simulations to train on.

        Args:
            theta: Theta rows, shape ``(B, E)``, of any real numbers.
            x: Data, shape ``(B, *event)``, of any real numbers.
            proposal: What the rows were drawn from: the prior (or None), or what
                :meth:`~.refinable.Refinable.truncated_prior` of a posterior returns, or
                another ``RestrictedPrior`` of sbi over this prior.
            kwargs: Further arguments of sbi's method.

        Returns:
            The trainer.

        Raises:
            NotImplementedError: If the proposal is a posterior, or anything else.
            TypeError, ValueError: If theta or x is malformed.
        """
        known = proposal is None or proposal is self._prior
        if not (known or isinstance(proposal, RestrictedPrior)):
            raise NotImplementedError(
                _NO_CORRECTION.format(type(proposal).__name__)
                if not isinstance(proposal, VariableKPrior)
                else _NO_CORRECTION.format("another VariableKPrior")
            )
        if isinstance(proposal, TruncatedPrior) and proposal.prior is not self._prior:
            raise NotImplementedError(
                _NO_CORRECTION.format("a truncated prior of another trainer's prior")
            )
        theta, x = (
            as_floats(value, name).float()
            for value, name in ((theta, "theta"), (x, "x"))
        )
        if theta.ndim != 2 or x.ndim < 2 or len(theta) != len(x):
            raise ValueError(
                "theta and x must have shapes (B, E) and (B, *event), got "
                f"{tuple(theta.shape)} and {tuple(x.shape)}."
            )
        return super().append_simulations(
            theta,
            x,
            proposal,  # pyright: ignore[reportArgumentType]
            **kwargs,
        )

    def train_online(
        self,
        simulator: Callable[[Tensor], Numbers],
        *,
        num_simulations: int,
        batch_size: int = 128,
        recipe: RecipeName = "adamw",
        learning_rate: float | None = None,
        ema_decay: float | None = 0.999,
        clip_max_norm: float | None = 5.0,
        seed: int = 0,
        num_validation: int = 2_000,
        validate_every: int = 500,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = True,
    ) -> SlotDensityEstimator:
        """Train on fresh simulations, a new batch every step.

        Args:
            simulator: Maps theta ``(B, E)`` to x ``(B, *event)``, a tensor or an array
                of any real numbers. Its randomness must come from torch's global
                generator, which is seeded for every step.
            num_simulations: Simulations to train on, in whole batches.
            batch_size: Simulations a step.
            recipe: ``"adamw"`` (warm-up and cosine) or ``"paper"`` (Adam, halved on
                plateaus of the validation loss).
            learning_rate: Peak learning rate; the recipe's own if None.
            ema_decay: Decay of the running average of the weights; None for none.
            clip_max_norm: Bound on the gradient's norm; None for none.
            seed: Seed of everything random.
            num_validation: Simulations of the fixed validation bank.
            validate_every: Steps between validations.
            checkpoint: File to keep the run's state in. If it exists and ``resume`` is
                True, the run goes on from there and ends as if never interrupted; a
                finished run is returned at once.
            checkpoint_every: Steps between checkpoints; every validation if None.
            resume: Whether to use an existing checkpoint.

        Returns:
            The estimator with averaged weights.

        Raises:
            ValueError: If a setting is out of range, or the checkpoint is corrupt or of
                another run.
            FloatingPointError: If a loss is NaN or infinite; the last checkpoint
                stands.
        """
        training = OnlineTraining(
            self._build,
            self._prior,  # pyright: ignore[reportArgumentType]
            partial(simulate, simulator),
            OnlineSettings(
                num_simulations=num_simulations,
                batch_size=batch_size,
                recipe=recipe,
                learning_rate=learning_rate,
                ema_decay=ema_decay,
                clip_max_norm=clip_max_norm,
                seed=seed,
                num_validation=num_validation,
                validate_every=validate_every,
            ),
            device=self._device,
            checkpoint=checkpoint,
            resume=resume,
        )
        estimator = training.run(
            checkpoint_every=checkpoint_every,
            show_progress_bar=self._show_progress_bars,
            on_validation=self._log,
        )
        self.history = training.history
        self._neural_net = estimator
        return estimator

    def build_posterior(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        density_estimator: SlotDensityEstimator | None = None,
        prior: Distribution | None = None,
        sample_with: str = "direct",
        **kwargs: Any,
    ) -> SlotPosterior:
        """Build the posterior.

        Args:
            density_estimator: A trained estimator; the last one trained if None.
            prior: Another prior over the same rows; the trainer's if None.
            sample_with: Only ``"direct"``.
            kwargs: Options of :class:`~sbi_slotflow.SlotPosterior`.

        Returns:
            A posterior with a copy of the estimator.

        Raises:
            NotImplementedError: If ``sample_with`` is not ``"direct"``.
            RuntimeError: If nothing was trained yet.
        """
        check_keywords("build_posterior", {"sample_with": sample_with})
        estimator = self._neural_net if density_estimator is None else density_estimator
        if estimator is None:
            raise RuntimeError("no estimator: call train() or train_online() first.")
        problem = getattr(self._builder, "problem", None)
        posterior = SlotPosterior(
            deepcopy(estimator),  # pyright: ignore[reportArgumentType]
            self._prior if prior is None else prior,  # pyright: ignore[reportArgumentType]
            device=self._device,
            **{"simulator": getattr(problem, "simulator", None), **kwargs},
        )
        self._posterior = posterior
        return posterior

    def _build(self, batch_theta: Tensor, batch_x: Tensor) -> SlotDensityEstimator:
        """Build the estimator before it is trained, and refuse one without slots."""
        estimator = self._builder(batch_theta, batch_x)
        if not isinstance(estimator, SlotDensityEstimator):
            raise TypeError(_NO_SLOTS.format(f"one of {type(estimator).__name__}"))
        return estimator

    def _log(self, entry: dict[str, float]) -> None:
        metrics = {name: value for name, value in entry.items() if name != "step"}
        self._tracker.log_metrics(metrics, step=int(entry["step"]))
