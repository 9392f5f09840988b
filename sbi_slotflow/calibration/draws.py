r"""Simulated pairs and posterior draws, which the checks share.

If :math:`(\theta, x)` is drawn from :math:`p(\theta)\, p(x | \theta)`, the truth
:math:`\theta` is one more draw from the exact posterior of x. Given its own K it is
one more draw from :math:`p(\Theta, s | x, K)`. Every check asks whether the truth can
be told from the draws. Pairs are handled in blocks of fixed size with random streams of
their own, so the result depends on the seed alone, not on the number of workers.

To rank components one by one, :class:`MatchedComponents` gives them labels. Draws that
are matched with the truth are pulled towards it, and an exact posterior looks too wide.
So truth and draws alike are matched with points m that know x but not the truth: a draw
given the true K that is used for nothing else (the one closest to the mean of many).
Given x, truth and draws stay exchangeable, and ranks stay uniform. The match minimises

.. math::
    \sum_{k, d} \big(\theta_{\pi(k), d} - m_{k, d}\big)^2 / s_d^2

with the posterior's standard deviations s, by the Hungarian method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..posterior.base import Posterior
from ..problems.base import Problem
from ..seeding import generator_for
from ..sets.checks import as_count, simulate
from ..sets.circular import circular_mean, near
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout
from ..sets.matching import hungarian

__all__ = [
    "BatchedPosterior",
    "CalibrationDraws",
    "MatchedComponents",
    "above_rounding",
    "cardinality_probs",
    "draw",
    "in_parallel",
]

BLOCK = 50
"""Pairs in one block."""


class BatchedPosterior(Protocol):
    """What the checks need of a posterior."""

    def sample_batched(
        self,
        sample_shape: Sequence[int],
        x: Tensor,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw rows ``(*sample_shape, B, E)``, of cardinality k if given."""
        ...

    def cardinality(self, x: Tensor | None = None) -> Categorical:
        """Return q(K | x) over 0..Kmax; ``of="line"`` for that of a class."""
        ...


@dataclass(frozen=True, eq=False)
class CalibrationDraws:
    """Pairs (theta, x) and, for each x, draws from its posterior.

    Attributes:
        layout: Layout of theta.
        cardinality_prior: p(K) of the pairs, shape ``(Kmax + 1,)``.
        theta: True rows, shape ``(n, E)``.
        x: Data, shape ``(n, T)``.
        draws: Draws from q(K, Theta, s | x), shape ``(L, n, E)``.
        given_k: Draws from q(Theta, s | x, K) at the true K, shape ``(L, n, E)``.
        guides: More of the same, from which labels and scales are taken, shape
            ``(H, n, E)``.
        probs: q(K | x), float64, shape ``(n, Kmax + 1)``.
        seed: Seed of all of them.
        complete: Of components of several classes: pairs whose draws given K have as
            many of each class as the truth, ``(n,)``; None where there are no classes.
    """

    layout: ThetaLayout
    cardinality_prior: Tensor
    theta: Tensor
    x: Tensor
    draws: Tensor
    given_k: Tensor
    guides: Tensor
    probs: Tensor
    seed: int
    complete: Tensor | None = None

    def of_class(self, name: str, prior: Tensor, probs: Tensor) -> "CalibrationDraws":
        """The pairs of one class alone, those that are complete.

        Which they are follows from x and the true numbers of components, so that what
        is true of all pairs is true of them.

        Args:
            name: Name of the class.
            prior: p(K) of the class.
            probs: q(K | x) of the class, for all pairs.
        """
        layout, complete = self.layout, self.complete
        if not isinstance(layout, ClassLayout) or complete is None:
            raise ValueError(f"these draws have no classes, got name={name!r}.")

        def own(rows: Tensor) -> Tensor:
            return layout.view(rows[:, complete], name)

        return CalibrationDraws(
            layout.of_class(name),
            prior,
            layout.view(self.theta[complete], name),
            self.x[complete],
            own(self.draws),
            own(self.given_k),
            own(self.guides),
            probs[complete],
            self.seed,
        )

    @property
    def num(self) -> int:
        """Number n of pairs."""
        return len(self.theta)

    @property
    def cardinality(self) -> Tensor:
        """True K, int64, shape ``(n,)``."""
        return self.layout.cardinality(self.theta)

    def generator(self, stream: int) -> torch.Generator:
        """Source of randomness of one check, numbered."""
        return generator_for(self.seed, 1, stream)


def draw(
    posterior: BatchedPosterior,
    problem: Problem,
    n: int = 1_000,
    *,
    num_draws: int = 200,
    num_guides: int = 64,
    seed: int = 0,
    num_workers: int = 1,
    show_progress: bool = False,
) -> CalibrationDraws:
    """Simulate pairs and draw from their posteriors.

    Args:
        posterior: The posterior to check.
        problem: The problem that it claims to solve.
        n: Number of pairs.
        num_draws: Draws L of either kind for each pair.
        num_guides: Draws H that labels and scales are taken from.
        seed: Seed of everything.
        num_workers: Processes of joblib; -1 for one a core.
        show_progress: Whether to show a progress bar.

    Raises:
        TypeError: If the posterior lacks a method.
        ValueError: If a number is too small, or draws don't fit the problem's layout.
    """
    for name in ("sample_batched", "cardinality"):
        if not callable(getattr(posterior, name, None)):
            advice = ""
            if hasattr(posterior, "posterior_estimator"):  # one of sbi's own
                advice = " Build it by SlotNPE, or by SlotPosterior(estimator, prior)."
            kind = type(posterior).__name__
            raise TypeError(f"posterior must have a method {name}, got {kind}.{advice}")
    n, num_draws = as_count(n, "n", 20), as_count(num_draws, "num_draws", 20)
    num_guides = as_count(num_guides, "num_guides", 2)
    if num_workers != -1:
        num_workers = as_count(num_workers, "num_workers")
    given = (num_draws, num_guides, seed)
    jobs = [
        partial(_block, posterior, problem, min(BLOCK, n - start), *given, start)
        for start in range(0, n, BLOCK)
    ]
    blocks = in_parallel(jobs, num_workers, "draws", show_progress)
    columns = list(zip(*blocks, strict=True))
    theta, x, probs, complete = (torch.cat(part) for part in columns[:4])
    draws, given_k, guides = (torch.cat(part, dim=1) for part in columns[4:])
    prior = problem.prior.cardinality_probs.double().cpu()
    found = theta, x, draws, given_k, guides, probs, seed
    classes = isinstance(problem.layout, ClassLayout)
    return CalibrationDraws(
        problem.layout, prior, *found, complete=complete if classes else None
    )


def _block(
    posterior: BatchedPosterior,
    problem: Problem,
    size: int,
    num_draws: int,
    num_guides: int,
    seed: int,
    start: int,
) -> tuple[Tensor, ...]:
    """Theta, x, q(K | x), which are complete, draws, those given K, guides."""
    source = generator_for(seed, 0, start, 0)
    theta = problem.prior.sample((size,), source).cpu()
    x = simulate(problem.simulator, theta, source)
    device = getattr(posterior, "_device", "cpu")
    generator = generator_for(seed, 0, start, 1, device=device)
    batch = x.to(device)
    probs = cardinality_probs(posterior, batch)
    counts = problem.layout.cardinality(theta)
    draws = theta.new_empty(num_draws, *theta.shape)
    rows = theta.new_empty(num_draws + num_guides, *theta.shape)
    complete = torch.ones(size, dtype=torch.bool)
    for k in counts.unique().tolist():
        here = counts == k
        sample = _sampler(posterior, batch[here], generator)
        found = sample(num_draws, None)
        problem.layout.validate(found, "posterior draws")
        draws[:, here] = found
        rows[:, here], complete[here] = _given_k(
            lambda num, k=k, sample=sample: sample(num, k),
            problem.layout,
            theta[here],
            len(rows),
        )
    return theta, x, probs, complete, draws, rows[:num_draws], rows[num_draws:]


def _sampler(
    posterior: BatchedPosterior, x: Tensor, generator: torch.Generator
) -> Callable[[int, int | None], Tensor]:
    """A function that draws so many rows ``(num, B, E)`` given x, of some K.

    What a posterior finds out about x is found out once, if it can keep it.
    """
    keeps = isinstance(posterior, Posterior)
    if keeps and type(posterior).sample_batched is Posterior.sample_batched:
        with torch.no_grad():
            sets = posterior.given(posterior.observations(x))
        return lambda num, k: sets.sample((num,), k, generator).cpu()
    return lambda num, k: posterior.sample_batched(
        (num,), x, generator=generator, **({} if k is None else {"k": k})
    ).cpu()


def _given_k(
    sample: Callable[[int], Tensor], layout: ThetaLayout, theta: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """Rows ``(num, n, E)`` of theta's K, and which pairs have them all, ``(n,)``.

    Where components have classes, there are as many of each as in theta. A pair for
    which too few of ten times as many draws are is left as it was.
    """
    rows = sample(num)
    if not isinstance(layout, ClassLayout):
        return rows, torch.ones(len(theta), dtype=torch.bool)
    kind, rows = layout.kind(theta), rows.clone()
    good = layout.kind(rows) == kind
    for _ in range(_MOST_ROUNDS):
        short = (~good.all(0)).nonzero().squeeze(-1)
        if not len(short):
            break
        found = sample(num)
        fits = layout.kind(found) == kind
        for i in short.tolist():
            new, free = found[fits[:, i], i], (~good[:, i]).nonzero()[:, 0]
            filled = min(len(new), len(free))
            rows[free[:filled], i] = new[:filled]
            good[free[:filled], i] = True
    return rows, good.all(0)


@torch.no_grad()
def cardinality_probs(
    posterior: BatchedPosterior, x: Tensor, of: str | None = None
) -> Tensor:
    """q(K | x), float64 on the CPU, summing to one, shape ``(B, Kmax + 1)``.

    Of one class, if named.
    """
    options: dict[str, Any] = {} if of is None else {"of": of}
    device = getattr(posterior, "_device", "cpu")
    batches = [part.to(device) for part in x.split(BLOCK)]
    found = _on_one_thread(
        lambda: [
            torch.atleast_2d(posterior.cardinality(b, **options).probs) for b in batches
        ]
    )
    probs = torch.cat(found).double().cpu()
    return probs / probs.sum(-1, keepdim=True)


def in_parallel(
    jobs: Sequence[Callable[[], Any]], num_workers: int, what: str, show_progress: bool
) -> list[Any]:
    """Results of jobs, each done on one thread, with a progress bar."""
    from joblib import Parallel, delayed
    from tqdm.auto import tqdm

    workers = Parallel(n_jobs=num_workers, return_as="generator")
    found: Any = workers(delayed(_on_one_thread)(job) for job in jobs)
    return list(tqdm(found, what, len(jobs), disable=not show_progress))


def _on_one_thread(job: Callable[[], Any]) -> Any:
    """Do a job with one thread of torch: sums in another order round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return job()
    finally:
        torch.set_num_threads(before)


# Times that as many draws are made again, to have those with the true numbers.
_MOST_ROUNDS = 10
# Matrices of costs handled at once.
_CHUNK = 20_000
# Below this share of their size, deviations are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class MatchedComponents:
    """Truths and draws given the true K, with labels of one meaning.

    Angles are shifted by whole turns to lie near the reference points.

    Attributes:
        source: Where the draws come from.
    """

    source: CalibrationDraws

    @property
    def mask(self) -> Tensor:
        """True where there is a component, shape ``(n, Kmax)``."""
        return self.source.layout.mask(self.source.cardinality)

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shared parameters of truth ``(n, S)``, draws and guides ``(L, n, S)``."""
        layout, source = self.source.layout, self.source
        periods = layout.shared_periods
        guides = layout.unpack(source.guides).shared.double()
        centre = circular_mean(guides, periods)
        found = (layout.unpack(r).shared for r in (source.theta, source.given_k))
        truth, draws = (near(values.double(), centre, periods) for values in found)
        return truth, draws, near(guides, centre, periods)

    @cached_property
    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Matched components of truth ``(n, Kmax, D)``, draws and guides likewise."""
        rows = (self.source.theta.unsqueeze(0), self.source.given_k, self.source.guides)
        truth, draws, guides = (self._matched(part) for part in rows)
        return truth[0], draws, guides

    @cached_property
    def deviations(self) -> tuple[Tensor, Tensor]:
        """Components of truth and draws, standardised by the guides; 0 for padding."""
        truth, draws, guides = self.components
        std = above_rounding(guides.std(0), guides.abs().amax(0))
        mean, mask = guides.mean(0), self.mask.unsqueeze(-1)
        truth, draws = (
            torch.where(mask, (part - mean) / std, 0.0) for part in (truth, draws)
        )
        return truth, draws

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor]:
        """Reference points ``(n, Kmax, D)`` and scales ``(n, 1, D)``."""
        guides = self.source.layout.unpack(self.source.guides).components.double()
        periods = self.source.layout.component_periods
        centre = circular_mean(guides, periods)
        offset = near(guides, centre, periods) - centre
        mask = self.mask.unsqueeze(-1)
        square = torch.where(mask, offset.square(), 0.0)
        count = mask.sum(-2, keepdim=True).clamp(min=1) * len(guides)
        variance = square.sum(0).sum(-2, keepdim=True) / count
        scale = above_rounding(variance.sqrt(), centre.abs().amax(-2, keepdim=True))
        distance = (square / scale.square()).sum((-2, -1))
        closest = distance.argmin(0)
        return guides[closest, torch.arange(self.source.num)], scale

    def _matched(self, rows: Tensor) -> Tensor:
        """Components ``(S, n, Kmax, D)`` of rows ``(S, n, E)``, relabelled."""
        source, (points, scale) = self.source, self._points
        periods, found = source.layout.component_periods, []
        components = source.layout.unpack(rows).components.double()
        for part in components.split(max(1, _CHUNK // source.num)):
            pairs = near(part.unsqueeze(-3), points.unsqueeze(-2), periods)
            pairs = (pairs - points.unsqueeze(-2)) / scale.unsqueeze(-2)
            cost = pairs.square().sum(-1).flatten(0, 1)
            order = hungarian(-cost, source.cardinality.repeat(len(part)))
            index = order.reshape(part.shape[:-1]).unsqueeze(-1).expand_as(part)
            found.append(near(part.gather(-2, index), points, periods))
        return torch.cat(found)


def above_rounding(scale: Tensor, size: Tensor) -> Tensor:
    """Scales of values of a size: never below their rounding; 1 where all are zero."""
    scale = torch.maximum(scale, _ROUNDING * size)
    return torch.where(scale > 0, scale, 1.0)
