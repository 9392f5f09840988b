"""Permanents and assignments against brute force over all permutations."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sbi_slotflow.sets import matching
from sbi_slotflow.sets.matching import EXACT_LIMIT, hungarian, log_permanent

INF = math.inf


def assignments(matrix: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """All assignments of a K x K matrix and the log density of each."""
    size = len(matrix)
    permutations = list(itertools.permutations(range(size)))
    rows = range(size)
    totals = [
        sum((matrix[i, p[i]] for i in rows), matrix.new_zeros(())) for p in permutations
    ]
    return permutations, torch.stack(totals)


def brute_force(log_density: Tensor, cardinality: Tensor) -> Tensor:
    """Log permanents, one permutation at a time."""
    return torch.stack(
        [
            torch.logsumexp(assignments(matrix[:k, :k])[1], dim=0)
            for matrix, k in zip(log_density, cardinality.tolist(), strict=True)
        ]
    )


def ragged_batch(size: int = 6, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Two rows of every K in 0..size; outside the K x K block everything is NaN."""
    generator = torch.Generator().manual_seed(size)
    cardinality = torch.arange(size + 1).repeat(2)
    values = scale * torch.randn(
        len(cardinality), size, size, generator=generator, dtype=torch.float64
    )
    active = torch.arange(size) < cardinality.unsqueeze(-1)
    block = active.unsqueeze(-1) & active.unsqueeze(-2)
    return values.masked_fill(~block, math.nan), cardinality


def with_holes(values: Tensor, seed: int = 1) -> Tensor:
    """Put -inf in a third of the entries."""
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(values.shape, generator=generator) < 1 / 3
    return values.masked_fill(holes & ~values.isnan(), -INF)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("scale", [0.1, 4.0, 300.0])
def test_permanent_of_a_ragged_batch_equals_sum_over_permutations(
    size: int, scale: float
) -> None:
    values, cardinality = ragged_batch(size, scale)
    expected = brute_force(values, cardinality)
    torch.testing.assert_close(log_permanent(values, cardinality), expected)


def test_permanent_in_float32_keeps_float32_accuracy() -> None:
    values, cardinality = ragged_batch()
    result = log_permanent(values.float(), cardinality)
    assert result.dtype == torch.float32
    expected = brute_force(values, cardinality).float()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permanent_with_zero_densities_equals_sum_over_permutations(
    dtype: torch.dtype,
) -> None:
    values, cardinality = ragged_batch()
    values = with_holes(values)
    expected = brute_force(values, cardinality)
    assert expected.isneginf().any()
    assert expected.isfinite().sum() > 4
    result = log_permanent(values.to(dtype), cardinality)
    torch.testing.assert_close(result, expected.to(dtype), rtol=1e-5, atol=1e-5)


def test_permanent_of_the_empty_set_is_one() -> None:
    values = torch.full((3, 4, 4), math.nan)
    result = log_permanent(values, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(result, torch.zeros(3), rtol=0, atol=0)


def test_permanent_of_no_rows_has_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert log_permanent(torch.zeros(0, 3, 3), none).shape == (0,)
    assert hungarian(torch.zeros(0, 3, 3), none).shape == (0, 3)


@pytest.mark.parametrize("k", [7, 10, EXACT_LIMIT])
def test_permanent_of_an_outer_sum_is_k_factorial_times_one_term(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a, b = 3 * torch.randn(2, 1, k, generator=generator, dtype=torch.float64)
    values = a.unsqueeze(-1) + b.unsqueeze(-2)
    result = log_permanent(values, torch.tensor([k]))
    expected = a.sum(-1) + b.sum(-1) + math.lgamma(k + 1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("k", [7, 10, EXACT_LIMIT])
def test_permanent_of_a_triangle_is_its_diagonal(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(1, k, k, generator=generator, dtype=torch.float64)
    above = torch.ones(k, k, dtype=torch.bool).triu(1)
    values = values.masked_fill(above, -INF)
    result = log_permanent(values, torch.tensor([k]))
    torch.testing.assert_close(result, values.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_permanent_equals_rysers_formula() -> None:
    k = 9
    generator = torch.Generator().manual_seed(k)
    density = torch.rand(k, k, generator=generator, dtype=torch.float64)
    total = 0.0
    for count in range(1, k + 1):
        for columns in itertools.combinations(range(k), count):
            sign = (-1) ** (k - count)
            total += sign * float(density[:, list(columns)].sum(-1).prod())
    result = log_permanent(density.log().unsqueeze(0), torch.tensor([k]))
    assert result.item() == pytest.approx(math.log(total), rel=1e-10)


def test_permanent_gradient_equals_that_of_the_sum_over_permutations() -> None:
    values, cardinality = ragged_batch(5)
    values.requires_grad_()
    (result,) = torch.autograd.grad(log_permanent(values, cardinality).sum(), values)
    (expected,) = torch.autograd.grad(brute_force(values, cardinality).sum(), values)
    torch.testing.assert_close(result, expected)
    # slot-by-component matching probabilities: every slot takes one component
    active = torch.arange(5) < cardinality.unsqueeze(-1)
    torch.testing.assert_close(result.sum(-1), active.double())
    torch.testing.assert_close(result.sum(-2), active.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permanent_gradient_is_finite_where_densities_are_zero(
    dtype: torch.dtype,
) -> None:
    values, cardinality = ragged_batch()
    values = with_holes(values).to(dtype).requires_grad_()
    result = log_permanent(values, cardinality)
    assert result.isneginf().any()
    possible = result.isfinite()
    (gradient,) = torch.autograd.grad(result[possible].sum(), values)
    assert gradient.isfinite().all()
    assert (gradient[values.isneginf()] == 0).all()
    rows = torch.arange(6) < (cardinality * possible).unsqueeze(-1)
    torch.testing.assert_close(gradient.sum(-1), rows.to(dtype), rtol=1e-4, atol=1e-4)


def test_permanent_does_not_depend_on_the_order_of_components() -> None:
    values, _ = ragged_batch()
    full = values[-1:]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    six = torch.tensor([6])
    torch.testing.assert_close(
        log_permanent(full[:, :, order], six), log_permanent(full, six)
    )


def test_permanent_above_the_exact_limit_is_a_bound_within_log_k_factorial() -> None:
    k = EXACT_LIMIT + 2
    equal = torch.full((k, k), -0.7, dtype=torch.float64)
    diagonal = equal.masked_fill(~torch.eye(k, dtype=torch.bool), -INF)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, k, generator=generator, dtype=torch.float64)
    outer = a.unsqueeze(-1) + b
    values = torch.stack([equal, diagonal, outer])
    factorial = math.lgamma(k + 1)
    one_term = torch.stack([equal.diagonal().sum(), diagonal.diagonal().sum()])
    exact = torch.cat([one_term, (a.sum() + b.sum()).unsqueeze(0)])
    short = torch.tensor([factorial, 0.0, factorial], dtype=torch.float64)
    exact = exact + short
    result = log_permanent(values, torch.full((3,), k))
    assert (result <= exact + 1e-9).all()
    assert (result >= exact - factorial - 1e-9).all()
    # the bound is reached: exact for a single term, log K! short for K! equal ones
    torch.testing.assert_close(exact - result, short)


def test_rows_above_the_exact_limit_leave_the_others_exact() -> None:
    size = EXACT_LIMIT + 1
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, size, size, generator=generator, dtype=torch.float64)
    cardinality = torch.tensor([3, size, 0, 5])
    result = log_permanent(values, cardinality)
    small = torch.tensor([0, 2, 3])
    expected = brute_force(values[small], cardinality[small])
    torch.testing.assert_close(result[small], expected)
    best = hungarian(values[1:2], cardinality[1:2])
    largest = values[1].gather(-1, best[0].unsqueeze(-1)).sum()
    torch.testing.assert_close(result[1], largest)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_hungarian_is_the_best_permutation(size: int) -> None:
    values, cardinality = ragged_batch(size)
    result = hungarian(values, cardinality)
    assert result.dtype == torch.int64
    assert result.shape == (len(values), size)
    for matrix, k, columns in zip(values, cardinality.tolist(), result, strict=True):
        permutations, totals = assignments(matrix[:k, :k])
        best = permutations[int(totals.argmax())]
        assert columns.tolist() == [*best, *range(k, size)]


def test_hungarian_avoids_zero_densities_where_it_can() -> None:
    values, cardinality = ragged_batch()
    values = with_holes(values)
    result = hungarian(values, cardinality)
    for matrix, k, columns in zip(values, cardinality.tolist(), result, strict=True):
        _, totals = assignments(matrix[:k, :k])
        slots = torch.arange(k)
        reached = matrix[slots, columns[:k]].sum()
        assert sorted(columns.tolist()) == list(range(6))
        torch.testing.assert_close(reached, totals.max())


def test_hungarian_optimum_lies_within_log_k_factorial_of_the_permanent() -> None:
    values, cardinality = ragged_batch()
    columns = hungarian(values, cardinality).unsqueeze(-1)
    best = values.gather(-1, columns).squeeze(-1).nan_to_num(0.0).sum(-1)
    exact = log_permanent(values, cardinality)
    assert (best <= exact + 1e-9).all()
    assert (best >= exact - torch.lgamma(cardinality + 1.0) - 1e-9).all()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_hungarian_refuses_what_cannot_be_matched(bad: float) -> None:
    values = torch.zeros(2, 3, 3)
    values[1, 0, 1] = bad
    with pytest.raises(ValueError, match=r"must not be NaN or \+inf"):
        hungarian(values, torch.tensor([3, 2]))


def test_permanent_refuses_nan() -> None:
    values = torch.zeros(2, 3, 3)
    values[1, 0, 1] = math.nan
    with pytest.raises(ValueError, match="must not be NaN inside the K x K block"):
        log_permanent(values, torch.tensor([3, 2]))


@pytest.mark.parametrize("limit", [1, 100, 500])
def test_permanent_in_chunks_equals_one_pass(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, cardinality = ragged_batch()
    whole = log_permanent(values, cardinality)
    monkeypatch.setattr(matching, "_MAX_TERMS", limit)
    torch.testing.assert_close(log_permanent(values, cardinality), whole)


def test_rows_do_not_influence_each_other() -> None:
    values, cardinality = ragged_batch()
    together = log_permanent(values, cardinality)
    matched = hungarian(values, cardinality)
    for i in range(len(values)):
        alone, k = values[i : i + 1], cardinality[i : i + 1]
        torch.testing.assert_close(log_permanent(alone, k)[0], together[i])
        assert hungarian(alone, k)[0].tolist() == matched[i].tolist()


def test_inputs_stay_as_they_are() -> None:
    values, cardinality = ragged_batch()
    before = values.clone()
    log_permanent(values, cardinality)
    hungarian(values, cardinality)
    torch.testing.assert_close(values, before, rtol=0, atol=0, equal_nan=True)
