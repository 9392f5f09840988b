"""Modes above cells: where they are, how high, and what lies below them."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from sbi_slotflow import slot_nn
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cells import OccupiedCells
from sbi_slotflow.nn.modes import Modes, log_evidence
from sbi_slotflow.problems import sinusoids

# amplitudes under a log-uniform prior, which prefers small ones
crowded = sinusoids("crowded")
SIZE = crowded.layout.max_cardinality
NUM_DATA, SIGMA = sum(grid.num_samples for grid in crowded.grids), 2.5
DEVIATION = SIGMA * math.sqrt(2 / NUM_DATA)


@pytest.fixture(scope="module")
def head() -> AutoregressiveHead:
    """What an untrained estimator finds modes with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = crowded.prior.sample((8,))
        build = slot_nn(crowded, refine_slots=4, trunk_features=8)
        head = build(theta, crowded.simulator(theta)).component_head
    assert isinstance(head, AutoregressiveHead)
    return head


def cells_of(*cells: int) -> OccupiedCells:
    """One set on even cells."""
    row = torch.zeros(1, SIZE).long()
    row[0, : len(cells)] = torch.tensor(cells)
    mask = torch.arange(SIZE)[None] < len(cells)
    return OccupiedCells(torch.zeros(1).long(), row, row.double(), row + 1.0, mask)


def found(head: AutoregressiveHead, x: Tensor, cell: int) -> Modes:
    assert head.find_modes is not None
    return head.find_modes(x, cells_of(cell))


def best(
    head: AutoregressiveHead, x: Tensor, cell: int, modes: Modes
) -> tuple[Tensor, float]:
    """Coordinates where likelihood times prior is highest, and its log there."""
    chart, amplitude = head.local_chart, crowded.prior.component_marginals[0]
    scale = modes.factor[0, :3, :3].diagonal().numpy()

    def cost(steps: np.ndarray) -> float:
        w = modes.mode[0, :1] + torch.from_numpy(steps * scale)
        where = chart.absolute(w, torch.tensor([cell]), modes.centre[0, :1])
        rows = torch.zeros(1, SIZE, 3)
        rows[:, 0] = chart.components(where)
        theta = crowded.layout.pack(torch.ones(1).long(), rows, torch.ones(1, 1))
        left = (x - crowded.simulator.signal(theta)).double().square().sum()
        prior = amplitude.log_density(rows[0, 0, :1].double())
        return float(0.5 * NUM_DATA * left.log() - prior)

    options = {"xatol": 1e-3, "fatol": 1e-4}
    result = optimize.minimize(
        cost, np.full(3, 0.3), method="Nelder-Mead", options=options
    )
    return torch.from_numpy(result.x), -float(result.fun)


def test_modes_are_those_of_likelihood_times_prior(head: AutoregressiveHead) -> None:
    # tones in the middles of cells 20 and 40, of 12 and of 6 deviations
    width = head.axis.num_cells
    low, high = crowded.prior.component_marginals[2].bounds
    middle = [low + (high - low) * (cell + 0.5) / width for cell in (20, 40)]
    tones = [[12 * DEVIATION, 1.0, middle[0]], [6 * DEVIATION, 2.0, middle[1]]]
    rows = torch.zeros(1, SIZE, 3)
    rows[0, :2] = torch.tensor(tones)
    theta = crowded.layout.pack(torch.tensor([2]), rows, torch.tensor([[SIGMA]]))
    x = crowded.simulator(theta, torch.Generator().manual_seed(0))
    modes = [found(head, x, cell) for cell in (20, 40)]
    true = [
        best(head, x, cell, peak) for cell, peak in zip((20, 40), modes, strict=True)
    ]
    for off, _ in true:  # in deviations; the prior moves the weak one by 0.2
        assert float(off.abs().max()) < 0.1
    difference = float(modes[0].height - modes[1].height)
    assert difference == pytest.approx(true[0][1] - true[1][1], abs=0.1)


def test_evidence_is_the_integral_over_the_cells(head: AutoregressiveHead) -> None:
    # Gaussians of two components in neighbouring cells, one of them over their common
    # edge, and of two in one cell: the mass between the ends by counting draws. 200,000
    # draws and 16 points: 10 % of the mass is about four standard errors.
    generator = torch.Generator().manual_seed(2)
    for places, offsets in (((7, 8), (0.35, 0.0)), ((7, 7), (-0.1, 0.1))):
        cells = cells_of(*places)
        chart, width = head.local_chart, head.local_chart.num_features
        size = SIZE * width
        factor = torch.eye(size).double()
        root = torch.randn(2 * width, 2 * width, generator=generator).double()
        spread = torch.tensor([0.2, 0.4, 0.1]).double().repeat(2)
        covariance = spread[:, None] * (root @ root.mT / 6 + torch.eye(6)) * spread
        factor[:6, :6] = torch.linalg.cholesky(covariance)
        mode = torch.zeros(1, SIZE, width).double()
        mode[0, :2, 0] = torch.tensor(offsets)
        height = torch.tensor([3.0]).double()
        zero = torch.zeros(1, SIZE).double()
        modes = Modes(mode, zero, factor[None], zero[..., None], *[height] * 4)
        noise = torch.randn(200_000, 6, generator=generator).double()
        w = (noise @ factor[:6, :6].mT).unflatten(-1, (2, width)) + mode[0, :2]
        low, high = (end.clone() for end in chart.ends(torch.tensor(0)))
        low[0], high[0] = -0.5, 0.5
        inside = ((w >= low) & (w <= high)).all(-1).all(-1)
        place = w[..., 0] + torch.tensor(places)
        inside &= place[:, 1] > place[:, 0]
        mass = float(inside.double().mean())
        assert 0.05 < mass < 0.8
        volume = 0.5 * float(torch.logdet(2 * math.pi * covariance))
        expected = 3.0 + volume + math.log(mass)
        value = float(log_evidence(modes, cells, chart))
        assert value == pytest.approx(expected, abs=0.1)
