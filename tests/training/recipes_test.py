"""Optimizers and the shape of their learning-rate schedules."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from sbi_slotflow.training.online import optimizer_tensors, restore_optimizer
from sbi_slotflow.training.recipes import Recipe, RecipeName, make_recipe

RECIPES: tuple[RecipeName, ...] = ("adamw", "paper")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def recipe_for(
    name: RecipeName,
    net: nn.Module,
    learning_rate: float | None = None,
    num_steps: int = 1_000,
) -> Recipe:
    return make_recipe(name, net.parameters(), learning_rate, num_steps)


def rate(recipe: Recipe) -> float:
    (value,) = {group["lr"] for group in recipe.optimizer.param_groups}
    return value


def rates(recipe: Recipe, num_steps: int) -> Iterator[float]:
    """The rate of every step, which a step without gradients leaves alone."""
    for _ in range(num_steps):
        yield rate(recipe)
        recipe.optimizer.step()
        recipe.after_step()
    yield rate(recipe)


@pytest.mark.parametrize(
    ("num_steps", "warm_up"), [(1, 1), (10, 1), (200, 10), (12_000, 500)]
)
def test_adamw_warms_up_linearly_and_decays_as_a_cosine_to_zero(
    num_steps: int, warm_up: int
) -> None:
    found = list(rates(recipe_for("adamw", network(), 2e-3, num_steps), num_steps))
    for step, value in enumerate(found):
        rise = min(1.0, (step + 1) / warm_up)
        decay = math.cos(math.pi * step / num_steps / 2) ** 2
        assert value == pytest.approx(2e-3 * rise * decay, abs=1e-12)
    assert max(found) <= 2e-3
    assert found[-1] == pytest.approx(0.0, abs=1e-12)
    assert found[max(warm_up - 1, 0) :] == sorted(found[warm_up - 1 :], reverse=True)


def test_adamw_does_not_listen_to_the_validation_loss() -> None:
    recipe = recipe_for("adamw", network())
    before = rate(recipe)
    for _ in range(20):
        recipe.after_validation(1.0)
    assert rate(recipe) == before


def test_paper_halves_on_a_plateau() -> None:
    recipe = recipe_for("paper", network(), 1e-3)
    found = []
    for _ in range(22):
        recipe.after_validation(1.0)
        found.append(rate(recipe))
    # one best, then six that are no better and are forgiven
    assert found[:7] == [1e-3] * 7
    assert found[7:14] == [5e-4] * 7
    assert found[14:21] == [2.5e-4] * 7


def test_paper_keeps_its_rate_while_the_loss_falls() -> None:
    recipe = recipe_for("paper", network(), 1e-3)
    for step in range(50):
        recipe.after_validation(10.0 * 0.9**step)
    assert rate(recipe) == 1e-3
    for _ in range(6):
        recipe.after_validation(1.0)
    recipe.after_validation(1e-6)  # a new best within the patience
    for _ in range(6):
        recipe.after_validation(1.0)
    assert rate(recipe) == 1e-3


def test_paper_rate_has_a_floor_and_ignores_steps() -> None:
    recipe = recipe_for("paper", network(), 1e-4)
    assert set(rates(recipe, 100)) == {1e-4}
    for _ in range(200):
        recipe.after_validation(1.0)
    assert rate(recipe) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "default"), [("adamw", AdamW, 2e-3), ("paper", Adam, 1e-4)]
)
def test_a_recipe_has_its_own_optimizer_and_rate(
    name: RecipeName, kind: type, default: float
) -> None:
    recipe = recipe_for(name, network(), None, num_steps=10)
    assert type(recipe.optimizer) is kind
    assert rate(recipe) == default
    assert rate(recipe_for(name, network(), 0.25, num_steps=10)) == 0.25
    number = sum(len(g["params"]) for g in recipe.optimizer.param_groups)
    assert number == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_rate_of_zero_is_not_taken_for_none(name: RecipeName) -> None:
    assert rate(recipe_for(name, network(), 0.0)) == 0.0


def advance(net: nn.Module, recipe: Recipe, step: int) -> float:
    """One step of regression; every third step is validated, on a plateau."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    loss = (net(x) - x[:, :2] ** 2).square().mean()
    recipe.optimizer.zero_grad()
    loss.backward()
    recipe.optimizer.step()
    recipe.after_step()
    if step % 3 == 0:
        recipe.after_validation(1.0)
    return rate(recipe)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stop", [1, 7, 25, 59])
def test_a_restored_recipe_goes_on_bit_for_bit(name: RecipeName, stop: int) -> None:
    whole = network()
    recipe = recipe_for(name, whole, 1e-2, num_steps=60)
    expected = [advance(whole, recipe, step) for step in range(60)]

    first = network()
    recipe = recipe_for(name, first, 1e-2, num_steps=60)
    found = [advance(first, recipe, step) for step in range(stop)]
    schedule = json.loads(json.dumps(recipe.schedule_state()))
    moments = {k: v.clone() for k, v in optimizer_tensors(recipe.optimizer).items()}

    second = network()
    second.load_state_dict(first.state_dict())
    recipe = recipe_for(name, second, 1e-2, num_steps=60)
    restore_optimizer(recipe.optimizer, moments)
    recipe.load_schedule_state(schedule)
    found += [advance(second, recipe, step) for step in range(stop, 60)]
    assert found == expected
    for left, right in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)
    if name == "paper":
        assert min(found) < 1e-2  # the plateau was reached


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe must be 'adamw' or 'paper'"):
        recipe_for("sgd", network())  # pyright: ignore[reportArgumentType]
