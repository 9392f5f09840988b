r"""The interface of all posteriors.

A posterior p(K, Theta, s | x) is made of one method, :meth:`Posterior.given`: it takes
observations and returns their :class:`~sbi_slotflow.sets.distribution.SetDistribution`.
Everything else (``sample``, ``log_prob``, ``cardinality``, ``map``, ``catalogue``,
``to_datatree``) is written here, and builds that distribution once. A posterior
remembers nothing of the observations that it was asked about. Those with a density are
:class:`~sbi_slotflow.posterior.refinable.Refinable` too.

Example:
    >>> from sbi_slotflow import problems
    >>> problem = problems.linear_gaussian()
    >>> posterior = problem.exact_posterior()
    >>> x = problem.simulator(problem.prior.sample((2,)))
    >>> posterior.sample((5,), x[0]).shape
    torch.Size([5, 7])
    >>> posterior.cardinality(x).batch_shape
    torch.Size([2])
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..catalogue import build_catalogue
from ..nn.charts import Chart, WhiteningChart
from ..seeding import draw_seed, generator_for
from ..sets.checks import (
    Numbers,
    Shape,
    as_cardinality,
    as_count,
    as_floats,
    as_shape,
    check_finite,
)
from ..sets.distribution import SetDistribution
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior
from .datatree import SignalModel, to_datatree

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["Posterior", "PosteriorOfOne", "check_keywords"]

# sbi's keywords: the values that ask for what is done anyway (None for all), and what
# to say of the others.
_Keywords = dict[str, tuple[tuple[Any, ...] | None, str]]
_DIRECT = (
    "theta has a discrete entry and a dimension that varies, on which sbi's MCMC and "
    "VI do not work. Draw directly; refine() corrects the draws with a likelihood"
)
_ONE_PASS = "draws are made in one pass and need no rejection, which takes no time"
_SAMPLING: _Keywords = {
    **dict.fromkeys(("show_progress_bars", "max_sampling_batch_size"), (None, "")),
    "reject_outside_prior": ((True,), "draws lie in the prior's support anyway"),
    "max_sampling_time": ((None,), _ONE_PASS),
    "return_partial_on_timeout": ((False,), _ONE_PASS),
    "sample_with": ((None, "direct"), _DIRECT),
}
_NO_ASCENT = "the densest draw is taken; there is no gradient ascent"
_UNUSED = ("show_progress_bars", "force_update", "save_best_every")
_MAXIMISING: _Keywords = {
    "init_method": (("posterior",), "draws of the posterior are compared"),
    **dict.fromkeys(_UNUSED, (None, "")),
    **dict.fromkeys(("num_iter", "num_to_optimize", "learning_rate"), ((), _NO_ASCENT)),
}
_NUM_SAMPLES = 4_000


class Posterior(ABC):
    """Base of all posteriors over sets of components.

    x is anything that :func:`~sbi_slotflow.sets.checks.as_floats` takes, of shape
    ``(*event)`` for one observation or ``(B, *event)`` for a batch.

    Attributes:
        prior: Prior over theta rows. Draws of a sampler come without.
        simulator: Simulator with a method ``signal``, if one is known.
        model_card: How a network was trained, if that is known.
    """

    prior: VariableKPrior
    simulator: SignalModel | None = None
    model_card: Mapping[str, Any] | None = None
    _x: Tensor | None = None
    _device: Any = "cpu"

    @property
    @abstractmethod
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""

    @abstractmethod
    def given(self, x: Tensor) -> SetDistribution:
        """Return the distribution over sets given checked, finite ``(B, *event)``."""

    def observations(self, x: Numbers | None) -> Tensor:
        """Return checked observations ``(B, *event)``; the default x if None."""
        return self._observed(x).reshape(-1, *self.event_shape)

    @property
    def has_density(self) -> bool:
        """Whether ``log_prob`` exists."""
        return True

    @property
    def chart(self) -> Chart:
        """Coordinates in which one component is moved and proposed."""
        return WhiteningChart(self.prior.component_marginals)

    @property
    def default_x(self) -> Tensor | None:
        """The observation to use where none is given."""
        return self._x

    @default_x.setter
    def default_x(self, x: Numbers) -> None:
        self.set_default_x(x)

    def set_default_x(self, x: Numbers) -> Self:
        """Set the observation to use where none is given; return the posterior."""
        self._x = self._observed(x)
        return self

    @torch.no_grad()
    def cardinality(
        self, x: Numbers | None = None, of: str | None = None
    ) -> Categorical:
        """Return q(K | x) over 0..Kmax, of batch shape ``(B,)`` for a batch of x.

        One observation ``(*event)`` gives no batch shape, a batch of one gives (1,).

        Args:
            x: Observations; the default x if None.
            of: The class whose components are counted; all together if None.

        Raises:
            TypeError, ValueError: If x is malformed or there is no such class.
        """

        def counted(sets: SetDistribution) -> Categorical:
            return sets.cardinality() if of is None else sets.class_cardinality(of)

        x = self._observed(x)
        if x.ndim > len(self.event_shape):
            return counted(self.given(x))
        distribution, _ = self._given_one(x, "cardinality")
        return Categorical(logits=counted(distribution).logits[0])

    def sample(
        self,
        sample_shape: Shape = (),
        x: Numbers | None = None,
        k: SupportsIndex | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draw from the posterior of one observation.

        Args:
            sample_shape: Shape of the draws, or their number.
            x: One observation, or a batch of one; the default x if None.
            k: Cardinality to condition on.
            generator: Source of randomness; torch's global generator if None.
            kwargs: sbi's keywords, where they ask for what is done anyway.

        Returns:
            Theta rows in canonical order, shape ``(*sample_shape, E)``.

        Raises:
            NotImplementedError: If ``sample_with`` asks for another sampler.
            TypeError, ValueError: If an argument is malformed, x a batch, k out of
                range, or a keyword unknown.
        """
        check_keywords("sample", kwargs)
        distribution, _ = self._given_one(x, "sample", "; use .sample_batched()")
        return self._rows(distribution, sample_shape, k, generator)[..., 0, :]

    def sample_batched(
        self,
        sample_shape: Shape,
        x: Numbers | None = None,
        k: SupportsIndex | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draw rows ``(*sample_shape, B, E)`` from the posteriors of B observations.

        See :meth:`sample`.
        """
        check_keywords("sample_batched", kwargs)
        with torch.no_grad():
            distribution = self.given(self.observations(x))
        return self._rows(distribution, sample_shape, k, generator)

    def log_prob(
        self, theta: Numbers, x: Numbers | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Evaluate the log density of sets given one observation.

        See :meth:`log_prob_batched`; theta has shape ``(..., E)``, and the result
        ``(...)``, or ``(1,)`` for a single row.
        """
        batch = self._one(x, "log_prob", "; use .log_prob_batched()")
        rows = torch.atleast_2d(as_floats(theta, "theta"))
        flat = rows.reshape(-1, 1, rows.shape[-1])
        values = self.log_prob_batched(flat, batch, *args, **kwargs)
        return values.reshape(rows.shape[:-1])

    def log_prob_batched(
        self,
        theta: Numbers,
        x: Numbers | None = None,
        norm_posterior: bool = True,
        track_gradients: bool = False,
        leakage_correction_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """Evaluate the log density of sets given B observations.

        Args:
            theta: Rows of shape ``(S, B, E)`` or ``(B, E)``, components in any order.
            x: Observations; the default x if None.
            norm_posterior: Whether to divide by the probability that a draw keeps the
                prior's least separation, where slots do not know of it. It is estimated
                from draws.
            track_gradients: Whether the result can be differentiated.
            leakage_correction_params: sbi's options of the same; only None.

        Returns:
            Log densities ``(S, B)``, -inf outside the prior's support.

        Raises:
            NotImplementedError: If the posterior has no density.
            TypeError, ValueError: If theta or x is malformed.
        """
        if leakage_correction_params is not None:
            raise ValueError(
                "leakage_correction_params must be None, as draws do not leak out of "
                f"the prior's support; got {leakage_correction_params!r}."
            )
        batch = self.observations(x)
        theta = as_floats(theta, "theta").to(self._device)
        self._layout.validate(theta)
        theta = theta.unsqueeze(0) if theta.ndim == 2 else theta
        if theta.ndim != 3 or theta.shape[1] != len(batch):
            raise ValueError(
                f"theta must have shape (S, B, E) or (B, E) with B = {len(batch)}, got "
                f"{tuple(theta.shape)}."
            )
        with torch.set_grad_enabled(track_gradients):
            return self._log_prob(self.given(batch), theta, norm_posterior)

    def map(
        self, x: Numbers | None = None, num_init_samples: int = 1_000, **kwargs: Any
    ) -> Tensor:
        """Return the densest of some draws given the most probable K, ``(1, E)``.

        Densities of sets of different size have different units, so the most probable
        K is chosen first. The ``num_init_samples`` draws come from a fixed seed; for
        the keywords see :meth:`sample`.
        """
        check_keywords("map", kwargs, _MAXIMISING)
        distribution, batch = self._given_one(x, "map")
        k = int(distribution.cardinality().probs.argmax())
        generator = generator_for(0, device=batch.device)
        with torch.no_grad():
            draws = distribution.sample((num_init_samples,), k, generator)
            return draws[distribution.log_prob(draws).argmax(), 0].unsqueeze(0)

    def reconstruct(
        self, samples: Tensor, simulator: SignalModel | None = None
    ) -> Tensor:
        """Return the noise-free signals ``(..., T)`` of draws ``(..., E)``.

        They are made by ``simulator.signal``; the posterior's own simulator if None.
        ValueError if there is none.
        """
        simulator = simulator or self.simulator
        if not hasattr(simulator, "signal"):
            raise ValueError(
                "reconstruct needs a simulator with a method signal(theta): pass "
                "simulator=..., or build the posterior from slot_nn(problem)."
            )
        assert simulator is not None
        return simulator.signal(samples)

    @torch.no_grad()
    def to_datatree(
        self,
        num_samples: int | None = None,
        x: Numbers | None = None,
        generator: torch.Generator | None = None,
        samples: Tensor | None = None,
        *,
        problem: Any = None,
        true_theta: Tensor | None = None,
        log_prob: bool = True,
        num_predictive: int = 100,
        num_prior: int = 1_000,
        attrs: Mapping[str, Any] | None = None,
    ) -> "DataTree":
        """Return draws as an ArviZ tree; see :func:`~sbi_slotflow.to_datatree`.

        ``num_samples`` draws are taken: 4,000 if None, or all of a sampler in their
        chains, weights beside them in the group ``sample_stats``; ``samples`` ``(S,
        E)`` replace them. A generator of None is a new one, whose seed is kept in the
        attributes. The :class:`~sbi_slotflow.Problem` of x gives prior, simulator, and
        ``lp`` up to a constant where the posterior has no density; ``log_prob`` tells
        whether ``lp`` is asked for. 0 for ``num_prior`` leaves out draws of the prior.
        """
        if problem is not None and problem.layout != self._layout:
            raise ValueError(
                f"problem must have the layout {self._layout}, got {problem.layout}."
            )
        generator = generator or generator_for(draw_seed(None), device=self._device)
        distribution, batch = self._given_one(x, "to_datatree")
        weights = None
        if samples is None:
            samples, weights = self._drawn(distribution, num_samples, generator)
        rows, values = samples.reshape(-1, samples.shape[-1]), None
        if log_prob and self.has_density:
            self._layout.validate(samples, "samples")
            there = rows.unsqueeze(1).to(batch.device)
            values = self._log_prob(distribution, there, norm_posterior=True)
        elif log_prob and problem is not None:
            values = problem.prior.log_prob(rows).double()
            values = values + problem.log_likelihood(rows, batch[0])
        if values is not None:
            values = values.reshape(-1, samples.shape[-2])
        on_gpu = generator.device.type != "cpu"
        on_cpu = generator_for(draw_seed(generator)) if on_gpu else generator
        prior = getattr(self if problem is None else problem, "prior", None)
        prior_samples = None
        if num_prior and prior is not None:
            prior_samples = prior.sample((num_prior,), generator=on_cpu)
        return to_datatree(
            samples,
            self._layout,
            x=batch[0],
            true_theta=true_theta,
            weights=weights,
            log_prob=values,
            statistics=self._statistics,
            simulator=self.simulator if problem is None else problem.simulator,
            num_predictive=num_predictive,
            prior_samples=prior_samples,
            generator=on_cpu,
            model_card=self.model_card,
            attrs={"seed": str(generator.initial_seed()), **(attrs or {})},
        )

    def catalogue(
        self,
        x: Numbers | None = None,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        samples: Tensor | None = None,
        ci_prob: float = 0.9,
        min_probability: float = 0.1,
        true_theta: Tensor | None = None,
    ) -> "Dataset":
        """Turn draws into a list of sources; see :func:`~sbi_slotflow.build_catalogue`.

        The draws are those of :meth:`to_datatree`, ``num_samples`` new ones from
        ``generator`` (torch's global one if None) or ``samples``; the other arguments
        are those of the function.
        """
        weights = None
        if samples is None:
            distribution, _ = self._given_one(x, "catalogue")
            samples, weights = self._drawn(distribution, num_samples, generator)
            samples = samples.flatten(0, 1)
            weights = None if weights is None else weights.flatten()
        return build_catalogue(
            samples,
            self._layout,
            weights=weights,
            ci_prob=ci_prob,
            min_probability=min_probability,
            true_theta=true_theta,
        )

    @property
    def _layout(self) -> ThetaLayout:
        return self.prior.layout

    @property
    def _statistics(self) -> Mapping[str, float]:
        """Numbers that tell how good the draws are, by name, for ``to_datatree``."""
        return {}

    def _log_prob(
        self, distribution: SetDistribution, theta: Tensor, norm_posterior: bool
    ) -> Tensor:
        """Log densities ``(S, B)``, all normalised unless slots make it costly."""
        return distribution.log_prob(theta)

    @torch.no_grad()
    def _drawn(
        self,
        distribution: SetDistribution,
        num_samples: int | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draws ``(chains, draws, E)`` and their weights ``(chains, draws)``."""
        num = _NUM_SAMPLES if num_samples is None else num_samples
        shape = (as_count(num, "num_samples"),)
        draws = distribution.sample(shape, generator=generator)
        return draws[:, 0].unsqueeze(0), None

    @torch.no_grad()
    def _rows(
        self,
        distribution: SetDistribution,
        sample_shape: Shape,
        k: SupportsIndex | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        k = as_cardinality(k, self._layout.max_cardinality)
        return distribution.sample(as_shape(sample_shape), k, generator)

    def _observed(self, x: Numbers | None) -> Tensor:
        """Return checked observations ``(*event)`` or ``(B, *event)``."""
        if x is None:
            if self.default_x is None:
                raise ValueError("x must be given where no default x is set.")
            return self.default_x
        x, event = as_floats(x, "x").to(self._device), self.event_shape
        shape = tuple(x.shape)
        if shape not in (event, (*shape[:1], *event)):
            sizes = ", ".join(map(str, event))
            raise ValueError(
                f"x must have shape {tuple(event)} or (batch, {sizes}), got {shape}."
            )
        if not x.numel():
            raise ValueError(f"x must hold at least one observation, got {shape}.")
        x = self._without_gaps(x)
        check_finite(x)
        return x

    def _without_gaps(self, x: Tensor) -> Tensor:
        """Observations in which what is missing is not NaN; nothing may be missing."""
        return x

    def _one(self, x: Numbers | None, method: str, advice: str = "") -> Tensor:
        """Return one observation ``(1, *event)``."""
        batch = self.observations(x)
        if len(batch) != 1:
            raise ValueError(
                f".{method}() takes one observation, got a batch of {len(batch)}"
                f"{advice}."
            )
        return batch

    def _given_one(
        self, x: Numbers | None, method: str, advice: str = ""
    ) -> tuple[SetDistribution, Tensor]:
        """Return the distribution given one observation, and that ``(1, *event)``."""
        batch = self._one(x, method, advice)
        with torch.no_grad():
            return self.given(batch), batch


class PosteriorOfOne(Posterior):
    """Base of posteriors that belong to one observation.

    Attributes:
        x: The observation, shape ``(*event)``.
    """

    x: Tensor

    @property
    def event_shape(self) -> torch.Size:
        """Shape of the observation."""
        return self.x.shape

    @property
    def default_x(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The observation."""
        return self.x

    def set_default_x(self, x: Numbers) -> Self:
        """Check that x is the observation."""
        batch = self.observations(x)
        if len(batch) != 1 or not torch.equal(batch[0].to(self.x), self.x):
            raise ValueError(
                "x differs from the observation that this posterior belongs to."
            )
        return self

    def given(self, x: Tensor) -> SetDistribution:
        """Return the distribution, if x is the observation ``(1, *event)``."""
        return self.set_default_x(x)._distribution()

    @abstractmethod
    def _distribution(self) -> SetDistribution:
        """The distribution given the observation."""


def check_keywords(
    method: str, given: Mapping[str, Any], known: _Keywords = _SAMPLING
) -> None:
    """Raise unless each keyword is sbi's and asks for what is done anyway.

    Raises:
        NotImplementedError: If one asks for something else.
        TypeError: If one is unknown.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(
                f"{method}() got an unexpected keyword argument {name!r}; those of sbi "
                f"that it takes are {sorted(known)}."
            )
        harmless, reason = known[name]
        if harmless is not None and value not in harmless:
            raise NotImplementedError(f"{name}={value!r} is not available: {reason}.")
