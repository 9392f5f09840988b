r"""The likelihood of counts beside a background, for Gauss-Newton steps.

.. math::
    \mu = b_0 + N \beta + \sum_k s(\theta_k), \qquad
    D(\theta) = \min_\beta \Big[ 2 \sum_t \big( x_t \log \tfrac{x_t}{\mu_t} - x_t
        + \mu_t \big) + (\beta - \bar\beta)^\top V^{-1} (\beta - \bar\beta) \Big]
        + \log\det (V P)

D, the deviance of the counts x and of the background's prior, takes the place of the
sum of squares: -D / 2 is the log likelihood of the components, the background
integrated out by Laplace's method, up to a constant of x. With
:math:`W = \mathrm{diag}(1 / \mu)` and J the derivatives of the components' signals,

.. math::
    -\tfrac12 \nabla D = J^\top W (x - \mu), \qquad
    C = J^\top W J - J^\top W N P^{-1} N^\top W J, \qquad
    P = N^\top W N + V^{-1}

but for the change of log det, which is small. C is Fisher's information given beta's
own uncertainty. Beta is found by Fisher scoring, which are least squares weighed anew
by the rate of the last round. Errors of the counts themselves would lean to the low
ones.

See Also:
    :mod:`.white_space`, which looks for components' first places by squares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.gauss_newton import NormalEquations

__all__ = ["CountLikelihood", "smooth"]

# Counts that are added: a sample of none has an error too.
LEAST_COUNTS = 1.0
# The rate that scoring starts from: counts averaged over so many samples.
_WIDE = 15 * (1 / 15,)
# Rounds of scoring; least rate over the largest count.
_ROUNDS, _LEAST_RATE = 4, 1e-6


class _Scored(NamedTuple):
    """Counts about the likeliest background."""

    rate: Tensor  # Mu, (N, T)
    beta: Tensor  # The background's parameters, (N, P)
    gram: Tensor  # N^T W N, (N, P, P)


class CountLikelihood:
    """The likelihood of counts x, given the signal of components.

    Args:
        x: Counts, shape ``(B, T)``.
        columns: What a unit of each background parameter adds, shape ``(P, T)``.
        constant: What is there without them, shape ``(T,)``.
        mean: The parameters' prior mean, shape ``(P,)``.
        covariance: Their prior covariance, shape ``(P, P)``.

    Example:
        >>> x, one = torch.tensor([[4.0, 6.0, 5.0]]), torch.ones(1, dtype=torch.float64)
        >>> wide = 1e6 * one[None]
        >>> counts = CountLikelihood(x, one.expand(1, 3), 0 * one.expand(3), one, wide)
        >>> right, gram = counts.moments(torch.zeros(1, 3), torch.tensor([0]))
        >>> (right / gram[:, 0]).round(decimals=4).tolist()  # the mean
        [[5.0]]
    """

    def __init__(
        self,
        x: Tensor,
        columns: Tensor,
        constant: Tensor,
        mean: Tensor,
        covariance: Tensor,
    ) -> None:
        self.x = x.double()
        self.columns, self.constant, self.mean = (
            part.to(self.x) for part in (columns, constant, mean)
        )
        size = len(self.columns)
        self.precision = torch.linalg.pinv(covariance.to(self.x), hermitian=True)
        self._log_det = self.precision.logdet() if size else self.precision.sum()
        # Products of two columns, (T, P P).
        pairs = self.columns.unsqueeze(1) * self.columns
        self._pairs = pairs.flatten(0, 1).mT
        self._start = smooth(self.x, _WIDE).clamp(min=0.0) + LEAST_COUNTS
        self._least = _LEAST_RATE * (self.x.amax(-1, keepdim=True) + LEAST_COUNTS)

    def moments(self, signal: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Weighed products of columns with what signals ``(N, T)`` leave, ``(N, P)``.

        And those of the columns with each other, ``(N, P, P)``, as the likelihood of a
        Gaussian would have them.
        """
        signal = signal.double()
        rate, _, gram = self._scored(self.x[owner], signal, owner)
        left = self.x[owner] - self.constant - signal
        return (left / rate) @ self.columns.mT, gram

    def equations(
        self, signal: Tensor, slopes: Tensor, owner: Tensor
    ) -> NormalEquations:
        """Linearise about signals ``(N, T)`` with derivatives ``(N, M, T)``."""
        x, signal = self.x[owner], signal.double()
        rate, beta, gram = self._scored(x, signal, owner)
        away = beta - self.mean
        inner = gram + self.precision
        score = (x - rate) / rate
        weighed = slopes / rate.unsqueeze(1)
        cross = weighed @ self.columns.mT
        # Beta is not quite the likeliest one: what is left of its own gradient.
        left = score @ self.columns.mT - away @ self.precision
        both = torch.cat([cross, left.unsqueeze(1)], 1)
        solved = torch.linalg.solve(inner, both.mT)
        lost = cross @ solved
        # Logarithms of no count are left out, as their terms are zero.
        deviance = 2 * (torch.xlogy(x, x / rate) - x + rate).sum(-1)
        deviance = deviance + ((away @ self.precision) * away).sum(-1)
        if len(self.columns):
            deviance = deviance + inner.logdet() - self._log_det
        return NormalEquations(
            residual=deviance,
            gradient=(slopes @ score.unsqueeze(-1)).squeeze(-1) - lost[..., -1],
            curvature=weighed @ slopes.mT - lost[..., :-1],
        )

    def _scored(self, x: Tensor, signal: Tensor, owner: Tensor) -> _Scored:
        rate, least = self._start[owner], self._least[owner]
        left, prior = x - self.constant - signal, self.precision @ self.mean
        beta = self.mean.expand(len(x), -1)
        for _ in range(_ROUNDS if len(self.columns) else 0):
            gram = self._gram(rate)
            right = (left / rate) @ self.columns.mT + prior
            beta = torch.linalg.solve(gram + self.precision, right)
            rate = self._rate(signal, beta, least)
        rate = self._rate(signal, beta, least)
        return _Scored(rate, beta, self._gram(rate))

    def _rate(self, signal: Tensor, beta: Tensor, least: Tensor) -> Tensor:
        return torch.maximum(self.constant + signal + beta @ self.columns, least)

    def _gram(self, rate: Tensor) -> Tensor:
        size = len(self.columns)
        return (rate.reciprocal() @ self._pairs).unflatten(-1, (size, size))


def smooth(data: Tensor, kernel: Sequence[float]) -> Tensor:
    """Data ``(B, T)`` averaged with weights, the ends repeated."""
    weights = torch.tensor(kernel, dtype=torch.float64)[None, None].to(data)
    reach = len(kernel) // 2
    padded = torch.nn.functional.pad(data.unsqueeze(1), (reach, reach), "replicate")
    return torch.nn.functional.conv1d(padded, weights).squeeze(1)
