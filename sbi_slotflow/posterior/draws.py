r"""Draws of sets that stand for a posterior: what samplers and refinement return.

Draws may carry importance weights, and MCMC's come in chains. Either way they answer as
a :class:`~sbi_slotflow.SlotPosterior` does: ``sample``, ``cardinality``,
``catalogue``, ``to_datatree``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import draw_seed, generator_for
from ..sets.layout import ThetaLayout
from .datatree import to_datatree
from .resampling import systematic

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

    from ..problems import Problem

__all__ = ["PosteriorDraws"]


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws from one observation's posterior.

    Attributes:
        layout: Layout of theta.
        theta: Theta rows in canonical order, shape ``(chains, draws, E)``.
        x: The observation, shape ``(T,)``.
        log_weights: Log importance weights, shape ``(chains, draws)``, up to a
            constant; None where all draws count the same.

    Raises:
        ValueError: If a shape is wrong, there is no draw, or none has a positive
            weight.
    """

    layout: ThetaLayout
    theta: Tensor
    x: Tensor
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.theta.ndim != 3:
            raise ValueError(
                "theta must have shape (chains, draws, E), got "
                f"{tuple(self.theta.shape)}."
            )
        self.layout.validate(self.theta)
        if not self.theta.numel():
            raise ValueError(
                f"theta must hold at least one draw, got {tuple(self.theta.shape)}."
            )
        if self.log_weights is None:
            return
        if self.log_weights.shape != self.theta.shape[:-1]:
            raise ValueError(
                f"log_weights must have shape {tuple(self.theta.shape[:-1])}, got "
                f"{tuple(self.log_weights.shape)}."
            )
        largest = self.log_weights.max()
        if not torch.isfinite(largest):
            raise ValueError(
                "log_weights must have a finite largest entry, got "
                f"{largest.item()}: no draw has a positive weight."
            )

    @property
    def rows(self) -> Tensor:
        """All draws, chain after chain, shape ``(chains * draws, E)``."""
        return self.theta.flatten(0, 1)

    @property
    def weights(self) -> Tensor:
        """Weights of :attr:`rows`, float64, summing to one."""
        if self.log_weights is None:
            num = len(self.rows)
            return torch.full((num,), 1 / num, dtype=torch.float64)
        return self.log_weights.flatten().double().softmax(-1)

    @property
    def ess(self) -> float:
        r"""Kish's effective sample size of the weights, :math:`1 / \sum_i w_i^2`.

        It knows nothing of the autocorrelation of a chain.
        """
        return float(1 / self.weights.square().sum())

    @property
    def statistics(self) -> dict[str, float]:
        """Numbers that tell how good the draws are, by name."""
        return {"ess": self.ess}

    def cardinality(self, x: Tensor | None = None) -> Categorical:
        """Return the estimate of p(K | x).

        Args:
            x: Left out, or the observation of the draws.
        """
        self._check_x(x)
        k = self.layout.cardinality(self.rows)
        probs = torch.zeros(self.layout.max_cardinality + 1, dtype=torch.float64)
        return Categorical(probs=probs.index_add(0, k, self.weights))

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        x: Tensor | None = None,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows of equal weight.

        Draws are resampled systematically: each appears as often as its weight says, up
        to one. From draws of equal weight it takes evenly spaced ones.

        Args:
            sample_shape: Shape of the draws.
            x: Left out, or the observation of the draws.
            k: Cardinality to condition on.
            generator: Source of randomness.

        Returns:
            Theta rows, shape ``(*sample_shape, E)``.

        Raises:
            ValueError: If no draw of positive weight has k components.
        """
        self._check_x(x)
        rows, weights = self.rows, self.weights
        if k is not None:
            weights = weights * (self.layout.cardinality(rows) == k)
            if not weights.sum() > 0:
                raise ValueError(f"no draw has k={k} components and a positive weight.")
        shape = torch.Size(sample_shape)
        num = shape.numel()
        index = systematic(weights, num, generator)
        index = index[torch.randperm(num, generator=generator)]
        return rows[index].reshape(*shape, self.layout.size)

    def to_datatree(
        self,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        problem: "Problem | None" = None,
        true_theta: Tensor | None = None,
        num_predictive: int = 100,
        num_prior: int = 1_000,
        attrs: Mapping[str, Any] | None = None,
    ) -> "DataTree":
        """Return the draws as an ArviZ tree; see :func:`~sbi_slotflow.to_datatree`.

        Args:
            num_samples: Number of resampled draws. If None, all draws are returned in
                their chains, weights beside them in the group ``sample_stats``.
            generator: Source of randomness; a new one, whose seed is kept in the
                attributes, if None.
            problem: The problem that the draws belong to. It adds ``lp``, the log
                posterior up to a constant, reconstructions and draws of the prior.
            true_theta: A true theta row, if known.
            num_predictive: Draws in ``posterior_predictive``; 0 for none.
            num_prior: Draws of the prior; 0 for none.
            attrs: Further attributes of the tree.

        Raises:
            ValueError: If the problem's layout differs.
        """
        generator = generator or generator_for(draw_seed(None))
        weights = None
        theta = self.theta
        if num_samples is not None:
            theta = self.sample((num_samples,), generator=generator).unsqueeze(0)
        elif self.log_weights is not None:
            weights = self.weights.reshape(self.log_weights.shape)
        options: dict[str, Any] = {}
        if problem is not None:
            if problem.layout != self.layout:
                raise ValueError(
                    f"problem must have the layout {self.layout}, got {problem.layout}."
                )
            flat = theta.flatten(0, 1)
            values = problem.prior.log_prob(flat).double()
            values = values + problem.log_likelihood(flat, self.x)
            options["log_prob"] = values.reshape(theta.shape[:-1])
            options["simulator"] = problem.simulator
            if num_prior:
                prior = problem.prior.sample((num_prior,), generator=generator)
                options["prior_samples"] = prior
        return to_datatree(
            theta,
            self.layout,
            x=self.x,
            true_theta=true_theta,
            weights=weights,
            statistics=self.statistics,
            num_predictive=num_predictive,
            generator=generator,
            attrs={"seed": str(generator.initial_seed()), **(attrs or {})},
            **options,
        )

    def catalogue(
        self,
        x: Tensor | None = None,
        *,
        ci_prob: float = 0.9,
        min_probability: float = 0.1,
        true_theta: Tensor | None = None,
    ) -> "Dataset":
        """Turn the draws into a list of sources.

        See :func:`~sbi_slotflow.build_catalogue`.

        Args:
            x: Left out, or the observation of the draws.
            ci_prob: Probability inside the credible intervals.
            min_probability: Sources that are less probable are not listed.
            true_theta: A true theta row, if known.

        Returns:
            A dataset with a row a source; ``to_dataframe()`` makes a table of it.
        """
        from ..catalogue import build_catalogue

        self._check_x(x)
        return build_catalogue(
            self.rows,
            self.layout,
            weights=self.weights,
            ci_prob=ci_prob,
            min_probability=min_probability,
            true_theta=true_theta,
        )

    def _check_x(self, x: Tensor | None) -> None:
        if x is not None and not torch.equal(
            torch.as_tensor(x).reshape(-1).to(self.x), self.x.reshape(-1)
        ):
            raise ValueError(
                "x differs from the observation that these draws belong to."
            )
