"""The density that the Laplace proposal reports is the one that it draws from."""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sine_evidence import observe, theta_row
from torch import Tensor

from sbi_slotflow import problems
from sbi_slotflow.problems import Sinusoids, sinusoids
from sbi_slotflow.problems.sinusoids.laplace import LaplaceProposal
from sbi_slotflow.rjmcmc import laplace_proposal

tiny = sinusoids("tiny")
NUM = 30_000
# Components (A, phi, f) of an observation and its sigma.
CASES: dict[str, tuple[list[list[float]], float]] = {
    "none": ([], 0.5),
    "one": ([[0.7, 1.0, 1.2]], 0.6),
    "one at the edge": ([[0.7, 1.0, 2.0]], 0.6),
    "two": ([[0.9, 1.0, 0.9], [1.2, 4.0, 1.5]], 0.5),
    "two as near as may be": ([[0.9, 1.0, 1.2], [1.2, 4.0, 1.3]], 0.5),
    "one, loud noise": ([[0.7, 1.0, 1.2]], 1.0),
}


def observation(case: str) -> Tensor:
    return observe(tiny, *CASES[case], seed=1).float()


@pytest.fixture(params=CASES, name="case", scope="module")
def _case(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(name="proposal", scope="module")
def _proposal(case: str) -> LaplaceProposal:
    return laplace_proposal(tiny, observation(case))


@dataclass(frozen=True)
class Broad:
    """Another density of sets, wider than the proposal.

    Frequencies are independent: of one component that is in the data half the time a
    Student t about the proposal's own, and else uniform over the band. Amplitudes and
    sigma are those of a least-squares fit at these frequencies, with larger errors.
    """

    proposal: LaplaceProposal
    centres: np.ndarray
    scales: np.ndarray
    extra: int

    @classmethod
    def about(cls, proposal: LaplaceProposal, k: int, extra: int) -> "Broad":
        """Broaden draws of k components, and add some that are not in the data."""
        rows = proposal.sample((2_000,), k=k, generator=generator(9))
        frequency = tiny.layout.unpack(rows).components[:, :k, 2].numpy()
        spread = np.subtract(*np.percentile(frequency, [75, 25], axis=0)) / 1.35
        return cls(proposal, np.median(frequency, axis=0), 1.5 * spread, extra)

    def sample(self, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
        """Theta rows in canonical order and their log density."""
        strong, statistics = len(self.centres), self.proposal.statistics
        k = strong + self.extra
        frequency = rng.uniform(0.5, 2.0, (NUM, k))
        near = self.centres + self.scales * rng.standard_t(4, (NUM, strong))
        chosen = rng.random((NUM, strong)) < 0.5
        frequency[:, :strong] = np.where(chosen, near, frequency[:, :strong])
        frequency.sort(axis=-1)
        log_r = self._log_frequencies(frequency)
        # Outside the band the proposal has no mass.
        outside = ((frequency < 0.5) | (frequency > 2.0)).any(-1)
        log_r[outside] = np.inf
        frequency = np.clip(frequency, 0.5, 2.0)
        gram = statistics.gram(frequency, frequency) + 1e-6 * np.eye(2 * k)
        right = statistics.projections(frequency).reshape(NUM, 2 * k, 1)
        mean = np.linalg.solve(gram, right)
        energy = statistics.energy - (right * mean).sum((-2, -1))
        centre = 0.5 * np.log(energy / tiny.num_data)
        scale = 1.5 / math.sqrt(2 * tiny.num_data)
        sigma = np.exp(centre + scale * rng.standard_t(4, NUM))
        sigma = np.where(rng.random(NUM) < 0.5, sigma, rng.uniform(0.1, 1.0, NUM))
        near_sigma = stats.t.pdf(np.log(sigma), 4, centre, scale) / sigma
        inside = (sigma >= 0.1) & (sigma <= 1.0)
        log_r += np.log(0.5 * near_sigma + 0.5 / 0.9 * inside)
        # z is normal, and the amplitudes 1.3 sigma G^(-1/2) z about the best.
        root = np.linalg.cholesky(gram)
        z = rng.standard_normal((NUM, 2 * k, 1))
        error = np.linalg.solve(np.swapaxes(root, -1, -2), z)
        linear = (mean + 1.3 * sigma[:, None, None] * error).reshape(NUM, k, 2)
        log_r += stats.norm.logpdf(z).sum((-2, -1))
        log_r += np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        log_r -= 2 * k * np.log(1.3 * sigma)
        log_r += np.log(np.hypot(linear[..., 0], linear[..., 1])).sum(-1)
        padded = np.zeros((NUM, 3, 3))
        padded[:, :k] = statistics.components(linear, frequency)
        rows = tiny.layout.pack(
            torch.full((NUM,), k),
            torch.from_numpy(padded),
            torch.from_numpy(sigma)[:, None],
        )
        return rows, log_r

    def _log_frequencies(self, frequency: np.ndarray) -> np.ndarray:
        """Log density of sorted frequencies, summed over all labellings."""
        k = frequency.shape[-1]
        wide = ((frequency >= 0.5) & (frequency <= 2.0)) / 1.5
        each = [
            0.5 * stats.t.pdf(frequency, 4, centre, scale) + 0.5 * wide
            for centre, scale in zip(self.centres, self.scales, strict=True)
        ]
        each += self.extra * [wide]
        labelled = np.zeros(NUM)
        for order in permutations(range(k)):
            product = np.ones(NUM)
            for i, j in enumerate(order):
                product *= each[j][:, i]
            labelled += product
        # labellings of the extra ones among each other are the same
        return np.log(labelled / math.factorial(self.extra))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Where two components crowd or the noise is loud, a third or second one lies too far
# from the other density for its weights.
WITH_ONE_MORE = [
    c for c in CASES if c not in ("two as near as may be", "one, loud noise")
]


@pytest.mark.parametrize(
    ("case", "extra"),
    [*((case, 0) for case in CASES), *((case, 1) for case in WITH_ONE_MORE)],
    indirect=["case"],
)
def test_the_density_has_mass_one_and_is_that_of_the_draws(
    case: str, proposal: LaplaceProposal, extra: int
) -> None:
    k = len(CASES[case][0]) + extra
    rows, log_r = Broad.about(proposal, k - extra, extra).sample(
        np.random.default_rng(0)
    )
    log_q = proposal.log_prob(rows) - proposal.cardinality().logits[k]
    ratio = np.exp(log_q.numpy() - log_r)
    error = ratio.std() / math.sqrt(NUM)
    assert error < 0.07
    # 5 standard errors, and 0.03 for the estimated share that is cut off: false alarm
    # in 6 of 10^7 for each of 12 masses and 300 bins, 2 of 10^4 seeds altogether
    assert abs(ratio.mean() - 1) < 5 * error + 0.03
    draws = proposal.sample((NUM,), k=k, generator=generator(0))
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for column in range(1, 2 + 3 * k):
        edges = draws[:, column].quantile(quarters)
        places = torch.bucketize(rows[:, column].contiguous(), edges)
        for place in range(4):
            part = ratio * (places == place).numpy()
            error = part.std() / math.sqrt(NUM) + math.sqrt(0.19 / NUM)
            assert abs(part.mean() - 0.25) < 5 * error + 0.01


def test_draws_are_canonical_and_inside(proposal: LaplaceProposal) -> None:
    rows = proposal.sample((5_000,), generator=generator(0))
    assert rows.dtype == torch.float64
    assert tiny.layout.is_well_formed(rows).all()
    assert torch.equal(tiny.layout.canonical(rows), rows)
    assert tiny.prior.separated(rows).all()
    parts = tiny.layout.unpack(rows)
    phase, frequency = parts.components[parts.mask][:, 1:].T
    assert ((phase >= 0) & (phase <= 2 * math.pi)).all()
    assert ((frequency >= 0.5) & (frequency <= 2.0)).all()
    assert ((parts.shared >= 0.1) & (parts.shared <= 1.0)).all()
    assert torch.isfinite(proposal.log_prob(rows)).all()


def test_k_follows_its_probabilities(proposal: LaplaceProposal) -> None:
    probs = proposal.cardinality().probs.numpy()
    assert probs.sum() == pytest.approx(1, abs=1e-12)
    assert (probs > 0.002).all()
    rows = proposal.sample((NUM,), generator=generator(0))
    counts = np.bincount(tiny.layout.cardinality(rows).numpy(), minlength=4)
    # false alarm in 1 of 10^6 seeds for each of six cases
    assert stats.chisquare(counts, NUM * probs).pvalue > 1e-6


def test_log_prob_does_not_depend_on_the_order(proposal: LaplaceProposal) -> None:
    rows = proposal.sample((500,), generator=generator(0))
    mixed = tiny.layout.relabel(rows, generator(1))
    torch.testing.assert_close(proposal.log_prob(mixed), proposal.log_prob(rows))
    shaped = proposal.log_prob(rows.reshape(10, 50, -1))
    torch.testing.assert_close(shaped.flatten(), proposal.log_prob(rows))
    batched = proposal.log_prob_batched(rows.unsqueeze(1), proposal.default_x)
    assert batched.shape == (500, 1)


def test_log_likelihood_is_the_problems(proposal: LaplaceProposal) -> None:
    theta = tiny.prior.sample((200,)).double()
    x = proposal.default_x.double()
    value = proposal.log_likelihood(theta)
    expected = tiny.log_likelihood(theta, x)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)
    one = proposal.log_likelihood(theta[0])
    assert one.shape == ()
    assert one.item() == pytest.approx(value[0].item(), rel=1e-12)


@pytest.mark.parametrize(
    ("components", "sigma"),
    [
        ([[0.7, 1.0, 0.49]], 0.5),
        ([[0.7, 1.0, 2.01]], 0.5),
        ([[0.7, 1.0, 1.2]], 0.09),
        ([[0.7, 1.0, 1.2]], 1.01),
        ([[0.7, -0.1, 1.2]], 0.5),
        ([[0.7, 6.3, 1.2]], 0.5),
        ([[-0.7, 1.0, 1.2]], 0.5),
        ([[0.0, 1.0, 1.2]], 0.5),
        ([[0.7, 1.0, 1.2], [0.7, 1.0, 1.29]], 0.5),
    ],
    ids=["f-", "f+", "sigma-", "sigma+", "phi-", "phi+", "A-", "A0", "separation"],
)
def test_the_density_vanishes_outside(
    components: list[list[float]], sigma: float
) -> None:
    proposal = laplace_proposal(tiny, observation("one"))
    assert proposal.log_prob(theta_row(tiny, components, sigma)).item() == -math.inf


def test_only_the_cardinalities_asked_for_are_considered() -> None:
    x = observation("one")
    proposal = laplace_proposal(tiny, x, cardinalities=[2, 1])
    probs = proposal.cardinality().probs
    assert probs[[0, 3]].tolist() == [0, 0]
    assert probs.sum().item() == pytest.approx(1)
    draws = proposal.sample((200,), generator=generator(0))
    assert set(tiny.layout.cardinality(draws).tolist()) <= {1, 2}
    assert proposal.log_prob(theta_row(tiny, [], 0.5)).item() == -math.inf
    with pytest.raises(ValueError, match=r"k must be among .*\[1, 2\], got 0"):
        proposal.sample((2,), k=0)


def test_tones_nearer_than_the_prior_allows_are_no_trap() -> None:
    paper = sinusoids("paper")
    times = torch.cat([grid.times for grid in paper.grids])
    tones = torch.tensor([2.6, 2.604, 2.8, 2.804]).double()
    x = torch.cos(2 * math.pi * tones[:, None] * times).sum(0)
    noise = torch.randn(paper.num_data, generator=generator(0), dtype=torch.float64)
    proposal = laplace_proposal(paper, x + 0.02 * noise, cardinalities=[4])
    rows = proposal.sample((100,), generator=generator(0))
    assert torch.isfinite(proposal.log_prob(rows)).all()
    assert paper.prior.separated(rows).all()


def test_data_that_the_prior_cannot_explain_still_give_draws() -> None:
    """Noise alone, where there must be a component of amplitude 0.5."""
    weights = tiny.prior.with_cardinality([0, 1, 1, 1])
    problem = Sinusoids("tones", weights, tiny.simulator, tiny.grids)
    x = 0.1 * torch.randn(tiny.num_data, generator=generator(0))
    proposal = laplace_proposal(problem, x)
    probs = proposal.cardinality().probs
    assert probs.sum().item() == pytest.approx(1)
    rows = proposal.sample((100,), generator=generator(0))
    assert torch.isfinite(proposal.log_prob(rows)).all()


def test_the_same_seeds_repeat() -> None:
    x = observation("two")
    first, again, other = (laplace_proposal(tiny, x, seed=s) for s in (1, 1, 2))
    evidence = first.log_evidence_by_cardinality
    assert torch.equal(evidence, again.log_evidence_by_cardinality)
    assert not torch.equal(evidence, other.log_evidence_by_cardinality)
    a, b = (q.sample((50,), generator=generator(3)) for q in (first, again))
    assert torch.equal(a, b)
    assert not torch.equal(a, first.sample((50,), generator=generator(4)))
    assert torch.equal(first.log_prob(a), again.log_prob(a))
    state = torch.random.get_rng_state()
    first.sample((50,), generator=generator(3))
    laplace_proposal(tiny, x)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sample_shapes() -> None:
    proposal = laplace_proposal(tiny, observation("one"))
    size = tiny.layout.size
    assert proposal.sample().shape == (size,)
    assert proposal.sample((2, 3)).shape == (2, 3, size)
    assert proposal.sample((0,)).shape == (0, size)
    batched = proposal.sample_batched((4,), proposal.default_x)
    assert batched.shape == (4, 1, size)


# what is refused


def test_a_problem_of_another_kind_is_rejected() -> None:
    resampled = sinusoids("tiny", noise="resampled")
    bad: Any = problems.linear_gaussian()
    for problem in (resampled, bad):
        with pytest.raises(TypeError, match=r"with white|no Laplace proposal"):
            laplace_proposal(problem, torch.zeros(300))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(299), ValueError, r"x must have shape \(300,\) or \(1, 300\)"),
        (torch.zeros(2, 300), ValueError, r"x must have shape .* got \(2, 300\)"),
        (torch.zeros(1, 1, 300), ValueError, r"x must have shape"),
        (torch.full((300,), math.nan), ValueError, "x must be finite"),
        (torch.full((300,), math.inf), ValueError, "x must be finite"),
        (np.zeros(300, bool), TypeError, "x must hold real numbers, got ndarray"),
    ],
)
def test_a_malformed_observation_is_rejected(
    x: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        laplace_proposal(tiny, x)


def test_bad_arguments_are_rejected() -> None:
    x = observation("one")
    for bad in ([], [4], [-1, 1]):
        with pytest.raises(ValueError, match=r"cardinalities must be among \[0, 1, 2"):
            laplace_proposal(tiny, x, cardinalities=bad)
    proposal = laplace_proposal(tiny, x)
    for other in (x + 1, x.double() + 1):
        with pytest.raises(ValueError, match="x differs from the observation"):
            proposal.sample((2,), other)
    with pytest.raises(ValueError, match=r"x must have shape \(300,\) or"):
        proposal.sample((2,), x[:5])
    assert proposal.cardinality(x).probs.shape == (4,)
    with pytest.raises(ValueError, match="theta must be finite"):
        proposal.log_prob(torch.full((1, 11), math.nan))
