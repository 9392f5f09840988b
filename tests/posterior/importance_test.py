"""Importance sampling against closed forms.

Each statistical test states its false-alarm rate; "z sigma" means z standard errors of
a nearly normal mean.
"""

import math
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
import torch
from by_hand import ByHand
from torch import Tensor
from torch.distributions import Categorical, Normal
from trained import linear_gaussian_posterior

from sbi_slotflow import problems
from sbi_slotflow.posterior.base import Posterior
from sbi_slotflow.posterior.importance import EvenedSets, WithExtraComponent
from sbi_slotflow.posterior.refine import RefinedPosterior, UnreliableWeights, refine
from sbi_slotflow.problems.linear_gaussian import (
    ExactLinearGaussianPosterior,
    LinearGaussian,
)
from sbi_slotflow.seeding import forked_rng, generator_for
from sbi_slotflow.sets.distribution import SetDistribution
from sbi_slotflow.sets.prior import VariableKPrior

LINEAR = problems.linear_gaussian()
EXACT = LINEAR.exact_posterior()
LAYOUT = LINEAR.prior.layout


@pytest.fixture(scope="module", name="observation")
def _observation():
    """Three observations with a truly uncertain K."""
    generator = generator_for(7)
    x = LINEAR.simulator(LINEAR.prior.sample((40,), generator), generator)
    probs = EXACT.cardinality(x).probs
    return x[probs.max(-1).values.argsort()[:3]]


@dataclass(frozen=True)
class PriorWide(ByHand):
    """The prior given K, with the exact p(K | x)."""

    prior: VariableKPrior = LINEAR.prior

    def q_of_k(self, x: Tensor) -> Categorical:
        return EXACT.cardinality(x)

    def draw(self, shape, x, k, generator) -> Tensor:
        with forked_rng(generator):
            drawn = EXACT.cardinality(x).sample(shape)
            k = drawn if k is None else torch.full_like(drawn, k)
            components = LINEAR.prior.component.sample((*k.shape, 3))
        return LAYOUT.canonical(LAYOUT.pack(k, components))

    def density(self, theta: Tensor, x: Tensor) -> Tensor:
        k = LAYOUT.cardinality(theta)
        log_k = EXACT.cardinality(x).logits
        log_k = log_k.expand(*k.shape, -1).gather(-1, k.unsqueeze(-1)).squeeze(-1)
        log_p = self.prior.log_prob(theta).double()
        return log_k + log_p - self.prior.log_cardinality_probs[k].double()


@dataclass(frozen=True)
class Transformed(ByHand):
    """The exact posterior with every component moved, component -> a component + b.

    Components are stretched about the prior's mean; K is as in ``exact``.
    """

    stretch: float = 1.0
    shift: float = 0.0
    exact: ExactLinearGaussianPosterior = EXACT
    prior: VariableKPrior = LINEAR.prior

    def q_of_k(self, x: Tensor) -> Categorical:
        return self.exact.cardinality(x)

    def draw(self, shape, x, k, generator) -> Tensor:
        rows = self.exact.sample_batched(shape, x, k, generator)
        parts = LAYOUT.unpack(rows)
        centre = LINEAR.mean
        components = centre + self.stretch * (parts.components - centre) + self.shift
        return LAYOUT.canonical(LAYOUT.pack(parts.cardinality, components))

    def density(self, theta: Tensor, x: Tensor) -> Tensor:
        parts, centre = LAYOUT.unpack(theta), LINEAR.mean
        components = centre + (parts.components - self.shift - centre) / self.stretch
        rows = LAYOUT.pack(parts.cardinality, components)
        value = self.exact.log_prob_batched(rows, x)
        return value - 2 * parts.cardinality * math.log(self.stretch)


def tilted(weights: list[float]) -> Transformed:
    """The exact posterior under other weights of K."""
    prior = LINEAR.prior.with_cardinality(weights)
    wrong = LinearGaussian(
        "tilted",
        prior,
        LINEAR.simulator,
        LINEAR.design,
        LINEAR.mean,
        LINEAR.tau,
        LINEAR.sigma,
    )
    return Transformed(exact=wrong.exact_posterior())


# A posterior's standard deviation is about 0.45, so 0.22 is half of it.
WRONG: dict[str, Posterior] = {
    "exact": Transformed(),
    "prior-wide": PriorWide(),
    "shifted": Transformed(shift=0.22),
    "tilted": tilted([4.0, 2.0, 1.0, 0.5]),
    "narrow": Transformed(stretch=0.8),
}


def refined(
    posterior: Posterior, x: Tensor, num: int = 40_000, seed: int = 0, **options
) -> RefinedPosterior:
    result = refine(
        posterior,
        options.pop("log_likelihood", LINEAR.log_likelihood),
        x,
        num,
        generator=generator_for(seed),
        **options,
    )
    assert isinstance(result, RefinedPosterior)
    return result


def share_error(draws: RefinedPosterior, event: Tensor) -> Tensor:
    """Standard error of a self-normalised weighted share."""
    weights = draws.weights
    share = (weights * event).sum()
    return (weights.square() * (event - share).square()).sum().sqrt()


def assert_exact(draws: RefinedPosterior) -> None:
    """Compare p(K | x) and the evidence: 5 sigma of 5, false alarms below 3e-6."""
    k, expected = LAYOUT.cardinality(draws.rows), EXACT.cardinality(draws.x).probs
    for i, found in enumerate(draws.cardinality().probs):
        error = share_error(draws, (k == i).double())
        assert abs(found - expected[i]) <= 5 * error
    miss = draws.log_evidence - EXACT.log_evidence(draws.x).item()
    assert abs(miss) <= 5 * draws.log_evidence_error


@pytest.mark.parametrize("name", WRONG)
def test_wrong_posteriors_become_exact(name, observation):
    draws = refined(WRONG[name], observation[0])
    assert_exact(draws)
    assert draws.is_reliable
    assert draws.log_evidence_error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_posteriors_become_exact_to_a_hundredth(name, observation):
    for seed, x in enumerate(observation):
        draws = refined(WRONG[name], x, 400_000, seed)
        # No word of k-hat: a K that the proposal draws too rarely by a constant factor
        # makes a step in the weights, which may look like a heavy tail.
        assert_exact(draws)
        # At standard errors of at most 0.002 and 0.004 these are 5 sigma: false alarms
        # below 1e-4 for all 75.
        gap = draws.cardinality().probs - EXACT.cardinality(x).probs
        assert gap.abs().max() <= 0.01
        assert abs(draws.log_evidence - EXACT.log_evidence(x).item()) <= 0.02
        assert draws.log_evidence_error < 0.004


def test_component_moments_given_k(observation):
    x = observation[0]
    draws = refined(WRONG["shifted"], x)
    # Weighted means of the components and of their squares, of exact mean m_K and
    # covariance C_K; by exchange all components of a set count alike.
    for k in (1, 2, 3):
        chosen = LAYOUT.cardinality(draws.rows) == k
        weights = draws.weights[chosen] / draws.weights[chosen].sum()
        components = LAYOUT.unpack(draws.rows[chosen]).components[:, :k].double()
        gain = LINEAR.tau**2 / (k * LINEAR.tau**2 + LINEAR.sigma**2)
        inside = x.double() @ LINEAR.design.double()
        mean = LINEAR.mean + gain * (inside - k * LINEAR.mean)
        variance = LINEAR.tau**2 * (1 - gain)
        covariance = -(LINEAR.tau**2) * gain
        miss = components - mean
        # of one component, and of the sum of all
        second = (variance + (k - 1) * covariance) * k
        for values, wanted in [
            (miss.mean(1), 0.0),
            (miss.square().mean(1), variance),
            (miss.sum(1).square(), second),
        ]:
            found = weights @ values
            error = (weights.square() @ (values - found).square()).sqrt()
            # 5 sigma of 2 entries of 3 moments of 3 K: false alarms below 2e-5
            assert ((found - wanted).abs() <= 5 * error).all()
            assert (error < 0.03).all()


def test_without_defence_the_exact_posterior_has_equal_weights(observation):
    draws = refined(EXACT, observation[0], 2_000, defensive=0.0)
    assert draws.ess == pytest.approx(2_000, rel=1e-4)
    expected = EXACT.log_evidence(observation[0]).item()
    assert draws.log_evidence == pytest.approx(expected, abs=1e-4)
    assert draws.efficiency == pytest.approx(1, rel=1e-4)
    assert draws.is_reliable


@pytest.mark.filterwarnings("ignore::sbi_slotflow.posterior.refine.UnreliableWeights")
def test_evidence_error_is_its_scatter(observation):
    x, repeats = observation[0], 100
    runs = [refined(PriorWide(), x, 500, seed) for seed in range(repeats)]
    misses = torch.tensor([r.log_evidence for r in runs]) - EXACT.log_evidence(x)
    stated = torch.tensor([r.log_evidence_error for r in runs])
    # chi2 of 100 normal misses: 5 of its sd, 14, both ways, false alarms near 1e-6
    assert 30 < (misses / stated).square().sum() < 180
    assert abs((misses / stated).mean()) < 0.5


def test_a_batch_is_as_good_as_one_by_one(observation):
    results = refine(
        WRONG["narrow"],
        LINEAR.log_likelihood,
        observation,
        20_000,
        generator=generator_for(3),
    )
    assert isinstance(results, list)
    assert len(results) == len(observation)
    for x, draws in zip(observation, results, strict=True):
        assert torch.equal(draws.x, x)
        assert draws.theta.shape == (1, 20_000, LAYOUT.size)
        alone = refined(WRONG["narrow"], x, 20_000, seed=9)
        k, k_alone = LAYOUT.cardinality(draws.rows), LAYOUT.cardinality(alone.rows)
        for i in range(4):
            error = torch.hypot(
                share_error(draws, (k == i).double()),
                share_error(alone, (k_alone == i).double()),
            )
            gap = draws.cardinality().probs[i] - alone.cardinality().probs[i]
            assert abs(gap) <= 5 * error  # 5 sigma of 12: false alarms below 1e-5
        error = math.hypot(draws.log_evidence_error, alone.log_evidence_error)
        assert abs(draws.log_evidence - alone.log_evidence) <= 5 * error


def test_one_observation_in_any_shape(observation):
    x = observation[0]
    flat, row = refined(EXACT, x, 500), refined(EXACT, x.unsqueeze(0), 500)
    assert torch.equal(flat.theta, row.theta)
    assert flat.x.shape == row.x.shape == (6,)


@dataclass(frozen=True)
class Relabelled(ByHand):
    """Draws of another posterior with their components in any order."""

    posterior: Posterior
    prior: VariableKPrior = LINEAR.prior

    def q_of_k(self, x: Tensor) -> Categorical:
        return self.posterior.cardinality(x)

    def draw(self, shape, x, k, generator) -> Tensor:
        rows = self.posterior.sample_batched(shape, x, generator=generator)
        return LAYOUT.relabel(rows, generator_for(99))

    def density(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.posterior.log_prob_batched(theta, x)


@dataclass(frozen=True)
class Counted(Transformed):
    """The exact posterior, which counts how often it is asked for a distribution."""

    asked: list[int] = field(default_factory=list)

    def given(self, x: Tensor) -> SetDistribution:
        self.asked.append(len(x))
        return super().given(x)


class Tabulated:
    """The exact likelihood, which only answers for the x that it was given."""

    def __init__(self) -> None:
        self.asked: list[torch.Size] = []

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("given(x) is there")

    def given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        self.asked.append(x.shape)
        return lambda theta: LINEAR.log_likelihood(theta, x)


@pytest.mark.filterwarnings("ignore::sbi_slotflow.posterior.refine.UnreliableWeights")
@pytest.mark.parametrize(
    ("method", "sizes", "shapes"),
    [("importance", [2], [(2, 6)]), ("smc", [1, 1], [(6,), (6,)])],
)
def test_one_distribution_and_one_likelihood_serve_all_steps(
    method, sizes, shapes, observation
):
    posterior, likelihood = Counted(), Tabulated()
    x = observation[:2]
    results = refine(
        posterior,
        likelihood,
        x,
        500,
        method=method,
        generator=generator_for(0),
    )
    assert posterior.asked == sizes
    assert likelihood.asked == shapes
    plain = refine(
        Transformed(),
        LINEAR.log_likelihood,
        x,
        500,
        method=method,
        generator=generator_for(0),
    )
    assert isinstance(results, list)
    assert isinstance(plain, list)
    for one, other in zip(results, plain, strict=True):
        torch.testing.assert_close(one.theta, other.theta)
        assert one.log_evidence == pytest.approx(other.log_evidence)


def test_draws_alone_cannot_be_refined(observation):
    draws = refined(EXACT, observation[0], 500)
    with pytest.raises(NotImplementedError, match="RefinedPosterior has no density"):
        refine(draws, LINEAR.log_likelihood, observation[0])


def test_labels_do_not_matter(observation):
    x = observation[0]
    plain = refined(WRONG["shifted"], x, 5_000)
    other = refined(Relabelled(WRONG["shifted"]), x, 5_000)
    assert other.log_evidence == pytest.approx(plain.log_evidence, abs=0.2)
    assert torch.equal(LAYOUT.canonical(other.rows), other.rows)
    bare = refined(WRONG["shifted"], x, 5_000, defensive=0.0)
    mixed = refined(Relabelled(WRONG["shifted"]), x, 5_000, defensive=0.0)
    torch.testing.assert_close(mixed.theta, bare.theta)
    torch.testing.assert_close(mixed.log_weights, bare.log_weights)


def test_narrow_posteriors_warn_with_numbers(observation):
    with pytest.warns(UnreliableWeights) as caught:
        draws = refined(Transformed(stretch=0.3), observation[0], 5_000)
    message = str(caught[0].message)
    assert f"k-hat = {draws.pareto_k:.2f}" in message
    assert f"{draws.ess:.0f} of 5000 draws" in message
    assert 'method="smc"' in message
    assert caught[0].filename == __file__
    assert draws.pareto_k > 0.7
    assert not draws.is_reliable


def test_few_draws_warn(observation):
    with pytest.warns(UnreliableWeights, match="of 60 draws are effective"):
        draws = refined(EXACT, observation[0], 60)
    assert not draws.is_reliable
    with pytest.warns(UnreliableWeights, match="k-hat = nan"):
        refined(EXACT, observation[0], 10)


def test_good_posteriors_do_not_warn(observation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refined(Transformed(stretch=1.2), observation[0], 5_000)


def log_posterior(x: Tensor, theta: Tensor) -> Tensor:
    """The exact posterior, unnormalised."""
    return LINEAR.prior.log_prob(theta) + LINEAR.log_likelihood(theta, x)


def mixture(
    posterior: Posterior, share: float, x: Tensor, target=log_posterior
) -> WithExtraComponent:
    return WithExtraComponent(
        posterior.given(x), posterior.prior, share, partial(target, x)
    )


def decisive(x: Tensor, theta: Tensor) -> Tensor:
    """A target so sharp that hardly ever two components are in doubt."""
    return 300 * LAYOUT.unpack(theta).components[..., 0].sum(-1)


@pytest.mark.parametrize("target", [log_posterior, decisive])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_mixture_density_is_that_of_its_draws(share, target, observation):
    # E_q'[p / q'; K] is p's share of K, for any density p that q' covers.
    x = observation[:2]
    proposal = mixture(WRONG["shifted"], share, x, target)
    theta, counted = proposal.sample(40_000, generator_for(2))
    left_out = float((~counted).double().mean())
    assert left_out > 0.05 if share and target is decisive else left_out < 1e-3
    log_q = torch.where(counted, proposal.log_prob(theta), torch.inf)
    assert log_q.shape == (40_000, 2)
    assert log_q.dtype == torch.float64
    k = LAYOUT.cardinality(theta)
    probs = EXACT.cardinality(x).probs
    others = [EXACT, PriorWide()] if share else [EXACT]
    for other in others:
        ratio = (other.log_prob_batched(theta, x) - log_q).exp()
        for i in range(4):
            term = torch.where(k == i, ratio, 0.0)
            error = term.std(0) / math.sqrt(len(term))
            # 5 sigma of 16: false alarms below 1e-5
            assert ((term.mean(0) - probs[:, i]).abs() <= 5 * error).all()
            assert (error < (0.05 if target is decisive else 0.02)).all()


def test_mixture_moves_the_share_up_one_cardinality(observation):
    x, share, num = observation[:1], 0.3, 50_000
    proposal = mixture(EXACT, share, x)
    k = LAYOUT.cardinality(proposal.sample(num, generator_for(2))[0])
    probs = EXACT.cardinality(x[0]).probs
    expected = probs * torch.tensor([0.7, 0.7, 0.7, 1.0])
    expected[1:] += share * probs[:-1]
    found = torch.bincount(k.flatten(), minlength=4) / num
    # 5 sigma of 4 shares: false alarms below 3e-6
    assert ((found - expected).abs() <= 5 * (expected / num).sqrt()).all()


def bumps(theta: Tensor, k: int) -> list[Tensor]:
    """Indicators of regions in a set of k components, in canonical order."""
    components = LAYOUT.unpack(theta).components[..., :k, :]
    level, slope = components.unbind(-1)
    edges = [-1.0, 0.8, 1.3, 1.8, 5.0]
    return [
        (level[..., j] > low) & (level[..., j] <= high) & (slope[..., j] > 0.1)
        for j in range(k)
        for low, high in pairwise(edges)
    ]


def test_mixture_density_follows_the_draws_frequencies(observation):
    # Shares of draws in regions of the components, against the density integrated over
    # them by draws of the prior.
    x, num = observation[:1], 60_000
    proposal = mixture(WRONG["narrow"], 0.4, x)
    theta, _ = proposal.sample(num, generator_for(2))
    broad = LINEAR.prior.sample((num, 1), generator_for(3))
    ratio = proposal.log_prob(broad) - LINEAR.prior.log_prob(broad).double()
    ratio = ratio.exp()
    for k in (1, 2, 3):
        pairs = zip(bumps(theta, k), bumps(broad, k), strict=True)
        of_k, broad_of_k = LAYOUT.cardinality(theta) == k, LAYOUT.cardinality(broad)
        for inside, inside_broad in pairs:
            seen = (inside & of_k).double()
            mass = torch.where(inside_broad & (broad_of_k == k), ratio, 0.0)
            error = torch.hypot(seen.std(), mass.std()) / math.sqrt(num)
            # 5 sigma of 24: false alarms below 2e-5
            assert abs(seen.mean() - mass.mean()) <= 5 * error
            assert error < 0.01


def test_mixture_density_in_closed_form(observation):
    """At K = 0, 1 and Kmax the sum is short enough to write down."""
    x, share = observation[:1], 0.3
    proposal = mixture(EXACT, share, x)
    theta = EXACT.sample_batched((50,), x, generator=generator_for(0))
    component = Normal(LINEAR.mean, LINEAR.tau)
    for k in range(4):
        rows = EXACT.sample_batched((50,), x, k, generator_for(1))
        total = EXACT.log_prob_batched(rows, x).exp() * (1 - share if k < 3 else 1.0)
        parts = LAYOUT.unpack(rows)
        for j in range(k):
            rest = [i for i in range(k) if i != j]
            kept = torch.zeros_like(parts.components)
            kept[..., : k - 1, :] = parts.components[..., rest, :]
            shorter = LAYOUT.pack(parts.cardinality - 1, kept)
            extra = component.log_prob(parts.components[..., j, :]).sum(-1)
            total += share * (EXACT.log_prob_batched(shorter, x) + extra).exp()
        torch.testing.assert_close(
            proposal.log_prob(rows), total.log(), rtol=1e-5, atol=1e-5
        )
        relabelled = LAYOUT.relabel(rows, generator_for(4))
        torch.testing.assert_close(
            proposal.log_prob(relabelled), total.log(), rtol=1e-5, atol=1e-5
        )
    mixed = proposal.log_prob(theta)
    assert torch.isfinite(mixed).all()


@dataclass(frozen=True)
class Doubtful(Transformed):
    """The exact posterior, which says which cardinalities it deems possible."""

    possible: tuple[tuple[bool, ...], ...] = ()  # for each observation

    def q_of_k(self, x: Tensor) -> Categorical:
        return Categorical(torch.where(torch.tensor(self.possible), 1.0, 1e-4))


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_only_possible_cardinalities_get_another_component(share, observation):
    x, num = observation[:2], 40_000
    # none and two of the first observation, one of the second
    doubtful = Doubtful(
        possible=((True, False, True, False), (False, True, False, True))
    )
    proposal = mixture(doubtful, share, x)
    theta, _ = proposal.sample(num, generator_for(2))
    k = LAYOUT.cardinality(theta)
    probs = EXACT.cardinality(x).probs
    moved = share * probs * torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    expected = probs - moved
    expected[:, 1:] += moved[:, :-1]
    found = torch.stack([torch.bincount(column, minlength=4) for column in k.T]) / num
    # 5 sigma of 8 shares: false alarms below 5e-6
    assert ((found - expected).abs() <= 5 * (expected / num).sqrt()).all()
    # and the density says the same: E_q'[p / q'; K] is p's share of K
    ratio = (EXACT.log_prob_batched(theta, x) - proposal.log_prob(theta)).exp()
    for i in range(4):
        term = torch.where(k == i, ratio, 0.0)
        error = term.std(0) / math.sqrt(num)
        assert ((term.mean(0) - probs[:, i]).abs() <= 5 * error).all()
        assert (error < 0.02).all()


def test_a_share_of_the_draws_has_an_even_cardinality(observation):
    # The second K of the first observation is rare, the last of the second impossible.
    @dataclass(frozen=True)
    class Leaning(Transformed):
        def q_of_k(self, x: Tensor) -> Categorical:
            return Categorical(torch.tensor(shares))

        def draw(self, shape, x, k, generator) -> Tensor:
            with forked_rng(generator):
                given = self.q_of_k(x).sample(shape)
            given = given if k is None else torch.full_like(given, k)
            rows = [self.exact.sample_batched(shape, x, i, generator) for i in range(4)]
            index = given.unsqueeze(-1).expand(-1, -1, LAYOUT.size)
            return torch.stack(rows).gather(0, index[None])[0]

        def density(self, theta: Tensor, x: Tensor) -> Tensor:
            k = LAYOUT.cardinality(theta)
            change = torch.tensor(shares).log() - EXACT.cardinality(x).logits
            change = change.expand(len(k), -1, -1).gather(-1, k.unsqueeze(-1))
            return self.exact.log_prob_batched(theta, x) + change.squeeze(-1)

    shares = [[0.59, 0.01, 0.2, 0.2], [0.5, 0.3, 0.2 - 1e-5, 1e-5]]
    x, num, share = observation[:2], 40_000, 0.4
    evened = EvenedSets(Leaning().given(x), share)
    even = torch.tensor([[0.25] * 4, [1 / 3] * 3 + [0.0]])
    expected = (1 - share) * torch.tensor(shares) + share * even
    torch.testing.assert_close(evened.cardinality().probs, expected)
    rows = evened.sample((num,), generator=generator_for(0))
    k = LAYOUT.cardinality(rows)
    found = torch.stack([torch.bincount(column, minlength=4) for column in k.T]) / num
    # 5 sigma of 8 shares: false alarms below 5e-6
    assert ((found - expected).abs() <= 5 * (expected / num).sqrt()).all()
    # E[p / q; K] is p's share of K where q draws that K at all
    ratio = (EXACT.log_prob_batched(rows, x) - evened.log_prob(rows)).exp()
    probs = EXACT.cardinality(x).probs
    for i in range(3):
        term = torch.where(k == i, ratio, 0.0)
        error = term.std(0) / math.sqrt(num)
        # Given K this is the posterior itself: equal weights, so that k alone varies.
        assert ((term.mean(0) - probs[:, i]).abs() <= 5 * error + 1e-6).all()
        assert (error < 0.01).all()
    again = evened.sample((num,), generator=generator_for(0))
    assert torch.equal(rows, again)
    assert (LAYOUT.cardinality(evened.sample((7,), k=2)) == 2).all()


def test_mixture_keeps_the_global_generator(observation):
    proposal = mixture(EXACT, 0.3, observation[:1])
    before = torch.random.get_rng_state()
    proposal.sample(10, generator_for(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeded_refinement_repeats(observation):
    first = refined(PriorWide(), observation[0], 500, seed=1)
    again = refined(PriorWide(), observation[0], 500, seed=1)
    other = refined(PriorWide(), observation[0], 500, seed=2)
    assert torch.equal(first.theta, again.theta)
    assert first.log_evidence == again.log_evidence
    assert not torch.equal(first.theta, other.theta)


def test_a_trained_posterior_becomes_exact(observation):
    posterior = linear_gaussian_posterior(4_000)
    results = posterior.refine(
        LINEAR.log_likelihood, observation, 20_000, generator=generator_for(0)
    )
    assert isinstance(results, list)
    for draws in results:
        assert_exact(draws)
        assert draws.is_reliable
        assert draws.efficiency > 0.1


def test_the_default_observation_is_refined(observation):
    posterior = copy(linear_gaussian_posterior(4_000))
    posterior.set_default_x(observation[0])
    draws = posterior.refine(LINEAR.log_likelihood, num_samples=1_000)
    assert isinstance(draws, RefinedPosterior)
    assert torch.equal(draws.x, observation[0])
    assert isinstance(draws.cardinality(), Categorical)


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_bad_arguments_are_named(method, observation):
    x = observation[0]

    def call(log_likelihood=LINEAR.log_likelihood, x=x, num=200, **options):
        options = {"method": method, **options}
        return refine(EXACT, log_likelihood, x, num, **options)

    with pytest.raises(ValueError, match=r"method must be one of \['importance', 's"):
        call(method="magic")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        call(num=0)
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"defensive must lie in \[0, 1\), got"):
            call(defensive=share)
    with pytest.raises(ValueError, match=r"x must have shape \(6,\) or \(batch, 6\)"):
        call(x=x.reshape(1, 1, 6))
    with pytest.raises(ValueError, match=r"at least one observation, got \(0, 6\)"):
        call(x=x.new_zeros(0, 6))
    with pytest.raises(ValueError, match="x must be finite"):
        call(x=x + math.nan)


def spoilt(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A likelihood that returns a value for the sets of two components."""

    def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
        values = LINEAR.log_likelihood(theta, x)
        return torch.where(theta[..., 0] == 2, value, values)

    return log_likelihood


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_bad_likelihoods_are_named(method, observation):
    x = observation[0]

    def call(log_likelihood):
        return refine(EXACT, log_likelihood, x, 200, method=method)

    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must not be NaN or \+inf, got it for"):
            call(spoilt(value))
    with pytest.raises(ValueError, match=r"log_likelihood must return shape \(\d+"):
        call(lambda theta, x: LINEAR.log_likelihood(theta, x).sum())
    with pytest.raises(ValueError, match=r"log_likelihood must return shape \(\d+"):
        call(lambda theta, x: LINEAR.log_likelihood(theta, x).unsqueeze(-1))
    with pytest.raises(ValueError, match="no draw has a positive"):
        call(lambda theta, x: torch.full(theta.shape[:-1], -math.inf))


def test_a_vanishing_likelihood_excludes_sets(observation):
    x = observation[0]
    draws = refined(EXACT, x, 20_000, log_likelihood=spoilt(-math.inf))
    probs = EXACT.cardinality(x).probs.clone()
    assert draws.cardinality().probs[2] == 0
    left = 1 - probs[2]
    # 5 sigma, false alarms below 1e-6
    miss = draws.log_evidence - EXACT.log_evidence(x).item() - float(left.log())
    assert abs(miss) <= 5 * draws.log_evidence_error
