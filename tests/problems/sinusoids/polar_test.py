"""Splits and merges of neighbours against the prior and each other."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest

from sbi_slotflow import problems
from sbi_slotflow.posterior.moves import Population, metropolis
from sbi_slotflow.problems.sinusoids.polar import PolarChart, SplitMove, _Phasors
from sbi_slotflow.seeding import generator_for

CROWDED = problems.sinusoids("crowded")
PRIOR, LAYOUT = CROWDED.prior, CROWDED.layout
CHART = CROWDED.build_chart()
assert isinstance(CHART, PolarChart)
MOVE = SplitMove(LAYOUT, CHART)


def prior_rows(num: int, k: int | None = None) -> torch.Tensor:
    prior = PRIOR
    if k is not None:
        prior = prior.with_cardinality([float(i == k) for i in range(11)])
    return prior.sample((num,), generator_for(0)).double()


def test_the_prior_is_invariant() -> None:
    """False alarms: 4e-5, of four tests at 1e-5 each."""

    def evaluate(theta: torch.Tensor) -> Population:
        log_p = PRIOR.log_prob(theta).double()
        return Population(theta, log_p, log_p)

    start = prior_rows(20_000)
    population, rates = evaluate(start), []
    for sweep in range(8):
        population, rate = metropolis(
            population, MOVE, 1.0, evaluate, generator_for(1, sweep)
        )
        rates.append(rate)
    assert min(rates) > 0.02
    theta = population.theta
    assert torch.equal(LAYOUT.canonical(theta), theta)
    counts = torch.bincount(LAYOUT.cardinality(theta), minlength=11)
    expected = PRIOR.cardinality_probs.double() * len(theta)
    result: Any = chisquare(counts, expected / expected.sum() * len(theta))
    assert result.pvalue > 1e-5
    moved = LAYOUT.cardinality(theta) != LAYOUT.cardinality(start)
    assert moved.double().mean() > 0.1
    # One component of each set: those of a set are not independent of each other.
    parts = LAYOUT.unpack(theta)
    some = parts.mask.any(-1)
    weights = parts.mask[some].double()
    chosen = torch.multinomial(weights, 1, generator=generator_for(2)).squeeze(-1)
    picked = parts.components[some, chosen]
    for marginal, values in zip(PRIOR.component_marginals, picked.T, strict=True):
        result = kstest(marginal.fraction(values).numpy(), "uniform")
        assert result.pvalue > 1e-5


def test_a_merge_undoes_a_split() -> None:
    start = prior_rows(2_000, k=1)
    split, log_ratio = MOVE._split(start, generator_for(3))
    done = torch.isfinite(log_ratio)
    assert done.double().mean() > 0.2
    assert (LAYOUT.cardinality(split[done]) == 2).all()
    merged, back = MOVE._merge(split[done], generator_for(4))
    # Either order of the two may be drawn, and leads to the same whole.
    gap = (
        LAYOUT.unpack(merged).components[:, 0]
        - (LAYOUT.unpack(start[done]).components[:, 0])
    )
    gap[:, 1] = torch.remainder(gap[:, 1] + math.pi, math.tau) - math.pi
    assert gap.abs().max() < 1e-6
    amplitudes = LAYOUT.unpack(split[done]).components[:, :2, 0].log()
    # -log p(A_1) - log A_2 of the one that is drawn first, p being log-uniform.
    swapped = 2 * (amplitudes[:, 0] - amplitudes[:, 1]).abs()
    # In the other order a split may have drawn what the prior excludes.
    possible = torch.isfinite(back)
    assert possible.double().mean() > 0.9
    error = (back + log_ratio[done]).abs()[possible]
    swapped = swapped[possible]
    assert torch.minimum(error, (error - swapped).abs()).max() < 1e-6
    assert 0.4 < (error < 1e-6).double().mean() < 0.6


def test_the_jacobian_of_a_split_is_that_of_its_map() -> None:
    def parts(v: torch.Tensor) -> torch.Tensor:
        whole = _Phasors(torch.complex(v[2], v[3]), v[4])
        first, second = MOVE._parts(whole, torch.complex(v[0], v[1]), v[5])
        z = torch.view_as_real(torch.stack([first.z, second.z])).flatten()
        return torch.cat([z, torch.stack([first.frequency, second.frequency])])

    for d in (0.3 + 0.2j, -0.9 + 0.4j, 1.7 - 1.1j):
        z, gap = 0.6 - 0.5j, 0.7 / MOVE.duration
        point = torch.tensor([d.real, d.imag, z.real, z.imag, 2.7, gap]).double()
        jacobian: Any = torch.autograd.functional.jacobian(parts, point)
        response = MOVE._response(torch.tensor(d / z), torch.tensor(gap).double())
        assert torch.isclose(
            jacobian.det().abs(), response.abs().double() ** -4, rtol=1e-5
        )
        # and the ratio has it: what remains has no D
        first, second = MOVE._parts(
            _Phasors(torch.tensor(z), point[4]), torch.tensor(d), point[5]
        )
        log_ratio = MOVE._log_ratio(torch.tensor(z), first, second)
        log_g = CHART.marginals[0].log_density(torch.tensor(abs(d)).double())
        log_g = log_g - math.log(math.tau * abs(d))
        log_h = -math.log(2 * MOVE.log_range * gap)
        areas = abs(z) / (first.z.abs() * second.z.abs())
        wanted = areas.log() + jacobian.det().abs().log() - log_g - log_h - math.log(2)
        assert torch.isclose(log_ratio.double(), wanted, atol=1e-4)


def test_the_frequencies_of_two_that_are_close_fit_the_whole_best() -> None:
    """To first order of the gap; false alarms: none, the seed is fixed."""
    start = prior_rows(4_000, k=1)
    split, log_ratio = MOVE._split(start, generator_for(5))
    parts = LAYOUT.unpack(split)
    gap = parts.components[:, 1, 2] - parts.components[:, 0, 2]
    resolution = 1 / CROWDED.grids[0].duration
    close = torch.isfinite(log_ratio) & (gap < 0.05 * resolution)
    # Where two nearly cancel, what is of second order is most of what remains.
    largest = parts.components[:, :2, 0].max(-1).values
    close &= LAYOUT.unpack(start).components[:, 0, 0] > 0.5 * largest
    assert close.sum() > 50
    before = CROWDED.simulator.signal(start[close])

    def error(shift: float) -> torch.Tensor:
        chosen = LAYOUT.unpack(split[close])
        components = chosen.components.clone()
        moved = shift * gap[close].unsqueeze(-1)
        components[:, :2, 2] += moved
        # phases stay where they are in the middle of the record
        components[:, :2, 1] -= math.tau * MOVE.chart.reference_time * moved
        theta = LAYOUT.pack(chosen.cardinality, components, chosen.shared)
        return (CROWDED.simulator.signal(theta) - before).square().mean(-1)

    best = error(0.0)
    for shift in (-0.3, 0.3):
        assert (best < error(shift)).double().mean() > 0.95


def test_sets_that_cannot_change_are_left_alone() -> None:
    empty, full = prior_rows(50, k=0), prior_rows(50, k=10)
    for rows, change in ((empty, MOVE._split), (full, MOVE._split)):
        theta, log_ratio = change(rows, generator_for(6))
        assert torch.isneginf(log_ratio).all()
        assert not log_ratio.isnan().any()
        assert torch.equal(theta, rows)
    for rows in (empty, prior_rows(50, k=1)):
        theta, log_ratio = MOVE._merge(rows, generator_for(6))
        assert torch.isneginf(log_ratio).all()
        assert torch.equal(theta, rows)


def test_other_components_are_refused() -> None:
    spikes = problems.spikes()
    assert not spikes.build_chart().extra_moves(spikes.layout)
    single = problems.sinusoids("tiny", cardinality=[1.0, 1.0])
    assert not single.build_chart().extra_moves(single.layout)
    with pytest.raises(ValueError, match="components must be"):
        SplitMove(single.layout, single.build_chart())  # pyright: ignore
