r"""Least squares of any differentiable signal that is a sum of components.

.. math::
    r = x - \sum_k s(\theta_k), \qquad
    \text{gradient } J^T r, \quad \text{curvature } J^T J, \qquad
    J = \left[ \partial s / \partial \theta_1, \ldots,
        \partial s / \partial \theta_K \right]

J is built explicitly, one forward-mode derivative for each of the D parameters, at a
cost of T K D numbers a set. A signal whose inner products have closed forms can do with
less (:mod:`.sinusoids.fit`). The equations are in float64.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import jvp
from torch.quasirandom import SobolEngine

from ..nn.gauss_newton import NormalEquations
from ..nn.spec import build, describe, register
from ..sets.marginals import Marginal, Marginals
from ..sets.prior import VariableKPrior
from .linear import LinearForm
from .noise_shape import GivenResidual
from .simulator import AdditiveSimulator
from .white_space import GivenWhite, WhiteSpace, known_variance, white_space

__all__ = ["AdditiveFit", "AdditiveLeastSquares", "additive_fit", "signal_slopes"]

_SEARCH_POINTS, _LINEAR_SEARCH_POINTS = 16, 32
_SEARCH_ROUNDS = 2
# Most numbers in a tensor of signals: bounds the memory.
_MOST_NUMBERS = 2**24


@register("fit")
@dataclass(frozen=True)
class AdditiveFit:
    """Normal equations of K components, beside a background.

    A file can describe it if the signal is a registered part
    (:mod:`sbi_slotflow.nn.spec`); an estimator that was saved with another signal
    is loaded with ``fit=...``.

    Attributes:
        component_signal: Maps components ``(..., D)`` to signals ``(..., *event)``,
            each on its own, by operations that torch can differentiate in forward mode.
        marginals: Prior marginals of the D parameters, ``prior.component_marginals``.
        location: Index of the location among the parameters; a tuple of several.
        space: Where noise is white and the background gone; None where noise is white
            and there is no background.
        variance: The noise's variance there; None if it is not known.
        form: In what components are linear, for starts; None for nothing known.
    """

    component_signal: Callable[[Tensor], Tensor]
    marginals: Sequence[Marginal]
    location: int | tuple[int, ...] = 0
    space: WhiteSpace | None = None
    variance: float | None = None
    form: LinearForm | None = None

    kind: ClassVar[str] = "additive"

    def __post_init__(self) -> None:
        if not all(0 <= index < len(self.marginals) for index in self.locations):
            raise ValueError(
                f"location must be one of 0..{len(self.marginals) - 1}, got "
                f"{self.location}."
            )

    @property
    def locations(self) -> tuple[int, ...]:
        """Indices of the locations."""
        return (self.location,) if isinstance(self.location, int) else self.location

    @property
    def linear_shared(self) -> tuple[int, ...]:
        """Shared parameters in which a background is linear that is fitted along."""
        return () if self.space is None else self.space.indices

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shared parameters on which the shape of the noise depends."""
        shape = None if self.space is None else self.space.shape
        return () if shape is None else tuple(shape.indices)

    def signals(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``, events side by side."""
        return self.component_signal(components).flatten(components.ndim - 1)

    @property
    def spec(self) -> dict[str, Any] | None:
        """Description for :meth:`from_spec`; None if the signal or space has none."""
        signal = describe("signal", self.component_signal)
        if signal is None or self.space is not None:
            return None
        known = {} if self.variance is None else {"variance": self.variance}
        return {
            "kind": self.kind,
            "signal": signal,
            **Marginals(self.marginals).spec,
            "location": self.location,
            **known,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "AdditiveFit":
        """Rebuild a fit from :attr:`spec`."""
        signal, marginals = build("signal", spec["signal"]), Marginals.from_spec(spec)
        place = spec["location"]
        place = place if isinstance(place, int) else tuple(place)
        return cls(signal, marginals, place, variance=spec.get("variance"))

    def candidates(
        self, low: Tensor, high: Tensor, num: int = _SEARCH_POINTS
    ) -> Tensor:
        """Candidates ``(N, K, G, D)`` for components with locations in intervals.

        The ends ``low`` and ``high`` are ``(N, K)``, of P locations ``(N, K, P)``.
        """
        if low.ndim == 2:
            low, high = low.unsqueeze(-1), high.unsqueeze(-1)
        # The sequence's first point is the corner, where a quantile may be infinite.
        engine = SobolEngine(len(self.marginals))
        points = engine.draw(num + 1, dtype=torch.float64)[1:].to(low.device)
        named = zip(self.marginals, points.unbind(-1), strict=True)
        shape = *low.shape[:-1], -1
        columns = [m.quantile(share).expand(shape) for m, share in named]
        for i, d in enumerate(self.locations):
            ends = low[..., i, None], high[..., i, None]
            columns[d] = torch.lerp(*ends, points[:, d])
        return torch.stack(columns, -1)

    def given(self, data: Tensor) -> "AdditiveLeastSquares":
        """The least squares of observations ``(B, T)``."""
        data = data.flatten(1)
        if self.space is None:
            return self.least_squares(self, data)
        white = self.space.given(data)
        return self.least_squares(self, white.data, white)

    @property
    def least_squares(self) -> "type[AdditiveLeastSquares]":
        """What to make of observations."""
        return AdditiveLeastSquares


@dataclass(frozen=True)
class AdditiveLeastSquares:
    """Least squares of given observations.

    Attributes:
        fit: The signal.
        data: The observations ``(B, T)``, where noise is white.
        white: The map there; None where it already is.
    """

    fit: AdditiveFit
    data: Tensor
    white: GivenWhite | None = None

    @property
    def variance(self) -> float | None:
        """Variance of the noise in the data, if it is known."""
        return self.fit.variance

    @property
    def counts(self) -> Tensor | None:
        """How many numbers of each observation are data; None if all are."""
        return None

    def signals(self, components: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(M, ..., T)`` of components ``(M, ..., D)`` of observations."""
        return self.fit.signals(components)

    def slopes(self, components: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Signals ``(M, T)`` of components ``(M, D)``, derivatives ``(M, D, T)``."""
        return signal_slopes(lambda c: self.signals(c, owner), components)

    def start(self, owner: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        """Estimate components with locations in given intervals.

        Candidates are one low-discrepancy set, spread over intervals and quantiles. One
        component after the other takes the one that leaves least power, in two rounds.
        Where components are linear in some parameters, only the others are searched.
        """
        low, high = low.double(), high.double()
        width = len(self.fit.marginals)
        if not mask.any():
            return low.new_zeros(*mask.shape, width)
        # Sets have intervals in common, each of which is looked at once.
        ends = torch.stack([low, high], -1)[mask].flatten(1)
        row = owner[mask.nonzero()[:, 0]]
        keys, which = torch.cat([row.double().unsqueeze(-1), ends], -1).unique(
            dim=0, return_inverse=True
        )
        form = self.fit.form
        signals = 1 if form is None else form.num_amplitudes
        numbers = len(keys) * _LINEAR_SEARCH_POINTS * signals * self.data.shape[-1]
        if numbers > _MOST_NUMBERS and len(owner) > 1:  # sets that have few in common
            half = len(owner) // 2
            parts = ([x[:half], x[half:]] for x in (owner, low, high, mask))
            return torch.cat([self.start(*part) for part in zip(*parts, strict=True)])
        place = torch.zeros_like(mask, dtype=torch.int64)
        place[mask] = which
        intervals = keys[:, 1:].unflatten(-1, (*low.shape[2:], 2)).unsqueeze(1)
        search = _Search(self, keys[:, 0].long(), *intervals.unbind(-1))
        parts = self._parts(mask.shape[-1] * search.num_signals, owner, place, mask)
        return torch.cat([search.choose(*part) for part in parts])

    def normal_equations(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        """Linearise the sum of the components about their present values."""
        components = components.double()
        signals = components.shape[-2] * components.shape[-1]
        parts = self._parts(signals, owner, components, mask)
        found = [self._linearise(i, *part) for i, *part in parts]
        return NormalEquations(*(torch.cat(each) for each in zip(*found, strict=True)))

    def _parts(self, signals: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Sets to handle at once, with that many signals each."""
        size = max(1, _MOST_NUMBERS // max(1, signals * self.data.shape[-1]))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def background_moments(
        self, owner: Tensor, components: Tensor, mask: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moments of the background given components; see :meth:`GivenWhite.moments`.

        They are of shapes ``(N, P)`` and ``(N, P, P)``. Shared parameters ``(N, S)``
        are looked at where the shape of the noise depends on them.
        """
        assert self.white is not None
        found = [
            self.white.moments(total, i, rows)
            for i, total, rows in self._totals(owner, components, mask, shared)
        ]
        right, gram = zip(*found, strict=True)
        return torch.cat(right), torch.cat(gram)

    def noise_given(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> GivenResidual:
        """What is known of the noise's level and shape given components."""
        assert self.white is not None
        left = [
            self.data[i].double() - self._seen(total, i)
            for i, total, _ in self._totals(owner, components, mask, owner)
        ]
        return self.white.noise_given(torch.cat(left), owner)

    def _totals(
        self, owner: Tensor, components: Tensor, mask: Tensor, rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Owners of some sets at a time, sums ``(N, T)`` of their signals, rows."""
        parts = self._parts(mask.shape[-1], owner, components.double(), mask, rows)
        for i, here, active, those in parts:
            total = here.new_zeros(len(i), self.data.shape[-1])
            if active.any():
                row = active.nonzero()[:, 0]
                signals = self.signals(here[active], i[row])
                total.index_add_(0, row, signals.to(total))
            yield i, total, those

    def _seen(self, signals: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` where noise is white and the background gone."""
        return signals if self.white is None else self.white(signals, owner)

    def _linearise(
        self, owner: Tensor, components: Tensor, mask: Tensor
    ) -> NormalEquations:
        data = self.data[owner].double()
        active, rows = components[mask], owner[mask.nonzero()[:, 0]]
        slopes = components.new_zeros(*components.shape, data.shape[-1])
        signals = components.new_zeros(*mask.shape, data.shape[-1])
        if len(active):
            signals[mask], slopes[mask] = self.slopes(active, rows)
        total, slopes = signals.sum(-2), slopes.flatten(-3, -2)
        if self.white is not None and self.white.likelihood is not None:
            return self.white.likelihood.equations(total, slopes, owner)
        residual = data - self._seen(total, owner)
        jacobian = self._seen(slopes, owner)
        return NormalEquations(
            residual=residual.square().sum(-1),
            gradient=(jacobian @ residual.unsqueeze(-1)).squeeze(-1),
            curvature=jacobian @ jacobian.mT,
        )


class _Search:
    """Candidates for components in U intervals, G in each, M signals of each.

    Args:
        least: The least squares.
        owner: The observation of each interval, shape ``(U,)``.
        low: Lower ends, shape ``(U, 1)``, of P locations ``(U, 1, P)``.
        high: Upper ends, of the same shape.
    """

    def __init__(
        self, least: "AdditiveLeastSquares", owner: Tensor, low: Tensor, high: Tensor
    ) -> None:
        self.form, fit = least.fit.form, least.fit
        num = {} if self.form is None else {"num": _LINEAR_SEARCH_POINTS}
        self.candidates = fit.candidates(low, high, **num)[:, 0]
        units = self.candidates.unsqueeze(-2)
        if self.form is not None:
            self.nonlinear = self.form.nonlinear(self.candidates)
            amplitudes = torch.eye(self.form.num_amplitudes).to(self.nonlinear)
            shape = *self.nonlinear.shape[:-1], len(amplitudes)
            each = self.nonlinear.unsqueeze(-2).expand(*shape, -1)
            units = self.form.components(each, amplitudes.expand(*shape, -1))
        self.num_signals = units.shape[1] * units.shape[2]
        # A start need not be exact: the data's own precision will do. Squares of small
        # numbers vanish in float32: in units near the data's scale.
        data = least.data
        exponent = -torch.frexp(data.abs().amax()).exponent
        self.data = torch.ldexp(data, exponent)
        parts = least._parts(self.num_signals, owner, units)
        seen = [least._seen(least.signals(u.to(data), i), i) for i, u in parts]
        # (U, G, M, T)
        self.signals = torch.ldexp(torch.cat(seen).to(data), exponent)
        gram = self.signals @ self.signals.mT
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        ridge = torch.where(size > 0, 1e-6 * size, 1.0)
        identity = torch.eye(gram.shape[-1]).to(gram)
        self.inverse = torch.linalg.inv(gram + ridge[..., None, None] * identity)
        self.power = gram[..., 0, 0]

    def choose(self, owner: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        """Candidates ``(N, K, D)`` that explain the data best together, in turns.

        ``place`` ``(N, K)`` is the interval of each component.
        """
        data, rows = self.data[owner], torch.arange(len(owner), device=owner.device)
        shape = *mask.shape, self.signals.shape[-2]
        chosen, amplitudes = torch.zeros_like(place), data.new_ones(shape)
        explained = data.new_zeros(*mask.shape, data.shape[-1])
        for _ in range(_SEARCH_ROUNDS):
            for k in range(mask.shape[-1]):
                at = place[:, k]
                rest = data - explained.sum(-2) + explained[:, k]
                signals = self.signals[at]
                inner = (signals @ rest[:, None, :, None]).squeeze(-1)
                if self.form is None:
                    best = (self.power[at] - 2 * inner[..., 0]).argmin(-1)
                    solved = torch.ones_like(inner)
                else:
                    solved = (self.inverse[at] @ inner.unsqueeze(-1)).squeeze(-1)
                    best = (inner * solved).sum(-1).argmax(-1)
                chosen[:, k], amplitudes[:, k] = best, solved[rows, best]
                here = amplitudes[:, k].unsqueeze(-2) @ signals[rows, best]
                active = mask[:, k, None]
                explained[:, k] = torch.where(active, here.squeeze(-2), 0.0)
        if self.form is None:
            return self.candidates[place, chosen]
        nonlinear = self.nonlinear[place, chosen]
        return self.form.components(nonlinear, amplitudes.to(nonlinear))


def additive_fit(
    simulator: AdditiveSimulator,
    prior: VariableKPrior,
    location: int | tuple[int, ...],
    form: LinearForm | None = None,
) -> AdditiveFit | None:
    """The least squares of a simulator's components, where its noise is white.

    None, with a warning, where noise or background allow no least squares. See
    :class:`AdditiveFit` for ``location`` and ``form``.
    """
    try:
        space = white_space(simulator, prior)
    except TypeError as error:
        warnings.warn(f"no Gauss-Newton steps: {error}", stacklevel=3)
        return None
    return AdditiveFit(
        simulator.component_signal,
        prior.component_marginals,
        location,
        space,
        known_variance(simulator.noise, space),
        form,
    )


def signal_slopes(
    signals: Callable[[Tensor], Tensor], components: Tensor
) -> tuple[Tensor, Tensor]:
    """Signals ``(M, T)`` of components ``(M, D)``, and derivatives ``(M, D, T)``."""
    value, slopes = torch.zeros_like(components[:, :0]), []
    for d in range(components.shape[-1]):
        direction = torch.zeros_like(components)
        direction[:, d] = 1.0
        value, slope = jvp(signals, (components,), (direction,))[:2]
        slopes.append(slope)
    return value, torch.stack(slopes, 1)
