"""This package's networks, the paper's among them, behind the rivals' interface."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sbi_slotflow import SlotNPE, SlotPosterior, load_pretrained, slot_nn
from sbi_slotflow.seeding import generator_for

from .base import Answer, Rival, Training

__all__ = ["Default", "Paper", "Shipped"]


class _Slots(Rival):
    posterior: SlotPosterior

    @torch.no_grad()
    def probs(self, x: Tensor) -> Tensor:
        """p(K | x)."""
        logits = self.posterior.posterior_estimator.log_prob_cardinality(x)
        return logits.softmax(-1).double()

    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Draw from the posterior."""
        rows = self.posterior.sample((num,), x, generator=generator_for(seed))
        return Answer(self.probs(x.unsqueeze(0))[0], rows)

    @torch.no_grad()
    def log_prob_given_k(self, theta: Tensor, x: Tensor) -> Tensor | None:
        """Log densities given K."""
        estimator = self.posterior.posterior_estimator
        if not estimator.chart.is_density:
            return None
        values = self.posterior.log_prob_batched(theta.unsqueeze(0), x)[0]
        log_k = estimator.log_prob_cardinality(x).log_softmax(-1)
        k = self.problem.layout.cardinality(theta)
        return (values - log_k.gather(-1, k.unsqueeze(-1)).squeeze(-1)).double()

    @property
    def network(self) -> nn.Module:
        """The estimator."""
        return self.posterior.posterior_estimator


class Default(_Slots):
    """Slots in cells with three Gauss-Newton steps, on the rivals' budget."""

    trains: ClassVar[bool] = True

    def _learn(self, training: Training) -> None:
        build = slot_nn(self.problem, refine_slots=3)
        inference = SlotNPE(self.problem.prior, build, show_progress_bars=False)
        inference.append_simulations(training.theta, training.x).train(
            max_num_epochs=training.epochs, stop_after_epochs=training.epochs
        )
        self.posterior = inference.build_posterior()


class Paper(_Slots):
    """The paper's network of 31 million parameters, with its recipe.

    It has no density, which sbi's loop asks of every network: it is trained online, on
    as many signals as the others see, all of them new.
    """

    trains: ClassVar[bool] = True

    def _learn(self, training: Training) -> None:
        build = slot_nn.paper(self.problem)
        inference = SlotNPE(self.problem.prior, build, show_progress_bars=False)
        inference.train_online(
            self.problem.simulator,
            num_simulations=len(training.theta) * training.epochs,
            recipe="paper",
            num_validation=128,
            seed=training.seed,
        )
        self.posterior = inference.build_posterior()


class Shipped(_Slots):
    """The weights that come with the package, trained longer than any rival here."""

    def __init__(self, weights: str) -> None:
        self.posterior = load_pretrained(weights)
        self.posterior.set_training_reference(None)
