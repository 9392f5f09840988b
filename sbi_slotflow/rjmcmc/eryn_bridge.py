r"""Reversible-jump MCMC with Eryn (Karnesis et al. 2023) for the package's problems.

One branch holds the components, a second one of exactly one leaf the shared parameters.
Prior and likelihood are the problem's own (:mod:`.eryn_target`); walkers at ten
temperatures move by :class:`ComponentStretchMove` given K, by births and deaths drawn
from the prior or, with :class:`SlotFlowMove`, from trained slots between K's, and by
swaps between temperatures.

What to know of Eryn 1.2.6:

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
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..posterior.component_proposals import PriorComponents
from ..posterior.draws import PosteriorDraws
from ..problems.base import Problem
from .eryn_start import Samples, start_rows
from .eryn_target import COMPONENTS, JointPrior, Leaves, joint_log_likelihood

__all__ = ["ErynSampler", "eryn_sampler"]

# Temperatures rise by equal factors up to this one; the last is infinite.
_MAX_TEMPERATURE = 1e3


class ErynSampler:
    """An Eryn sampler with its walkers; made by :func:`eryn_sampler`.

    Args:
        problem: The problem.
        x: The observation, shape ``(T,)``.
        sampler: Eryn's ``EnsembleSampler``.
        start: Rows at which walkers start, ``(temperatures, walkers, E)``.
        seed: Seed of all randomness.

    Attributes:
        sampler: Eryn's ``EnsembleSampler``.
    """

    def __init__(
        self, problem: Problem, x: Tensor, sampler: Any, start: Tensor, seed: int
    ) -> None:
        from eryn.state import State

        self.problem, self.x, self.sampler = problem, x, sampler
        self._leaves = Leaves(problem.layout)
        coords, inds = self._leaves.from_rows(start)
        self._state: Any = State(coords, inds=inds)
        sampler.random_state = _numpy_state(seed, 0)
        self._global_state = _numpy_state(seed, 1)

    def run(
        self, num_steps: int, burn_in: int = 0, thin: int = 1, progress: bool = False
    ) -> PosteriorDraws:
        """Advance the walkers from where they are.

        Temperatures adapt during burn-in only. The kept steps of all temperatures stay
        in ``sampler``, for its ``get_chain`` and acceptance fractions.

        Args:
            num_steps: Steps after burn-in.
            burn_in: Steps that are thrown away first.
            thin: Keep every ``thin``-th step.
            progress: Whether to show progress bars.

        Returns:
            The cold walkers, theta of shape ``(walkers, num_steps // thin, E)``.

        Raises:
            ValueError: If a number is too small.
        """
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("burn_in", burn_in, 0),
            ("thin", thin, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value}.")
        if num_steps < thin:
            raise ValueError(f"num_steps must be at least thin, got {num_steps}.")
        rows = []
        with self._global_generator(), warnings.catch_warnings():
            # with few walkers it happens that none has a partner to stretch towards
            warnings.filterwarnings("ignore", "All points input for the Likelihood")
            for _ in self._steps(burn_in, adaptive=True, store=False, bar=progress):
                pass
            kept = num_steps // thin
            for _ in self._steps(kept, adaptive=False, thin_by=thin, bar=progress):
                rows.append(self._cold_rows())
        theta = torch.stack(rows, dim=1)
        return PosteriorDraws(self.problem.layout, theta, self.x)

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
    posterior: Samples | None = None,
    num_walkers: int = 20,
    num_temperatures: int = 10,
    moves: Sequence[Any] | None = None,
    seed: int = 0,
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
        options: Further options of Eryn's ``EnsembleSampler``, for example
            ``num_repeats_in_model``.

    Raises:
        ImportError: If Eryn is not installed.
        TypeError: If problem is no ``Problem``.
        ValueError: If an argument has a wrong shape or value, is missing, or a start
            lies outside the prior's support.
    """
    from .eryn_import import require_eryn

    require_eryn()
    from eryn.ensemble import EnsembleSampler
    from eryn.moves import ReversibleJumpMove
    from eryn.utils import PeriodicContainer

    from .eryn_moves import ComponentStretchMove, SlotFlowMove, leaf_limits

    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}.")
    for name, value, least in (
        ("num_walkers", num_walkers, 2),
        ("num_temperatures", num_temperatures, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value}.")
    data = torch.as_tensor(x)
    if data.shape not in ((problem.num_data,), (1, problem.num_data)):
        raise ValueError(
            f"x must be one observation of length {problem.num_data}, got shape "
            f"{tuple(data.shape)}."
        )
    if not torch.isfinite(data).all():
        raise ValueError("x must be finite, got NaN or Inf.")
    data = data.reshape(-1)
    rows = start_rows(
        problem, data, start, theta, posterior, num_temperatures * num_walkers, seed
    )
    prior, layout = problem.prior, problem.layout
    low, high = leaf_limits(prior)
    branches = Leaves(layout).branches
    pairs = [move if isinstance(move, tuple) else (move, 1.0) for move in moves or ()]
    jumps = [pair for pair in pairs if isinstance(pair[0], ReversibleJumpMove)]
    others = [pair for pair in pairs if not isinstance(pair[0], ReversibleJumpMove)]
    births = SlotFlowMove(PriorComponents(prior.component), low, high, update_share=0)
    named = zip(layout.component_names, layout.component_periods, strict=True)
    circular = {name: period for name, period in named if math.isfinite(period)}
    periodic = PeriodicContainer(
        {name: {} for name in branches} | {COMPONENTS: circular},
        key_order={name: list(parameters) for name, parameters in branches.items()},
    )
    empty = torch.zeros(layout.size, dtype=torch.float64)
    sampler = EnsembleSampler(
        num_walkers,
        {name: len(parameters) for name, parameters in branches.items()},
        joint_log_likelihood(problem, data),
        {"all_models_together": JointPrior(prior)},
        provide_groups=True,
        vectorize=True,
        tempering_kwargs=(
            {"betas": _ladder(num_temperatures)} if num_temperatures > 1 else {}
        ),
        branch_names=list(branches),
        nleaves_max=high,  # pyright: ignore[reportArgumentType]
        nleaves_min=low,  # pyright: ignore[reportArgumentType]
        moves=others or [(ComponentStretchMove(layout.order_by), 1.0)],
        rj_moves=jumps or [(births, 1.0)],
        periodic=periodic,
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


def _ladder(num: int) -> Any:
    """Inverse temperatures of ``num`` > 1 rungs."""
    return np.append(np.geomspace(1, 1 / _MAX_TEMPERATURE, num)[:-1], 0.0)


def _numpy_state(seed: int, stream: int) -> Any:
    words = np.random.SeedSequence((seed, stream)).generate_state(8)
    return np.random.RandomState(words).get_state()
