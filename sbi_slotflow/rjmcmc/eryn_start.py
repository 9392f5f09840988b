"""Where the walkers of a sampler start."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..nn.charts import WhiteningChart
from ..problems.base import Problem
from ..seeding import forked_rng, generator_for

__all__ = ["Samples", "start_rows"]

# Scatter of walkers around the truth, in the prior's standard deviations.
_SCATTER = 1e-3


class Samples(Protocol):
    """Anything that draws theta rows given x."""

    def sample(self, sample_shape: Any, /, *, x: Tensor) -> Tensor:
        """Draw rows ``(*sample_shape, E)``."""
        ...


def start_rows(
    problem: Problem,
    x: Tensor,
    start: str,
    theta: Tensor | None,
    posterior: Samples | None,
    num: int,
    seed: int,
) -> Tensor:
    """Draw the rows at which walkers start.

    Args:
        problem: The problem.
        x: The observation, shape ``(T,)``.
        start: ``"prior"``, ``"truth"`` or ``"slotflow"``.
        theta: True row ``(E,)``, for ``"truth"``.
        posterior: Anything with ``sample((n,), x=x)``, for ``"slotflow"``.
        num: Number of rows.
        seed: Seed of the draws.

    Returns:
        Rows of shape ``(num, E)``.

    Raises:
        TypeError, ValueError: If an argument is missing or malformed, or rows lie
            outside the prior's support.
    """
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
    chart = problem.build_chart()

    def moved(values: Tensor, chart: Any) -> Tensor:
        u, _ = chart.forward(values)
        noise = torch.randn(u.shape, generator=generator, dtype=u.dtype)
        return chart.inverse(u + _SCATTER * noise)

    new = problem.layout.pack(
        parts.cardinality,
        torch.where(
            parts.mask.unsqueeze(-1), moved(parts.components, chart), parts.components
        ),
        moved(parts.shared, WhiteningChart(problem.prior.shared_marginals))
        if problem.layout.num_shared
        else None,
    )
    inside = torch.isfinite(problem.prior.log_prob(new))
    return torch.where(inside.unsqueeze(-1), new, rows.double())
