import math
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor

from sbi_slotflow import ThetaLayout

LAYOUTS = {
    "one-parameter": ThetaLayout(3, ("t",)),
    "shared": ThetaLayout(4, ("a", "b"), ("s",), order_by=1),
    "single-slot": ThetaLayout(1, ("a", "b", "c"), ("r", "s"), order_by=2),
}

# K = 2 of at most 3, components (0, 0) and (-1, 5): the first is active and all zero.
TWO = ThetaLayout(3, ("a", "b"), ("s",), order_by=0)
ROW = [2.0, 0.5, 0.0, 0.0, -1.0, 5.0, 0.0, 0.0]


@pytest.fixture(params=LAYOUTS, name="layout")
def _layout(request: pytest.FixtureRequest) -> ThetaLayout:
    return LAYOUTS[request.param]


def random_parts(
    layout: ThetaLayout, *batch: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*batch, layout.max_cardinality, layout.num_component_params)
    return (
        torch.randint(layout.max_cardinality + 1, batch),
        torch.randn(shape, dtype=dtype),
        torch.randn(*batch, layout.num_shared, dtype=dtype),
    )


def random_rows(layout: ThetaLayout, *batch: int) -> Tensor:
    return layout.pack(*random_parts(layout, *batch))


def as_set(layout: ThetaLayout, row: Tensor) -> list[tuple[float, ...]]:
    """Read a row's components by hand, as a sorted list."""
    k, start = int(row[0]), 1 + layout.num_shared
    size = layout.num_component_params
    flat = row[start : start + k * size].reshape(k, size)
    return sorted(tuple(c) for c in flat.tolist())


@pytest.mark.parametrize("batch", [(), (5,), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unpack_inverts_pack(
    layout: ThetaLayout, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    k, components, shared = random_parts(layout, *batch, dtype=dtype)
    theta = layout.pack(k, components, shared)
    assert theta.shape == (*batch, layout.size)
    assert theta.dtype == dtype
    parts = layout.unpack(theta)
    assert torch.equal(parts.cardinality, k)
    assert parts.cardinality.dtype == torch.int64
    assert torch.equal(parts.shared, shared)
    assert torch.equal(parts.components[parts.mask], components[parts.mask])
    assert torch.equal(parts.mask.sum(-1), k)
    assert torch.equal(layout.cardinality(theta), k)


def test_a_row_is_cardinality_then_shared_then_components() -> None:
    components = torch.tensor([[0.0, 0.0], [-1.0, 5.0], [7.0, 8.0]])
    row = TWO.pack(torch.tensor(2), components, torch.tensor([0.5]))
    assert row.tolist() == ROW


def test_padding_is_zero_whatever_the_inactive_components_hold(
    layout: ThetaLayout,
) -> None:
    k, components, shared = random_parts(layout, 50)
    components[~layout.mask(k)] = torch.nan
    theta = layout.pack(k, components, shared)
    parts = layout.unpack(theta)
    assert (parts.components[~parts.mask] == 0).all()
    assert layout.is_well_formed(theta).all()


def test_the_mask_follows_from_the_cardinality_alone() -> None:
    mask = TWO.mask(torch.tensor([[0, 1], [2, 3]]))
    expected = [
        [[False, False, False], [True, False, False]],
        [[True, True, False], [True, True, True]],
    ]
    assert mask.tolist() == expected
    zeros = TWO.pack(torch.tensor(2), torch.zeros(3, 2), torch.zeros(1))
    assert TWO.unpack(zeros).mask.tolist() == [True, True, False]


@pytest.mark.parametrize("operation", ["canonical", "relabel"])
def test_an_active_component_that_is_exactly_zero_survives(operation: str) -> None:
    row = torch.tensor(ROW)
    moved = getattr(TWO, operation)(row.expand(20, -1))
    for other in moved:
        assert other[0] == 2
        assert as_set(TWO, other) == [(-1.0, 5.0), (0.0, 0.0)]
        assert (other[-2:] == 0).all()


def test_canonical_sorts_the_active_components_and_only_them(
    layout: ThetaLayout,
) -> None:
    theta = random_rows(layout, 200)
    result = layout.canonical(theta)
    for before, after in zip(theta, result, strict=True):
        components = as_set(layout, before)
        components.sort(key=lambda c: c[layout.order_by])
        flat = [value for component in components for value in component]
        head = before[: 1 + layout.num_shared].tolist()
        padding = [0.0] * (layout.size - len(head) - len(flat))
        assert after.tolist() == head + flat + padding


def test_canonical_is_the_same_for_every_labelling(layout: ThetaLayout) -> None:
    theta = layout.canonical(random_rows(layout, 200))
    assert torch.equal(layout.canonical(theta), theta)
    assert torch.equal(layout.canonical(layout.relabel(theta)), theta)


def test_relabel_describes_the_same_set(layout: ThetaLayout) -> None:
    theta = random_rows(layout, 200)
    result = layout.relabel(theta)
    head = 1 + layout.num_shared
    assert torch.equal(result[:, :head], theta[:, :head])
    assert layout.is_well_formed(result).all()
    for before, after in zip(theta, result, strict=True):
        assert as_set(layout, after) == as_set(layout, before)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_relabel_draws_every_labelling_equally_often(k: int) -> None:
    layout, num = ThetaLayout(5, ("t",)), 12_000
    components = torch.arange(1.0, 6.0).unsqueeze(-1)
    theta = layout.pack(torch.tensor(k), components).expand(num, -1)
    drawn = [tuple(row[1 : 1 + k].tolist()) for row in layout.relabel(theta)]
    counts = [drawn.count(p) for p in permutations(range(1, k + 1))]
    assert sum(counts) == num
    # false alarm in 1 of 10^6 seeds
    assert stats.chisquare(counts).pvalue > 1e-6


def test_relabel_takes_its_randomness_from_the_generator() -> None:
    layout = ThetaLayout(4, ("t",))
    theta = layout.pack(torch.full((50,), 4), torch.randn(50, 4, 1))
    state = torch.random.get_rng_state()
    first = layout.relabel(theta, torch.Generator().manual_seed(1))
    again = layout.relabel(theta, torch.Generator().manual_seed(1))
    other = layout.relabel(theta, torch.Generator().manual_seed(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_entry_of_a_row_has_its_own_name(layout: ThetaLayout) -> None:
    assert len(layout.names) == layout.size == len(set(layout.names))
    assert TWO.names == ["K", "s", "a_1", "b_1", "a_2", "b_2", "a_3", "b_3"]


def test_rows_built_by_pack_are_accepted(layout: ThetaLayout) -> None:
    theta = random_rows(layout, 2, 50)
    layout.validate(theta)
    layout.validate(theta.double())
    assert layout.is_well_formed(theta).all()
    assert layout.is_well_formed(theta).shape == (2, 50)


def edited(**entries: float) -> Tensor:
    row = torch.tensor(ROW)
    for name, value in entries.items():
        row[TWO.names.index(name)] = value
    return row


MALFORMED = {
    "nan": (edited(a_1=torch.nan), "theta must be finite: NaN or Inf in 1 row"),
    "inf": (edited(s=torch.inf), "theta must be finite: NaN or Inf in 1 row"),
    "nan-padding": (edited(b_3=torch.nan), "theta must be finite: NaN or Inf"),
    "nan-cardinality": (edited(K=torch.nan), "theta must be finite: NaN or Inf"),
    "half-cardinality": (edited(K=1.5), r"integer cardinality K in 0\.\.3 .*got 1\.5"),
    "negative": (edited(K=-1.0), r"integer cardinality K in 0\.\.3 .*got -1"),
    "too-large": (edited(K=4.0), r"integer cardinality K in 0\.\.3 .*got 4"),
}


@pytest.mark.parametrize(("row", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_rejected_and_its_neighbours_are_not(
    row: Tensor, message: str
) -> None:
    theta = torch.stack([torch.tensor(ROW), row])
    with pytest.raises(ValueError, match=message):
        TWO.validate(theta)
    with pytest.raises(ValueError, match=message):
        TWO.validate(row)
    assert TWO.is_well_formed(theta).tolist() == [True, False]


def test_non_zero_padding_is_not_well_formed() -> None:
    assert not TWO.is_well_formed(edited(a_3=1e-6))
    assert not TWO.is_well_formed(edited(K=1.0))
    assert TWO.is_well_formed(edited(K=1.0, a_2=0.0, b_2=0.0))


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_row_of_the_wrong_length_is_rejected(size: int) -> None:
    for read in (TWO.validate, TWO.unpack, TWO.canonical, TWO.relabel):
        with pytest.raises(ValueError, match=r"8 entries .*got shape \(2, \d\)"):
            read(torch.zeros(2, size))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        TWO.validate(torch.tensor(1.0))


def test_the_error_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^input must have 8 entries"):
        TWO.validate(torch.zeros(3), name="input")
    with pytest.raises(ValueError, match=r"^input must be finite"):
        TWO.validate(edited(s=torch.nan), name="input")


@pytest.mark.parametrize(
    ("theta", "kind"),
    [(torch.zeros(8, dtype=torch.int64), "torch.int64"), (ROW, "list")],
    ids=["integers", "list"],
)
def test_only_floating_point_tensors_are_accepted(theta: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"floating-point tensor, got {kind}"):
        TWO.validate(theta)  # pyright: ignore[reportArgumentType]


def test_pack_rejects_shapes_that_do_not_fit() -> None:
    k = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"components must have shape \(2, 3, 2\)"):
        TWO.pack(k, torch.zeros(2, 2, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"shared must have shape \(2, 1\)"):
        TWO.pack(k, torch.zeros(2, 3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"shared must have shape \(2, 1\)"):
        TWO.pack(k, torch.zeros(2, 3, 2))


def test_an_impossible_layout_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_cardinality must be at least 1, got 0"):
        ThetaLayout(0, ("a",))
    with pytest.raises(ValueError, match="component_names must name at least one"):
        ThetaLayout(1, ())
    for order_by in (-1, 2):
        with pytest.raises(ValueError, match=f"one of the 2 .*got {order_by}"):
            ThetaLayout(1, ("a", "b"), order_by=order_by)


def test_periods_are_checked_and_do_not_tell_layouts_apart():
    layout = ThetaLayout(2, ("a", "b"), ("s",), periods={"b": 3.0})
    assert layout == ThetaLayout(2, ("a", "b"), ("s",))
    assert layout.component_periods == (float("inf"), 3.0)
    with pytest.raises(ValueError, match="periods must name parameters of"):
        ThetaLayout(2, ("a",), periods={"c": 1.0})
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="periods must be positive and finite"):
            ThetaLayout(2, ("a",), periods={"a": wrong})


@pytest.mark.parametrize(
    ("components", "shared", "message"),
    [
        (("a", "a"), (), r"must differ.*'a'"),
        (("a", "b"), ("a",), r"must differ.*'a'"),
        (("a",), ("s", "s"), r"must differ.*'s'"),
        (("K",), (), r"must differ.*'K'"),
        (("a",), ("K",), r"must differ.*'K'"),
        (("a",), ("a_1",), r"must differ.*'a_1'"),
        (("a", "a_2"), (), r"must differ.*'a_2'"),
        (("a", ""), (), "must be strings that are not empty"),
        (("a",), (3,), "must be strings that are not empty"),
    ],
)
def test_names_that_collide_are_rejected(components, shared, message) -> None:
    with pytest.raises(ValueError, match=message):
        ThetaLayout(3, components, shared)


def test_names_that_only_look_alike_are_accepted() -> None:
    layout = ThetaLayout(3, ("theta_1", "theta_2"), ("a_1", "theta"))
    assert len(set(layout.names)) == layout.size


def test_periods_are_told_by_position() -> None:
    layout = ThetaLayout(2, ("a", "b"), ("s", "t"), periods={"b": 2.0, "s": 3.0})
    assert layout.component_periods == (math.inf, 2.0)
    assert layout.shared_periods == (3.0, math.inf)
