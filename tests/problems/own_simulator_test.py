"""Any callable is a simulator, and x may have any shape."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from sbi.utils import BoxUniform
from torch import Tensor, nn

from sbi_slotflow import (
    AdditiveSimulator,
    Problem,
    SlotDensityEstimator,
    SlotNPE,
    VariableKPrior,
    WhiteNoise,
    calibration,
    slot_nn,
)
from sbi_slotflow.sets.checks import simulate

SIZE = 8
GRID = torch.arange(SIZE) / SIZE


def star(components: Tensor) -> Tensor:
    """Images ``(..., 8, 8)`` of stars (x, y, flux)."""
    x, y, flux = (part[..., None, None] for part in components.unbind(-1))
    row, column = GRID.to(components)[:, None], GRID.to(components)
    return flux * torch.exp(-0.5 * ((row - y) ** 2 + (column - x) ** 2) / 0.1**2)


PRIOR = VariableKPrior(
    BoxUniform(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 3.0])),
    [1.0, 1.0, 1.0],
    shared=BoxUniform(torch.tensor([0.1]), torch.tensor([0.3])),
    component_names=("x", "y", "flux"),
    shared_names=("sigma",),
)
ADDITIVE = AdditiveSimulator(star, WhiteNoise(), PRIOR.layout)


def bare(theta: Tensor) -> np.ndarray:
    """The same, in NumPy, of NumPy's global generator."""
    signal = ADDITIVE.signal(theta.double()).numpy()
    sigma = PRIOR.layout.unpack(theta).shared.numpy()[..., None]
    return signal + sigma * np.random.normal(size=signal.shape)  # noqa: NPY002


class Embedding(nn.Module):
    """A CNN, as sbi's embedding nets: images to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-2:] == (SIZE, SIZE)
        return self.last(self.first(x.unsqueeze(-3)).relu().flatten(-3))


def numpy_state() -> np.ndarray:
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].copy()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_add_up() -> None:
    theta = PRIOR.sample((5,), seeded(1))
    signal = ADDITIVE.signal(theta)
    assert ADDITIVE.event_shape == signal.shape[1:] == (SIZE, SIZE)
    parts = PRIOR.layout.unpack(theta)
    each = torch.where(parts.mask[..., None, None], star(parts.components), 0.0)
    torch.testing.assert_close(signal, each.sum(1))
    torch.testing.assert_close(ADDITIVE.component_signals(theta), each)
    x = ADDITIVE(theta, seeded(2))
    assert x.shape == (5, SIZE, SIZE)
    expected = WhiteNoise().log_prob((x - signal).flatten(1), parts.shared)
    found = ADDITIVE.log_likelihood(theta, x)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-3)
    every = ADDITIVE.log_likelihood(theta.unsqueeze(1), x)
    torch.testing.assert_close(every.diagonal(), found)
    with pytest.raises(ValueError, match="event shape"):
        ADDITIVE.log_likelihood(theta, x.flatten(1))


def test_a_background_may_be_an_image() -> None:
    level = AdditiveSimulator(
        star,
        WhiteNoise(0.1),
        PRIOR.layout,
        background=lambda s: s[..., :1, None] + 0 * torch.zeros(SIZE, SIZE),
    )
    theta = PRIOR.sample((3,), seeded(1))
    added = level.signal(theta) - ADDITIVE.signal(theta)
    sigma = PRIOR.layout.unpack(theta).shared[..., None]
    torch.testing.assert_close(added, sigma.expand_as(added), rtol=1e-4, atol=1e-5)


def test_a_bare_callable_is_seeded_and_leaves_no_trace() -> None:
    theta = PRIOR.sample((4,), seeded(1))
    state, torch_state = numpy_state(), torch.get_rng_state()
    first, second = (simulate(bare, theta, seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, simulate(bare, theta, seeded(4)))
    assert (numpy_state() == state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    with pytest.raises(ValueError, match="simulator's x must have shape"):
        simulate(lambda theta: torch.zeros(2, 3), theta, seeded(1))


@pytest.fixture(scope="module", name="trained")
def _trained():
    problem = Problem("stars", PRIOR, bare)
    torch.manual_seed(0)
    inference = SlotNPE(PRIOR, slot_nn(problem, encoder=Embedding(), slots="global"))
    inference.train_online(bare, num_simulations=2_000)
    return problem, inference.build_posterior()


def test_images_go_through_training_and_inference(trained) -> None:
    problem, posterior = trained
    assert problem.event_shape == (SIZE, SIZE)
    assert problem.num_data == SIZE * SIZE
    theta = PRIOR.sample((3,), seeded(1))
    x = simulate(bare, theta, seeded(2))
    assert posterior.cardinality(x[0]).probs.shape == (3,)
    assert posterior.cardinality(x[:1]).probs.shape == (1, 3)
    assert posterior.cardinality(x).probs.shape == (3, 3)
    rows = posterior.sample((10,), x[0], generator=seeded(3))
    assert posterior.log_prob(rows, x[0]).isfinite().all()
    assert posterior.sample_batched((4,), x).shape == (4, 3, PRIOR.layout.size)
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        posterior.sample((1,), x.flatten(1))
    tree = posterior.to_datatree(20, x[0], seeded(4), problem=problem)
    assert tree["posterior_predictive/x"].shape[-1] == SIZE * SIZE
    assert "signal" not in tree["posterior_predictive"]


def test_what_needs_a_likelihood_says_so(trained) -> None:
    problem, posterior = trained
    x = simulate(bare, PRIOR.sample((1,), seeded(1)), seeded(2))[0]
    with pytest.raises(NotImplementedError, match="no log_likelihood"):
        posterior.refine(problem.log_likelihood, x, num_samples=100)
    with pytest.raises(ValueError, match="signal"):
        posterior.reconstruct(posterior.sample((2,), x))
    with pytest.raises(TypeError, match="callable"):
        Problem("none", PRIOR, 3)
    with pytest.raises(TypeError, match="VariableKPrior"):
        Problem("none", cast(Any, BoxUniform(torch.zeros(2), torch.ones(2))), bare)


def test_the_report_leaves_out_what_needs_a_signal(trained) -> None:
    problem, posterior = trained
    found = calibration.report(
        posterior, problem, 200, num_draws=30, show_progress=False
    )
    assert "residuals" in found.skipped
    assert {"sets", "coverage", "cardinality", "local C2ST"} <= set(found.checks)
    additive = Problem("stars", PRIOR, ADDITIVE)
    full = calibration.report(
        posterior, additive, 200, num_draws=30, show_progress=False
    )
    assert "residuals" in full.checks


def test_an_estimator_of_images_is_saved_and_loaded(trained, tmp_path) -> None:
    _, posterior = trained
    path = tmp_path / "stars.safetensors"
    posterior.posterior_estimator.save(path)
    loaded = SlotDensityEstimator.load(path, encoder=Embedding())
    x = simulate(bare, PRIOR.sample((2,), seeded(1)), seeded(2))
    expected = posterior.posterior_estimator.log_prob_cardinality(x)
    torch.testing.assert_close(loaded.log_prob_cardinality(x), expected)
