"""Models that the command line can use: shipped weights and files of the user's."""

import hashlib
import runpy
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..nn.estimator import SlotDensityEstimator
from ..posterior.network import SlotPosterior
from ..pretrained.load import available_weights, load_pretrained
from ..pretrained.recipes import RECIPES
from ..problems import Problem
from ..sets.prior import VariableKPrior
from .arguments import InputError

__all__ = ["Model", "load_model", "sha256"]


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
    """Load a model.

    Args:
        name: A shipped model's name, or the path of a file that
            ``SlotDensityEstimator.save`` wrote.
        problem: For a file: ``FILE.py:NAME``, or a shipped model's name.

    Raises:
        InputError: If there is no such model or problem, or they do not fit each other.
    """
    shipped = available_weights()
    if name in shipped:
        if problem is not None:
            raise InputError(
                f"--problem goes with a model file; {name} has a problem of its own"
            )
        weights = files("sbi_slotflow") / "weights" / f"{name}.safetensors"
        with as_file(weights) as path:
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
