"""Line spectra: the protocol's laws, the likelihood, complex fits, circular tokens."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sbi_slotflow import SlotDensityEstimator, SlotPosterior, slot_nn
from sbi_slotflow.nn.spec import build
from sbi_slotflow.problems import LineSpectrum, line_spectrum
from sbi_slotflow.problems.sinusoids.line_spectrum import clustered
from sbi_slotflow.problems.sinusoids.pursuit import SinePursuit
from sbi_slotflow.seeding import generator_for

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
}


@pytest.fixture(scope="module")
def problem() -> LineSpectrum:
    return line_spectrum()


def exponentials(components: Tensor, num: int = 50) -> np.ndarray:
    """Complex samples of components (A, phi, f) ``(K, 3)``, one at a time."""
    n = np.arange(num)
    total = np.zeros(num, dtype=complex)
    for amplitude, phase, frequency in components.double().numpy():
        total += amplitude * np.exp(1j * (2 * np.pi * frequency * n + phase))
    return total


def signals(problem: LineSpectrum, rows: list[list[list[float]]], snr: float):
    """Theta rows of given lines, and observations of them."""
    components = torch.zeros(len(rows), problem.layout.max_cardinality, 3)
    for i, row in enumerate(rows):
        components[i, : len(row)] = torch.tensor(row)
    k = torch.tensor([len(row) for row in rows])
    theta = problem.layout.pack(k, components, torch.full((len(rows), 1), snr))
    return theta, problem.simulator(theta, generator_for(1))


# prior, simulator, likelihood


def test_parameters_have_the_law_of_the_protocol(problem: LineSpectrum) -> None:
    assert problem.component_names == ("amplitude", "phase", "frequency")
    assert problem.shared_names == ("snr",)
    expected = torch.tensor([0.0] + [0.1] * 10)
    torch.testing.assert_close(problem.prior.cardinality_probs, expected)
    parts = problem.layout.unpack(problem.prior.sample((4_000,), generator_for(0)))
    laws = [
        (parts.components[..., 0][parts.mask], stats.halfnorm(0.1, 1.0)),
        (parts.components[..., 1][parts.mask], stats.uniform(0, 2 * math.pi)),
        (parts.shared[:, 0], stats.uniform(0, 50)),
    ]
    for values, law in laws:
        # false alarm in 1 of 10^6 seeds for each
        assert stats.kstest(values.double().numpy(), law.cdf).pvalue > 1e-6


@pytest.mark.parametrize("draw", ["prior", "clustered"])
def test_lines_keep_their_distance_around_the_circle(problem, draw: str) -> None:
    if draw == "prior":
        theta = problem.prior.sample((3_000,), generator_for(1))
    else:
        theta = clustered(problem, 3_000, generator_for(1))
    parts = problem.layout.unpack(theta.double())
    gaps = parts.components[..., 2].unsqueeze(-1) - parts.components[..., None, :, 2]
    gaps = (gaps - gaps.round()).abs()
    both = parts.mask.unsqueeze(-1) & parts.mask.unsqueeze(-2)
    both &= ~torch.eye(10, dtype=torch.bool)
    assert gaps[both].min() >= 0.02 - 1e-6
    # some of the closest pairs lie on either side of the seam
    across = parts.components[:, 0, 2] + 1 - parts.components.amax(-2)[:, 2]
    assert (across[parts.cardinality == 10] < 0.04).any()
    assert problem.prior.support.check(theta).all()


def test_clustered_lines_are_neighbours_of_one_another(problem) -> None:
    weights = [float(k == 2) for k in range(11)]
    pairs = LineSpectrum(
        "pairs",
        problem.prior.with_cardinality(weights),
        problem.simulator,
        problem.grids[0],
    )
    theta = clustered(pairs, 3_000, generator_for(2)).double()
    places = problem.layout.unpack(theta).components[:, :2, 2]
    gap = places[:, 1] - places[:, 0]
    gap = torch.minimum(gap, 1 - gap)
    # false alarm in 1 of 10^6 seeds
    assert stats.kstest(gap.numpy(), stats.halfnorm(0.02, 0.05).cdf).pvalue > 1e-6


def test_the_likelihood_is_that_of_complex_noise_below_the_signal(problem) -> None:
    theta = problem.prior.sample((20,), generator_for(3))
    x = problem.simulator(theta, generator_for(4))
    assert x.shape == (20, 100)
    parts = problem.layout.unpack(theta)
    for i in range(20):
        signal: Any = exponentials(parts.components[i, : int(parts.cardinality[i])])
        power = np.mean(np.abs(signal) ** 2) * 10 ** (-parts.shared[i, 0].item() / 10)
        residual = x[i].double().numpy() - np.concatenate([signal.real, signal.imag])
        # half the noise's power in the real parts, half in the imaginary ones
        expected = stats.norm.logpdf(residual, 0, math.sqrt(power / 2)).sum()
        value = problem.log_likelihood(theta[i].double(), x[i]).item()
        assert value == pytest.approx(expected, rel=1e-8, abs=1e-6)


def test_noise_has_the_power_that_the_ratio_says(problem) -> None:
    theta, _ = signals(problem, [[[1.0, 0.3, 0.1], [0.5, 2.0, -0.45]]] * 2_000, 7.0)
    noise = problem.simulator(theta, generator_for(5)) - problem.simulator.signal(theta)
    signal = problem.simulator.signal(theta[:1])
    ratio = signal.square().mean() / noise.square().mean()
    # 2 10^5 squared normals: 5 standard errors of their mean
    assert 10 * ratio.log10().item() == pytest.approx(7.0, abs=5 * 4.34 / 316)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        line_spectrum(num_samples=1)
    with pytest.raises(ValueError, match=r"max_cardinality must lie in 1\.\.49"):
        line_spectrum(max_cardinality=50)


# least squares


def test_normal_equations_of_complex_data_are_those_of_autograd(problem) -> None:
    theta = problem.prior.sample((8,), generator_for(6))
    x = problem.simulator(theta, generator_for(7))
    parts = problem.layout.unpack(theta)
    components = parts.components.clone()
    components[0, 0, 2], components[0, -1, 2] = -0.4999, 0.4999  # about the seam
    owner = torch.arange(8).flip(0)
    found = problem.build_fit().given(x).normal_equations(owner, components, parts.mask)
    for i in range(8):
        active = components[i][parts.mask[i]].double()

        def total(values: Tensor) -> Tensor:
            n = torch.arange(50, dtype=torch.float64)
            amplitude, phase, frequency = values.unsqueeze(-1).unbind(-2)
            angle = 2 * math.pi * frequency * n + phase
            parts = [amplitude * angle.cos(), amplitude * angle.sin()]
            return torch.cat(parts, -1).sum(0)

        residual = x[owner[i]].double() - total(active)
        jacobian = torch.autograd.functional.jacobian(total, active)
        assert isinstance(jacobian, Tensor)
        jacobian = jacobian.flatten(1)
        size = jacobian.shape[-1]
        torch.testing.assert_close(found.residual[i], residual.square().sum())
        torch.testing.assert_close(
            found.gradient[i, :size], jacobian.mT @ residual, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            found.curvature[i, :size, :size],
            jacobian.mT @ jacobian,
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_fit_survives_json(problem: LineSpectrum) -> None:
    fit = problem.build_fit()
    assert build("fit", json.loads(json.dumps(fit.spec))) == fit


def test_pursuit_finds_lines_as_precisely_as_the_noise_allows(problem) -> None:
    rows = [
        [[1.0, 1.0, -0.3], [0.5, 4.0, 0.12], [1.5, 2.0, 0.4]],
        [[1.0, 0.5, 0.4995]],
        [[1.0, 0.0, 0.1], [0.8, 1.5, 0.13]],
    ]
    theta, x = signals(problem, rows, 20.0)
    pursued = SinePursuit(problem.build_fit(), (-0.5, 0.5), 10)(x)
    sigma = problem.simulator.noise.scale(
        problem.simulator.signal(theta), problem.layout.unpack(theta).shared
    )
    for i, row in enumerate(rows):
        strongest = pursued.phasor[i].abs().argsort(descending=True)[: len(row)]
        found = pursued.frequency[i, strongest].sort().values
        truth = torch.tensor(row).double()
        # Cramer-Rao bound of one line: var f = 6 sigma^2 / ((2 pi A)^2 T^3), both parts
        bound = sigma[i].double() * math.sqrt(6 / 50**3) / (2 * math.pi * truth[:, 0])
        # 5 deviations, and twice as much for lines half an element apart
        assert ((found - truth[:, 2]).abs() < (10 if i == 2 else 5) * bound).all()


# tokens


def test_tokens_turn_with_the_spectrum(problem: LineSpectrum) -> None:
    theta = problem.prior.sample((5,), generator_for(8))
    x = problem.simulator(theta, generator_for(9))
    encoder = problem.build_token_encoder(pursuit=False)
    front: Any = encoder.front_end
    assert front.circular
    samples = torch.complex(*x.double().chunk(2, -1))
    turn = torch.arange(50) - 24.5  # about the middle, where phases are referred to
    moved = samples * torch.exp(2j * math.pi * turn / 50)
    moved = torch.cat([moved.real, moved.imag], -1).float()
    before, after = (front._read(data)[0] for data in (x, moved))
    torch.testing.assert_close(
        after.roll(-1, -1)[..., :-1], before[..., :-1], atol=1e-5, rtol=0
    )
    blocks = encoder.blocks
    tokens = torch.randn(2, 50, 64)
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        torch.testing.assert_close(
            block(tokens.roll(7, 1)), block(tokens).roll(7, 1), atol=1e-5, rtol=1e-4
        )


# networks


@pytest.mark.parametrize("refine_slots", [0, 2])
def test_a_network_of_lines_learns_draws_and_is_saved(
    problem: LineSpectrum, refine_slots: int, tmp_path: Path
) -> None:
    theta = problem.prior.sample((8,), generator_for(10))
    x = problem.simulator(theta, generator_for(11))
    sets = {"weighed_sets": 4} if refine_slots else {}
    build = slot_nn(problem, refine_slots=refine_slots, **sets, **SMALL)
    estimator = build(theta, x)
    assert estimator.spec.slots["kind"] == "anchored"
    loss = estimator.loss(theta, x)
    assert loss.isfinite().all()
    loss.mean().backward()
    gradients = [p.grad for p in estimator.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    posterior = SlotPosterior(estimator.eval(), problem.prior)
    draws = posterior.sample_batched((20,), x, generator=generator_for(12))
    assert problem.prior.support.check(draws).all()
    assert posterior.log_prob_batched(draws, x).isfinite().all()

    path = tmp_path / "lines.safetensors"
    estimator.save(path)
    loaded = SlotDensityEstimator.load(path)
    with torch.no_grad():
        assert torch.equal(loaded.log_prob(draws, x), estimator.log_prob(draws, x))
