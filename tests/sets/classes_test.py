"""Rows of several classes."""

from dataclasses import asdict

import pytest
import torch

from sbi_slotflow import ThetaLayout
from sbi_slotflow.sets.classes import ClassLayout, layout_from_spec

LINE = ThetaLayout(2, ("amplitude", "phase", "frequency"), order_by=2)
BURST = ThetaLayout(3, ("time", "width"))
LAYOUT = ClassLayout.of({"line": LINE, "burst": BURST}, ("sigma",))
# Two lines and one burst.
ROW = torch.tensor([2, 1, 0.5, 1.0, 0.1, 3.0, 2.0, 0.2, 4.0, 7.0, 0.7, 0, 0, 0, 0])


def rows(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def some(layout: ThetaLayout) -> torch.Tensor:
        k = torch.randint(0, layout.max_cardinality + 1, (num,), generator=generator)
        shape = num, layout.max_cardinality, layout.num_component_params
        components = torch.rand(shape, generator=generator) + 0.1
        return layout.canonical(layout.pack(k, components))

    shared = torch.rand((num, 1), generator=generator)
    return LAYOUT.joined([some(LINE), some(BURST)], shared)


def test_rows_begin_with_counts_and_shared_parameters() -> None:
    assert LAYOUT.size == len(LAYOUT.names) == len(ROW)
    assert LAYOUT.names[:5] == [
        "K_line",
        "K_burst",
        "sigma",
        "line.amplitude_1",
        "line.phase_1",
    ]
    assert LAYOUT.names[-2:] == ["burst.time_3", "burst.width_3"]
    assert LAYOUT.max_cardinality == 5
    assert LAYOUT.counts(ROW).tolist() == [2, 1]
    assert LAYOUT.cardinality(ROW) == 3


def test_a_view_is_a_row_of_the_class() -> None:
    assert torch.equal(LAYOUT.view(ROW, "line"), ROW[[0, 3, 4, 5, 6, 7, 8]])
    assert torch.equal(LAYOUT.view(ROW, "burst"), ROW[[1, 9, 10, 11, 12, 13, 14]])
    both = [LAYOUT.view(ROW, name) for name in LAYOUT.class_names]
    assert torch.equal(LAYOUT.joined(both, ROW[2:3]), ROW)
    with pytest.raises(ValueError, match="one of the classes"):
        LAYOUT.view(ROW, "star")


def test_components_carry_their_class_and_begin_with_their_place() -> None:
    parts = LAYOUT.unpack(ROW)
    assert parts.components.shape == (5, 4)
    assert parts.components[0].tolist() == [0.0, 3.0, 1.0, pytest.approx(0.1)]
    assert parts.components[2].tolist() == [1.0, 7.0, pytest.approx(0.7), 0.0]
    assert not parts.components[3:].any()
    assert parts.mask.tolist() == [True, True, True, False, False]
    own = LAYOUT.to_class(parts.components[:2], 0)
    assert torch.equal(own, ROW[3:9].reshape(2, 3))


def test_packing_undoes_unpacking_in_any_order() -> None:
    theta = rows(200)
    parts = LAYOUT.unpack(theta)
    assert torch.equal(
        LAYOUT.pack(parts.cardinality, parts.components, parts.shared), theta
    )
    mixed = LAYOUT.relabel(theta, torch.Generator().manual_seed(3))
    assert not torch.equal(mixed, theta)
    assert torch.equal(LAYOUT.canonical(mixed), theta)


def test_any_component_may_come_first() -> None:
    """A row keeps each class together; taken apart, all have the same chance."""
    theta, generator = ROW.expand(3_000, -1), torch.Generator().manual_seed(0)
    parts = LAYOUT.shuffled(theta, generator)
    places = parts.components[:, 0, 1]
    for place in (3.0, 4.0, 7.0):
        share = float((places == place).double().mean())
        assert share == pytest.approx(1 / 3, abs=0.05)  # more than five deviations
    assert torch.equal(
        LAYOUT.canonical(
            LAYOUT.pack(parts.cardinality, parts.components, parts.shared)
        ),
        theta,
    )


def test_rows_with_the_same_counts_are_of_one_kind() -> None:
    theta = rows(200)
    codes, counts = LAYOUT.kind(theta), LAYOUT.counts(theta)
    for code in codes.unique():
        assert len(counts[codes == code].unique(dim=0)) == 1
    assert len(codes.unique()) == len(counts.unique(dim=0))


def test_too_many_of_a_class_are_no_row() -> None:
    parts = LAYOUT.unpack(ROW)
    components = parts.components.clone()
    components[2, 0] = 0.0  # three lines
    row = LAYOUT.pack(parts.cardinality, components, parts.shared)
    assert LAYOUT.counts(row).tolist() == [3, 0]
    assert not LAYOUT.is_well_formed(row)
    with pytest.raises(ValueError, match=r"K_line in 0\.\.2, K_burst in 0\.\.3"):
        LAYOUT.validate(row)


@pytest.mark.parametrize(
    ("entry", "value"), [(0, 3.0), (1, 0.5), (13, 1.0), (2, torch.nan)]
)
def test_malformed_rows_are_told(entry: int, value: float) -> None:
    bad = ROW.clone()
    bad[entry] = value
    assert LAYOUT.is_well_formed(ROW)
    assert not LAYOUT.is_well_formed(bad)


def test_layouts_survive_a_file() -> None:
    assert layout_from_spec(asdict(LAYOUT)) == LAYOUT
    turning = ClassLayout.of({"line": LINE}, ("angle",), {"angle": 6.0})
    assert layout_from_spec(asdict(turning)).shared_periods == (6.0,)
    assert layout_from_spec(asdict(LINE)) == LINE


def test_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        ClassLayout.of({})
    with pytest.raises(ValueError, match="no shared parameters of its own"):
        ClassLayout.of({"a": ThetaLayout(1, ("t",), ("sigma",))})
    with pytest.raises(ValueError, match=r"shared parameters of \('sigma',\)"):
        ClassLayout.of({"a": LINE}, ("sigma",), {"frequency": 1.0})
    with pytest.raises(ValueError, match="twice"):
        ClassLayout.of({"a": LINE}, ("K_a",))
    with pytest.raises(ValueError, match="15 entries"):
        LAYOUT.unpack(ROW[:-1])
