"""The density estimator: every variant of the builder keeps the same invariants."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sbi.neural_nets.embedding_nets import FCEmbedding
from sbi.utils import BoxUniform, MultipleIndependent
from scipy import stats
from torch import Tensor, nn
from torch.distributions import (
    ExpTransform,
    Independent,
    Normal,
    TransformedDistribution,
    Uniform,
)

from sbi_slotflow import VariableKPrior, problems
from sbi_slotflow.nn import (
    ComponentHead,
    Encoding,
    GlobalSlots,
    MLPEncoder,
    SlotDensityEstimator,
    slot_nn,
)
from sbi_slotflow.storage import read_tensors, write_tensors

FORMAT, VERSION = "sbi_slotflow.SlotDensityEstimator", 2
SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
    "flow_bins": 5,
}
NARROW: dict[str, Any] = {"channels": (8, 8, 8), "num_heads": 2}
PAPER: dict[str, Any] = {
    **NARROW,
    "kernels": (8, 8, 5),
    "strides": ((2, 2, 1), (2, 2, 1)),
    "context_features": 32,
    "noise_stack": True,
    "residual": False,
    "centre_phase": False,
    "bands": None,
}


class UserEncoder(nn.Module):
    """A module that knows nothing of this package and returns a tensor."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layer = nn.Linear(300, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class ThreeEncoders(nn.Module):
    """One embedding for each reader, all of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, width) for width in (12, 8, 5))

    def forward(self, x: Tensor) -> Encoding:
        return Encoding(*(torch.tanh(layer(x)) for layer in self.layers))


def sbi_encoder() -> nn.Module:
    return FCEmbedding(input_dim=300, output_dim=12, num_layers=2, num_hiddens=16)


def tiny(**options: Any) -> slot_nn:
    problem = problems.sinusoids("tiny")
    return slot_nn(problem, **{**SMALL, "encoder_options": NARROW, **options})


def tiny_with(encoder: nn.Module) -> slot_nn:
    return tiny(encoder=encoder, encoder_options=None, hidden_features=None)


def bare_prior() -> slot_nn:
    """No K = 0, uneven weights, two shared parameters, ordered by the second."""
    component = MultipleIndependent(
        [
            Normal(torch.tensor([1.0]), torch.tensor([0.5])),
            TransformedDistribution(
                Uniform(torch.tensor([-2.0]), torch.tensor([1.0])), [ExpTransform()]
            ),
        ],
        validate_args=False,
    )
    shared = BoxUniform(torch.tensor([0.0, -1.0]), torch.tensor([2.0, 3.0]))
    prior = VariableKPrior(component, [0.0, 1.0, 2.0, 1.0], shared=shared, order_by=1)
    return slot_nn(prior, **SMALL)


def linear() -> slot_nn:
    return slot_nn(problems.linear_gaussian(), **SMALL)


def paper() -> slot_nn:
    return slot_nn.paper(
        problems.sinusoids("tiny"),
        hidden_features=16,
        flow_hidden_features=32,
        flow_layers=4,
        flow_bins=8,
        encoder_options=PAPER,
    )


VARIANTS: dict[str, Callable[[], slot_nn]] = {
    "tiny": tiny,
    "full-size": lambda: slot_nn(problems.sinusoids("tiny"), slots="attention"),
    "hungarian": lambda: tiny(matching="hungarian"),
    "permanent": lambda: tiny(matching="permanent"),
    "ordered": lambda: tiny(matching="ordered"),
    "blind-to-k": lambda: tiny(condition_on_cardinality=False),
    "no-shared-head": lambda: tiny(shared_head=False),
    "global-slots": lambda: tiny(slots="global"),
    "no-trunk": lambda: tiny(trunk_features=None),
    "residual-flow": lambda: tiny(flow_network="residual"),
    "no-location-scale": lambda: tiny(location_scale=False),
    "mean-flow-loss": lambda: tiny(mean_flow_loss=True, loss_weights=(1.0, 2.0, 0.5)),
    "time-time": lambda: tiny(
        domains=("time", "time"),
        encoder_options={**NARROW, "strides": ((2, 2, 1), (2, 2, 2))},
    ),
    "frequency-frequency": lambda: tiny(domains=("frequency", "frequency")),
    "time-frequency": lambda: tiny(domains=("time-frequency", "time")),
    "circle": lambda: tiny(chart="circle"),
    "paper": paper,
    "linear-gaussian": linear,
    "bare-prior": bare_prior,
    "user-encoder": lambda: tiny_with(UserEncoder()),
    "user-encoding": lambda: tiny_with(ThreeEncoders()),
    "sbi-encoder": lambda: tiny_with(sbi_encoder()),
}
USER_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "user-encoder": UserEncoder,
    "user-encoding": ThreeEncoders,
    "sbi-encoder": sbi_encoder,
}
SURFACES = ("circle", "paper")
DENSITIES = [name for name in VARIANTS if name not in SURFACES]


@dataclass(frozen=True)
class Variant:
    """An estimator with random weights and a batch with every possible K."""

    name: str
    prior: VariableKPrior
    estimator: SlotDensityEstimator
    theta: Tensor
    x: Tensor

    @property
    def free_prior(self) -> VariableKPrior:
        """The prior without its least separation, which slots do not know of."""
        return VariableKPrior(
            self.prior.component,
            self.prior.cardinality_probs,
            shared=self.prior.shared,
            order_by=self.prior.layout.order_by,
        )

    def copy(self, noise: float = 0.0) -> SlotDensityEstimator:
        """A copy to change, if asked with more noise on its weights."""
        estimator = deepcopy(self.estimator)
        shake(estimator, noise)
        return estimator

    def rows_with(self, cardinality: int) -> Tensor:
        """Positions of the rows with this K."""
        k = self.prior.layout.cardinality(self.theta)
        return (k == cardinality).nonzero().squeeze(-1)


def shake(module: nn.Module, noise: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += noise * torch.randn_like(parameter)


@torch.no_grad()
def spread(estimator: SlotDensityEstimator, x: Tensor) -> None:
    """Spread the embeddings of a batch, which random weights leave almost equal."""
    for name, projection in estimator.net.named_children():
        if name.startswith("to_"):
            outputs: list[Tensor] = []
            hook = projection.register_forward_hook(
                lambda module, args, output, seen=outputs: seen.append(output)
            )
            estimator.encode(x)
            hook.remove()
            last = cast(nn.Sequential, projection)[-1]
            assert isinstance(last, nn.Linear)
            scale = 1 / outputs[0].std(0)
            last.weight *= scale.unsqueeze(-1)
            last.bias.sub_(outputs[0].mean(0)).mul_(scale)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulate(builder: slot_nn, theta: Tensor) -> Tensor:
    if isinstance(builder.problem, VariableKPrior):
        weights = torch.randn(theta.shape[-1], 7)
        return torch.tanh(theta @ weights) + 0.1 * torch.randn(len(theta), 7)
    assert isinstance(builder.problem, problems.Problem)
    return builder.problem.simulator(theta)


@cache
def variant_named(name: str) -> Variant:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        builder = VARIANTS[name]()
        problem = builder.problem
        prior = problem if isinstance(problem, VariableKPrior) else problem.prior  # pyright: ignore[reportOptionalMemberAccess]
        draws = prior.sample((500,))
        k = prior.layout.cardinality(draws)
        possible = prior.cardinality_probs.nonzero().squeeze(-1).tolist()
        rows = torch.cat([(k == n).nonzero()[:5, 0] for n in possible])
        theta = draws[rows[torch.randperm(len(rows))]]
        x = simulate(builder, theta)
        estimator = builder(theta, x)
        shake(estimator, 0.05)
        spread(estimator, x)
    return Variant(name, prior, estimator.eval(), theta, x)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_named(request.param)


@pytest.fixture(params=DENSITIES)
def density(request: pytest.FixtureRequest) -> Variant:
    return variant_named(request.param)


# --- the loss


@torch.no_grad()
def test_loss_is_one_number_a_row_the_weighted_sum_of_its_terms(
    variant: Variant,
) -> None:
    terms = variant.estimator.loss_terms(variant.theta, variant.x)
    assert set(terms) == {"cardinality", "flow", "shared", "correct"}
    assert all(t.shape == (len(variant.theta),) for t in terms.values())
    cardinality, flow, shared = variant.estimator.spec.loss_weights
    loss = variant.estimator.loss(variant.theta, variant.x)
    assert loss.shape == (len(variant.theta),)
    assert loss.isfinite().all()
    torch.testing.assert_close(
        loss,
        cardinality * terms["cardinality"]
        + flow * terms["flow"]
        + shared * terms["shared"],
    )
    k = variant.prior.layout.cardinality(variant.theta)
    log_k = variant.estimator.log_prob_cardinality(variant.x)
    torch.testing.assert_close(terms["cardinality"], -log_k[torch.arange(len(k)), k])
    assert torch.equal(terms["correct"], (log_k.argmax(-1) == k).float())
    assert (terms["flow"][k == 0] == 0).all()


def test_every_parameter_receives_a_gradient(variant: Variant) -> None:
    parameters = dict(variant.estimator.named_parameters())
    gradients = torch.autograd.grad(
        variant.estimator.loss(variant.theta, variant.x).mean(),
        list(parameters.values()),
        allow_unused=True,
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.isfinite().all(), f"{name} has a gradient that is not finite"
        assert (gradient != 0).any(), f"{name} has a gradient of zero"


@torch.no_grad()
def test_loss_does_not_depend_on_the_labelling(variant: Variant) -> None:
    loss = variant.estimator.loss(variant.theta, variant.x)
    for seed in range(3):
        relabelled = variant.prior.layout.relabel(variant.theta, seeded(seed))
        assert not torch.equal(relabelled, variant.theta)
        again = variant.estimator.loss(relabelled, variant.x)
        torch.testing.assert_close(again, loss, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_loss_called_twice_is_the_same_and_leaves_its_inputs(
    variant: Variant, training: bool
) -> None:
    theta, x = variant.theta.clone(), variant.x.clone()
    estimator = variant.copy().train() if training else variant.estimator
    state = {n: v.clone() for n, v in estimator.state_dict().items()}
    with torch.no_grad():
        first, second = estimator.loss(theta, x), estimator.loss(theta, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(theta, variant.theta)
    assert torch.equal(x, variant.x)
    assert all(torch.equal(state[n], v) for n, v in estimator.state_dict().items())


@torch.no_grad()
def test_rows_do_not_influence_each_others_loss(variant: Variant) -> None:
    together = variant.estimator.loss(variant.theta, variant.x)
    for i in range(0, len(variant.theta), 6):
        alone = variant.estimator.loss(variant.theta[i : i + 1], variant.x[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batch_of_the_smallest_k_only_has_a_loss(variant: Variant) -> None:
    smallest = int(variant.prior.layout.cardinality(variant.theta).min())
    rows = variant.rows_with(smallest)
    whole = variant.estimator.loss(variant.theta, variant.x)
    part = variant.estimator.loss(variant.theta[rows], variant.x[rows])
    torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-4)
    if variant.name != "bare-prior":
        assert smallest == 0


def test_a_batch_without_components_has_gradients(variant: Variant) -> None:
    rows = variant.rows_with(0)
    if len(rows) == 0:
        pytest.skip("this prior excludes K = 0")
    gradients = torch.autograd.grad(
        variant.estimator.loss(variant.theta[rows], variant.x[rows]).mean(),
        list(variant.estimator.parameters()),
        allow_unused=True,
    )
    found = [g for g in gradients if g is not None]
    assert found
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("name", ["tiny", "linear-gaussian", "bare-prior", "circle"])
def test_permanent_loss_is_at_most_hungarian_loss_is_at_most_ordered_loss(
    name: str,
) -> None:
    variant = variant_named(name)
    terms = {}
    for matching in ("permanent", "hungarian", "ordered"):
        spec = replace(variant.estimator.spec, matching=matching)
        estimator = SlotDensityEstimator(spec)
        estimator.load_state_dict(variant.estimator.state_dict())
        shake_slots(estimator)
        terms[matching] = estimator.loss_terms(variant.theta, variant.x)["flow"]
    k = variant.prior.layout.cardinality(variant.theta)
    slack = 1e-4
    assert (terms["permanent"] <= terms["hungarian"] + slack).all()
    assert (terms["hungarian"] <= terms["ordered"] + slack).all()
    # the gaps are real, except where there is nothing to match
    assert (terms["permanent"] < terms["hungarian"] - slack)[k > 1].any()
    assert (terms["hungarian"] < terms["ordered"] - slack)[k > 1].any()
    for matching in ("hungarian", "ordered"):
        few = k < 2
        torch.testing.assert_close(terms[matching][few], terms["permanent"][few])
    # K! assignments, of which the Hungarian one is the largest
    gap = terms["hungarian"] - terms["permanent"]
    assert (gap <= torch.lgamma(k + 1.0) + slack).all()


def head(estimator: SlotDensityEstimator) -> ComponentHead:
    assert isinstance(estimator.component_head, ComponentHead)
    return estimator.component_head


def shake_slots(estimator: SlotDensityEstimator) -> None:
    """Make the slots differ, by the same amount on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        slots = head(estimator).slots
        shake(slots if isinstance(slots, GlobalSlots) else slots.start, 0.5)


# --- draws


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_samples_have_the_shape_that_was_asked_for(
    variant: Variant, shape: Sequence[int]
) -> None:
    x = variant.x[:4]
    rows = variant.estimator.sample(shape, x)
    assert rows.shape == (*shape, 4, variant.prior.layout.size)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_samples_are_canonical_and_inside_the_priors_support(
    variant: Variant,
) -> None:
    estimator = variant.copy(noise=0.3)
    rows = estimator.sample((40,), variant.x, generator=seeded())
    layout = variant.prior.layout
    assert torch.equal(layout.canonical(rows), rows)
    assert layout.is_well_formed(rows).all()
    assert variant.free_prior.support.check(rows).all()
    if variant.prior.min_separation is None:
        assert variant.prior.support.check(rows).all()


def test_generator_decides_the_samples(variant: Variant) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        variant.estimator.sample((5,), variant.x, generator=seeded(s))
        for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_samples_without_a_generator_follow_torchs_seed(variant: Variant) -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(variant.estimator.sample((5,), variant.x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@torch.no_grad()
def test_cardinalities_are_drawn_from_their_probabilities(variant: Variant) -> None:
    estimator, x = variant.copy(), variant.x[:2]
    for parameter in estimator.cardinality_head.parameters():
        parameter *= 3  # observations that differ in K
    rows = estimator.sample((2_000,), x, generator=seeded())
    drawn = variant.prior.layout.cardinality(rows)
    log_k = estimator.log_prob_cardinality(x)
    for k, probs in zip(drawn.mT, log_k.exp().double(), strict=True):
        counts = torch.bincount(k, minlength=len(probs)).double()
        assert (counts[probs == 0] == 0).all()
        expected = probs[probs > 0] / probs.sum()
        # 40 tests at 1e-6
        test = stats.chisquare(counts[probs > 0].numpy(), 2_000 * expected.numpy())
        assert test.pvalue > 1e-6


def test_a_given_cardinality_is_kept(variant: Variant) -> None:
    layout = variant.prior.layout
    largest = layout.max_cardinality
    x = variant.x[:5]
    for given in (
        torch.tensor(largest),
        torch.tensor([0, 1, largest, 1, 0]),
        torch.tensor([[0], [1], [largest]]),
        torch.arange(15).reshape(3, 5) % (largest + 1),
    ):
        rows = variant.estimator.sample((3,), x, cardinality=given)
        assert rows.shape == (3, 5, layout.size)
        assert torch.equal(layout.cardinality(rows), given.expand(3, 5))
        assert layout.is_well_formed(rows).all()


@pytest.mark.parametrize("bad", [-1, 4, 1.0])
def test_a_cardinality_out_of_range_is_refused(bad: float) -> None:
    variant = variant_named("tiny")
    with pytest.raises(ValueError, match=r"cardinality must hold integers in 0\.\.3"):
        variant.estimator.sample((2,), variant.x, cardinality=torch.tensor(bad))


def test_each_observation_gets_draws_of_its_own(variant: Variant) -> None:
    # Given K, a seed spends the same noise on either batch: draws of the observation
    # that they share are the same, the others differ.
    # With little noise on the weights, no draw is pressed to an end of the prior.
    estimator = variant.copy(noise=0.03)
    x, k = variant.x, torch.tensor(2)
    first = estimator.sample((5,), x[[0, 1, 2]], k, seeded())
    second = estimator.sample((5,), x[[3, 1, 4]], k, seeded())
    gap = (first - second).abs().amax(-1)
    rounding = gap[:, 1].max()
    assert rounding < 1e-3
    assert (gap[:, [0, 2]] > 10 * rounding + 1e-5).all()


# --- the density


def brute_force_log_prob(
    estimator: SlotDensityEstimator, row: Tensor, x: Tensor
) -> Tensor:
    """Log density of one row, one assignment and one slot at a time."""
    parts = estimator.layout.unpack(row)
    k = int(parts.cardinality)
    owner, count = torch.zeros(1, dtype=torch.int64), torch.tensor([k])
    encoding = estimator.encode(x)
    result = estimator.log_prob_cardinality(x)[0, k]
    shared = estimator.shared_given(encoding)
    if shared is not None:
        value = shared.log_prob(parts.shared.unsqueeze(0), owner, count)
        result = result + value.squeeze(0)
    table = torch.zeros(k, k)
    for i in range(k):
        context = head(estimator).slots(encoding, owner, count, torch.tensor([i]))
        for j in range(k):
            u, log_det = estimator.chart.forward(parts.components[j : j + 1])
            table[i, j] = (head(estimator).flow.log_prob(u, context) + log_det)[0]
    terms = [
        sum((table[i, p[i]] for i in range(k)), torch.zeros(()))
        for p in permutations(range(k))
    ]
    return result + torch.logsumexp(torch.stack(terms), dim=0)


@torch.no_grad()
def test_log_prob_is_the_sum_over_all_assignments(density: Variant) -> None:
    log_q = density.estimator.log_prob(density.theta, density.x)[0]
    possible = density.prior.cardinality_probs.nonzero().squeeze(-1).tolist()
    for k in possible:
        i = int(density.rows_with(k)[0])
        expected = brute_force_log_prob(
            density.estimator, density.theta[i], density.x[i : i + 1]
        )
        torch.testing.assert_close(log_q[i], expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_log_prob_broadcasts_samples_and_conditions(density: Variant) -> None:
    estimator, x = density.estimator, density.x[:2]
    rows = estimator.sample((2,), x, generator=seeded())
    one_by_one = torch.tensor(
        [
            [
                [float(estimator.log_prob(rows[s, b : b + 1], x[c : c + 1]))]
                for b in range(2)
                for c in range(2)
            ]
            for s in range(2)
        ]
    ).reshape(2, 2, 2)  # sample, row, condition
    same = one_by_one.diagonal(dim1=1, dim2=2)

    def check(theta: Tensor, condition: Tensor, expected: Tensor) -> None:
        result = estimator.log_prob(theta, condition)
        assert result.shape == expected.shape
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)

    check(rows, x, same)
    check(rows[0], x, same[:1])
    check(rows, x.expand(2, 2, -1), same)
    # one observation for all rows, one row for all observations
    check(rows, x[:1], one_by_one[:, :, 0])
    check(rows, x[:1].expand(2, 1, -1), one_by_one[:, :, 0])
    check(rows[:, 1:2], x, one_by_one[:, 1])
    # conditions that differ along the sample axis
    turned = torch.stack([x, x.roll(1, 0)])
    shifted = one_by_one[1, torch.arange(2), torch.tensor([1, 0])]
    check(rows, turned, torch.stack([same[0], shifted]))


@torch.no_grad()
def test_log_prob_is_the_same_for_every_labelling(density: Variant) -> None:
    log_q = density.estimator.log_prob(density.theta, density.x)
    for seed in range(3):
        relabelled = density.prior.layout.relabel(density.theta, seeded(seed))
        again = density.estimator.log_prob(relabelled, density.x)
        torch.testing.assert_close(again, log_q, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_log_prob_of_many_rows_equals_that_of_each(density: Variant) -> None:
    log_q = density.estimator.log_prob(density.theta, density.x)[0]
    for k in range(density.prior.max_cardinality + 1):
        rows = density.rows_with(k)
        if len(rows):
            part = density.estimator.log_prob(density.theta[rows], density.x[rows])
            torch.testing.assert_close(part[0], log_q[rows], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SURFACES)
def test_log_prob_on_a_surface_is_refused(name: str) -> None:
    variant = variant_named(name)
    with pytest.raises(NotImplementedError, match="log_prob does not exist in the"):
        variant.estimator.log_prob(variant.theta, variant.x)


@torch.no_grad()
def test_log_prob_outside_the_support_is_minus_infinity() -> None:
    variant = variant_named("tiny")
    layout = variant.prior.layout
    i = int(variant.rows_with(1)[0])
    parts = layout.unpack(variant.theta[i])
    for d, bad in ((0, 2.0), (0, -5.0), (1, 7.0), (2, 5.0), (None, 3.0)):
        components, shared = parts.components.clone(), parts.shared.clone()
        if d is None:
            shared[0] = bad
        else:
            components[0, d] = bad
        row = layout.pack(parts.cardinality, components, shared).unsqueeze(0)
        assert not variant.prior.support.check(row).any()
        log_q = variant.estimator.log_prob(row, variant.x[i : i + 1])
        assert log_q.isneginf().all(), f"parameter {d} at {bad}: {log_q.item():.2f}"


def test_log_prob_has_a_gradient_in_the_weights(density: Variant) -> None:
    gradients = torch.autograd.grad(
        density.estimator.log_prob(density.theta, density.x).mean(),
        list(density.estimator.parameters()),
    )
    assert all(g.isfinite().all() for g in gradients)


@torch.no_grad()
def test_permanent_loss_is_the_negative_log_density() -> None:
    for name in ("permanent", "linear-gaussian"):
        variant = variant_named(name)
        spec = replace(variant.estimator.spec, matching="permanent")
        estimator = SlotDensityEstimator(spec)
        estimator.load_state_dict(variant.estimator.state_dict())
        torch.testing.assert_close(
            estimator.loss(variant.theta, variant.x),
            -estimator.log_prob(variant.theta, variant.x)[0],
            rtol=1e-4,
            atol=1e-3,
        )


@torch.no_grad()
def test_cardinality_probabilities_add_up_to_one(variant: Variant) -> None:
    log_k = variant.estimator.log_prob_cardinality(variant.x)
    assert log_k.shape == (len(variant.x), variant.prior.max_cardinality + 1)
    torch.testing.assert_close(log_k.exp().sum(-1), torch.ones(len(variant.x)))
    excluded = variant.prior.cardinality_probs == 0
    assert log_k[:, excluded].isneginf().all()
    assert log_k[:, ~excluded].isfinite().all()


@torch.no_grad()
def test_an_excluded_cardinality_has_no_density() -> None:
    variant = variant_named("bare-prior")
    row = variant.theta[:1].clone()
    shared = variant.prior.layout.unpack(row).shared
    nothing = torch.zeros(1, 3, 2)
    row = variant.prior.layout.pack(torch.tensor([0]), nothing, shared)
    assert variant.estimator.log_prob(row, variant.x[:1]).isneginf().all()


@pytest.mark.parametrize("name", ["tiny", "blind-to-k"])
@torch.no_grad()
def test_a_slot_sees_k_exactly_if_it_was_asked_to(name: str) -> None:
    estimator = variant_named(name).estimator
    encoding = estimator.encode(variant_named(name).x[:1])
    u = torch.randn(1, 3, generator=seeded())
    owner, slot = torch.zeros(1, dtype=torch.int64), torch.tensor([0])
    values = [
        head(estimator).flow.log_prob(
            u,
            head(estimator).slots(encoding, owner, torch.tensor([k]), slot),
        )
        for k in (1, 2, 3)
    ]
    same = torch.stack(values).unique().numel() == 1
    assert same == (name == "blind-to-k")


@torch.no_grad()
def test_shared_parameters_depend_on_k_and_on_x() -> None:
    variant = variant_named("tiny")
    head = variant.estimator.shared_given(variant.estimator.encode(variant.x[:2]))
    other = variant.estimator.shared_given(variant.estimator.encode(variant.x[1:2]))
    assert head is not None
    assert other is not None
    shared = torch.full((4, 1), 0.4)
    owner, k = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 3, 0])
    values = head.log_prob(shared, owner, k)
    assert values.unique().numel() == 4
    # a pair (x, K) has one density, whatever the other rows are
    alone = other.log_prob(shared[:1], owner[:1], k[3:])
    torch.testing.assert_close(alone, values[3:])
    draws = [
        head.sample(owner[i].expand(500), k[i].expand(500), seeded()) for i in range(4)
    ]
    assert torch.stack(draws).mean((1, 2)).unique().numel() == 4


@torch.no_grad()
def test_a_shared_head_that_is_off_is_the_prior() -> None:
    variant = variant_named("no-shared-head")
    head = variant.estimator.shared_given(variant.estimator.encode(variant.x[:1]))
    prior = variant.prior.shared
    assert head is not None
    assert prior is not None
    owner, k = torch.zeros(2, 2_000, dtype=torch.int64)
    shared = prior.sample((2_000,))
    log_q = head.log_prob(shared, owner, k)
    expected = prior.log_prob(shared).reshape(-1)
    torch.testing.assert_close(log_q, expected, rtol=1e-4, atol=1e-4)
    draws = head.sample(owner, k, seeded()).squeeze(-1)
    marginal = variant.prior.shared_marginals[0]
    test = stats.kstest(marginal.fraction(draws.double()).numpy(), "uniform")
    assert test.pvalue > 1e-6


def one_parameter_estimator(**options: Any) -> SlotDensityEstimator:
    prior = VariableKPrior(
        Independent(Normal(torch.tensor([1.0]), torch.tensor([0.5])), 1), [1, 1, 2]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = prior.sample((50,))
        x = theta.sum(-1, keepdim=True) + torch.randn(50, 4)
        estimator = slot_nn(prior, **{**SMALL, **options})(theta, x)
        shake(estimator, 0.2)
    return estimator.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"location_scale": False},
        {"condition_on_cardinality": False},
        {"flow_network": "residual", "trunk_features": None},
    ],
    ids=str,
)
@torch.no_grad()
def test_density_of_one_parameter_integrates_to_one_by_quadrature(
    options: dict[str, Any],
) -> None:
    estimator = one_parameter_estimator(**options)
    x = torch.ones(1, 4)
    size, end = 301, 9.0
    grid = torch.linspace(1 - end, 1 + end, size)
    step = float(grid[1] - grid[0])
    layout = estimator.layout

    def density(k: int, components: Tensor) -> Tensor:
        padded = torch.zeros(len(components), 2, 1)
        padded[:, :k, 0] = components
        rows = layout.pack(torch.full((len(components),), k), padded)
        return estimator.log_prob(rows.unsqueeze(1), x).exp().double().sum()

    pairs = torch.cartesian_prod(grid, grid)
    above, diagonal = (
        pairs[pairs[:, 0] < pairs[:, 1]],
        pairs[pairs[:, 0] == pairs[:, 1]],
    )
    totals = torch.stack(
        [
            density(0, torch.zeros(1, 0)),
            step * density(1, grid.unsqueeze(-1)),
            step**2 * (density(2, above) + density(2, diagonal) / 2),
        ]
    )
    probs = estimator.log_prob_cardinality(x)[0].exp().double()
    torch.testing.assert_close(totals, probs, rtol=0, atol=2e-3)
    assert float(totals.sum()) == pytest.approx(1.0, abs=3e-3)


def linear_estimator(noise: float, **options: Any) -> SlotDensityEstimator:
    problem = problems.linear_gaussian(max_cardinality=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = problem.prior.sample((50,))
        estimator = slot_nn(problem, **{**SMALL, **options})(
            theta, problem.simulator(theta)
        )
        shake(estimator, noise)
    return estimator.eval()


def gaussian_prior(scale: float, weights: Sequence[float]) -> VariableKPrior:
    """The linear-Gaussian problem's prior with another spread."""
    component = Normal(torch.tensor([1.5, 0.0]), torch.full((2,), scale))
    return VariableKPrior(Independent(component, 1), weights)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("network", ["projected", "residual"])
@torch.no_grad()
def test_density_of_sets_integrates_to_one_by_importance_sampling(
    noise: float, network: str
) -> None:
    estimator = linear_estimator(noise, flow_network=network)
    x = torch.tensor([[2.0, 1.0, 0.0, 1.5, 2.5, 0.5]])
    # Wider than the prior, so that the ratios have a finite variance.
    proposal = gaussian_prior(0.7, [1, 4, 10])
    rows = proposal.sample((20_000,), generator=seeded())
    log_q = estimator.log_prob(rows.unsqueeze(1), x)[:, 0]
    ratio = (log_q - proposal.log_prob(rows)).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.03
    # 5 standard errors: a false alarm in 2 million draws
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * error)
    if noise:  # random weights are not the prior
        prior = gaussian_prior(0.5, [1, 1, 1])
        own = estimator.sample((200,), x, generator=seeded())
        gap = estimator.log_prob(own, x)[:, 0] - prior.log_prob(own[:, 0])
        assert float(gap.mean()) > 0.1


@pytest.mark.parametrize("noise", [0.0, 0.15])
@torch.no_grad()
def test_samples_of_sets_have_the_density_that_log_prob_states(noise: float) -> None:
    estimator = linear_estimator(noise)
    x = torch.tensor([[2.0, 1.0, 0.0, 1.5, 2.5, 0.5]])
    rows = estimator.sample((20_000,), x, generator=seeded())
    log_q = estimator.log_prob(rows, x)[:, 0]
    k = estimator.layout.cardinality(rows[:, 0])
    inside = gaussian_prior(0.3, [1, 1, 1])
    ratio = (inside.log_prob(rows[:, 0]) - log_q).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.03
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * error)
    for count in range(3):  # and for each K on its own
        part = torch.where(k == count, ratio, 0.0)
        error = float(part.std()) / math.sqrt(len(part))
        assert float(part.mean()) == pytest.approx(1 / 3, abs=5 * error + 1e-6)


@torch.no_grad()
def test_samples_and_log_prob_agree_inside_a_box(density: Variant) -> None:
    # A uniform density g on a smaller box of components has E_q[g / q] = 1.
    layout = density.prior.layout
    middle = torch.tensor([0.08, 0.92], dtype=torch.float64)
    ends = torch.stack([m.quantile(middle) for m in density.prior.component_marginals])
    shared = density.prior.shared
    if density.prior.shared is not None:
        low_high = torch.stack(
            [m.quantile(middle) for m in density.prior.shared_marginals]
        ).float()
        shared = BoxUniform(low_high[:, 0], low_high[:, 1])
    weights = [0.0] * (layout.max_cardinality + 1)
    weights[1], weights[2] = 1.0, 1.0
    box = BoxUniform(ends[:, 0].float(), ends[:, 1].float())
    inside = VariableKPrior(box, weights, shared=shared, order_by=layout.order_by)
    x = density.x[:1]
    counts = torch.arange(4_000) % 2 + 1
    rows = density.estimator.sample((4_000,), x, counts.unsqueeze(-1), seeded())
    log_q = density.estimator.log_prob(rows, x)[:, 0]
    log_k = density.estimator.log_prob_cardinality(x)[0, counts]
    # K was given, one half each
    ratio = (inside.log_prob(rows[:, 0]) - (log_q - log_k + math.log(0.5))).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.1
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * error)


# --- another prior of K


@torch.no_grad()
def test_another_prior_of_k_multiplies_the_odds(variant: Variant) -> None:
    estimator = variant.copy()
    before = estimator.log_prob_cardinality(variant.x)
    trained = variant.prior.cardinality_probs
    weights = torch.tensor([3.0, 1.0, 0.5, 2.0]) * (trained > 0)
    estimator.set_cardinality_prior(weights)
    expected = before.exp() * (weights / trained).nan_to_num(0.0)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(
        estimator.log_prob_cardinality(variant.x).exp(), expected, rtol=1e-4, atol=1e-6
    )
    # the training prior puts everything back, after any number of changes
    estimator.set_cardinality_prior(trained)
    torch.testing.assert_close(estimator.log_prob_cardinality(variant.x), before)


@torch.no_grad()
def test_a_new_prior_of_k_is_drawn_from_and_saved(tmp_path: Path) -> None:
    variant = variant_named("tiny")
    estimator = variant.copy()
    estimator.set_cardinality_prior([0, 1, 0, 1])
    rows = estimator.sample((50,), variant.x, generator=seeded())
    assert set(variant.prior.layout.cardinality(rows).unique().tolist()) == {1, 3}
    estimator.save(tmp_path / "e.safetensors")
    loaded = SlotDensityEstimator.load(tmp_path / "e.safetensors")
    assert torch.equal(
        loaded.log_prob_cardinality(variant.x),
        estimator.log_prob_cardinality(variant.x),
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], "weights must hold 4 numbers"),
        ([0.0, 1.0, -1.0, 1.0], "finite, non-negative"),
        ([0.0, 0.0, 0.0, 0.0], "not all zero"),
        ([0.0, math.nan, 1.0, 1.0], "finite, non-negative"),
        ([1.0, 1.0, 1.0, 1.0], "zero where the training prior is zero"),
    ],
)
def test_an_impossible_prior_of_k_is_refused(
    weights: list[float], message: str
) -> None:
    estimator = variant_named("bare-prior").copy()
    before = estimator.cardinality_head.log_prior.clone()
    with pytest.raises(ValueError, match=message):
        estimator.set_cardinality_prior(weights)
    assert torch.equal(estimator.cardinality_head.log_prior, before)


# --- files


def outputs(estimator: SlotDensityEstimator, variant: Variant) -> list[Tensor]:
    log_density = estimator.log_prob if estimator.chart.is_density else estimator.loss
    return [
        log_density(variant.theta, variant.x),
        estimator.log_prob_cardinality(variant.x),
        estimator.sample((), variant.x, generator=seeded()),
    ]


@torch.no_grad()
def test_a_saved_estimator_loads_bit_for_bit(variant: Variant, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "estimator.safetensors"
    variant.estimator.save(path)
    make = USER_ENCODERS.get(variant.name)
    loaded = SlotDensityEstimator.load(path, encoder=make() if make else None)
    assert not loaded.training
    state = variant.estimator.state_dict()
    assert list(loaded.state_dict()) == list(state)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    for left, right in zip(
        outputs(loaded, variant), outputs(variant.estimator, variant), strict=True
    ):
        assert torch.equal(left, right)
    # and once more, to the byte
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    for _ in range(2):
        variant_named("tiny").estimator.save(path)
        SlotDensityEstimator.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_saving_does_not_replace_another_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt exists and is no"):
        variant_named("tiny").estimator.save(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", USER_ENCODERS)
def test_a_users_encoder_must_be_handed_over_to_load(name: str, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    variant_named(name).estimator.save(path)
    with pytest.raises(ValueError, match="encoder must be given"):
        SlotDensityEstimator.load(path)


def test_another_encoder_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    variant_named("user-encoder").estimator.save(path)
    with pytest.raises(ValueError, match="does not fit its spec"):
        SlotDensityEstimator.load(path, encoder=UserEncoder(width=13))


class EncoderWithASpec(UserEncoder):
    """A user's module whose attribute ``spec`` means something else."""

    spec = 3


def test_a_users_attribute_named_spec_is_not_taken_for_the_packages(
    tmp_path: Path,
) -> None:
    path = tmp_path / "e.safetensors"
    variant = variant_named("tiny")
    tiny_with(EncoderWithASpec())(variant.theta, variant.x).save(path)
    SlotDensityEstimator.load(path, encoder=EncoderWithASpec())
    with pytest.raises(ValueError, match="encoder must be given"):
        SlotDensityEstimator.load(path)


class ScaledEncoder(MLPEncoder):
    """A user's subclass: same weights as its base, another function of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(10 * x)


def test_a_subclass_of_a_package_encoder_is_not_taken_for_its_base(
    tmp_path: Path,
) -> None:
    path = tmp_path / "e.safetensors"
    variant = variant_named("tiny")
    builder = tiny_with(ScaledEncoder(300, 16))
    estimator = builder(variant.theta, variant.x).eval()
    estimator.save(path)
    loaded = SlotDensityEstimator.load(path, encoder=ScaledEncoder(300, 16))
    expected = estimator.log_prob_cardinality(variant.x)
    assert torch.equal(loaded.log_prob_cardinality(variant.x), expected)
    with pytest.raises(ValueError, match="encoder must be given"):
        SlotDensityEstimator.load(path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "e.safetensors"
    variant_named("tiny").estimator.save(path)
    return path


def test_loading_leaves_the_global_generator_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    SlotDensityEstimator.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
        SlotDensityEstimator.load(saved)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        SlotDensityEstimator.load(tmp_path / "none.safetensors")


def test_a_foreign_file_is_refused(saved: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, saved)
    with pytest.raises(ValueError, match="was not written by sbi_slotflow"):
        SlotDensityEstimator.load(saved)


def test_a_pickle_is_refused_unread(saved: Path) -> None:
    torch.save({"weight": torch.ones(3)}, saved)
    with pytest.raises(ValueError, match="is corrupt or no safetensors file"):
        SlotDensityEstimator.load(saved)


def test_a_file_of_another_format_or_a_newer_version_is_refused(saved: Path) -> None:
    tensors, meta = read_tensors(saved, FORMAT, VERSION)
    saved.unlink()
    write_tensors(saved, tensors, {**meta, "format": "sbi_slotflow.TrainingState"})
    with pytest.raises(ValueError, match=r"holds .*TrainingState, expected"):
        SlotDensityEstimator.load(saved)
    saved.unlink()
    write_tensors(saved, tensors, {**meta, "version": 99})
    with pytest.raises(ValueError, match="version 99 of its format"):
        SlotDensityEstimator.load(saved)


def changed(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    spec = deepcopy(spec)
    *parents, last = path.split(".")
    inner = spec
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flow", None),
        ("nonsense", 1),
        ("loss_weights", 1.0),
        ("flow.hidden_features", 17),
        ("flow.nonsense", 1),
        ("slots.nonsense", 1),
        ("chart.kind", "mercator"),
        ("encoder.kind", "transformer"),
        ("encoder.nonsense", 1),
        ("layout.max_cardinality", 4),
        ("layout.component_names", None),
        ("num_data", 301),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(
    saved: Path, field: str, value: Any
) -> None:
    tensors, meta = read_tensors(saved, FORMAT, VERSION)
    spec = changed(meta["spec"], field, value)
    write_tensors(saved, tensors, {**meta, "spec": spec})
    with pytest.raises(ValueError, match=r"spec|kind|fit"):
        SlotDensityEstimator.load(saved)


def test_a_file_that_lacks_a_tensor_is_refused(saved: Path) -> None:
    tensors, meta = read_tensors(saved, FORMAT, VERSION)
    tensors.pop("x_scale")
    write_tensors(saved, tensors, meta)
    with pytest.raises(ValueError, match="does not fit its spec"):
        SlotDensityEstimator.load(saved)


# --- malformed input


@pytest.mark.parametrize("method", ["loss", "log_prob", "sample", "cardinality"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, :-1], ValueError, r"x must have shape \(batch, 300\)"),
        (lambda x: x[0], ValueError, r"x must have shape \(batch, 300\)"),
        (lambda x: x * math.nan, ValueError, "x must be finite"),
        (lambda x: x + math.inf, ValueError, "x must be finite"),
        (lambda x: x.long(), TypeError, "x must be a floating-point tensor"),
        (lambda x: x.tolist(), TypeError, "x must be a floating-point tensor"),
    ],
    ids=["short", "unbatched", "nan", "inf", "int", "list"],
)
def test_malformed_data_are_refused(
    method: str,
    change: Callable[[Tensor], Any],
    error: type[Exception],
    message: str,
) -> None:
    variant = variant_named("tiny")
    x = change(variant.x)
    calls = {
        "loss": lambda: variant.estimator.loss(variant.theta, x),
        "log_prob": lambda: variant.estimator.log_prob(variant.theta, x),
        "sample": lambda: variant.estimator.sample((2,), x),
        "cardinality": lambda: variant.estimator.log_prob_cardinality(x),
    }
    with pytest.raises(error, match=message):
        calls[method]()


@pytest.mark.parametrize("method", ["loss", "log_prob"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t[:, :-1], ValueError, "input must have 11 entries"),
        (lambda t: t * math.nan, ValueError, "input must be finite"),
        (lambda t: t.long(), TypeError, "input must be a floating-point tensor"),
        (lambda t: with_k(t, 4.0), ValueError, r"integer cardinality K in 0\.\.3"),
        (lambda t: with_k(t, -1.0), ValueError, r"integer cardinality K in 0\.\.3"),
        (lambda t: with_k(t, 1.5), ValueError, r"integer cardinality K in 0\.\.3"),
    ],
    ids=["short", "nan", "int", "K too large", "K negative", "K broken"],
)
def test_malformed_theta_is_refused(
    method: str,
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    variant = variant_named("tiny")
    theta = change(variant.theta)
    with pytest.raises(error, match=message):
        getattr(variant.estimator, method)(theta, variant.x)


def with_k(theta: Tensor, k: float) -> Tensor:
    theta = theta.clone()
    theta[-1, 0] = k
    return theta


def test_training_on_an_excluded_cardinality_is_refused() -> None:
    variant = variant_named("bare-prior")
    theta = with_k(variant.theta, 0.0)
    with pytest.raises(ValueError, match="training prior excludes: K = 0"):
        variant.estimator.loss(theta, variant.x)


def test_batches_of_different_size_are_refused() -> None:
    variant = variant_named("tiny")
    with pytest.raises(ValueError, match="matching batch sizes, got 5 and 3"):
        variant.estimator.log_prob(variant.theta[:5], variant.x[:3])


def test_loss_of_batches_of_different_size_is_refused() -> None:
    variant = variant_named("tiny")
    for num_theta, num_x in ((5, 3), (3, 5), (1, 3)):
        theta, x = variant.theta[:num_theta], variant.x[:num_x]
        with pytest.raises(ValueError, match="batch"):
            variant.estimator.loss(theta, x)


def test_scale_of_x_is_that_of_the_batch() -> None:
    variant = variant_named("tiny")
    x = variant.x.double().numpy()
    estimator = tiny()(variant.theta, variant.x)
    assert float(estimator.x_shift) == pytest.approx(np.mean(x), abs=1e-5)
    assert float(estimator.x_scale) == pytest.approx(np.std(x, ddof=1), rel=1e-4)
