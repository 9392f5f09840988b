"""Optimizers with their learning-rate schedules, by name.

``"adamw"`` is AdamW with a linear warm-up and a cosine decay to zero over the run;
``"paper"`` is the paper's Adam with ``ReduceLROnPlateau`` on the validation loss.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

__all__ = ["Recipe", "RecipeName", "make_recipe"]

RecipeName = Literal["adamw", "paper"]


@dataclass
class Recipe:
    """An optimizer and its schedule."""

    optimizer: Optimizer
    schedule: LambdaLR | ReduceLROnPlateau

    def after_step(self) -> None:
        """Advance the schedule after an optimizer step."""
        if isinstance(self.schedule, LambdaLR):
            self.schedule.step()

    def after_validation(self, loss: float) -> None:
        """Tell the schedule a validation loss."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)

    def schedule_state(self) -> dict[str, Any]:
        """State of the schedule, plain JSON."""
        if isinstance(self.schedule, LambdaLR):  # the rate follows from the step
            return {"step": self.schedule.last_epoch}
        return {
            "best": self.schedule.best,
            "num_bad_epochs": self.schedule.num_bad_epochs,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
        }

    def load_schedule_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`schedule_state`."""
        schedule = self.schedule
        if isinstance(schedule, LambdaLR):
            schedule.last_epoch = step = state["step"]
            pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            rates = [base * factor(step) for base, factor in pairs]
        else:
            schedule.best, rates = state["best"], state["rates"]
            schedule.num_bad_epochs = state["num_bad_epochs"]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def make_recipe(
    name: RecipeName,
    parameters: Iterable[nn.Parameter],
    learning_rate: float | None,
    num_steps: int,
) -> Recipe:
    """Make the named recipe."""
    if name == "adamw":
        rate = 2e-3 if learning_rate is None else learning_rate
        optimizer = AdamW(parameters, lr=rate, weight_decay=1e-4)
        warm_up = max(1, min(500, num_steps // 20))

        def factor(step: int) -> float:
            decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
            return min(1.0, (step + 1) / warm_up) * decay

        return Recipe(optimizer, LambdaLR(optimizer, factor))
    if name == "paper":
        adam = Adam(parameters, lr=1e-4 if learning_rate is None else learning_rate)
        plateau = ReduceLROnPlateau(adam, factor=0.5, patience=6, min_lr=1e-6)
        return Recipe(adam, plateau)
    raise ValueError(f"recipe must be 'adamw' or 'paper', got {name!r}.")
