"""The exact posterior of one observation, as weighted or moved draws."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .draws import PosteriorDraws

__all__ = [
    "LogLikelihood",
    "RefinedPosterior",
    "UnreliableWeights",
    "likelihood_of",
]

LogLikelihood = Callable[[Tensor, Tensor], Tensor]


# k-hat above which estimates from the weights are not to be trusted (Vehtari et al.
# 2024), and effective draws below which they are too few.
LARGEST_K_HAT = 0.7


FEWEST_EFFECTIVE = 100


class UnreliableWeights(UserWarning):
    """Importance weights with a tail too heavy, or too few effective draws."""


@dataclass(frozen=True)
class RefinedPosterior(PosteriorDraws):
    """Draws of the exact posterior of one observation.

    Attributes:
        log_evidence: Estimate of log p(x).
        log_evidence_error: Its standard error.
        pareto_k: k-hat of the weights; below 0.7 they can be believed.
        diagnostics: Numbers of the method: those of tempering steps and of sweeps of
            all moves, and the acceptance of each kind of move.
    """

    log_evidence: float = math.nan
    log_evidence_error: float = math.nan
    pareto_k: float = math.nan
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def statistics(self) -> dict[str, float]:
        """Effective sample size, k-hat, evidence, and the method's own numbers."""
        return {
            **super().statistics,
            "pareto_k": self.pareto_k,
            "log_evidence": self.log_evidence,
            "log_evidence_error": self.log_evidence_error,
            **self.diagnostics,
        }

    @property
    def efficiency(self) -> float:
        """Effective over actual number of draws."""
        return self.ess / len(self.rows)

    @property
    def is_reliable(self) -> bool:
        """Whether k-hat and the effective sample size pass."""
        return self.pareto_k <= LARGEST_K_HAT and self.ess >= FEWEST_EFFECTIVE


def likelihood_of(
    log_likelihood: LogLikelihood, x: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return log p(x | theta) of given x as a checked function of theta; float64.

    A likelihood that has a method ``given(x)`` is asked for it once, so that it may
    tabulate what it needs of x.
    """
    given = getattr(log_likelihood, "given", None)
    evaluate = partial(_of_both, log_likelihood, x) if given is None else given(x)

    def checked(theta: Tensor) -> Tensor:
        values = torch.as_tensor(evaluate(theta)).double()
        expected = theta.shape[:-1]
        if values.shape != expected:
            raise ValueError(
                f"log_likelihood must return shape {tuple(expected)} for theta of "
                f"shape {tuple(theta.shape)}, got {tuple(values.shape)}."
            )
        bad = torch.isnan(values) | torch.isposinf(values)
        if bad.any():
            raise ValueError(
                "log_likelihood must not be NaN or +inf, got it for "
                f"{int(bad.sum())} of {bad.numel()} rows."
            )
        return values

    return checked


def _of_both(log_likelihood: LogLikelihood, x: Tensor, theta: Tensor) -> Tensor:
    return log_likelihood(theta, x)
