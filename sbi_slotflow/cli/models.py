"""Models, shipped or of the user, and their posteriors of a batch of signals."""

import hashlib
import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.misspecification import TrainingReference
from ..nn.estimator import SlotDensityEstimator
from ..posterior import UnreliableWeights, refine
from ..posterior.network import SlotPosterior
from ..pretrained import (
    RECIPES,
    available_weights,
    load_pretrained,
    weights_file,
)
from ..problems import Problem
from ..seeding import generator_for
from ..sets.prior import VariableKPrior
from . import InputError

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = [
    "Answers",
    "Model",
    "Settings",
    "answer",
    "check_refinable",
    "load_model",
    "sha256",
]


@dataclass(frozen=True)
class Model:
    """A posterior and the problem that it is for.

    Attributes:
        name: A shipped model's name or the path of a file.
        sha256: Of the weights' file.
        posterior: The posterior.
        problem: The problem; None where only a prior is known.
    """

    name: str
    sha256: str
    posterior: SlotPosterior
    problem: Problem | None

    @property
    def num_data(self) -> int:
        """Length T of x."""
        return self.posterior.posterior_estimator.spec.num_data


def load_model(name: str, problem: str | None) -> Model:
    """Load a model."""
    shipped = available_weights()
    if name in shipped:
        if problem is not None:
            raise InputError(
                f"--problem goes with a model file; {name} has a problem of its own"
            )
        with weights_file(name) as path:
            digest = sha256(path)
        return Model(name, digest, load_pretrained(name), RECIPES[name].problem)
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"expected --model to be one of {', '.join(shipped)}, or a file that "
            f"SlotDensityEstimator.save wrote; got {name!r}"
        )
    if problem is None:
        raise InputError(
            f"{name} holds a network but no prior: expected --problem FILE.py:NAME, "
            "what it was trained for; got none"
        )
    found = _problem(problem)
    fit = found.build_fit() if isinstance(found, Problem) else None
    try:
        estimator = SlotDensityEstimator.load(path, fit=fit)
        if isinstance(found, Problem):
            posterior = SlotPosterior(estimator, found.prior, found.simulator)
            return Model(name, sha256(path), posterior, found)
        return Model(name, sha256(path), SlotPosterior(estimator, found), None)
    except ValueError as error:
        raise InputError(f"cannot use --model {name}: {_line(error)}") from error


def _problem(text: str) -> Problem | VariableKPrior:
    if text in available_weights():
        return RECIPES[text].problem
    file, colon, attribute = text.rpartition(":")
    if not colon or not Path(file).is_file():
        raise InputError(
            f"expected --problem to be FILE.py:NAME or one of "
            f"{', '.join(available_weights())}; got {text!r}"
        )
    try:
        names: dict[str, Any] = runpy.run_path(file)
    except Exception as error:
        raise InputError(
            f"{file} cannot be run: {type(error).__name__}: {_line(error)}"
        ) from error
    found = names.get(attribute)
    if not isinstance(found, Problem | VariableKPrior):
        came = type(found).__name__ if attribute in names else "no such name"
        raise InputError(
            f"expected {attribute} in {file} to be a Problem or a VariableKPrior; "
            f"got {came}"
        )
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Draws to weigh, of which --num-samples are resampled.
_FEWEST_WEIGHTED = 10_000
# Rows whose density is evaluated at once.
_MOST_ROWS = 20_000
# Streams of a seed.
_DRAWS, _REFINE = range(2)


@dataclass(frozen=True)
class Settings:
    """How signals are analysed.

    Attributes:
        num_samples: Draws S from each posterior.
        seed: Seed of the draws.
        refine: Whether the posterior is made exact with the problem's likelihood.
    """

    num_samples: int
    seed: int = 0
    refine: bool = False


@dataclass(frozen=True)
class Answers:
    """Posteriors of B signals.

    Attributes:
        probs: p(K | x), shape ``(B, Kmax + 1)``.
        draws: Theta rows of equal weight, shape ``(B, S, E)``.
        log_prob: Their log posterior densities, shape ``(B, S)``; None where the
            model's samples have no density.
        catalogues: The sources of each signal.
        statistics: Numbers ``(B,)`` by name: ``training_p_value``, which is small where
            a signal is unlike the training data, and what refinement tells.
    """

    probs: Tensor
    draws: Tensor
    log_prob: Tensor | None
    catalogues: "list[Dataset]"
    statistics: dict[str, Tensor]


def check_refinable(model: Model) -> None:
    """Raise InputError unless a model's posterior can be refined."""
    if model.problem is None:
        raise InputError(
            "--refine needs a likelihood: expected --problem to name a Problem, got a "
            "VariableKPrior"
        )
    if not model.posterior.has_density:
        raise InputError(
            f"--refine needs a density, which the samples of {model.name} have not "
            "(slot_nn.paper's chart is a surface)"
        )
    try:
        row = model.posterior.prior.sample((1,), generator=generator_for(0))
        model.problem.log_likelihood(row, torch.zeros(1, model.num_data))
    except NotImplementedError as error:
        raise InputError(f"--refine needs a likelihood: {error}") from error


@torch.no_grad()
def answer(
    model: Model,
    x: Tensor,
    settings: Settings,
    batch: int = 0,
    true_theta: Tensor | None = None,
) -> Answers:
    """Analyse a batch of signals."""
    posterior = model.posterior
    try:
        posterior.posterior_estimator.checked(x)
    except ValueError as error:
        raise InputError(f"cannot analyse SIGNALS: {error}") from error
    statistics: dict[str, Tensor] = {}
    if isinstance(posterior.training_reference, TrainingReference):
        statistics["training_p_value"] = posterior.training_reference.p_values(x)
    if settings.refine:
        return _refined(model, x, settings, batch, statistics, true_theta)
    generator = generator_for(settings.seed, _DRAWS, batch)
    given = posterior.given(x)
    draws = given.sample((settings.num_samples,), generator=generator)
    log_prob = None
    if posterior.has_density:
        rows = max(1, _MOST_ROWS // len(x))
        parts = [given.log_prob(part) for part in draws.split(rows)]
        log_prob = torch.cat(parts).T
    draws = draws.transpose(0, 1)
    found = [posterior.catalogue(samples=rows, true_theta=true_theta) for rows in draws]
    return Answers(given.cardinality().probs, draws, log_prob, found, statistics)


def _refined(
    model: Model,
    x: Tensor,
    settings: Settings,
    batch: int,
    statistics: dict[str, Tensor],
    true_theta: Tensor | None,
) -> Answers:
    assert model.problem is not None
    generator = generator_for(settings.seed, _REFINE, batch)
    num = max(_FEWEST_WEIGHTED, settings.num_samples)
    probs, draws, log_prob, catalogues, numbers = [], [], [], [], []
    for one in x:
        with warnings.catch_warnings():
            # k-hat is in the result, and the command line tells of it in its own words.
            warnings.simplefilter("ignore", UnreliableWeights)
            likelihood = model.problem.log_likelihood
            found = refine(model.posterior, likelihood, one, num, generator=generator)
        assert not isinstance(found, list)
        rows = found.sample((settings.num_samples,), generator=generator)
        values = model.posterior.prior.log_prob(rows).double()
        values = values + model.problem.log_likelihood(rows, one)
        probs.append(found.cardinality().probs)
        draws.append(rows)
        log_prob.append(values - found.log_evidence)
        catalogues.append(found.catalogue(true_theta=true_theta))
        numbers.append(found.statistics)
    statistics = statistics | {
        name: torch.tensor([row[name] for row in numbers], dtype=torch.float64)
        for name in numbers[0]
    }
    rows, values = torch.stack(draws), torch.stack(log_prob)
    return Answers(torch.stack(probs), rows, values, catalogues, statistics)
