"""Stages of training: which weights each one changes and which it keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sbi_slotflow import SlotDensityEstimator, problems, slot_nn
from sbi_slotflow.training.stages import StageBuilder

tiny = problems.sinusoids("tiny")
SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
}


def pairs(num: int = 16) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = tiny.prior.sample((num,))
        return theta, tiny.simulator(theta)


def build(part: Any, weights: Any = None, **options: Any) -> SlotDensityEstimator:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return StageBuilder(slot_nn(tiny, **SMALL, **options), weights, part)(*pairs())


def is_local(name: str) -> bool:
    return name.startswith(
        (
            "component_head.local",
            "component_head.trunk",
            "component_head.gaussian",
            "net.to_context",
            "shared_head",
        )
    )


@pytest.mark.parametrize("refine_slots", [0, 1])
@pytest.mark.parametrize("part", ["cells", "local", "all"])
def test_a_stage_changes_its_part_alone(part: str, refine_slots: int) -> None:
    estimator = build(part, refine_slots=refine_slots)
    before = {name: p.detach().clone() for name, p in estimator.named_parameters()}
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    for _ in range(2):  # last layers that start at zero hold back the first
        optimizer.zero_grad()
        terms = estimator.loss_terms(*pairs(), "cells" if part == "cells" else "all")
        estimator.weigh(terms).mean().backward()
        optimizer.step()
    for name, parameter in estimator.named_parameters():
        trained = part == "all" or is_local(name) == (part == "local")
        assert torch.equal(parameter, before[name]) != trained, name


def test_cells_need_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = build("cells", refine_slots=1)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("fitted")

    monkeypatch.setattr("sbi_slotflow.nn.modes.fit_mode", refuse)
    terms = estimator.loss_terms(*pairs(), "cells")
    assert (terms["shared"] == 0).all()
    with pytest.raises(AssertionError, match="fitted"):
        estimator.loss_terms(*pairs())


def test_the_loss_of_cells_is_a_part_of_the_whole() -> None:
    """What is left of the components' loss is that of the local densities."""
    estimator = build("all")
    whole = estimator.loss_terms(*pairs())["flow"]
    cells = estimator.loss_terms(*pairs(), "cells")["flow"]
    theta, _ = pairs()
    empty = tiny.layout.cardinality(theta) == 0
    assert empty.any()
    assert (cells[empty] == 0).all()
    assert (cells[~empty] > 0).all()
    torch.testing.assert_close(whole[empty], cells[empty])
    assert not torch.isclose(whole[~empty], cells[~empty]).any()


def test_a_stage_keeps_the_rest_from_the_one_before() -> None:
    first = build("cells", refine_slots=1)
    weights = {
        name: value + 0.1 if value.is_floating_point() else value
        for name, value in first.state_dict().items()
    }
    second = build("local", weights, refine_slots=1)
    for name, value in second.named_parameters():
        assert torch.equal(value, weights[name]) != is_local(name), name
    # the same for slots of another kind, whose local densities are their own
    third = build("local", weights, refine_slots=0).state_dict()
    assert torch.equal(third["net.lift.0.weight"], weights["net.lift.0.weight"])
    whole = build("all", weights, refine_slots=1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_whole_stage_wants_all_weights() -> None:
    weights = build("cells", refine_slots=1).state_dict()
    del weights["net.lift.0.weight"]
    with pytest.raises(RuntimeError, match=r"net\.lift\.0\.weight"):
        build("all", weights, refine_slots=1)
