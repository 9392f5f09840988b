"""Images: components with a place of two parameters, on a grid of cells."""

import math
from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, Uniform

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    VariableKPrior,
    WhiteNoise,
    rjmcmc,
    slot_nn,
)
from sbi_slotflow.nn.cells import CellAxis, CellGrid
from sbi_slotflow.nn.class_cells import axis_from_spec
from sbi_slotflow.nn.encoders import PatchTokens, TokenEncoder
from sbi_slotflow.problems import Image, Trace, spikes, stars

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
    "weighed_sets": 64,
}
# Laplace approximations alone, without a flow.
PLAIN: dict[str, Any] = {
    "flow_layers": 0,
    "flow_hidden_features": None,
    "trunk_features": "default",
}


def blob(components: Tensor) -> Tensor:
    """Blobs on 8 x 12 pixels of components (x, y, flux)."""
    x, y, flux = components[..., None, None].unbind(-3)
    column, row = torch.arange(12.0) + 0.5, torch.arange(8.0).unsqueeze(1) + 0.5
    distance = (column - x).square() + (row - y).square()
    return flux * torch.exp(-0.5 * distance / 1.2**2)


def blob_prior(order_by: int = 0, **options: Any) -> VariableKPrior:
    low, high = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([12.0, 8.0, 4.0])
    return VariableKPrior(
        Independent(Uniform(low, high), 1),
        [1.0, 1.0, 1.0],
        order_by=order_by,
        component_names=("x", "y", "flux"),
        **options,
    )


def blobs(order_by: int = 0, sigma: float = 1.0, **options: Any) -> Image:
    prior = blob_prior(order_by)
    simulator = AdditiveSimulator(blob, WhiteNoise(sigma), prior.layout)
    return Image("blobs", prior, simulator, linear=("flux",), **options)


def estimator_of(problem: Image | Trace, **options: Any) -> Any:
    torch.manual_seed(0)
    theta = problem.prior.sample((32,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    return slot_nn(problem, **SMALL | options)(theta, x).eval(), x


@pytest.fixture(params=[(2, 3), (1, 4), (4, 1), (8, 8)], ids=str)
def grid(request: pytest.FixtureRequest) -> CellGrid:
    rows, columns = request.param
    return CellGrid(0, rows * columns, across=1, rows=rows)


def test_cells_of_a_grid_are_numbered_row_by_row(grid: CellGrid) -> None:
    columns, rows = grid.lengths
    edges = torch.arange(grid.num_cells + 1.0, dtype=torch.float64)[None]
    for row, column in product(range(rows), range(columns)):
        for inside in ([0.0, 0.0], [0.5, 0.5], [0.999, 0.999]):
            place = torch.tensor([column, row]).double() + torch.tensor(inside)
            position = grid.position(place)[None, None]
            assert grid.cells(position, edges).item() == row * columns + column
    assert torch.equal(
        grid.middles(torch.arange(grid.num_cells)),
        torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        .flip(-1)
        .double()
        + 0.5,
    )


def test_the_end_of_a_row_is_in_its_last_cell(grid: CellGrid) -> None:
    columns, rows = grid.lengths
    edges = torch.arange(grid.num_cells + 1.0, dtype=torch.float64)[None]
    for row in range(rows):
        end = torch.tensor([columns, row + 0.5]).double()
        cell = grid.cells(grid.position(end)[None, None], edges)
        assert cell.item() == row * columns + columns - 1
    corner = torch.tensor([columns, rows]).double()
    cell = grid.cells(grid.position(corner)[None, None], edges)
    assert cell.item() == grid.num_cells - 1


def test_spans_are_where_cells_are(grid: CellGrid) -> None:
    columns, rows = grid.lengths
    cells = torch.arange(grid.num_cells)
    along, across = grid.spans(cells, cells.double(), cells + 1.0)
    middle = torch.stack([(low + high) / 2 for low, high in (along, across)], -1)
    torch.testing.assert_close(
        middle * torch.tensor([columns, rows]).double(), grid.middles(cells).double()
    )


def test_steps_do_not_lead_around_the_grid() -> None:
    grid = CellGrid(0, 64, across=1, rows=8)
    steps = torch.tensor(grid.steps(6))
    cells, inside = grid.stepped(torch.arange(64), steps)
    middles = grid.middles(torch.arange(64)).unsqueeze(1)
    there = grid.middles(cells) - middles
    expected = steps.flip(-1).double().expand_as(there)
    assert torch.equal(there[inside], expected[inside])
    assert not inside[7, (steps == torch.tensor([0, 1])).all(-1)].any()
    # Every step leads on: no cell before this one is looked at.
    assert (cells >= torch.arange(64).unsqueeze(1))[inside].all()


def test_a_grid_is_rebuilt_from_its_fields() -> None:
    for axis in (CellAxis(2, 8, 0.5), CellGrid(0, 6, across=2, rows=3)):
        rebuilt = axis_from_spec(asdict(axis))
        assert rebuilt == axis
        assert type(rebuilt) is type(axis)


@pytest.mark.parametrize(
    "options", [{"rows": 4}, {"rows": 3, "separation": 0.1}], ids=str
)
def test_a_grid_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rows|separation"):
        CellGrid(0, 6, across=1, **options)


@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12)], ids=str)
def test_a_patch_holds_its_cell_and_half_a_cell_around(shape: tuple[int, ...]) -> None:
    tokens = PatchTokens(shape, (2, 3))
    x = torch.randn(2, *shape)
    channels, level, edges = tokens(x)
    assert edges is None
    assert level.shape == (2, 1)
    assert channels.shape == (2, 6, tokens.channels)
    images = x.reshape(2, -1, 8, 12)
    # The patch of the cell in row 1, column 1: columns 2..9, rows 2..9 (8, 9 repeated).
    patch = channels[:, 4, : images.shape[1] * 64].reshape(2, -1, 8, 8)
    assert torch.equal(patch[:, :, :6], images[:, :, 2:, 2:10])
    assert torch.equal(patch[:, :, 6], images[:, :, 7, 2:10])


def test_an_encoder_of_patches_refuses_another_shape() -> None:
    encoder = TokenEncoder(PatchTokens((8, 12), (2, 3)), 8, 8)
    with pytest.raises(ValueError, match=r"8, 12.*12, 8"):
        encoder(torch.zeros(1, 12, 8))
    with pytest.raises(ValueError, match="grid must divide"):
        PatchTokens((8, 12), (3, 3))


@pytest.mark.parametrize("options", [{}, {"coupling": "factorised"}], ids=str)
@pytest.mark.parametrize("order_by", [0, 1])
def test_draws_lie_in_the_prior_and_have_a_density(
    order_by: int, options: dict[str, Any]
) -> None:
    problem = blobs(order_by)
    if options:
        options = {**options, "weighed_sets": None}
    estimator, x = estimator_of(problem, **options)
    with torch.no_grad():
        sets = estimator.given(x[:6])
        draws = sets.sample((200,), generator=torch.Generator().manual_seed(2))
        value = sets.log_prob(draws)
    assert problem.prior.log_prob(draws).isfinite().all()
    assert value.isfinite().all()
    order = problem.layout.unpack(draws).components[..., order_by]
    mask = problem.layout.unpack(draws).mask
    both = mask[..., 1:]
    assert (order.diff(dim=-1)[both] >= 0).all()


@pytest.mark.parametrize("options", [{}, {"coupling": "factorised"}], ids=str)
def test_the_density_of_a_set_integrates_to_one(options: dict[str, Any]) -> None:
    # Noise that hides most of the blobs: the prior then covers the posterior, and the
    # mean of q over the prior's density has a small error.
    problem = blobs(sigma=6.0)
    if options:
        options = {**options, "weighed_sets": None}
    estimator, x = estimator_of(problem, **options)
    theta = problem.prior.sample((40_000,), torch.Generator().manual_seed(3))
    with torch.no_grad():
        value = estimator.given(x[:1]).log_prob(theta.unsqueeze(1))[:, 0]
    ratio = (value.double() - problem.prior.log_prob(theta).double()).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.02
    # Four deviations: a false alarm in 16,000.
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_the_density_does_not_depend_on_labels_or_on_the_order() -> None:
    estimators = [estimator_of(blobs(order_by)) for order_by in (0, 1)]
    problem = blobs(0)
    estimators[1][0].load_state_dict(estimators[0][0].state_dict())
    x = estimators[0][1][:1]
    theta = problem.prior.sample((200,), torch.Generator().manual_seed(4))
    values = []
    with torch.no_grad():
        for estimator, _ in estimators:
            sets = estimator.given(x)
            for rows in (theta, problem.layout.relabel(theta)):
                values.append(sets.log_prob(rows.unsqueeze(1))[:, 0])
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", [(3.0, 2.5), (6.0, 4.0), (4.0, 4.02), (11.7, 0.2)])
def test_widths_are_those_of_the_cramer_rao_bound(place: tuple[float, float]) -> None:
    """In a cell, on the corner of four, and at the image's own edge."""
    problem = blobs(sigma=0.05)
    estimator, _ = estimator_of(problem, **PLAIN)
    component = torch.tensor([*place, 3.0], dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda c: blob(c).flatten(), component)
    bound = (torch.linalg.inv(slopes.mT @ slopes) * 0.05**2).diagonal().sqrt()
    noise = torch.randn(8, 12, generator=torch.Generator().manual_seed(5))
    # Widths are those of the noise that is known, not of the residual's.
    noise = 0.8 * noise / noise.square().mean().sqrt()
    x = (blob(component) + 0.05 * noise.double()).float()[None]
    with torch.no_grad():
        draws = estimator.given(x).sample(
            (4_000,), k=1, generator=torch.Generator().manual_seed(6)
        )
    found = problem.layout.unpack(draws[:, 0]).components[:, 0].double()
    away = (found.mean(0) - component) / bound
    assert away.abs().max() < 5
    inside = slice(0, 3) if place[0] < 11 else slice(2, 3)
    ratio = (found.std(0) / bound)[inside]
    assert (ratio - 1).abs().max() < 0.12


def test_the_collapsed_sampler_agrees_with_the_network_on_one_blob() -> None:
    problem = blobs(sigma=0.3)
    estimator, _ = estimator_of(problem, **PLAIN)
    component = torch.tensor([5.0, 4.0, 3.0])
    noise = torch.randn(8, 12, generator=torch.Generator().manual_seed(7))
    x = blob(component) + 0.3 * noise
    exact = rjmcmc.collapsed(problem, x, num_draws=300, burn_in=500)
    rows = exact.sample((4_000,), generator=torch.Generator().manual_seed(8))
    ones = rows[problem.layout.cardinality(rows) == 1]
    with torch.no_grad():
        draws = estimator.given(x[None]).sample(
            (4_000,), k=1, generator=torch.Generator().manual_seed(9)
        )[:, 0]
    first, second = (
        problem.layout.unpack(each).components[:, 0].double() for each in (ones, draws)
    )
    assert len(ones) > 500
    scale = first.std(0)
    assert ((first.mean(0) - second.mean(0)) / scale).abs().max() < 0.2
    assert (second.std(0) / scale - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"place": ("x", "x")}, "place must name two"),
        ({"place": ("x", "z")}, "place must name two"),
        ({"place": ("y", "flux")}, "order components by one of"),
        ({"cells": (3, 3)}, "cells must divide"),
        ({"cells": (2,)}, "cells must be two"),
        ({"linear": "flux"}, "linear must be a sequence"),
    ],
    ids=str,
)
def test_an_image_that_is_none_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    prior = blob_prior()
    simulator = AdditiveSimulator(blob, WhiteNoise(1.0), prior.layout)
    with pytest.raises((TypeError, ValueError), match=message):
        Image("blobs", prior, simulator, **changes)


def test_priors_that_cells_do_not_know_are_refused() -> None:
    close = blob_prior(min_separation=0.5)
    simulator = AdditiveSimulator(blob, WhiteNoise(1.0), close.layout)
    with pytest.raises(ValueError, match="min_separation"):
        Image("blobs", close, simulator)
    centre = torch.tensor([6.0, 4.0, 2.0])
    normal = VariableKPrior(
        Independent(Normal(centre, torch.ones(3)), 1),
        [1.0, 1.0],
        component_names=("x", "y", "flux"),
    )
    simulator = AdditiveSimulator(blob, WhiteNoise(1.0), normal.layout)
    with pytest.raises(ValueError, match="uniform in 'x'"):
        Image("blobs", normal, simulator)


def test_a_trace_is_no_image() -> None:
    prior = blob_prior()
    simulator = AdditiveSimulator(
        lambda components: blob(components).sum(-2), WhiteNoise(1.0), prior.layout
    )
    with pytest.raises(ValueError, match="signals of shape"):
        Image("blobs", prior, simulator)


def test_cells_have_about_four_pixels() -> None:
    assert blobs().grid == (2, 3)
    assert stars(size=32).grid == (8, 8)
    assert stars(size=12).location_axis().lengths == (3, 3)


def test_a_separation_holds_across_the_seam_of_a_circle() -> None:
    """The density integrates to one over pairs, whatever falls off at the seam."""
    place = torch.arange(16.0) + 0.5

    def ring(c: Tensor) -> Tensor:
        return 3.0 * torch.exp(-0.5 * ((place - c[..., :1] + 8) % 16 - 8).square())

    prior = VariableKPrior(
        Independent(Uniform(torch.zeros(1), torch.full((1,), 16.0)), 1),
        [0.0, 0.0, 1.0],
        min_separation=5.0,
        component_names=("place",),
        periods={"place": 16.0},
    )
    simulator = AdditiveSimulator(ring, WhiteNoise(30.0), prior.layout)
    problem = Trace("ring", prior, simulator, cells=8)
    estimator, x = estimator_of(problem)
    posterior = SlotPosterior(estimator, prior)
    pairs = torch.combinations((torch.arange(160) + 0.5) / 10, 2)
    rows = torch.cat([torch.full((len(pairs), 1), 2.0), pairs], -1)
    total = posterior.log_prob(rows, x[0]).double().exp().sum() * 0.1**2
    # The share of draws that is kept is known to 1 %; it is 0.83 here.
    assert float(total) == pytest.approx(1.0, abs=0.04)


def test_starts_of_sets_that_share_cells_are_those_of_each_alone() -> None:
    problem = spikes(num_samples=128, max_cardinality=3)
    theta = problem.prior.sample((2,), torch.Generator().manual_seed(0))
    x = problem.simulator(theta, torch.Generator().manual_seed(1))
    fit = problem.build_fit()
    assert fit is not None
    given, seen = fit.given(x), []
    low = torch.tensor([[0.1, 0.4, 0.4], [0.1, 0.5, 0.0], [0.4, 0.5, 0.9]]).double()
    high = low + torch.tensor([0.1, 0.05, 0.1])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    owner = torch.tensor([0, 0, 1])
    together = given.start(owner, low, high, mask)
    for i in range(3):
        here = slice(i, i + 1)
        alone = given.start(owner[here], low[here], high[here], mask[here])
        torch.testing.assert_close(together[here][mask[here]], alone[mask[here]])
        seen.append(alone[mask[here]])
    assert len(torch.cat(seen).unique(dim=0)) > 4
