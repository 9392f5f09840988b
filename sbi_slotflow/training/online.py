"""Training on fresh simulations, every step a new batch, and its state in one file.

All randomness of step t derives from (seed, t), so a run that was killed and resumed
from its checkpoint ends with the same weights, bit for bit, as one that was not.

The recipe ``"adamw"`` is AdamW with a linear warm-up and a cosine decay to zero over
the run; ``"paper"`` is the paper's Adam with ``ReduceLROnPlateau`` on the validation
loss.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from ..nn.estimator import SlotDensityEstimator
from ..seeding import forked_rng, generator_for
from ..sets.checks import as_count
from ..sets.matching import NonFiniteDensityError
from ..storage import check_tensors_replaceable, read_tensors, write_tensors

__all__ = [
    "OnlineSettings",
    "OnlineTraining",
    "Recipe",
    "RecipeName",
    "load_state",
    "make_recipe",
    "optimizer_tensors",
    "restore_optimizer",
]

RecipeName = Literal["adamw", "paper"]

_FORMAT = "sbi_slotflow.TrainingState"
_VERSION = 1
_INIT, _VALIDATION, _STEPS = 0, 1, 2  # streams of the seed
_TERMS = ("cardinality", "flow", "shared", "correct")
_logger = logging.getLogger(__name__)


def load_state(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a run's state, and its ``progress`` and ``settings``."""
    return read_tensors(path, _FORMAT, _VERSION)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """List an optimizer's per-parameter state by name."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` listed."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


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
        schedule = self.schedule
        if isinstance(schedule, LambdaLR):  # the rate follows from the step
            return {"step": schedule.last_epoch}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        bad = schedule.num_bad_epochs
        return {"best": schedule.best, "num_bad_epochs": bad, "rates": rates}

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


@dataclass(frozen=True)
class OnlineSettings:
    """Settings of a run, see :meth:`SlotNPE.train_online`; a resumed run repeats them.

    ``part`` says what is trained, see :meth:`SlotDensityEstimator.loss_terms`.
    """

    num_simulations: int
    batch_size: int = 128
    recipe: RecipeName = "adamw"
    learning_rate: float | None = None
    ema_decay: float | None = 0.999
    clip_max_norm: float | None = 5.0
    seed: int = 0
    num_validation: int = 2_000
    validate_every: int = 500
    part: Literal["all", "cells"] = "all"

    def __post_init__(self) -> None:
        counts = ("num_simulations", "batch_size", "num_validation", "validate_every")
        for name in (*counts, "seed"):
            as_count(getattr(self, name), name, least=int(name != "seed"))
        for name in ("learning_rate", "clip_max_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.num_simulations / self.batch_size)


class OnlineTraining:
    """One run of online training, fresh or resumed from its checkpoint.

    The estimator is built by ``build(theta, x)`` on a first batch. The simulator maps
    theta ``(B, E)`` to x ``(B, *event)``; its randomness must come from torch's global
    generator, which is seeded for every step. :attr:`history` has an entry for each
    validation: step, learning rate, and the mean of each term over the steps since the
    last one (``train_*``) and over the validation bank (``val_*``).
    """

    def __init__(
        self,
        build: Callable[[Tensor, Tensor], SlotDensityEstimator],
        prior: Distribution,
        simulator: Callable[[Tensor], Tensor],
        settings: OnlineSettings,
        *,
        device: str | torch.device = "cpu",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self._prior, self._simulator = prior, simulator
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self.history: list[dict[str, float]] = []
        self._step = 0
        self._sums = dict.fromkeys(_TERMS, 0.0)
        self._since = 0

        self._validation = self._simulate(_VALIDATION, num=settings.num_validation)
        with forked_rng(generator_for(settings.seed, _INIT)):
            self.estimator = build(*(part.cpu() for part in self._validation))
        self.estimator.to(self.device)
        self._recipe = make_recipe(
            settings.recipe,
            self.estimator.parameters(),
            settings.learning_rate,
            settings.num_steps,
        )
        self._average: AveragedModel | None = None
        if settings.ema_decay is not None:
            self._average = AveragedModel(
                self.estimator, multi_avg_fn=_warmed_average(settings.ema_decay)
            )
        if resume and self._checkpoint is not None and self._checkpoint.exists():
            self._restore(*load_state(self._checkpoint))
        elif self._checkpoint is not None:
            check_tensors_replaceable(self._checkpoint, _FORMAT)
        self.resumed_from = self._step

    @property
    def averaged(self) -> SlotDensityEstimator:
        """The estimator with averaged weights, which validation judges."""
        if self._average is None or self._step == 0:
            return self.estimator
        return self._average.module  # pyright: ignore[reportReturnType]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self._step >= self.settings.num_steps

    def run(
        self,
        *,
        checkpoint_every: int | None = None,
        show_progress_bar: bool = True,
        on_validation: Callable[[dict[str, float]], None] | None = None,
    ) -> SlotDensityEstimator:
        """Train to the end."""
        if checkpoint_every is None:
            checkpoint_every = self.settings.validate_every
        every = as_count(checkpoint_every, "checkpoint_every")
        if self.finished:
            _logger.info("training is complete in %s, nothing to do", self._checkpoint)
        bar = tqdm(
            total=self.settings.num_steps,
            initial=self._step,
            desc="Training",
            unit="step",
            disable=not show_progress_bar or self.finished,
        )
        with bar:
            while not self.finished:
                self._train_step()
                last = self._step == self.settings.num_steps
                if last or self._step % self.settings.validate_every == 0:
                    entry = self._validate()
                    bar.set_postfix(
                        loss=f"{entry['val_loss']:.3f}", K=f"{entry['val_correct']:.3f}"
                    )
                    if on_validation is not None:
                        on_validation(entry)
                if self._checkpoint is not None and (last or self._step % every == 0):
                    write_tensors(self._checkpoint, *self._state())
                bar.update()
        return self.averaged.eval()

    def _train_step(self) -> None:
        theta, x = self._simulate(_STEPS, self._step, num=self.settings.batch_size)
        self.estimator.train()
        try:
            terms = self.estimator.loss_terms(theta, x, self.settings.part)
            loss = self.estimator.weigh(terms).mean()
        except NonFiniteDensityError as error:
            raise self._divergence("NaN") from error
        if not torch.isfinite(loss):
            raise self._divergence(str(loss.item()))
        self._recipe.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.clip_max_norm is not None:
            clip_grad_norm_(self.estimator.parameters(), self.settings.clip_max_norm)
        self._recipe.optimizer.step()
        self._recipe.after_step()
        if self._average is not None:
            self._average.update_parameters(self.estimator)
        for name in _TERMS:
            self._sums[name] += terms[name].detach().mean().item()
        self._since += 1
        self._step += 1

    def _divergence(self, loss: str) -> FloatingPointError:
        return FloatingPointError(
            f"the loss became {loss} at step {self._step}; the last checkpoint is "
            "whole. A lower learning_rate usually helps."
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        estimator = self.averaged.eval()
        size, part = self.settings.batch_size, self.settings.part
        pairs = zip(*(each.split(size) for each in self._validation), strict=True)
        batches = [estimator.loss_terms(theta, x, part) for theta, x in pairs]
        terms = {name: torch.cat([b[name] for b in batches]) for name in _TERMS}
        entry = {
            "step": float(self._step),
            "learning_rate": self._recipe.optimizer.param_groups[0]["lr"],
            "val_loss": self.estimator.weigh(terms).mean().item(),
        }
        entry |= {f"val_{name}": value.mean().item() for name, value in terms.items()}
        entry |= {f"train_{name}": self._sums[name] / self._since for name in _TERMS}
        self._sums, self._since = dict.fromkeys(_TERMS, 0.0), 0
        self._recipe.after_validation(entry["val_loss"])
        self.history.append(entry)
        return entry

    def _simulate(self, *stream: int, num: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), forked_rng(generator_for(self.settings.seed, *stream)):
            theta = self._prior.sample(torch.Size((num,)))
            x = self._simulator(theta)
        return theta.to(self.device), x.to(self.device)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{k}": v for k, v in self.estimator.state_dict().items()}
        if self._average is not None:
            average = self._average.state_dict()
            tensors |= {f"average.{k}": v for k, v in average.items()}
        moments = optimizer_tensors(self._recipe.optimizer)
        tensors |= {f"optimizer.{k}": v for k, v in moments.items()}
        progress = {"step": self._step, "schedule": self._recipe.schedule_state()}
        progress |= {"sums": self._sums, "since": self._since, "history": self.history}
        meta = {"format": _FORMAT, "version": _VERSION, "progress": progress}
        return tensors, {**meta, "settings": self._fingerprint()}

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        new, old, progress = self._fingerprint(), meta["settings"], meta["progress"]
        if old != new:
            names = sorted(name for name in new | old if new.get(name) != old.get(name))
            # Other settings, a seed for one, make other data.
            told = [name for name in names if name != _DATA] or names
            pairs = "; ".join(
                f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
                for name in told
            )
            raise ValueError(
                f"checkpoint {self._checkpoint} belongs to another run ({pairs}). Give "
                "another path, pass resume=False to start over, or repeat its settings."
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        self.estimator.load_state_dict(part("model."))
        if self._average is not None:
            self._average.load_state_dict(part("average."))
        restore_optimizer(self._recipe.optimizer, part("optimizer."))
        self._recipe.load_schedule_state(progress["schedule"])
        self._step = progress["step"]
        self._sums, self._since = progress["sums"], progress["since"]
        self.history = progress["history"]

    def _fingerprint(self) -> dict[str, Any]:
        spec = self.estimator.spec.to_json()
        described = {f"estimator.{name}": value for name, value in spec.items()}
        # Of another simulator, or another noise, data are others.
        x = self._validation[1].double()
        numbers = x.mean(), x.std(), x.abs().mean(), x.reshape(-1)[-1]
        data = [f"{float(number):.5g}" for number in numbers]
        return {**asdict(self.settings), **described, _DATA: data}


# Entry of a fingerprint that tells of the simulator.
_DATA = "simulated data"


def _warmed_average(
    decay: float,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential average whose decay starts at 0.1, so that early weights fade."""

    @torch.no_grad()
    def average(
        kept: Sequence[Tensor], new: Sequence[Tensor], count: Tensor | int
    ) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for old, value in zip(kept, new, strict=True):
            old.lerp_(value, share)

    return average


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
