import warnings

import numpy as np
import pytest
import torch

from sbi_slotflow import problems
from sbi_slotflow.sets.checks import as_floats, as_shape


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([1.0, 2.0]), torch.float32),
        (torch.tensor([1.0, 2.0]).double(), torch.float64),
        (torch.tensor([1.0, 2.0]).half(), torch.float32),
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.float32),
        (torch.tensor([1, 2]), torch.float64),
        (np.array([1, 2], dtype=">u2"), torch.float64),
        (np.array([1.0, 2.0], dtype=">f8"), torch.float64),
        (np.array([1.0, 2.0], dtype="f2"), torch.float32),
        (np.array([1.0, 2.0], dtype=np.longdouble), torch.float64),
        (np.array([2.0, 1.0])[::-1], torch.float64),
        ([1, 2], torch.float64),
        ([torch.tensor(1.0), torch.tensor(2.0)], torch.float32),
    ],
)
def test_numbers_keep_their_values_in_single_or_double_precision(value, dtype):
    found = as_floats(value, "x")
    assert found.dtype == dtype
    assert found.tolist() == [1.0, 2.0]


def test_integers_keep_all_their_digits():
    assert as_floats([2**25 + 1], "x").tolist() == [2**25 + 1]


def test_gradients_pass_through():
    x = torch.ones(2, requires_grad=True)
    as_floats(x, "x").sum().backward()
    assert x.grad is not None


def test_arrays_are_not_shared_with_their_owner():
    array = np.zeros(2, dtype=np.float32)
    found = as_floats(array, "x")
    array[0] = 1.0
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [torch.tensor([2, 3]), np.array([2, 3]), [2, 3]])
def test_shapes_of_any_kind(shape):
    assert as_shape(shape) == torch.Size((2, 3))


def test_rows_of_broken_cardinality_warn_if_there_are_many():
    prior = problems.linear_gaussian().prior
    rows = prior.sample((30,))
    broken = rows.clone()
    broken[:, 0] += 0.3
    with pytest.warns(
        UserWarning, match="not one of 30 theta rows starts with a whole"
    ):
        assert not prior.support.check(broken).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.support.check(broken[:5])
        prior.support.check(torch.cat([broken, rows[:1]]))
        prior.support.check(rows.unsqueeze(1))
