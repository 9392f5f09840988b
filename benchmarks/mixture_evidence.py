r"""p(K | x) of Gaussian mixtures by annealing at fixed K, plain and slow.

.. math::
    p(x | K) = \prod_t \mathrm{E}_{\pi_{t - 1}}
        p(x | \Theta, K)^{\beta_t - \beta_{t - 1}}, \qquad
    \pi_t \propto p(\Theta | K)\, p(x | \Theta, K)^{\beta_t}

Particles go from the prior (beta = 0) to the posterior of one K by random walks of one
component at a time. Nothing changes K, no network and no move of the package takes
part: what is shared with `refine` is the prior's density alone. Repeats with other
seeds tell how far to believe it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbi_slotflow.problems import Points
from sbi_slotflow.seeding import generator_for

# Particles that stay effective from one temperature to the next.
_EFFECTIVE = 0.9


@dataclass(frozen=True)
class ExactCardinality:
    """p(K | x) by annealing.

    Attributes:
        by_repeat: p(K | x) of each repeat, shape ``(repeats, Kmax + 1)``.
        log_evidence: Log p(x | K) of each repeat, of the same shape.
    """

    by_repeat: Tensor
    log_evidence: Tensor

    @property
    def probs(self) -> Tensor:
        """The estimate, from the mean evidence of all repeats."""
        mean = self.log_evidence.logsumexp(0)
        prior = (self.by_repeat.log() - self.log_evidence)[0]
        return torch.where(self.by_repeat[0] > 0, mean + prior, -torch.inf).softmax(-1)

    @property
    def spread(self) -> float:
        """Mean total variation of a repeat from the estimate, over the root of R."""
        away = 0.5 * (self.by_repeat - self.probs).abs().sum(-1)
        return float(away.mean()) / math.sqrt(len(away))


def exact_cardinality(
    problem: Points,
    x: Tensor,
    *,
    num_particles: int = 500,
    num_sweeps: int = 8,
    repeats: int = 4,
    seed: int = 0,
) -> ExactCardinality:
    """Estimate p(K | x) of one set of points ``(n, 2)``."""
    prior = problem.prior
    found = torch.full((repeats, prior.max_cardinality + 1), -torch.inf).double()
    for k in prior.cardinality_probs.nonzero().flatten().tolist():
        found[:, k] = log_evidence(
            problem, x, k, num_particles, num_sweeps, repeats, seed
        )
    log_p = found + prior.log_cardinality_probs.double()
    return ExactCardinality(log_p.softmax(-1), found)


def log_evidence(
    problem: Points,
    x: Tensor,
    k: int,
    num_particles: int,
    num_sweeps: int,
    repeats: int,
    seed: int,
) -> Tensor:
    """Estimate log p(x | K) of a mixture on a line, ``(repeats,)``."""
    points = x[x[:, 1] > 0][:, 0].double()
    walk = _Walk(problem, points, (repeats, num_particles, k), seed)
    beta, total = torch.zeros(repeats).double(), torch.zeros(repeats).double()
    while bool((beta < 1).any()):
        step = _longest(walk.log_likelihood, 1 - beta)
        log_w = step.unsqueeze(-1) * walk.log_likelihood
        total += log_w.logsumexp(-1) - math.log(num_particles)
        beta = torch.where(1 - beta - step < 1e-9, 1.0, beta + step)
        walk.resample(log_w)
        for _ in range(num_sweeps * k):
            walk.step(beta)
    return total


def _longest(log_likelihood: Tensor, most: Tensor) -> Tensor:
    """Longest steps ``(repeats,)`` that leave enough particles effective."""
    low, high = torch.zeros_like(most), most.clone()
    for _ in range(40):
        middle = 0.5 * (low + high)
        weights = (middle.unsqueeze(-1) * log_likelihood).softmax(-1)
        share = 1 / weights.square().sum(-1) / weights.shape[-1]
        low, high = (
            torch.where(share >= _EFFECTIVE, middle, low),
            torch.where(share >= _EFFECTIVE, high, middle),
        )
    weights = (most.unsqueeze(-1) * log_likelihood).softmax(-1)
    enough = 1 / weights.square().sum(-1) / weights.shape[-1] >= _EFFECTIVE
    return torch.where(enough, most, low)


class _Walk:
    """Particles ``(R, N, K)`` of components, in coordinates of the prior."""

    def __init__(
        self, problem: Points, points: Tensor, shape: tuple[int, int, int], seed: int
    ) -> None:
        self.marginals = problem.prior.component_marginals
        self.component, self.points = problem.prior.component, points
        self.generator = generator_for(seed, shape[-1])
        with torch.random.fork_rng():
            torch.manual_seed(seed * 100 + shape[-1])
            drawn = self.component.sample((math.prod(shape),)).double()
        self.u, _ = self.marginals.forward(drawn.reshape(*shape, -1))
        self.log_prior, self.each = self._component(self.u)
        self.log_likelihood = self._mixed(self.each)

    def _component(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of components ``(..., 3)``: log prior in u, log of w, and of w times N."""
        mean, deviation, weight = (values := self.marginals.inverse(u)).unbind(-1)
        flat = self.component.log_prob(values.reshape(-1, 3).float()).double()
        flat = flat.sum(-1) if flat.ndim > 1 else flat
        log_p = flat.reshape(mean.shape) - self.marginals.forward(values)[1]
        z = (self.points - mean.unsqueeze(-1)) / deviation.unsqueeze(-1)
        log_w = weight.log()
        height = log_w - deviation.log() - 0.5 * math.log(2 * math.pi)
        return log_p, torch.cat(
            [height.unsqueeze(-1) - 0.5 * z.square(), log_w.unsqueeze(-1)], -1
        )

    @staticmethod
    def _mixed(each: Tensor) -> Tensor:
        """Log likelihood of components ``(..., K, n + 1)``: the last is log w."""
        top = each.amax(-2, keepdim=True)
        mixed = (each - top).exp().sum(-2).log() + top.squeeze(-2)
        return mixed[..., :-1].sum(-1) - (each.shape[-1] - 1) * mixed[..., -1]

    def resample(self, log_w: Tensor) -> None:
        repeats, num = log_w.shape
        start = torch.rand(repeats, 1, generator=self.generator).double()
        places = (torch.arange(num) + start) / num
        index = torch.searchsorted(log_w.softmax(-1).cumsum(-1), places)
        row = torch.arange(repeats).unsqueeze(-1), index.clamp(max=num - 1)
        self.u, self.log_prior = self.u[row], self.log_prior[row]
        self.each, self.log_likelihood = self.each[row], self.log_likelihood[row]

    def step(self, beta: Tensor) -> None:
        """Move one component of each particle by a step of any size."""
        shape = self.log_likelihood.shape
        slot = torch.randint(self.u.shape[-2], shape, generator=self.generator)
        row = (*torch.meshgrid(*map(torch.arange, shape), indexing="ij"), slot)
        draw = {"generator": self.generator, "dtype": torch.float64}
        size = 10 ** (-2.5 * torch.rand(*shape, 1, **draw))
        # Some of the parameters, all of one size.
        some = torch.rand(*shape, 3, **draw) < 0.6
        new = self.u[row] + some * size * torch.randn(*shape, 3, **draw)
        log_prior, here = self._component(new)
        each = self.each.clone()
        each[row] = here
        found = self._mixed(each)
        gain = log_prior - self.log_prior[row]
        gain = gain + beta.unsqueeze(-1) * (found - self.log_likelihood)
        kept = torch.rand(shape, **draw).log() < gain
        kept &= torch.isfinite(found)
        self.u[row] = torch.where(kept.unsqueeze(-1), new, self.u[row])
        self.log_prior[row] = torch.where(kept, log_prior, self.log_prior[row])
        self.each = torch.where(kept[..., None, None], each, self.each)
        self.log_likelihood = torch.where(kept, found, self.log_likelihood)
