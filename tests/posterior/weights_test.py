import math

import numpy as np
import pytest
import torch

from sbi_slotflow.posterior import weights
from sbi_slotflow.posterior.weights import pareto_smoothed, worst_pareto_k
from sbi_slotflow.seeding import generator_for


def pareto_log_weights(shape: float, num: int, seed: int = 0) -> torch.Tensor:
    """Log weights with P(w > t) = t^(-1 / shape)."""
    uniform = torch.rand(num, dtype=torch.float64, generator=generator_for(seed))
    return -shape * uniform.log()


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_the_shape_of_a_known_tail(shape):
    num = 200_000
    found = pareto_smoothed(pareto_log_weights(shape, num)).pareto_k
    # The fit sees 3 sqrt(S) = 1342 draws of the tail, and its error is (1 + k) over the
    # root of that: 5 of it, and 0.01 for its prior, give false alarms below 1e-6.
    tail = 3 * math.sqrt(num)
    assert abs(found - shape) <= 5 * (1 + shape) / math.sqrt(tail) + 0.01


def test_heavy_weights_have_a_large_shape_and_their_inverse_a_small_one():
    log_weights = pareto_log_weights(1.2, 20_000)
    # standard error below 0.12: 5 of it, false alarms below 1e-6
    assert pareto_smoothed(log_weights).pareto_k > 0.6
    assert pareto_smoothed(-log_weights).pareto_k < 0.0


def test_bounded_weights_have_a_negative_shape():
    uniform = torch.rand(20_000, dtype=torch.float64, generator=generator_for(1))
    # k = -1 for a density that ends at a corner; error as above
    assert pareto_smoothed(uniform.log()).pareto_k < -0.4


def test_smoothing_keeps_order_scale_and_all_but_the_tail():
    log_weights = pareto_log_weights(0.9, 10_000) - 500
    smoothed = pareto_smoothed(log_weights).log_weights
    assert smoothed.dtype == log_weights.dtype
    torch.testing.assert_close(smoothed.logsumexp(0), log_weights.logsumexp(0))
    order = log_weights.argsort()
    assert (smoothed[order].diff() >= 0).all()
    body = order[: 10_000 - math.ceil(3 * math.sqrt(10_000))]
    shift = smoothed[body] - log_weights[body]
    assert shift.max() - shift.min() < 1e-9
    ends = smoothed.max() - shift.mean()
    assert ends <= log_weights.max() + 1e-9


@pytest.mark.parametrize("shape", [0.6, 0.9])
def test_smoothing_makes_heavy_means_more_regular(shape):
    # The mean of Pareto weights is 1 / (1 - k). Smoothed means scatter less; on 400
    # repeats of 1,000 draws the variances' ratio is far below 1.
    raw, smooth = [], []
    for seed in range(400):
        log_weights = pareto_log_weights(shape, 1_000, seed)
        order = log_weights.argsort()
        result = pareto_smoothed(log_weights).log_weights
        shift = (result - log_weights)[order[0]]
        raw.append(float(log_weights.exp().mean()))
        smooth.append(float((result - shift).exp().mean()))
    assert np.var(smooth) < np.var(raw)


def test_a_constant_changes_nothing():
    log_weights = pareto_log_weights(0.5, 2_000)
    near, far = pareto_smoothed(log_weights), pareto_smoothed(log_weights + 5_000)
    assert far.pareto_k == pytest.approx(near.pareto_k, abs=1e-6)
    torch.testing.assert_close(far.log_weights, near.log_weights + 5_000)


@pytest.mark.parametrize("value", [0.0, -3_000.0])
def test_equal_weights_have_no_tail(value):
    log_weights = torch.full((1_000,), value)
    result = pareto_smoothed(log_weights)
    assert result.pareto_k == 0.0
    assert torch.equal(result.log_weights, log_weights)


def test_equal_weights_but_for_rounding_have_no_tail():
    log_weights = 1e-6 * torch.randn(1_000, generator=generator_for(0))
    result = pareto_smoothed(log_weights)
    assert result.pareto_k == 0.0
    assert torch.equal(result.log_weights, log_weights)


@pytest.mark.parametrize("num_tied", [2, 30, 90, 94, 95, 200])
def test_ties_at_the_top_are_no_heavy_tail(num_tied):
    log_weights = torch.randn(1_000, generator=generator_for(0))
    log_weights[:num_tied] = log_weights.max()
    result = pareto_smoothed(log_weights)
    assert torch.isfinite(result.log_weights).all()
    # with few ties the fit is that of the normal's tail
    assert result.pareto_k < 0.7
    assert result.log_weights.logsumexp(0) == pytest.approx(
        float(log_weights.logsumexp(0)), abs=1e-4
    )


def test_a_lone_weight_has_a_heavy_tail():
    log_weights = 0.1 * torch.randn(1_000, generator=generator_for(0))
    log_weights[7] = 60.0
    assert pareto_smoothed(log_weights).pareto_k > 0.7
    log_weights = torch.zeros(1_000)
    log_weights[7] = 60.0
    assert pareto_smoothed(log_weights).pareto_k > 0.7


@pytest.mark.parametrize("num", [0, 1, 24])
def test_too_few_draws_have_no_shape(num):
    log_weights = torch.randn(num)
    result = pareto_smoothed(log_weights)
    assert math.isnan(result.pareto_k)
    assert torch.equal(result.log_weights, log_weights)


def test_too_few_positive_weights_have_no_shape():
    log_weights = torch.full((1_000,), -math.inf)
    log_weights[:24] = torch.randn(24)
    assert math.isnan(pareto_smoothed(log_weights).pareto_k)


def test_fewest_draws_with_a_shape():
    assert math.isfinite(pareto_smoothed(pareto_log_weights(0.3, 25)).pareto_k)


def test_vanishing_weights_stay_and_do_not_count():
    log_weights = pareto_log_weights(0.8, 2_000)
    mixed = torch.full((3_000,), -math.inf, dtype=torch.float64)
    mixed[500:2_500] = log_weights
    alone, result = pareto_smoothed(log_weights), pareto_smoothed(mixed)
    assert result.pareto_k == alone.pareto_k
    assert torch.equal(result.log_weights[500:2_500], alone.log_weights)
    assert torch.isneginf(result.log_weights[:500]).all()
    assert torch.isneginf(result.log_weights[2_500:]).all()


def test_the_input_is_left_alone():
    log_weights = pareto_log_weights(0.8, 2_000)
    before = log_weights.clone()
    pareto_smoothed(log_weights)
    assert torch.equal(log_weights, before)


def test_a_heavy_tail_among_few_draws_of_one_cardinality_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    k = (torch.arange(10_000) % 20 == 0).long()  # 5 % of the draws
    good = 0.3 * torch.randn(10_000, generator=generator, dtype=torch.float64)
    u = torch.rand(10_000, generator=generator, dtype=torch.float64)
    heavy = -0.9 * u.log() - 5.0  # a Pareto tail of shape 0.9, of small weight
    raw = torch.where(k == 1, heavy, good)
    smoothed = pareto_smoothed(raw)
    assert smoothed.pareto_k < 0.7
    # of 500 draws k-hat errs by 0.1
    assert worst_pareto_k(raw, k, smoothed) == pytest.approx(0.9, abs=0.3)
    assert worst_pareto_k(raw, k, smoothed) > 0.7
    # of no weight, it does not count; nor do cardinalities of a few draws
    light = raw - 20.0 * k
    without = pareto_smoothed(light)
    assert worst_pareto_k(light, k, without, 1e-3) < 0.1
    assert worst_pareto_k(light, k, without) > 0.7
    rare = (torch.arange(10_000) % 200 == 0).long()
    assert worst_pareto_k(raw, rare, smoothed) < 0.9


def test_too_few_positive_weights_have_no_k_hat() -> None:
    raw = torch.full((1_000,), -math.inf, dtype=torch.float64)
    raw[:3] = torch.tensor([0.0, 1.0, 2.0])
    smoothed = pareto_smoothed(raw)
    assert math.isnan(smoothed.pareto_k)
    one_k = torch.ones(1_000, dtype=torch.long)
    assert math.isnan(worst_pareto_k(raw, one_k, smoothed))


def test_ties_in_the_tail_leave_the_k_hat_of_the_others() -> None:
    # copies of one draw a quarter into the tail, where a fit of the tail fails
    values = torch.linspace(-3.0, 0.0, 250, dtype=torch.float64)
    values[190:235] = values[190]
    found = pareto_smoothed(values)
    assert math.isfinite(found.pareto_k)
    assert found.pareto_k < 0.7


def mixture(num: int, seed: int) -> torch.Tensor:
    """Log weights of a usual K, nearly equal, and of a rare one, spread but bounded."""
    random = np.random.default_rng(seed)
    values = random.normal(0.0, 0.1, num)
    rare = random.random(num) < 0.05
    values[rare] = random.uniform(-4.0, 1.5, rare.sum())
    return torch.from_numpy(values)


def test_a_rare_cardinality_of_bounded_weights_is_no_heavy_tail() -> None:
    # At most five in a hundred were found above 0.7 by simulation; a false alarm of
    # this test, 16 of 40, has a probability below 1e-9.
    found = [pareto_smoothed(mixture(4_000, seed)).pareto_k for seed in range(40)]
    assert sum(value > 0.7 for value in found) <= 15
    alone = [weights._fitted(mixture(4_000, seed).numpy())[1] for seed in range(5)]
    assert min(alone) > 0.7  # what a Pareto fit alone makes of them


@pytest.mark.parametrize("index", [0.8, 1.0, 1.5])
def test_a_heavy_tail_keeps_its_shape(index: float) -> None:
    for seed in range(10):
        values = pareto_log_weights(index, 2_000, seed)
        shape = weights._fitted(values.double().numpy())[1]
        assert pareto_smoothed(values).pareto_k == pytest.approx(shape)


def test_a_few_weights_far_above_the_rest_are_a_heavy_tail() -> None:
    values = mixture(4_000, 0).clamp(max=0.3)
    values[:8] = torch.linspace(6.0, 9.0, 8)
    assert pareto_smoothed(values).pareto_k > 0.7
