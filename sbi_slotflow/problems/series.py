r"""Records at irregular times: one network for many schedules.

.. math::
    x_i = (t_i, v_i, e_i), \qquad
    v_i = b(s; t_i) + \sum_{k=1}^{K} s(\theta_k; t_i) + \sigma e_i \epsilon_i,
    \qquad \epsilon_i \sim N(0, 1)

x has shape ``(B, T, 3)``: time, value and error of up to T samples. A sample whose
value is NaN is missing, and so is one whose error is 0, which is how records of
different length are padded (:func:`~sbi_slotflow.sets.records.packed`). The schedule,
times and errors, is drawn anew for each simulation, and is given when something is
inferred: densities are those of v given times and errors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp

from ..nn.cells import CellAxis
from ..nn.charts import Chart, DiscChart
from ..nn.encoders import PeriodogramTokens, TokenEncoder
from ..seeding import forked_rng
from ..sets.checks import Numbers, as_count, as_floats
from ..sets.layout import ThetaLayout
from ..sets.marginals import Marginal
from ..sets.prior import VariableKPrior
from ..sets.records import filled
from .base import Problem
from .least_squares import AdditiveFit, AdditiveLeastSquares
from .linear import LinearForm, PolarForm
from .noise import GaussianNoise
from .simulator import AdditiveSimulator
from .white_space import WhiteSpace, linear_background

__all__ = ["GivenSchedule", "Series", "SeriesFit", "SeriesSimulator"]

# Signal and background: of parameters (..., D) or (..., S), and times (..., T).
Timed = Callable[[Tensor, Tensor], Tensor]
Schedule = Callable[[int, torch.Generator], Tensor]

# Components that are taken out in turn for what a network sees, at most.
_MOST_REMOVED = 4


class SeriesSimulator:
    """Simulator of records at irregular times.

    Args:
        component_signal: Maps components ``(..., D)`` and times ``(..., T)``, whose
            leading dimensions broadcast, to signals ``(..., T)``.
        schedule: Draws times and errors: of a number n and a generator, a tensor
            ``(n, T, 2)``. An error of 0 stands for no sample.
        layout: Layout of theta, ``prior.layout``.
        background: Maps shared parameters ``(..., S)`` and times ``(..., T)`` to what
            they add, ``(..., T)``: an offset, a trend. It must be linear in them.
        level: Index of the shared parameter that scales all errors; None for none.
    """

    def __init__(
        self,
        component_signal: Timed,
        schedule: Schedule,
        layout: ThetaLayout,
        *,
        background: Timed | None = None,
        level: int | None = None,
    ) -> None:
        for name, part in (
            ("component_signal", component_signal),
            ("schedule", schedule),
        ):
            if not callable(part):
                raise TypeError(
                    f"{name} must be a function, got {type(part).__name__}."
                )
        if not isinstance(layout, ThetaLayout):
            raise TypeError(
                f"layout must be a prior's layout, got {type(layout).__name__}."
            )
        if level is not None and not 0 <= level < layout.num_shared:
            raise ValueError(
                f"level must be one of the {layout.num_shared} shared parameters, got "
                f"{level}."
            )
        self.component_signal, self.schedule, self.layout = (
            component_signal,
            schedule,
            layout,
        )
        self.background, self.level = background, level

    def __call__(
        self, theta: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Simulate records ``(..., T, 3)`` of theta rows ``(..., E)``."""
        self.layout.validate(theta)
        rows = theta.reshape(-1, self.layout.size)
        with forked_rng(generator):
            seed = int(torch.randint(2**62, ()))
        own = torch.Generator().manual_seed(seed)
        times, errors = self.drawn(len(rows), own).unbind(-1)
        level = self._level(rows).unsqueeze(-1)
        noise = torch.randn(errors.shape, generator=own, dtype=errors.dtype)
        value = self.signal(rows.double(), times) + level * errors * noise
        x = torch.stack([times, value, errors], -1)
        x = torch.where((errors > 0).unsqueeze(-1), x, 0.0)
        return x.reshape(*theta.shape[:-1], *x.shape[1:]).to(theta)

    def drawn(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw schedules ``(num, T, 2)``, float64.

        Raises:
            ValueError: If ``schedule`` returns something else.
        """
        found = as_floats(self.schedule(num, generator), "schedule").double()
        if found.ndim != 3 or found.shape[0] != num or found.shape[2] != 2:
            raise ValueError(
                f"schedule must return times and errors ({num}, T, 2), got "
                f"{tuple(found.shape)}."
            )
        if not found.isfinite().all() or (found[..., 1] < 0).any():
            raise ValueError(
                "schedule must return finite times, and errors that are finite and not "
                "negative."
            )
        return found

    def signal(self, theta: Tensor, times: Tensor) -> Tensor:
        """Signals ``(..., T)`` of rows ``(..., E)`` at times ``(..., T)``."""
        parts = self.layout.unpack(theta)
        total = self.background_signal(parts.shared, times)
        for k in range(int(parts.cardinality.max()) if len(theta) else 0):
            active = parts.mask[..., k : k + 1]
            middle = parts.components[..., k, :]
            # Padding may lie where there is no signal: a component that is there.
            safe = torch.where(active, middle, self._some(parts.components, parts.mask))
            total = total + torch.where(active, self.component_signal(safe, times), 0.0)
        return total

    def background_signal(self, shared: Tensor, times: Tensor) -> Tensor:
        """What shared parameters add, ``(..., T)``."""
        if self.background is None:
            shape = torch.broadcast_shapes(shared.shape[:-1], times.shape[:-1])
            return times.new_zeros(*shape, times.shape[-1])
        return as_floats(self.background(shared, times), "background").to(times)

    def log_likelihood(self, theta: Tensor, x: Numbers) -> Tensor:
        """Evaluate log p(v | theta, t, e) exactly, float64.

        Args:
            theta: Rows of shape ``(..., E)``.
            x: Records ``(T, 3)`` or ``(..., T, 3)``, whose batch shape broadcasts with
                theta's.

        Raises:
            TypeError, ValueError: If theta or x is malformed.
        """
        self.layout.validate(theta)
        x = filled(x).double()
        shape = torch.broadcast_shapes(theta.shape[:-1], x.shape[:-2])
        rows = theta.double().expand(*shape, -1).reshape(-1, self.layout.size)
        x = x.expand(*shape, -1, -1).reshape(-1, *x.shape[-2:])
        values = []
        for row, (time, value, error) in (
            (row, part.unbind(-1))
            for row, part in zip(rows.split(512), x.split(512), strict=True)
        ):
            there = error > 0
            spread = self._level(row).unsqueeze(-1) * torch.where(there, error, 1.0)
            z = (value - self.signal(row, time)) / spread
            each = -0.5 * z.square() - spread.log() - 0.5 * math.log(2 * math.pi)
            total = torch.where(there, each, 0.0).sum(-1)
            values.append(torch.where(self._level(row) > 0, total, -torch.inf))
        return torch.cat(values).reshape(shape) if values else rows.new_zeros(shape)

    def at(self, times: Tensor, errors: Tensor) -> AdditiveSimulator:
        """The simulator of values ``(..., T)`` at given times and errors ``(T,)``."""
        times, background = times.double(), self.background

        def beneath(shared: Tensor) -> Tensor:
            assert background is not None
            return background(shared, times.to(shared).expand(*shared.shape[:-1], -1))

        def signal(components: Tensor) -> Tensor:
            here = times.to(components).expand(*components.shape[:-1], -1)
            return self.component_signal(components, here)

        noise = GaussianNoise(errors=errors, level=self.level)
        fixed = None if background is None else beneath
        return AdditiveSimulator(signal, noise, self.layout, background=fixed)

    def _level(self, theta: Tensor) -> Tensor:
        shared = self.layout.unpack(theta).shared.double()
        if self.level is None:
            return shared.new_ones(shared.shape[:-1])
        return shared[..., self.level]

    @staticmethod
    def _some(components: Tensor, mask: Tensor) -> Tensor:
        """A component ``(D,)`` that is there."""
        return components[mask][0]


@dataclass(frozen=True)
class SeriesFit(AdditiveFit):
    """Normal equations of K components of records at irregular times.

    Attributes:
        simulator: The records' simulator.
        prior: The prior, for the background's own.
    """

    simulator: SeriesSimulator | None = None
    prior: VariableKPrior | None = None

    @property
    def spec(self) -> None:
        """None: a file cannot describe a signal of the user's own."""
        return None

    @property
    def linear_shared(self) -> tuple[int, ...]:
        """Shared parameters in which the background is linear."""
        assert self.simulator is not None
        assert self.prior is not None
        if self.simulator.background is None:
            return ()
        every = range(self.prior.layout.num_shared)
        return tuple(i for i in every if i != self.simulator.level)

    def given(self, data: Tensor) -> "SeriesLeastSquares":
        """The least squares of records ``(B, T, 3)``."""
        return SeriesLeastSquares(self, data)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, float]:
        """Prior mean and covariance of :attr:`linear_shared`, and a low level."""
        assert self.simulator is not None
        assert self.prior is not None
        rows = self.prior.sample((2_000,), torch.Generator().manual_seed(0)).double()
        shared = self.prior.layout.unpack(rows).shared
        beta = shared[:, list(self.linear_shared)]
        level = 1.0
        if self.simulator.level is not None:
            level = float(shared[:, self.simulator.level].quantile(0.01))
        covariance = torch.cov(beta.mT).reshape(2 * (beta.shape[1],))
        return beta.mean(0), covariance, level


class SeriesLeastSquares(AdditiveLeastSquares):
    """Least squares of given records.

    Attributes:
        data: Values over errors, where the background is gone, ``(B, T)``; zero where
            there is no sample.
    """

    fit: SeriesFit

    def __init__(self, fit: SeriesFit, x: Tensor) -> None:
        assert fit.simulator is not None
        time, value, error = x.double().unbind(-1)
        self.times, there = time, error > 0
        self.number = there.sum(-1)
        weights = torch.where(there, 1 / torch.where(there, error, 1.0), 0.0)
        space = _RecordSpace(fit, time, value, weights)
        super().__init__(fit, space.data, space)  # pyright: ignore[reportArgumentType]

    @property
    def counts(self) -> Tensor:
        """How many samples each record has, ``(B,)``."""
        return self.number

    def signals(self, components: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(M, ..., T)`` of components ``(M, ..., D)`` of records."""
        assert self.fit.simulator is not None
        times = self.times[owner].to(components)
        times = times.reshape(len(owner), *[1] * (components.ndim - 2), -1)
        times = times.expand(*components.shape[:-1], -1)
        return self.fit.simulator.component_signal(components, times)


class _RecordSpace:
    """Where each record's noise is white and its background gone.

    As :class:`.white_space.GivenWhite`, with times of its own for each record.
    """

    likelihood: None = None  # the noise is Gaussian

    def __init__(
        self, fit: SeriesFit, time: Tensor, value: Tensor, weights: Tensor
    ) -> None:
        assert fit.simulator is not None
        linear, simulator = list(fit.linear_shared), fit.simulator
        self._weights = weights
        num = simulator.layout.num_shared
        zero = time.new_zeros(len(time), num)
        constant = simulator.background_signal(zero, time)
        columns = [
            simulator.background_signal(zero + one, time) - constant
            for one in torch.eye(num).to(time)[linear]
        ]
        shape = len(time), len(linear), time.shape[-1]
        raw = torch.stack([torch.zeros_like(time), *columns], 1)[:, 1:].reshape(shape)
        left = torch.where(weights > 0, value - constant, 0.0)
        self.columns = raw * weights.unsqueeze(1)
        self._basis = self._share = None
        usual = left
        if linear:
            mean, covariance, level = fit.moments
            mean, root = mean.to(time), torch.linalg.cholesky_ex(covariance)[0].to(time)
            _, size, self._basis = torch.linalg.svd(
                root.mT @ self.columns, full_matrices=False
            )
            loud = size / level
            self._share = 1 - torch.hypot(torch.ones_like(loud), loud).reciprocal()
            usual = left - (mean @ raw)
        self._right = (self.columns @ (left * weights).unsqueeze(-1)).squeeze(-1)
        self._gram = self.columns @ self.columns.mT
        owner = torch.arange(len(time), device=time.device)
        self.data = self(usual, owner)

    def white(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` over errors."""
        weights = self._weights[owner].to(signal)
        return signal * weights.reshape(
            len(owner), *[1] * (signal.ndim - 2), signal.shape[-1]
        )

    def __call__(self, signal: Tensor, owner: Tensor) -> Tensor:
        """Signals ``(N, ..., T)`` where noise is white and the background gone."""
        white = self.white(signal, owner)
        if self._basis is None or self._share is None:
            return white
        basis, share = self._basis[owner].to(white), self._share[owner].to(white)
        flat = white.reshape(len(owner), -1, white.shape[-1])
        inner = (flat @ basis.mT) * share.unsqueeze(-2)
        return (flat - inner @ basis).reshape(white.shape)

    def moments(
        self, signal: Tensor, owner: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`.white_space.GivenWhite.moments`."""
        white = self.white(signal.double(), owner).unsqueeze(-1)
        inner = (self.columns[owner] @ white).squeeze(-1)
        return self._right[owner] - inner, self._gram[owner]


@dataclass(frozen=True)
class Series(Problem):
    """A problem of periodic components in records at irregular times.

    The canonical order is by the components' period or frequency. Its cells are equal
    shares of its prior, so that they are uniform in the frequency, in its logarithm, or
    in what else the prior is uniform in. A network has a token for each cell, made of
    the least-squares spectrum of the record there, as it is and with the strongest
    components taken out in turn (:mod:`sbi_slotflow.nn.prewhitening`), and takes
    Gauss-Newton steps on the samples that are there. Times count from where the
    components' phases do: from the middle of the records, where a phase is known
    independently of the period, and they stay small, as float32 has seven digits.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: A :class:`SeriesSimulator`.
        periodic: What the prior's ``order_by`` parameter is.
        cells: Number of cells: about the longest record times the band in frequency.
        linear: Names of the parameters in which a component is linear; with ``polar``,
            an amplitude and a phase.
        polar: Whether ``linear`` are polar coordinates.
        disc: Names of a parameter and an angle that means nothing where the parameter
            is at its lower bound, and of a phase that is known there together with the
            angle only: eccentricity, argument and mean anomaly, for example. See
            :class:`~sbi_slotflow.nn.charts.DiscChart`.

    Raises:
        TypeError, ValueError: If an argument is of another kind or out of range.
    """

    periodic: Literal["period", "frequency"] = "period"
    cells: int = 128
    linear: tuple[str, ...] = ()
    polar: bool = False
    disc: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.simulator, SeriesSimulator):
            raise TypeError(
                "simulator must be a SeriesSimulator, got "
                f"{type(self.simulator).__name__}."
            )
        if self.periodic not in ("period", "frequency"):
            raise ValueError(
                f"periodic must be 'period' or 'frequency', got {self.periodic!r}."
            )
        as_count(self.cells, "cells")
        low, _ = self.place.bounds
        if not low > 0:
            raise ValueError(
                f"prior must have a positive {self.periodic} as its order_by "
                f"parameter, got one from {low:g}."
            )
        self.linear_form()  # checks the names
        self.build_chart()
        # Checks that the background is linear, at one schedule.
        self.at(self.some_record).linear_background()

    @property
    def place(self) -> Marginal:
        """Prior of the period or frequency."""
        return self.prior.component_marginals[self.layout.order_by]

    @cached_property
    def some_record(self) -> Tensor:
        """Times and errors, as a record ``(T, 3)`` with values of zero."""
        drawn = self.simulator.drawn(1, torch.Generator().manual_seed(0))[0]
        time, error = drawn.unbind(-1)
        return torch.stack([time, torch.zeros_like(time), error], -1)

    @property
    def event_shape(self) -> torch.Size:
        """Shape ``(T, 3)`` of a record."""
        return self.some_record.shape

    @property
    def noise_level(self) -> int | None:
        """Index of the shared parameter that scales all errors."""
        return self.simulator.level

    def linear_form(self) -> LinearForm | None:
        """Return in what components are linear, at one schedule."""
        if not self.linear:
            return None
        time, _, error = self.some_record.unbind(-1)
        signal = self.simulator.at(time[error > 0], error[error > 0]).component_signal
        return self._form(signal)

    def _form(self, signal: Callable[[Tensor], Tensor]) -> LinearForm:
        if not self.polar:
            return LinearForm(signal, self.layout, self.linear)
        names, marginals = self.component_names, self.prior.component_marginals
        if len(self.linear) != 2 or not set(self.linear) <= set(names):
            raise ValueError(
                f"linear must name an amplitude and a phase of {names} where polar is "
                f"True, got {self.linear}."
            )
        start = marginals[names.index(self.linear[1])].bounds[0]
        return PolarForm(signal, self.layout, self.linear, start)

    def at(self, x: Numbers) -> "GivenSchedule":
        """The problem of values at the times of one record ``(T, 3)``."""
        x = filled(x)
        x = x.reshape(-1, 3)
        time, _, error = x[x[:, 2] > 0].double().unbind(-1)
        simulator = self.simulator.at(time, error)
        form = self._form(simulator.component_signal) if self.linear else None
        return GivenSchedule(self.name, self.prior, simulator, form)

    def collapsed(self, x: Numbers, **options: Any) -> Any:
        """Draw from the exact posterior of one record."""
        x = filled(x).reshape(-1, 3)
        return self.at(x).collapsed(x[x[:, 2] > 0][:, 1], **options)

    def build_token_encoder(self, **options: Any) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell."""
        num = 2 * self.cells
        shares = (torch.arange(num, dtype=torch.float64) + 0.5) / num
        place = self.place.quantile(shares)
        frequencies = 1 / place if self.periodic == "period" else place
        tokens = PeriodogramTokens(
            self.event_shape[0],
            self.cells,
            frequencies.tolist(),
            min(self.prior.max_cardinality, _MOST_REMOVED),
        )
        return TokenEncoder(tokens, **options)

    def build_chart(self) -> Chart:
        """Return the transform of a component to what the flow sees."""
        if not self.disc:
            return super().build_chart()
        names = self.component_names
        if len(self.disc) not in (2, 3) or not set(self.disc) <= set(names):
            raise ValueError(
                f"disc must name a parameter, an angle and perhaps a phase of {names}, "
                f"got {self.disc}."
            )
        indices = (names.index(name) for name in self.disc)
        return DiscChart(self.prior.component_marginals, *indices)

    def location_axis(self) -> CellAxis:
        """The period or frequency, in cells of equal prior probability."""
        return CellAxis(self.layout.order_by, self.cells)

    def build_fit(self) -> SeriesFit | None:
        """Return the least squares; None if torch cannot differentiate the signal."""
        width = self.layout.num_component_params
        middle = self.build_chart().some_point(torch.zeros(width))[None]
        times = self.some_record[None, :, 0].to(middle)
        signal = self.simulator.component_signal
        try:
            jvp(lambda c: signal(c, times), (middle,), (torch.ones_like(middle),))
        except (AttributeError, RuntimeError, TypeError):
            return None
        return SeriesFit(
            signal,  # pyright: ignore[reportArgumentType]  (it is asked with times)
            self.prior.component_marginals,
            self.layout.order_by,
            variance=1.0 if self.simulator.level is None else None,
            form=self.linear_form(),
            simulator=self.simulator,
            prior=self.prior,
        )


@dataclass(frozen=True)
class GivenSchedule(Problem):
    """Values at given times.

    Attributes:
        form: In what components are linear.
    """

    form: LinearForm | None = None

    def linear_form(self) -> LinearForm | None:
        """Return in what components are linear."""
        return self.form

    def linear_background(self) -> WhiteSpace:
        """The background's space, if it is linear.

        Raises:
            TypeError: If it is not.
        """
        background = linear_background(self.simulator, self.prior)
        return WhiteSpace(self.simulator.noise, background)
