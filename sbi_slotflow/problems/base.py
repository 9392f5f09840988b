"""A problem: prior, simulator and likelihood that belong together.

:class:`Problem` says by its hooks how a network reads the data. Each has a default, so
that a problem of your own states what is special about it and nothing else; where
components sit somewhere in a trace, :class:`Trace` is enough.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    ExpTransform,
    TransformedDistribution,
    Uniform,
)
from torch.func import jvp

from ..nn.cells import CellAxis
from ..nn.charts import Chart, WhiteningChart
from ..nn.encoders import MLPEncoder, TokenEncoder, TraceTokens
from ..nn.gauss_newton import SignalFit
from ..sets.checks import Numbers, as_count, simulate
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior
from .least_squares import AdditiveFit
from .linear import LinearForm
from .noise import GaussianNoise
from .simulator import AdditiveSimulator, WhiteNoise
from .white_space import linear_background, noise_index, white_space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOISE_LOG_PROB = AdditiveSimulator.noise_log_prob

__all__ = [
    "Likelihood",
    "Problem",
    "Stream",
    "Trace",
    "log_uniform",
    "uniform",
]


@dataclass(frozen=True)
class Stream:
    """A contiguous part of x.

    Attributes:
        times: Times of its samples, shape ``(T,)``.
        title: What it is.
        axis_label: Label of the time axis.
    """

    times: NDArray[np.float64]
    title: str = ""
    axis_label: str = "sample"

    @property
    def num_samples(self) -> int:
        """Number T of samples."""
        return len(self.times)


@dataclass(frozen=True)
class Likelihood:
    """Log p(x | theta) of a simulator, called as ``log_likelihood(theta, x)``."""

    simulator: Any

    def __call__(self, theta: Tensor, x: Numbers) -> Tensor:
        """Evaluate log p(x | theta); see :meth:`AdditiveSimulator.log_likelihood`.

        Raises:
            NotImplementedError: If the simulator has none.
        """
        own = getattr(self.simulator, "log_likelihood", None)
        if own is None:
            raise NotImplementedError(
                "this simulator has no log_likelihood(theta, x): what needs a "
                "likelihood (refine, exact samplers) needs an AdditiveSimulator, or a "
                "function log_likelihood(theta, x) of your own."
            )
        return own(theta, x)

    def given(self, x: Numbers) -> Callable[[Tensor], Tensor]:
        """Log p(x | theta) as a function of theta alone, rows that broadcast with x.

        It owns all that can be computed of x, ``(T,)`` or ``(B, T)``, beforehand.
        """
        return lambda theta: self(theta, x)


@dataclass(frozen=True)
class Problem:
    """Prior and simulator of a trans-dimensional problem, and how a network reads it.

    =============================  ====================================================
    hook                           default
    =============================  ====================================================
    :meth:`build_encoder`          an MLP that reads x as a vector
    :meth:`build_chart`            each parameter by its prior's distribution function
    :meth:`location_axis`          none: components have no place in x
    :meth:`build_token_encoder`    none; a token for each cell of the location axis
    :meth:`build_fit`              none; least squares for Gauss-Newton steps
    :attr:`log_likelihood`         the simulator's
    :meth:`linear_form`            none; what :meth:`collapsed` needs
    :meth:`collapsed`              a sampler for any linear form
    :meth:`laplace_proposal`       none
    :attr:`streams`                one of samples
    :attr:`units`                  none
    :attr:`noise_level`            the shared parameter that white noise reads
    :meth:`plot_spectrum`          none
    =============================  ====================================================

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: Simulator theta -> x. Any callable from rows ``(B, E)`` to data
            ``(B, *event)`` will do for training and calibration; one without
            ``log_likelihood``, ``signal`` and ``noise`` cannot be refined, and checks
            that need them are left out.
    """

    name: str
    prior: VariableKPrior
    simulator: Any

    def __post_init__(self) -> None:
        if not isinstance(self.prior, VariableKPrior):
            raise TypeError(
                f"prior must be a VariableKPrior, got {type(self.prior).__name__}."
            )
        if not callable(self.simulator):
            raise TypeError(
                "simulator must be a callable from theta rows to data, got "
                f"{type(self.simulator).__name__}."
            )

    @property
    def layout(self) -> ThetaLayout:
        """Layout of theta."""
        return self.prior.layout

    @property
    def component_names(self) -> tuple[str, ...]:
        """Names of a component's parameters."""
        return self.layout.component_names

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Names of the shared parameters."""
        return self.layout.shared_names

    @property
    def units(self) -> dict[str, str]:
        """Units of parameters by name, for tables and figures."""
        return {}

    @property
    def noise_level(self) -> int | None:
        """Index of the shared parameter that scales the noise, if one does."""
        return noise_index(getattr(self.simulator, "noise", None))

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The records that x concatenates; a single one of samples by default."""
        return (Stream(np.arange(self.num_data, dtype=np.float64)),)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one x; one is simulated if the simulator does not say."""
        if isinstance(self.simulator, AdditiveSimulator):
            return self.simulator.signal(torch.zeros(self.layout.size)).shape
        generator = torch.Generator().manual_seed(0)
        rows = self.prior.sample((2,), generator)
        return simulate(self.simulator, rows, generator).shape[1:]

    @property
    def num_data(self) -> int:
        """How many numbers one x holds; the length T of a record."""
        return self.event_shape.numel()

    @property
    def log_likelihood(self) -> Likelihood:
        """Log p(x | theta), called as ``log_likelihood(theta, x)``.

        A subclass may as well define a plain method of (theta, x).
        """
        return Likelihood(self.simulator)

    def build_encoder(self, **options: Any) -> nn.Module:
        """Return a fresh encoder for this problem's data, with its class's options."""
        return MLPEncoder(self.num_data, **options)

    def build_token_encoder(self, **options: Any) -> nn.Module | None:
        """Return a fresh encoder with a token for each cell of the location axis."""
        return None

    def location_axis(self) -> CellAxis | None:
        """Return the axis on which components have a place; None if they have none."""
        return None

    def build_fit(self) -> SignalFit | None:
        """Return the least squares for Gauss-Newton steps; None if there is none."""
        return None

    def build_chart(self) -> Chart:
        """Return the transform of a component to what the flow sees."""
        return WhiteningChart(self.prior.component_marginals)

    def linear_form(self) -> LinearForm | None:
        """Return in what components are linear; None if in nothing that is known."""
        return None

    def collapsed(self, x: Tensor, **options: Any) -> Any:
        """Draw from the exact posterior; see :func:`sbi_slotflow.rjmcmc.collapsed`."""
        from .collapsed import collapsed

        form = self.linear_form()
        if form is None:
            raise TypeError(
                f"problem {self.name!r} has no collapsed sampler: it must say by "
                "linear_form() in which parameters components are linear (a Trace by "
                'linear=["amplitude"], for example).'
            )
        noise = self.simulator.noise
        own = type(self.simulator).noise_log_prob
        gaussian = isinstance(noise, WhiteNoise | GaussianNoise)
        if not gaussian or own is not _NOISE_LOG_PROB:
            raise TypeError(
                "the collapsed sampler needs WhiteNoise or GaussianNoise, problem "
                f"{self.name!r} has {type(noise).__name__} in a "
                f"{type(self.simulator).__name__}."
            )
        background = linear_background(self.simulator, self.prior)
        known = set() if background is None else set(background.indices)
        known |= set() if self.noise_level is None else {self.noise_level}
        if len(known) != self.layout.num_shared:
            raise TypeError(
                "the collapsed sampler takes as shared parameters the noise level and "
                "those in which a background is linear, problem "
                f"{self.name!r} has {self.shared_names}."
            )
        x = self.simulator.checked_data(x)
        if x.numel() != self.num_data or x.ndim > 2:
            raise ValueError(
                f"x must have shape ({self.num_data},) or (1, {self.num_data}), got "
                f"{tuple(x.shape)}."
            )
        x = x.detach().cpu()
        return collapsed(self.prior, form, noise, x, background=background, **options)

    def laplace_proposal(self, x: Tensor, **options: Any) -> Any:
        """Return what :func:`sbi_slotflow.rjmcmc.laplace_proposal` does."""
        raise TypeError(f"problem {self.name!r} has no Laplace proposal.")

    def plot_spectrum(
        self, samples: Tensor, x: Tensor, true_theta: Tensor | None = None
    ) -> "Figure":
        """Plot spectrum and posterior; see :func:`sbi_slotflow.plots.plot_spectrum`."""
        raise ValueError(
            f"plot_spectrum needs a problem with a spectrum, got {self.name!r}."
        )


@dataclass(frozen=True)
class Trace(Problem):
    """A problem whose components have a place (a time, a position) in a trace.

    The place is the prior's ``order_by`` parameter. Its prior must be uniform from the
    first sample of the trace to the end of the last: cell i of the place is cell i of
    the samples. A network then has a token for each cell, and takes Gauss-Newton steps
    on the component signal where that is of torch operations, smooth in the
    component's parameters.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: Simulator theta -> x.
        cells: Number of cells of the trace, a divisor of its length T; a few samples
            each, so that a cell seldom holds two components.
        linear: Names of the parameters in which a component's signal is linear (its
            height, a flux): the collapsed sampler integrates them out.

    Raises:
        ValueError: If ``cells`` does not divide T, or the place is not uniform.
    """

    cells: int = 64
    linear: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.simulator, AdditiveSimulator):
            raise TypeError(
                "simulator must be an AdditiveSimulator, which knows the components' "
                f"signals, got {type(self.simulator).__name__}."
            )
        if len(self.simulator.event_shape) != 1:
            raise ValueError(
                "a Trace has signals of shape (..., T), got ones of event shape "
                f"{tuple(self.simulator.event_shape)}."
            )
        if isinstance(self.linear, str):
            raise TypeError(
                'linear must be a sequence of names, such as ("height",), got '
                f"{self.linear!r}."
            )
        self.linear_form()  # checks the names
        as_count(self.cells, "cells")
        if self.num_data % self.cells:
            raise ValueError(
                f"cells must divide the {self.num_data} samples of the trace, got "
                f"{self.cells}."
            )
        place = self.prior.component_marginals[self.layout.order_by]
        if not place.is_uniform:
            raise ValueError(
                "prior must be uniform in its order_by parameter "
                f"{self.component_names[self.layout.order_by]!r}, which is the place "
                f"in the trace, got {place}."
            )

    def build_token_encoder(self, **options: Any) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell."""
        return TokenEncoder(TraceTokens(self.num_data, self.cells), **options)

    def location_axis(self) -> CellAxis:
        """The place, in cells that hold the same number of samples."""
        order_by = self.layout.order_by
        low, high = self.prior.component_marginals[order_by].bounds
        separation = self.prior.min_separation or 0.0
        return CellAxis(order_by, self.cells, separation * self.cells / (high - low))

    def linear_form(self) -> LinearForm | None:
        """Return the signal as linear in :attr:`linear`; None if that is empty."""
        if not self.linear:
            return None
        return LinearForm(self.simulator.component_signal, self.layout, self.linear)

    def build_fit(self) -> AdditiveFit | None:
        """Return the least squares of the component signal, by its derivatives.

        Noise is made white, and a background that is linear in shared parameters is
        fitted along. None if torch cannot differentiate the signal, one of NumPy for
        example, or, with a warning, where noise or background allow no least squares.
        """
        signal = self.simulator.component_signal
        width = self.layout.num_component_params
        middle = self.build_chart().some_point(torch.zeros(width))[None]
        try:
            jvp(signal, (middle,), (torch.ones_like(middle),))
        except (AttributeError, RuntimeError, TypeError):
            return None
        try:
            space = white_space(self.simulator, self.prior)
        except TypeError as error:
            warnings.warn(f"no Gauss-Newton steps: {error}", stacklevel=2)
            return None
        marginals, order_by = self.prior.component_marginals, self.layout.order_by
        return AdditiveFit(signal, marginals, order_by, space)


def uniform(low: float, high: float) -> Uniform:
    """The uniform prior of one parameter, of batch shape ``(1,)``."""
    return Uniform(torch.tensor([float(low)]), torch.tensor([float(high)]))


def log_uniform(low: float, high: float) -> Distribution:
    """The prior of one positive parameter whose logarithm is uniform."""
    bounds = uniform(low, high)
    return TransformedDistribution(
        Uniform(bounds.low.log(), bounds.high.log()), [ExpTransform()]
    )
