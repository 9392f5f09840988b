r"""The shape of noise where it is not known: estimates of a spectrum's slope, a jitter.

C is diagonal, in the samples or in their Fourier transform; :math:`p_j` are the mean
squares of a residual there, each of :math:`m_j` numbers, T in all, and
:math:`v_j(\eta)` their variances, up to the level s squared. The level given the shape
is nearly lognormal about :math:`\hat s^2 = \sum_j m_j p_j / v_j T`; of the shape alone

.. math::
    \ell(\eta) = -\tfrac12 \sum_j m_j \log v_j - \tfrac{T}{2} \log \hat s^2(\eta),
    \qquad
    F = \tfrac12 \sum_j m_j\, g_j g_j^\top, \qquad
    g_j = \left( 2, \frac{\partial \log v_j}{\partial \eta} \right)

(Whittle 1953, exact where C is circulant). Steps of Fisher scoring,
:math:`F^{-1} \tfrac12 \sum_j m_j g_j (p_j / \hat s^2 v_j - 1)`, lead to the maximum;
a parabola through it and points a deviation away is the Gaussian that is returned. Of
data that still hold components the estimate takes s from the median and counts each
:math:`p_j` as at most a few times its variance: lines in a spectrum, pulses in a record
move it little as long as most j hold noise alone.
"""

import math

import torch
from torch import Tensor

from ..sets.prior import VariableKPrior
from .noise import GaussianNoise

__all__ = ["GivenResidual", "NoiseShape", "marks_of"]

# Candidates of each parameter in a round of the search, and rounds.
_CANDIDATES, _ROUNDS = 32, 3
# Largest count of one mean square over its expectation.
_MOST = 6.0
# Median of a mean square of one and of two numbers over its expectation.
_MEDIANS = {1: 0.45494, 2: math.log(2.0)}
_STEPS, _SMALL = 5, 1e-3
# Least precision of a natural coordinate; farthest point of a parabola.
_RIDGE, _FAR = 1e-3, 0.3
# What is left to a bound in natural coordinates; how often a move is shortened.
_SHORT, _SHORTER = 1e-6, 4
# Most numbers in a table of candidates' variances.
_MOST_NUMBERS = 2**22
# Stands for an open end.
_OPEN = 1e6


def marks_of(rows: Tensor) -> list[float]:
    """Numbers by which rows ``(R, n)`` are told from others: products with waves."""
    time = torch.arange(rows.shape[-1], device=rows.device).double()
    time = (time + 0.5) / max(1, rows.shape[-1])
    waves = torch.stack([torch.exp(-time * (k + 1)) for k in range(2)])
    return (rows.double() @ waves.mT).flatten().tolist()


class NoiseShape:
    """Estimates of the parameters that the shape of a noise depends on.

    Args:
        noise: The noise; its shape is a function.
        prior: Prior of the shared parameters.

    Raises:
        ValueError: If the noise reads a parameter that there is not.
    """

    def __init__(self, noise: GaussianNoise, prior: VariableKPrior) -> None:
        marginals, num = prior.shared_marginals, prior.layout.num_shared
        if noise.depends_on and max(noise.depends_on) >= num:
            raise ValueError(
                f"depends_on must name some of the {num} shared parameters, got "
                f"{noise.depends_on}."
            )
        if noise.level is not None and noise.level >= num:
            raise ValueError(
                f"level must be one of the {num} shared parameters, got {noise.level}."
            )
        self.noise, self.indices = noise, list(noise.depends_on)
        self.marginals = [marginals[i] for i in self.indices]
        half = torch.tensor(0.5, dtype=torch.float64)
        self.usual = torch.stack([m.quantile(half).reshape(()) for m in marginals])
        self.level = None if noise.level is None else marginals[noise.level]
        scales = [m.natural_scale[:2] for m in self.marginals]
        self.middle, self.half = torch.tensor(scales, dtype=torch.float64).unbind(-1)
        bounds = [[*map(math.isfinite, m.bounds)] for m in self.marginals]
        self.low = torch.tensor([-1.0 if low else -_OPEN for low, _ in bounds]).double()
        self.high = torch.tensor([1.0 if high else _OPEN for _, high in bounds])
        # Short of bounds, where a variance may be zero.
        self.low, self.high = self.low + _SHORT, self.high.double() - _SHORT
        self._check_reading(prior)

    def _check_reading(self, prior: VariableKPrior) -> None:
        """Check that the shape of a row depends on what it should alone."""
        assert self.noise.function is not None
        rows = prior.sample((3,), torch.Generator().manual_seed(0)).double()
        shared = prior.layout.unpack(rows).shared
        found = torch.as_tensor(self.noise.function(shared)).double()
        alone = torch.as_tensor(self.noise.function(shared[:1])).double()
        if alone.shape[1:] != found.shape[1:] or not torch.allclose(
            alone[0], found[0], rtol=1e-5, atol=0.0
        ):
            raise ValueError(
                f"{self.noise.kind} must map each row of shared parameters on its own, "
                "got a function whose values depend on the other rows."
            )
        for i, name in enumerate(prior.layout.shared_names):
            if i in self.indices:
                continue
            moved = shared[:1].clone()
            moved[:, i] = shared[1:2, i]
            other = torch.as_tensor(self.noise.function(moved)).double()
            if not torch.allclose(other, alone, rtol=1e-5, atol=0.0):
                raise ValueError(
                    f"{self.noise.kind} must depend on the parameters that depends_on "
                    f"names, {self.noise.depends_on}, got a function of {name!r} too."
                )

    def variances(self, values: Tensor, num_data: int) -> Tensor:
        """Variances ``(..., n)`` of parameters ``(..., P)``."""
        shared = self.usual.to(values).repeat(*values.shape[:-1], 1)
        shared[..., self.indices] = values
        flat = shared.reshape(-1, shared.shape[-1])
        root = self.noise.root(flat, num_data)
        return root.square().unflatten(0, values.shape[:-1])

    def white(self, signal: Tensor, values: Tensor) -> Tensor:
        """Signals ``(..., T)`` where parameters ``(..., P)`` make noise white."""
        root = self.variances(values, signal.shape[-1]).sqrt()
        return self.noise.white_given(signal, root)

    def natural(self, values: Tensor) -> Tensor:
        """Coordinates in which a bounded parameter covers [-1, 1]."""
        return (values - self.middle.to(values)) / self.half.to(values)

    def values(self, natural: Tensor) -> Tensor:
        """The inverse of :meth:`natural`."""
        return self.middle.to(natural) + self.half.to(natural) * natural

    @property
    def mark(self) -> tuple[float, ...]:
        """Numbers by which another shape is told from this one."""
        levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        columns = [m.quantile(levels) for m in self.marginals]
        rows = self.usual.repeat(3, 1)
        rows[:, self.indices] = torch.stack(columns, -1)
        assert self.noise.function is not None
        found = torch.as_tensor(self.noise.function(rows)).double()
        # In their own unit: what matters is how they go up and down.
        return (float(found.shape[-1]), *marks_of(found))

    @torch.no_grad()
    def estimate(self, data: Tensor) -> Tensor:
        """Parameters ``(B, P)`` of data ``(B, T)`` that may hold components."""
        num_data, num = data.shape[-1], len(self.indices)
        data = data.double()
        if self.noise.kind == "spectrum":
            # Of a record that is faded in and out, loud lines leak into few others.
            taper = torch.hann_window(num_data, dtype=data.dtype, device=data.device)
            data = data * taper / taper.square().mean().sqrt()
        power = self.noise.power(data)
        each = max(1, _MOST_NUMBERS // (_CANDIDATES * num * power.shape[-1]))
        return torch.cat([self._search(p, num_data) for p in power.split(each)])

    def _search(self, power: Tensor, num_data: int) -> Tensor:
        num = len(self.indices)
        engine = torch.quasirandom.SobolEngine(num)
        points = engine.draw(_CANDIDATES * num + 1, dtype=torch.float64)[1:]
        points = points.to(power.device)
        centre = power.new_full((len(power), 1, num), 0.5)
        width, rows = 1.0, torch.arange(len(power), device=power.device)
        found = centre
        for _ in range(_ROUNDS):
            level = (centre + width * (points - 0.5)).clamp(1e-3, 1 - 1e-3)
            columns = zip(self.marginals, level.unbind(-1), strict=True)
            found = torch.stack([m.quantile(share) for m, share in columns], -1)
            best = self._robust(power, found, num_data).argmax(-1)
            centre, found = level[rows, best].unsqueeze(1), found[rows, best]
            width *= 4 * len(points) ** (-1 / num)
        return found

    def _robust(self, power: Tensor, values: Tensor, num_data: int) -> Tensor:
        """A log likelihood ``(B, G)`` that single mean squares move little."""
        variance = self.variances(values, num_data).clamp(min=1e-300)
        counts = self.noise.multiplicity(num_data).to(power)
        ratio = power.unsqueeze(1) / variance
        log_scale = torch.zeros_like(ratio[..., 0])
        if self.level is not None:
            usual = _MEDIANS[2 if self.noise.kind == "spectrum" else 1]
            scale = (ratio.median(-1).values / usual).clamp(min=1e-300)
            ratio, log_scale = ratio / scale.unsqueeze(-1), scale.log()
        each = variance.log() + ratio.clamp(max=_MOST)
        return -0.5 * (each @ counts) - 0.5 * counts.sum() * log_scale

    @torch.no_grad()
    def given(self, white: Tensor, first: Tensor) -> "GivenResidual":
        """What N residuals say of level and shape.

        Args:
            white: Residuals ``(N, T)`` as they are where parameters ``first`` make
                noise white, of level s.
            first: Those parameters, shape ``(N, P)``; the search begins there.
        """
        num_data = white.shape[-1]
        power = self.noise.power(white) * self.variances(first, num_data)
        return GivenResidual(self, power, num_data, self.natural(first))


class GivenResidual:
    """What residuals say of the level and the shape of noise.

    Attributes:
        mean: Of the shape's natural coordinates, shape ``(N, P)``.
        factor: Lower triangular factor of their covariance, ``(N, P, P)``.
    """

    def __init__(
        self, shape: NoiseShape, power: Tensor, num_data: int, start: Tensor
    ) -> None:
        self._shape, self._power, self._num_data = shape, power, num_data
        self._counts = shape.noise.multiplicity(num_data).to(power)
        self.mean, self.factor = self._gaussian(start)

    def level(self, natural: Tensor) -> Tensor:
        """Log of the level's estimate ``(N,)`` given a shape ``(N, P)``."""
        if self._shape.level is None:
            return torch.zeros_like(natural[:, 0])
        ratio = self._power / self._variances(natural)
        total = (ratio @ self._counts / self._counts.sum()).clamp(min=1e-300)
        return 0.5 * total.log()

    def _variances(self, natural: Tensor) -> Tensor:
        return self._shape.variances(self._shape.values(natural), self._num_data)

    def _log_likelihood(self, natural: Tensor) -> Tensor:
        """Log likelihood ``(N,)`` of shapes ``(N, P)``, at its best level."""
        variance = self._variances(natural)
        value = -0.5 * (variance.log() @ self._counts)
        if self._shape.level is None:
            return value - 0.5 * ((self._power / variance) @ self._counts)
        return value - self._counts.sum() * self.level(natural)

    def _gaussian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape, counts = self._shape, self._counts
        precision = z.new_zeros(0)
        for _ in range(_STEPS):
            ratio = self._power / self._variances(z)
            slopes = self._slopes(z)
            if shape.level is not None:
                ratio = ratio * (-2 * self.level(z)).exp().unsqueeze(-1)
                # What the level can take up is not the shape's.
                mean = (slopes @ counts) / counts.sum()
                slopes = slopes - mean.unsqueeze(-1)
            weighted = 0.5 * slopes * counts
            # Of natural coordinates 1 is that of the prior, about.
            precision = weighted @ slopes.mT + _RIDGE * torch.eye(z.shape[-1]).to(z)
            score = (weighted @ (ratio - 1).unsqueeze(-1)).squeeze(-1)
            move = torch.linalg.solve(precision, score).clamp(-0.5, 0.5)
            z = self._uphill(z, move)
        deviation = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
        return self._parabola(z, precision, deviation.clamp(max=_FAR))

    def _uphill(self, z: Tensor, move: Tensor) -> Tensor:
        """Shapes a move further, or as much of it as makes data more likely."""
        low, high = self._shape.low.to(z), self._shape.high.to(z)
        here, best = self._log_likelihood(z), z
        for _ in range(_SHORTER):
            tried = (z + move).maximum(low).minimum(high)
            value = self._log_likelihood(tried)
            better = (value > here) & (best == z).all(-1)
            best = torch.where(better.unsqueeze(-1), tried, best)
            move = 0.3 * move
        return best

    def _slopes(self, z: Tensor) -> Tensor:
        """Derivatives ``(N, P, n)`` of log variances by natural coordinates."""
        found = []
        for direction in torch.eye(z.shape[-1]).to(z):
            above, below = self._beside(z, _SMALL * direction)
            logs = self._variances(above).log() - self._variances(below).log()
            found.append(logs / ((above - below) @ direction).unsqueeze(-1))
        return torch.stack(found, 1)

    def _beside(self, z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Points to both sides, within bounds."""
        low, high = self._shape.low.to(z), self._shape.high.to(z)
        return (z + step).minimum(high), (z - step).maximum(low)

    def _parabola(
        self, z: Tensor, precision: Tensor, deviation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and factor by the log likelihood a deviation away.

        F is no curvature where a variance has no slope, as at a jitter of zero.
        """
        here = self._log_likelihood(z)
        bend, slope = [], []
        for d, direction in enumerate(torch.eye(z.shape[-1]).to(z)):
            above, below = self._beside(z, deviation[:, d, None] * direction)
            # At a bound, two points on its other side.
            up, down = (above - z) @ direction, (z - below) @ direction
            at_top, at_end = up < 0.5 * down, down < 0.5 * up
            above = torch.where(at_top.unsqueeze(-1), 0.5 * (z + below), above)
            below = torch.where(at_end.unsqueeze(-1), 0.5 * (z + above), below)
            first, second = (above - z) @ direction, (below - z) @ direction
            rise = (self._log_likelihood(above) - here) / first
            fall = (self._log_likelihood(below) - here) / second
            curve = 2 * (rise - fall) / (first - second)
            bend.append(-curve)
            slope.append(rise - 0.5 * curve * first)
        found = torch.stack(bend, -1).clamp(min=0.0) + _RIDGE
        fisher = precision.diagonal(dim1=-2, dim2=-1)
        scale = (found / fisher).sqrt()
        precision = precision * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        covariance = torch.linalg.inv(precision)
        covariance = 0.5 * (covariance + covariance.mT)
        move = (covariance @ torch.stack(slope, -1).unsqueeze(-1)).squeeze(-1)
        # At a bound the parabola's top lies beyond it; elsewhere only if it is higher.
        low, high = self._shape.low.to(z), self._shape.high.to(z)
        held = ((z <= low) & (move < 0)) | ((z >= high) & (move > 0))
        inner = torch.where(held, 0.0, move)
        top = self._uphill(z, inner)
        mean = torch.where(held, z + move.clamp(-2.0, 2.0), top)
        return mean, torch.linalg.cholesky(covariance)
