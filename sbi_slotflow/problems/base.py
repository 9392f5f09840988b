"""A problem: prior, simulator and likelihood that belong together.

:class:`Problem` says by its hooks how a network reads the data. Each has a default, so
that a problem of your own states what is special about it and nothing else; where
components sit somewhere in a trace or an image, :class:`.placed.Trace` or
:class:`.placed.Image` is enough.
"""

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

from ..nn.cells import CellAxis
from ..nn.charts import Chart, WhiteningChart
from ..nn.encoders import MLPEncoder
from ..nn.gauss_newton import SignalFit
from ..sets.checks import Numbers, simulate
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior, check_independent
from .linear import LinearForm
from .noise import GaussianNoise
from .simulator import AdditiveSimulator, WhiteNoise
from .white_space import linear_background, noise_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOISE_LOG_PROB = AdditiveSimulator.noise_log_prob

__all__ = [
    "Likelihood",
    "Problem",
    "Stream",
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
        check_independent(self.prior, "the collapsed sampler")
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
        known |= set(getattr(noise, "depends_on", ()))
        if len(known) != self.layout.num_shared:
            raise TypeError(
                "the collapsed sampler takes as shared parameters those of the noise "
                "and those in which a background is linear, problem "
                f"{self.name!r} has {self.shared_names}."
            )
        x = self.simulator.checked_data(x)
        event = self.event_shape
        if x.shape not in (event, (1, *event)):
            raise ValueError(
                f"x must have shape {tuple(event)} or {(1, *event)}, got "
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


def uniform(low: float, high: float) -> Uniform:
    """The uniform prior of one parameter, of batch shape ``(1,)``."""
    return Uniform(torch.tensor([float(low)]), torch.tensor([float(high)]))


def log_uniform(low: float, high: float) -> Distribution:
    """The prior of one positive parameter whose logarithm is uniform."""
    bounds = uniform(low, high)
    return TransformedDistribution(
        Uniform(bounds.low.log(), bounds.high.log()), [ExpTransform()]
    )
