r"""Reversible-jump MCMC with Eryn (Karnesis et al. 2023) for the package's problems.

One branch holds the components (of several classes, one for each, of the class's name),
another one of exactly one leaf the shared parameters.
Prior and likelihood are the problem's own; walkers at ten temperatures move by
:class:`ComponentStretchMove` given K, by births and deaths drawn from the prior or,
with :class:`SlotFlowMove`, from trained slots between K's, and by swaps between
temperatures.

Eryn keeps components as *leaves* of a branch: Kmax places of which K are in use. It
chooses the place of a birth among the Kmax - K free ones and the victim of a death
among the K + 1 used ones, and corrects for neither. That is right for the target

.. math::
    \log \pi = \log p(K) + \log p(s) + \sum_{k=1}^{K} \log p(\theta_k) - \log Z_K

which is the package's density of the set less log K!: the C(Kmax, K) choices of places
and the two missing probabilities cancel, so K's marginal is p(K). Where no leaf is in
use at all, Eryn sets the log-prior to zero, whatever the prior says. Without shared
parameters that is K = 0, so the prior is scaled to be one there.

What to know of Eryn 1.2.6:

- A file (``backend``) asks a prior of all branches together for the parameters of each,
  and gives names back that it then finds different.
- Swaps permute the walkers of a temperature, so walker i of the cold chain is no
  trajectory. R-hat and autocorrelation by walker mean nothing with more than one
  temperature; compare whole runs of different seeds.
- Its swaps and splits draw from numpy's global generator. :meth:`ErynSampler.run` seeds
  that and puts its state back, so a seeded run repeats and leaves no trace.
- Its ``StretchMove`` and any ``gibbs_sampling_setup`` by leaf treat leaves that are not
  in use, whose log-prior is taken as zero, as parameters: beside reversible jumps the
  result is silently wrong. Nothing here uses them.
- Periodic parameters given by integer are silently ignored; those given by name need a
  container built by hand. The one built here is handed to all moves.
- K changes by one in a step, so the prior's cardinalities must be consecutive. There
  are no splits and merges, no evidence, and delayed rejection is not implemented.
- Its in-model ``DistributionGenerate`` loses proposal factors where a walker has more
  than one leaf; :class:`SlotFlowMove` updates one component at a time.
- All of it runs on the CPU in one thread.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..nn.charts import WhiteningChart
from ..posterior.component_proposals import PriorComponents
from ..posterior.convergence import convergence_of
from ..posterior.draws import ChainDraws
from ..posterior.importance import likelihood_of
from ..problems.base import Problem
from ..seeding import forked_rng, generator_for
from ..sets.checks import as_count
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior
from .eryn_moves import (
    COMPONENTS,
    SHARED,
    Arrays,
    ComponentStretchMove,
    Floats,
    SlotFlowMove,
    leaf_limits,
    members_of,
)

# After .eryn_moves, which makes sure that Eryn can be imported.
from eryn.backends import HDFBackend  # isort: skip
from eryn.ensemble import EnsembleSampler  # isort: skip
from eryn.moves import ReversibleJumpMove  # isort: skip
from eryn.state import State  # isort: skip
from eryn.utils import PeriodicContainer  # isort: skip

__all__ = ["ErynSampler", "eryn_sampler"]

# Temperatures rise by equal factors up to this one; the last is infinite.
_MAX_TEMPERATURE = 1e3
_ADVICE = (
    "Run more steps (num_steps, burn_in), more walkers (num_walkers) or temperatures "
    '(num_temperatures), or begin at a posterior\'s draws (start="slotflow").'
)
# Scatter of walkers around the truth, in the prior's standard deviations.
_SCATTER = 1e-3


class ErynSampler:
    """An Eryn sampler with its walkers; made by :func:`eryn_sampler`.

    Attributes:
        sampler: Eryn's ``EnsembleSampler``.
    """

    def __init__(
        self, problem: Problem, x: Tensor, sampler: Any, start: Tensor, seed: int
    ) -> None:
        self.problem, self.x, self.sampler = problem, x, sampler
        self._leaves = _Leaves(problem.layout)
        done = sampler.iteration
        if done:
            self._state: Any = sampler.get_last_sample()
        else:
            coords, inds = self._leaves.from_rows(start)
            self._state = State(coords, inds=inds)
        sampler.random_state = _numpy_state(seed, 0, done)
        self._global_state = _numpy_state(seed, 1, done)

    def run(
        self, num_steps: int, burn_in: int = 0, thin: int = 1, progress: bool = False
    ) -> ChainDraws:
        """Advance the walkers from where they are; a second call goes on.

        Temperatures adapt during burn-in only. The kept steps of all temperatures stay
        in ``sampler``, for its ``get_chain`` and acceptance fractions.

        Args:
            num_steps: Steps after burn-in.
            burn_in: Steps that are thrown away first.
            thin: Keep every ``thin``-th step.
            progress: Whether to show progress bars.

        Returns:
            The cold walkers, theta of shape ``(walkers, num_steps // thin, E)``, and
            their diagnostics, which compare the first half of the steps with the second
            (walkers of several temperatures mix by exchanges, so that one that is stuck
            shows less than in chains of their own).

        Raises:
            TypeError: If a number is no integer.
            ValueError: If a number is too small.

        Warns:
            NotConverged: If the walkers still drift or hold too few effective draws.
            PilesUp: If most draws lie on a bound of the prior.
        """
        burn_in, thin = as_count(burn_in, "burn_in", 0), as_count(thin, "thin")
        if as_count(num_steps, "num_steps") < thin:
            raise ValueError(f"num_steps must be at least thin, got {num_steps}.")
        rows, values = [], []
        before = None
        with self._global_generator(), warnings.catch_warnings():
            # with few walkers it happens that none has a partner to stretch towards
            warnings.filterwarnings("ignore", "All points input for the Likelihood")
            for _ in self._steps(burn_in, adaptive=True, store=False, bar=progress):
                pass
            kept = num_steps // thin
            if self.sampler.has_reversible_jump:
                before = self._accepted_jumps
            for _ in self._steps(kept, adaptive=False, thin_by=thin, bar=progress):
                rows.append(self._cold_rows())
                values.append(torch.from_numpy(self._state.log_like[0].copy()))
        theta = torch.stack(rows, dim=1)
        jumps = None if before is None else self._accepted_jumps - before
        shares = {"in model": self.sampler.acceptance_fraction[0]}
        if self.sampler.has_reversible_jump:
            shares["between models"] = self.sampler.rj_acceptance_fraction[0]
        found = convergence_of(
            self.problem.prior,
            theta,
            torch.stack(values, 1),
            {name: float(np.mean(each)) for name, each in shares.items()},
            jumps=jumps,
        )
        found.warn(_ADVICE)
        return ChainDraws(self.problem.layout, theta, self.x, diagnostics=found)

    @property
    def _accepted_jumps(self) -> int:
        """Moves between models that cold walkers accepted up to now.

        K of a walker also changes where temperatures swap; whether those bring all K
        that there are, nothing here could tell.
        """
        return int(self.sampler.backend.rj_accepted[0].sum())

    def _steps(
        self, iterations: int, *, adaptive: bool, bar: bool, **options: Any
    ) -> Iterator[None]:
        """Advance the walkers, with a stop after each iteration."""
        if self.sampler.temperature_control is not None:
            self.sampler.temperature_control.adaptive = adaptive
        if iterations:
            steps = self.sampler.sample(
                self._state, iterations, progress=bar, **options
            )
            for self._state in steps:
                yield

    def _cold_rows(self) -> Tensor:
        """Canonical float32 rows of the cold walkers, ``(walkers, E)``."""
        prior, layout, state = self.problem.prior, self.problem.layout, self._state
        rows = self._leaves.to_rows(state.branches_coords, state.branches_inds)[0]
        # Float32 may round a value onto a bound, where a density can be zero.
        k, shared, components, _ = layout.unpack(rows.float())
        if layout.num_shared:
            shared = prior.shared_marginals.clamp(shared)
        components = prior.component_marginals.clamp(components)
        return layout.canonical(layout.pack(k, components, shared))

    @contextmanager
    def _global_generator(self) -> Iterator[None]:
        """Lend numpy's global generator a state of our own."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._global_state)  # noqa: NPY002
        try:
            yield
        finally:
            self._global_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002


def eryn_sampler(
    problem: Problem,
    x: Tensor,
    start: Literal["prior", "truth", "slotflow"] = "prior",
    *,
    theta: Tensor | None = None,
    posterior: Any = None,
    num_walkers: int = 20,
    num_temperatures: int = 10,
    moves: Sequence[Any] | None = None,
    seed: int = 0,
    backend: str | PathLike[str] | Any = None,
    **options: Any,
) -> ErynSampler:
    """Set up Eryn for one observation of a problem.

    Args:
        problem: The problem; its prior, likelihood and chart are used.
        x: One observation, shape ``(T,)`` or ``(1, T)``.
        start: Where walkers start: at draws from the prior, around the true ``theta``,
            or at draws from ``posterior``.
        theta: True row ``(E,)``, for ``start="truth"``.
        posterior: Anything with ``sample((n,), x=x)``, for ``start="slotflow"``.
        num_walkers: Walkers at each temperature.
        num_temperatures: Rungs of the ladder: equal factors from 1 to 1,000, the last
            infinite. 1 switches tempering off.
        moves: Eryn moves, or pairs (move, weight). Reversible-jump moves replace births
            and deaths from the prior, others :class:`ComponentStretchMove`; of a kind
            that is not given the default stays.
        seed: Seed of all randomness.
        backend: File (HDF5) that keeps all steps, or a backend of Eryn's. Where it has
            some already, walkers go on from the last of them and ``start`` does not
            count; a run that was never interrupted draws other random numbers.
        options: Further options of Eryn's ``EnsembleSampler``, for example
            ``num_repeats_in_model``.

    Raises:
        TypeError: If problem is no ``Problem``, or a number no integer.
        ValueError: If an argument has a wrong shape or value, is missing, or a start
            lies outside the prior's support.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}.")
    num_walkers = as_count(num_walkers, "num_walkers", 2)
    num_temperatures = as_count(num_temperatures, "num_temperatures")
    seed = as_count(seed, "seed", 0)
    data = torch.as_tensor(x)
    if data.shape not in ((problem.num_data,), (1, problem.num_data)):
        raise ValueError(
            f"x must be one observation of length {problem.num_data}, got shape "
            f"{tuple(data.shape)}."
        )
    if not torch.isfinite(data).all():
        raise ValueError("x must be finite, got NaN or Inf.")
    data = data.reshape(-1)
    rows = _start_rows(
        problem, data, start, theta, posterior, num_temperatures * num_walkers, seed
    )
    prior, layout = problem.prior, problem.layout
    low, high = leaf_limits(prior)
    branches = _Leaves(layout).branches
    pairs = [move if isinstance(move, tuple) else (move, 1.0) for move in moves or ()]
    jumps = [pair for pair in pairs if isinstance(pair[0], ReversibleJumpMove)]
    others = [pair for pair in pairs if not isinstance(pair[0], ReversibleJumpMove)]
    members = members_of(prior)
    births = [
        (SlotFlowMove(PriorComponents(own.component), low, high, name, 0), 1.0)
        for name, own in members.items()
    ]
    stretches = [
        (ComponentStretchMove(own.layout.order_by, branch=name), 1.0)
        for name, own in members.items()
    ]
    circular = {
        name: _finite(own.layout.component_names, own.layout.component_periods)
        for name, own in members.items()
    }
    periodic = PeriodicContainer(
        {name: circular.get(name, {}) for name in branches},
        key_order={name: list(parameters) for name, parameters in branches.items()},
    )
    empty = torch.zeros(layout.size, dtype=torch.float64)
    ladder = np.geomspace(1, 1 / _MAX_TEMPERATURE, num_temperatures)
    if isinstance(backend, str | PathLike):
        backend = _File(os.fspath(backend))
    sampler = _Ensemble(
        num_walkers,
        {name: len(parameters) for name, parameters in branches.items()},
        _joint_log_likelihood(problem, data),
        {"all_models_together": _JointPrior(prior)},
        provide_groups=True,
        vectorize=True,
        tempering_kwargs=(
            {"betas": np.append(ladder[:-1], 0.0)} if num_temperatures > 1 else {}
        ),
        branch_names=list(branches),
        nleaves_max=high,  # pyright: ignore[reportArgumentType]
        nleaves_min=low,  # pyright: ignore[reportArgumentType]
        moves=others or stretches,
        rj_moves=jumps or births,
        periodic=periodic,
        backend=backend,
        # K = 0 without shared parameters: a walker without leaves
        fill_zero_leaves_val=(
            -1e300
            if layout.num_shared
            else problem.log_likelihood(empty, data.double()).item()
        ),
        **options,
    )
    return ErynSampler(
        problem, data, sampler, rows.reshape(num_temperatures, num_walkers, -1), seed
    )


def _finite(names: Sequence[str], periods: Sequence[float]) -> dict[str, float]:
    named = zip(names, periods, strict=True)
    return {name: period for name, period in named if math.isfinite(period)}


class _Ensemble(EnsembleSampler):
    """Eryn's, whose one prior of all branches does not name their parameters."""

    def reset(self, **options: Any) -> None:
        """Tell a new backend the parameters of each branch."""
        super().reset(**{**options, "key_order": self.key_order})

    @property
    def key_order(self) -> dict[str, list[str]]:
        """Names of the parameters of each branch."""
        prior: Any = self._priors["all_models_together"]
        return prior.by_branch

    @key_order.setter
    def key_order(self, value: Any) -> None:
        """Leave it to the prior."""


class _File(HDFBackend):
    """Eryn's file, which gives the names back as they were written."""

    @property
    def key_order(self) -> dict[str, list[str]]:
        """Names of the parameters of each branch."""
        return {branch: list(names) for branch, names in super().key_order.items()}


def _numpy_state(*words: int) -> Any:
    mixed = np.random.SeedSequence(words).generate_state(8)
    return np.random.RandomState(mixed).get_state()


def _start_rows(
    problem: Problem,
    x: Tensor,
    start: str,
    theta: Tensor | None,
    posterior: Any,
    num: int,
    seed: int,
) -> Tensor:
    """Draw the rows ``(num, E)`` at which walkers start; see :func:`eryn_sampler`."""
    generator = generator_for(seed)
    if start == "prior":
        rows = problem.prior.sample((num,), generator)
    elif start == "truth":
        if theta is None:
            raise ValueError('theta must be given for start="truth".')
        problem.layout.validate(theta)
        rows = theta.expand(num, -1)
    elif start == "slotflow":
        if posterior is None:
            raise ValueError('posterior must be given for start="slotflow".')
        with forked_rng(generator):
            rows = posterior.sample((num,), x=x).cpu()
    else:
        raise ValueError(
            f"start must be 'prior', 'truth' or 'slotflow', got {start!r}."
        )
    outside = ~torch.isfinite(problem.prior.log_prob(rows))
    if outside.any():
        raise ValueError(
            f"start={start!r} must give rows in the prior's support, got "
            f"{int(outside.sum())} of {num} outside."
        )
    return _scattered(problem, rows, generator) if start == "truth" else rows


def _scattered(problem: Problem, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Scatter rows a little, in the chart's coordinates and within the support."""
    parts = problem.layout.unpack(rows.double())

    def moved(values: Tensor, chart: Any) -> Tensor:
        u, _ = chart.forward(values)
        noise = torch.randn(u.shape, generator=generator, dtype=u.dtype)
        return chart.inverse(u + _SCATTER * noise)

    components = torch.where(
        parts.mask.unsqueeze(-1),
        moved(parts.components, problem.build_chart()),
        parts.components,
    )
    shared = parts.shared
    if problem.layout.num_shared:
        shared = moved(shared, WhiteningChart(problem.prior.shared_marginals))
    new = problem.layout.pack(parts.cardinality, components, shared)
    inside = torch.isfinite(problem.prior.log_prob(new))
    return torch.where(inside.unsqueeze(-1), new, rows.double())


@dataclass(frozen=True)
class _Leaves:
    """The branches of a layout, and the way between theta rows and leaves."""

    layout: ThetaLayout

    @property
    def branches(self) -> dict[str, tuple[str, ...]]:
        """Names of the branches and of their parameters."""
        names = {name: own.component_names for name, own in self._classes}
        shared = self.layout.shared_names
        return names | ({SHARED: shared} if shared else {})

    @property
    def members(self) -> dict[str, ThetaLayout]:
        """The layout of each branch of components."""
        return dict(self._classes)

    @property
    def _classes(self) -> list[tuple[str, ThetaLayout]]:
        if isinstance(self.layout, ClassLayout):
            return list(self.layout.classes)
        return [(COMPONENTS, self.layout)]

    def _views(self, theta: Tensor) -> Sequence[Tensor]:
        """Rows of each class without shared parameters, or the rows themselves."""
        layout = self.layout
        return layout.views(theta) if isinstance(layout, ClassLayout) else [theta]

    def from_rows(self, theta: Tensor) -> tuple[Arrays, Arrays]:
        """Eryn's ``coords`` and ``inds`` of rows ``(temperatures, walkers, E)``."""
        theta, coords, inds = theta.double(), {}, {}
        for (name, own), rows in zip(self._classes, self._views(theta), strict=True):
            parts = own.unpack(rows)
            coords[name] = parts.components.numpy().copy()
            inds[name] = parts.mask.numpy().copy()
        if self.layout.num_shared:
            shared = self.layout.unpack(theta).shared
            coords[SHARED] = shared.unsqueeze(-2).numpy().copy()
            inds[SHARED] = np.ones(coords[SHARED].shape[:-1], dtype=bool)
        return coords, inds

    def to_rows(self, coords: Arrays, inds: Arrays) -> Tensor:
        """Collect leaves into float64 rows ``(temperatures, walkers, E)``."""
        counts, components = {}, {}
        for name, _ in self._classes:
            used = inds[name]
            order = np.argsort(~used, axis=-1, kind="stable")[..., None]
            sorted_ = np.take_along_axis(coords[name], order, axis=-2)
            counts[name] = torch.from_numpy(used.sum(-1))
            components[name] = torch.from_numpy(sorted_)
        shared = None
        if self.layout.num_shared:
            shared = torch.from_numpy(coords[SHARED][..., 0, :])
        return self.packed(counts, components, shared)

    def packed(
        self,
        counts: dict[str, Tensor],
        components: dict[str, Tensor],
        shared: Tensor | None,
    ) -> Tensor:
        """Rows of each branch's number of components, and components used first."""
        layout = self.layout
        if not isinstance(layout, ClassLayout):
            return layout.pack(counts[COMPONENTS], components[COMPONENTS], shared)
        rows = [
            own.pack(counts[name], components[name]) for name, own in layout.classes
        ]
        return layout.joined(rows, shared)

    def log_orders(self, rows: Tensor) -> Tensor:
        """Log of the orders in which a row's components may stand in their leaves."""
        each = [
            torch.lgamma(own.cardinality(view).double() + 1)
            for (_, own), view in zip(self._classes, self._views(rows), strict=True)
        ]
        return torch.stack(each).sum(0)


class _JointPrior:
    """Prior over all branches at once, with the names that Eryn asks for."""

    def __init__(self, prior: VariableKPrior) -> None:
        self.prior, self.leaves = prior, _Leaves(prior.layout)
        self.by_branch = {n: list(each) for n, each in self.leaves.branches.items()}
        self.key_order = [name for each in self.by_branch.values() for name in each]
        empty = prior.log_cardinality_probs[0].item()
        scaled = prior.layout.num_shared == 0 and np.isfinite(empty)
        self._offset = empty if scaled else 0.0

    def logpdf(
        self, coords: Arrays, inds: Arrays, supps: Any = None, branch_supps: Any = None
    ) -> Floats:
        """Evaluate the log-prior of every walker, ``(temperatures, walkers)``."""
        rows = self.leaves.to_rows(coords, inds)
        value = self.prior.log_prob(rows) - self.leaves.log_orders(rows)
        return (value - self._offset).numpy()


def _joint_log_likelihood(problem: Problem, x: Tensor) -> Callable[[Any, Any], Floats]:
    """The likelihood of x as a function of the leaves in use and of their walkers.

    Leaves are ``(n, parameters)`` and walkers ``(n,)``, for each branch.
    """
    evaluate = likelihood_of(problem.log_likelihood, x.double())
    leaves_of = _Leaves(problem.layout)
    members = leaves_of.members

    def log_likelihood(params: Any, groups: Any) -> Floats:
        if len(leaves_of.branches) == 1:  # then it is not in a list
            params, groups = [params], [groups]
        num = 1 + max(owner.max(initial=-1) for owner in groups)
        counts, components, shared = {}, {}, None
        for name, leaves, owner in zip(leaves_of.branches, params, groups, strict=True):
            if name == SHARED:
                shared = torch.from_numpy(np.asarray(leaves))
                continue
            own = members[name]
            found = np.zeros((num, own.max_cardinality, own.num_component_params))
            place = np.arange(len(owner)) - np.searchsorted(owner, owner)
            found[owner, place] = leaves
            components[name] = torch.from_numpy(found)
            counts[name] = torch.from_numpy(np.bincount(owner, minlength=num))
        rows = leaves_of.packed(counts, components, shared)
        return evaluate(rows).numpy()

    return log_likelihood
