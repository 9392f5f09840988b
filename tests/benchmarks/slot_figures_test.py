"""Figures of slots hold what they are given."""

import numpy as np
import pytest
import torch

from benchmarks.slots import (
    SlotMatches,
    plot_slot_contexts,
    plot_slot_specialisation,
    plot_slot_stability,
)
from sbi_slotflow.problems import sinusoids
from sbi_slotflow.seeding import generator_for

LAYOUT = sinusoids("tiny").layout


def made_matches(num: int = 40) -> SlotMatches:
    """Slots that draw low, high and middle frequencies."""
    noise = torch.randn(num, 3, 3, generator=generator_for(0))
    centre = torch.tensor([0.6, 1.8, 1.2])
    components = 1.0 + 0.1 * noise
    components[..., 2] = centre + 0.1 * noise[..., 2]
    contexts = torch.cat([components, noise], dim=-1)
    return SlotMatches(LAYOUT, components, contexts)


def test_specialisation_orders_slots_by_their_mean() -> None:
    figure = plot_slot_specialisation(made_matches(), unit="Hz")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "3", "2"]
    assert axes.get_ylabel() == "matched frequency (Hz)"
    with pytest.raises(ValueError, match="parameter must be one of"):
        plot_slot_specialisation(made_matches(), "pitch")


def test_stability_tells_the_consistency() -> None:
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    axes = plot_slot_stability(shares).axes[0]
    assert axes.get_title(loc="left") == "Consistency 0.75"
    assert [text.get_text() for text in axes.texts] == ["1", ".50", ".50"]
    for wrong in (torch.ones(2, 2), torch.ones(1, 2) / 2, torch.ones(2)):
        with pytest.raises(ValueError, match="shares must be a square matrix"):
            plot_slot_stability(wrong)


@pytest.mark.parametrize(("method", "slot"), [("tsne", None), ("isomap", 2)])
def test_contexts_have_a_panel_for_each_parameter(method, slot) -> None:
    figure = plot_slot_contexts(made_matches(), method, slot=slot)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == 3
    for axes in panels:
        (points,) = axes.collections
        assert len(np.asarray(points.get_offsets())) == (120 if slot is None else 40)
    first, second = (panels[i].collections[0].get_cmap().name for i in (0, 1))
    assert (first, second) == ("viridis", "twilight")


def test_contexts_refuse_what_they_cannot_show() -> None:
    matches = made_matches()
    with pytest.raises(ValueError, match="method must be"):
        plot_slot_contexts(matches, "pca")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"slot must lie in 1\.\.3"):
        plot_slot_contexts(matches, slot=0)
    with pytest.raises(ValueError, match="matches must hold 20 contexts"):
        plot_slot_contexts(made_matches(5))
