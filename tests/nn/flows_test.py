"""Conditional flows: bijections, normalised densities, shared contexts."""

import math
from itertools import product
from typing import Literal, cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from sbi_slotflow.nn import flows
from sbi_slotflow.nn.flows import ConditionalFlow, LocationScale, RowContext

NUM_CONTEXT = 3
FEATURES = (1, 2, 3, 4)
Network = Literal["projected", "residual"]
KINDS: list[tuple[Network, bool]] = [
    ("projected", True),
    ("projected", False),
    ("residual", True),
    ("residual", False),
]


def make_flow(
    features: int,
    network: Network = "projected",
    location_scale: bool = True,
    noise: float = 0.15,
) -> ConditionalFlow:
    """A flow with random weights, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(features)
        flow = ConditionalFlow(
            features,
            NUM_CONTEXT,
            hidden_features=12,
            num_layers=4,
            num_bins=5,
            tail_bound=3.0,
            network=network,
            location_scale=location_scale,
        ).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter += noise * torch.randn_like(parameter)
    return flow.eval()


def context_for(num_rows: int, distinct: int = 3) -> RowContext:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(distinct, NUM_CONTEXT, generator=generator).double()
    return RowContext(values, torch.arange(num_rows) % distinct)


def points(num: int, features: int, scale: float = 2.0) -> Tensor:
    """Points on both sides of the splines' tail bound."""
    generator = torch.Generator().manual_seed(2)
    return scale * torch.randn(num, features, generator=generator).double()


@pytest.fixture(
    params=product(FEATURES, KINDS),
    ids=lambda p: f"{p[0]}-{p[1][0]}{'-gauss' if p[1][1] else ''}",
    scope="module",
)
def flow(request: pytest.FixtureRequest) -> ConditionalFlow:
    features, (network, location_scale) = request.param
    return make_flow(features, network, location_scale)


def test_inverse_of_forward_is_identity(flow: ConditionalFlow) -> None:
    u, context = points(300, flow.features), context_for(300)
    assert (u.abs() > 3.0).any()
    noise, log_det = flow.transform(u, context)
    back, inverse_log_det = flow.transform.inverse(noise, context)
    torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(noise, u, atol=0.1)


def test_forward_of_inverse_is_identity(flow: ConditionalFlow) -> None:
    noise, context = points(300, flow.features), context_for(300)
    u, _ = flow.transform.inverse(noise, context)
    back, _ = flow.transform(u, context)
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)


def test_log_density_is_the_normals_plus_autograds_log_jacobian(
    flow: ConditionalFlow,
) -> None:
    u, context = points(12, flow.features), context_for(12)
    result = flow.log_prob(u, context)
    for i in range(12):
        own = context.rows(i, i + 1)

        def to_noise(row: Tensor, own: RowContext = own) -> Tensor:
            return flow.transform(row.unsqueeze(0), own)[0].squeeze(0)

        jacobian = cast(Tensor, torch.autograd.functional.jacobian(to_noise, u[i]))
        expected = torch.linalg.slogdet(jacobian).logabsdet
        expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(
            to_noise(u[i])
        ).sum(-1)
        torch.testing.assert_close(result[i], expected, rtol=1e-8, atol=1e-8)


def test_samples_are_the_inverse_of_the_generators_noise(
    flow: ConditionalFlow,
) -> None:
    context = context_for(500)
    samples = flow.sample(context, torch.Generator().manual_seed(5))
    assert samples.shape == (500, flow.features)
    noise = torch.empty(500, flow.features, dtype=torch.float64)
    noise.normal_(generator=torch.Generator().manual_seed(5))
    back, _ = flow.transform(samples, context)
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)


def test_samples_have_the_density_that_log_prob_states(flow: ConditionalFlow) -> None:
    # E_q[g / q] = 1 for any density g inside the support of q.
    context = context_for(6_000, distinct=1)
    samples = flow.sample(context, torch.Generator().manual_seed(6))
    narrow = torch.distributions.Normal(samples.mean(0), 0.5 * samples.std(0))
    with torch.no_grad():
        log_q = flow.log_prob(samples, context)
    ratio = (narrow.log_prob(samples).sum(-1) - log_q).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.1
    # 5 standard errors: a false alarm in 2 million draws
    assert (ratio.mean() - 1).abs() < 5 * error


@pytest.mark.parametrize(("network", "location_scale"), KINDS)
def test_density_in_one_dimension_integrates_to_one_and_is_that_of_the_samples(
    network: Network, location_scale: bool
) -> None:
    flow = make_flow(1, network, location_scale)
    grid = torch.linspace(-60.0, 60.0, 40_001, dtype=torch.float64)
    for i in range(3):
        values = context_for(3).values[i : i + 1]
        zeros = torch.zeros(len(grid), dtype=torch.int64)
        with torch.no_grad():
            log_q = flow.log_prob(grid.unsqueeze(-1), RowContext(values, zeros))
        density = log_q.exp().numpy()
        step = float(grid[1] - grid[0])
        assert np.trapezoid(density, dx=step) == pytest.approx(1.0, abs=1e-5)
        cumulative = np.cumsum(density) * step
        samples = flow.sample(
            RowContext(values, zeros[:5_000]), torch.Generator().manual_seed(i)
        ).squeeze(-1)
        test = stats.kstest(
            samples.numpy(), lambda v, c=cumulative: np.interp(v, grid.numpy(), c)
        )
        assert test.pvalue > 1e-6


@pytest.mark.parametrize(("network", "location_scale"), KINDS)
def test_density_in_two_dimensions_integrates_to_one(
    network: Network, location_scale: bool
) -> None:
    flow = make_flow(2, network, location_scale)
    context = context_for(1, distinct=1)
    draws = flow.sample(
        RowContext(context.values, torch.zeros(2_000, dtype=torch.int64)),
        torch.Generator().manual_seed(7),
    )
    centre, width = draws.mean(0), 9 * draws.std(0)
    size = 300
    axes = [
        torch.linspace(float(c - w), float(c + w), size, dtype=torch.float64)
        for c, w in zip(centre, width, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    which = torch.zeros(len(grid), dtype=torch.int64)
    with torch.no_grad():
        log_q = flow.log_prob(grid, RowContext(context.values, which))
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    assert float(log_q.exp().sum()) * cell == pytest.approx(1.0, abs=2e-3)


def test_shared_contexts_equal_one_context_a_row(flow: ConditionalFlow) -> None:
    u, shared = points(60, flow.features), context_for(60)
    own = RowContext(shared.values[shared.which], torch.arange(60))
    torch.testing.assert_close(flow.log_prob(u, shared), flow.log_prob(u, own))
    samples = [flow.sample(c, torch.Generator().manual_seed(0)) for c in (shared, own)]
    torch.testing.assert_close(*samples)


def test_rows_do_not_influence_each_other(flow: ConditionalFlow) -> None:
    u, context = points(9, flow.features), context_for(9)
    together = flow.log_prob(u, context)
    alone = [flow.log_prob(u[i : i + 1], context.rows(i, i + 1)) for i in range(9)]
    torch.testing.assert_close(torch.cat(alone), together)
    # and the context does
    turned = RowContext(context.values, (context.which + 1) % 3)
    assert (flow.log_prob(u, turned) != together).all()


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_chunks_equal_one_pass(
    flow: ConditionalFlow, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, context = points(20, flow.features), context_for(20)
    with torch.no_grad():
        whole = flow.log_prob(u, context)
    samples = flow.sample(context, torch.Generator().manual_seed(0))
    monkeypatch.setattr(flows, "_MAX_ROWS", limit)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(u, context), whole)
    torch.testing.assert_close(
        flow.sample(context, torch.Generator().manual_seed(0)), samples
    )


def test_generator_decides_the_samples(flow: ConditionalFlow) -> None:
    context = context_for(10)
    before = torch.get_rng_state()
    first, again, other = (
        flow.sample(context, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_rows_give_no_numbers(flow: ConditionalFlow) -> None:
    none = RowContext(context_for(3).values, torch.zeros(0, dtype=torch.int64))
    empty = torch.zeros(0, flow.features, dtype=torch.float64)
    assert flow.log_prob(empty, none).shape == (0,)
    assert flow.sample(none).shape == (0, flow.features)


def test_every_parameter_receives_a_gradient(flow: ConditionalFlow) -> None:
    u, context = points(200, flow.features), context_for(200)
    parameters = dict(flow.named_parameters())
    gradients = torch.autograd.grad(
        flow.log_prob(u, context).sum(), list(parameters.values())
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.isfinite().all(), name
        assert (gradient != 0).any(), name


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("network", "location_scale"), KINDS)
def test_float32_samples_are_finite_with_wild_weights(
    features: int, network: Network, location_scale: bool
) -> None:
    flow = make_flow(features, network, location_scale, noise=0.6).float()
    context = RowContext(context_for(3).values.float(), torch.arange(4_000) % 3)
    samples = flow.sample(context, torch.Generator().manual_seed(8))
    assert samples.dtype == torch.float32
    assert samples.isfinite().all()
    with torch.no_grad():
        assert flow.log_prob(samples, context).isfinite().all()


@pytest.mark.parametrize("features", FEATURES)
def test_location_scale_starts_near_the_identity(features: int) -> None:
    layer = LocationScale(features, NUM_CONTEXT, 12)
    u, context = points(50, features).float(), context_for(50)
    context = RowContext(context.values.float(), context.which)
    noise, log_det = layer(u, context)
    torch.testing.assert_close(noise, u, rtol=0.05, atol=0.05)
    torch.testing.assert_close(log_det, torch.zeros(50), rtol=0, atol=0.05)


@pytest.mark.parametrize("features", FEATURES)
def test_location_scale_is_a_full_gaussian(features: int) -> None:
    flow = make_flow(features)
    layer = cast(LocationScale, next(iter(flow.transform.children()))[0])  # type: ignore[index]
    assert isinstance(layer, LocationScale)
    context = context_for(1, distinct=1)
    axes = torch.cat([torch.zeros(1, features), torch.eye(features)]).double()
    which = torch.zeros(features + 1, dtype=torch.int64)
    with torch.no_grad():
        image, _ = layer.inverse(axes, RowContext(context.values, which))
        u = points(40, features)
        rows = RowContext(context.values, torch.zeros(40, dtype=torch.int64))
        noise, log_det = layer(u, rows)
    mean, root = image[0], (image[1:] - image[0]).mT
    gaussian = torch.distributions.MultivariateNormal(
        mean, covariance_matrix=root @ root.mT
    )
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    torch.testing.assert_close(normal + log_det, gaussian.log_prob(u))


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_location_scale_bounds_its_log_scale(raw: float) -> None:
    layer = LocationScale(2, NUM_CONTEXT, 12)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(raw)
    context = RowContext(torch.ones(1, NUM_CONTEXT), torch.zeros(5, dtype=torch.int64))
    noise, log_det = layer(torch.ones(5, 2), context)
    assert log_det.isfinite().all()
    assert log_det.abs().max() <= 2 * 10.0
    assert noise.isfinite().all()
