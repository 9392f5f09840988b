"""Shipped weights: what is there, that it is safe to load, and that it is good."""

import hashlib
import json
import math

import pytest
import torch

from sbi_slotflow import (
    SlotPosterior,
    load_pretrained,
    metrics,
    model_card,
    problems,
    rjmcmc,
)
from sbi_slotflow.calibration import TrainingReference
from sbi_slotflow.pretrained import (
    RECIPES,
    available_weights,
    pretrain,
    training_reference,
    weights_file,
)
from sbi_slotflow.seeding import generator_for

PRESETS = ("tiny", "paper", "crowded")


def signals(preset, num: int, seed: int = 0):
    problem = problems.sinusoids(preset)
    theta = problem.prior.sample((num,), generator_for(seed, 0))
    return problem, theta, problem.simulator(theta, generator_for(seed, 1))


def test_every_recipe_is_shipped() -> None:
    assert set(available_weights()) == set(RECIPES)
    assert set(RECIPES) == {f"sinusoids-{preset}" for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_are_ready_to_use(preset) -> None:
    posterior = load_pretrained(f"sinusoids-{preset}")
    assert isinstance(posterior, SlotPosterior)
    problem, _, x = signals(preset, 2)
    assert posterior.prior.layout == problem.layout
    rows = posterior.sample((50,), x[0], generator=generator_for(2))
    assert problem.prior.support.check(rows).all()
    assert torch.isfinite(posterior.log_prob(rows, x[0])).all()
    assert posterior.reconstruct(rows).shape == (50, problem.num_data)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_card_says_how_they_were_made_and_what_was_measured(preset) -> None:
    name = f"sinusoids-{preset}"
    card = model_card(name)
    assert card["name"] == name
    trained = sum(stage["num_simulations"] for stage in card["training"]["stages"])
    assert trained == sum(s.num_simulations for s in RECIPES[name].stages)
    assert 0.3 < card["measured"]["K accuracy"]["accuracy"] <= 1.0
    json.dumps(card, allow_nan=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shipped_reference_is_that_of_the_recipe(preset) -> None:
    name = f"sinusoids-{preset}"
    shipped = load_pretrained(name).training_reference
    assert isinstance(shipped, TrainingReference)
    _, _, x = signals(preset, 20)
    # Other versions of torch round elsewhere; another sample differs by about 0.1.
    torch.testing.assert_close(
        training_reference(name).p_values(x), shipped.p_values(x), rtol=0, atol=2e-3
    )


def test_the_most_probable_k_is_right_on_papers_signals() -> None:
    problem, theta, x = signals("paper", 200, seed=5)
    probs = load_pretrained("sinusoids-paper").cardinality(x).probs
    right = probs.argmax(-1) == problem.layout.cardinality(theta)
    assert right.double().mean() >= 0.98  # always the same signals


def test_posteriors_of_paper_signals_are_as_wide_as_exact_ones() -> None:
    problem, theta, x = signals("paper", 6, seed=6)
    posterior = load_pretrained("sinusoids-paper")
    ratios = []
    for i in range(len(x)):
        k = int(problem.layout.cardinality(theta[i]))
        found = metrics.compare(
            posterior.sample((2_000,), x[i], k=k, generator=generator_for(7, i)),
            rjmcmc.fixed_k(problem, x[i], k).sample(
                (2_000,), generator=generator_for(8, i)
            ),
            layout=problem.layout,
            k=k,
            periods={"phase": math.tau},
        )
        ratios += [parameter.std_ratio for parameter in found.parameters]
    # Deviations of 2,000 draws are good to 2 %.
    assert torch.tensor(ratios).median() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["sinusoids", "../estimator", ""])
def test_unknown_weights_are_refused(name) -> None:
    for function in (load_pretrained, model_card, pretrain):
        with pytest.raises(ValueError, match="name must be one of"):
            function(name)


def test_a_signal_of_zeros_has_a_posterior() -> None:
    # Where no component explains data that are zero, nothing has a scale: precisions
    # were 0 / 0, which linear algebra refused in words of its own.
    posterior = load_pretrained("sinusoids-tiny")
    x = torch.zeros(300)
    for k in range(4):
        draws = posterior.sample(
            (20,), x, k=k, generator=torch.Generator().manual_seed(k)
        )
        assert posterior.prior.support.check(draws).all()
        assert posterior.log_prob(draws, x).isfinite().all()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_card_is_that_of_its_weights(name: str) -> None:
    with weights_file(name, "safetensors") as path:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model_card(name)["sha256"] == found
