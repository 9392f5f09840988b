"""A problem: prior, simulator and likelihood that belong together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..nn.cells import CellAxis
from ..nn.charts import Chart, WhiteningChart
from ..nn.encoders import MLPEncoder
from ..nn.gauss_newton import SignalFit
from ..sets.layout import ThetaLayout
from ..sets.prior import VariableKPrior
from .noise import WhiteNoise
from .simulator import AdditiveSimulator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..posterior.chains import CollapsedDraws

__all__ = ["Problem", "Stream"]


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
class Problem:
    """Prior and simulator of a trans-dimensional problem, and how a network reads it.

    Subclass it for a problem of your own and override :meth:`build_encoder` and
    :meth:`build_chart`; the defaults are an MLP and one whitened axis a parameter.

    Attributes:
        name: Name of the problem.
        prior: Prior over theta rows.
        simulator: Simulator theta -> x.
    """

    name: str
    prior: VariableKPrior
    simulator: AdditiveSimulator

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
        """Index of the shared parameter that is white noise's sigma, if one is."""
        noise = getattr(self.simulator, "noise", None)
        if isinstance(noise, WhiteNoise) and noise.sigma is None:
            return noise.shared_index
        return None

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The records that x concatenates; a single one of samples by default."""
        return (Stream(np.arange(self.num_data, dtype=np.float64)),)

    @property
    def num_data(self) -> int:
        """Length T of x."""
        return self.simulator.signal(torch.zeros(self.layout.size)).shape[-1]

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate log p(x | theta); see :meth:`AdditiveSimulator.log_likelihood`."""
        return self.simulator.log_likelihood(theta, x)

    def build_encoder(self, **options: Any) -> nn.Module:
        """Return a fresh encoder for this problem's data.

        Args:
            options: Options of the encoder's class.
        """
        return MLPEncoder(self.num_data, **options)

    def build_token_encoder(self, **options: Any) -> nn.Module | None:
        """Return a fresh encoder with a token for each cell of the location axis.

        Args:
            options: Options of the encoder's class.
        """
        return None

    def location_axis(self) -> CellAxis | None:
        """Return the axis on which components have a place; None if they have none."""
        return None

    def build_fit(self) -> SignalFit | None:
        """Return the signal for Gauss-Newton fits of it; None if there is none."""
        return None

    def build_chart(self) -> Chart:
        """Return the true chart of a component."""
        return WhiteningChart(self.prior.component_marginals)

    def collapsed(self, x: Tensor, **options: Any) -> "CollapsedDraws":
        """Draw from the exact posterior; see :func:`sbi_slotflow.rjmcmc.collapsed`.

        Raises:
            TypeError: If this problem has no sampler of its own.
        """
        raise TypeError(f"problem {self.name!r} has no collapsed sampler.")

    def laplace_proposal(self, x: Tensor, **options: Any) -> Any:
        """Approximate the posterior without a network.

        See :func:`sbi_slotflow.rjmcmc.laplace_proposal`.

        Raises:
            TypeError: If this problem has none.
        """
        raise TypeError(f"problem {self.name!r} has no Laplace proposal.")

    def plot_spectrum(
        self, samples: Tensor, x: Tensor, true_theta: Tensor | None = None
    ) -> "Figure":
        """Plot spectrum and posterior; see :func:`sbi_slotflow.plots.plot_spectrum`.

        Raises:
            ValueError: If x has no spectrum.
        """
        raise ValueError(
            f"plot_spectrum needs a problem with time grids, got {self.name!r}."
        )
