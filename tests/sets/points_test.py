"""Sets of points: what is missing, packing."""

import math

import pytest
import torch

from sbi_slotflow.sets.points import filled_points, packed_points


def test_points_with_nan_or_without_a_mark_are_missing() -> None:
    x = [[1.0, 2.0, 1.0], [math.nan, 2.0, 1.0], [3.0, 4.0, 0.0], [5.0, 6.0, math.nan]]
    expected = torch.zeros(4, 3).double()
    expected[0] = torch.tensor([1.0, 2.0, 1.0])
    assert torch.equal(filled_points(torch.tensor(x).double()), expected)


def test_packed_sets_are_padded() -> None:
    x = packed_points([torch.ones(3, 2), [[4.0, 5.0]]], length=4)
    assert x.shape == (2, 4, 3)
    assert x[..., -1].sum(-1).tolist() == [3.0, 1.0]
    assert x[1].tolist() == [[4.0, 5.0, 1.0], *3 * [[0.0, 0.0, 0.0]]]
    assert packed_points([[1.0, 2.0], [3.0]]).shape == (2, 2, 2)


@pytest.mark.parametrize("mark", [0.5, 2.0, -1.0])
def test_another_mark_is_refused(mark: float) -> None:
    with pytest.raises(ValueError, match="must have 1"):
        filled_points(torch.tensor([[1.0, mark]]))


def test_wrong_points_are_refused() -> None:
    with pytest.raises(ValueError, match="finite coordinates"):
        filled_points(torch.tensor([[math.inf, 1.0]]))
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., n, d \+ 1\)"):
        filled_points(torch.ones(4, 1))
    with pytest.raises(ValueError, match="sets of shape"):
        packed_points([torch.ones(3, 2), torch.ones(3)])
    with pytest.raises(ValueError, match="sets of shape"):
        packed_points([])
    with pytest.raises(ValueError, match="length must be at least 3"):
        packed_points([[1.0, 2.0, 3.0]], length=2)
