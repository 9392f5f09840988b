r"""Prior and likelihood of a problem, as Eryn's sampler calls them.

Eryn keeps components as *leaves* of a branch: Kmax places of which K are in use. It
chooses the place of a birth among the Kmax - K free ones and the victim of a death
among the K + 1 used ones, and corrects for neither. That is right for the target

.. math::
    \log \pi = \log p(K) + \log p(s) + \sum_{k=1}^{K} \log p(\theta_k) - \log Z_K

which is the package's density of the set less log K!: the C(Kmax, K) choices of places
and the two missing probabilities cancel, so K's marginal is p(K).

Where no leaf is in use at all, Eryn sets the log-prior to zero, whatever the prior
says. Without shared parameters that is K = 0, so the prior is scaled to be one there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..posterior.refined import likelihood_of
from ..problems.base import Problem
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior

__all__ = ["COMPONENTS", "SHARED", "JointPrior", "Leaves", "joint_log_likelihood"]

COMPONENTS = "components"
SHARED = "shared"

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
LogLikelihood = Callable[[Any, Any], Floats]
Evaluate = Callable[[Floats, NDArray[Any], Floats], Floats]


@dataclass(frozen=True)
class Leaves:
    """The branches of a layout, and the way between theta rows and leaves.

    Attributes:
        layout: Layout of theta.
    """

    layout: ThetaLayout

    @property
    def branches(self) -> dict[str, tuple[str, ...]]:
        """Names of the branches and of their parameters."""
        names = {COMPONENTS: self.layout.component_names}
        return names | ({SHARED: self.layout.shared_names} if self._shared else {})

    def from_rows(self, theta: Tensor) -> tuple[Arrays, Arrays]:
        """Put rows ``(temperatures, walkers, E)`` into leaves.

        Returns:
            Eryn's ``coords``, shape ``(temperatures, walkers, leaves, parameters)`` in
            each branch, and its ``inds``, without the last axis.
        """
        parts = self.layout.unpack(theta.double())
        coords = {COMPONENTS: parts.components.numpy().copy()}
        inds = {COMPONENTS: parts.mask.numpy().copy()}
        if self._shared:
            coords[SHARED] = parts.shared.unsqueeze(-2).numpy().copy()
            inds[SHARED] = np.ones(coords[SHARED].shape[:-1], dtype=bool)
        return coords, inds

    def to_rows(self, coords: Arrays, inds: Arrays) -> Tensor:
        """Collect leaves into float64 rows ``(temperatures, walkers, E)``."""
        used = inds[COMPONENTS]
        order = np.argsort(~used, axis=-1, kind="stable")[..., None]
        components = np.take_along_axis(coords[COMPONENTS], order, axis=-2)
        shared = torch.from_numpy(coords[SHARED][..., 0, :]) if self._shared else None
        return self.layout.pack(
            torch.from_numpy(used.sum(-1)), torch.from_numpy(components), shared
        )

    @property
    def _shared(self) -> bool:
        return self.layout.num_shared > 0


class JointPrior:
    """Prior over all branches at once.

    Args:
        prior: The problem's prior.
    """

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior, self.leaves = prior, Leaves(prior.layout)
        self.key_order = [name for b in self.leaves.branches.values() for name in b]
        empty = prior.log_cardinality_probs[0].item()
        scaled = prior.layout.num_shared == 0 and np.isfinite(empty)
        self._offset = empty if scaled else 0.0

    def logpdf(
        self, coords: Arrays, inds: Arrays, supps: Any = None, branch_supps: Any = None
    ) -> Floats:
        """Evaluate the log-prior of every walker, ``(temperatures, walkers)``."""
        rows = self.leaves.to_rows(coords, inds)
        k = self.prior.layout.cardinality(rows)
        value = self.prior.log_prob(rows) - torch.lgamma(k.double() + 1)
        return (value - self._offset).numpy()


def joint_log_likelihood(problem: Problem, x: Tensor) -> LogLikelihood:
    """Make the vectorised likelihood of an observation.

    Args:
        problem: The problem.
        x: One observation, shape ``(T,)``.

    Returns:
        Function of the leaves in use of each branch, ``(n, parameters)``, and the
        walker to which each belongs, ``(n,)``; lists of these where there are shared
        parameters. It returns one number for each walker.
    """
    evaluate = _by_problem(problem, x)
    size, dim = problem.layout.max_cardinality, problem.layout.num_component_params

    def log_likelihood(params: Any, groups: Any) -> Floats:
        if problem.layout.num_shared:
            (leaves, shared), (owner, _) = params, groups
        else:
            leaves, owner = params, groups
            shared = np.zeros((owner.max(initial=-1) + 1, 0))
        components = np.zeros((len(shared), size, dim))
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        components[owner, place] = leaves
        counts = np.bincount(owner, minlength=len(shared))
        return evaluate(components, counts, shared)

    return log_likelihood


def _by_problem(problem: Problem, x: Tensor) -> Evaluate:
    log_likelihood = likelihood_of(problem.log_likelihood, x.double())

    def evaluate(components: Floats, counts: NDArray[Any], shared: Floats) -> Floats:
        parts = [torch.from_numpy(array) for array in (counts, components, shared)]
        return log_likelihood(problem.layout.pack(*parts)).numpy()

    return evaluate
