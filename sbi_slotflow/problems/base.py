"""A problem: prior, simulator and likelihood that belong together."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import ThetaLayout
from ..nn.anchor_axis import AnchorAxis
from ..nn.charts import Chart, PolarChart, WhiteningChart
from ..nn.encoders import MLPEncoder
from ..nn.gauss_newton import SignalFit
from ..prior import VariableKPrior
from ..simulator import AdditiveSimulator

__all__ = ["Problem"]


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
    def periods(self) -> dict[str, float]:
        """Periods of the component parameters that are angles, by name."""
        chart = self.build_chart()
        if not isinstance(chart, PolarChart):
            return {}
        return {self.component_names[chart.phase]: 2 * math.pi}

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

    def location_axis(self) -> AnchorAxis | None:
        """Return the axis on which components have a place; None if they have none."""
        return None

    def build_fit(self) -> SignalFit | None:
        """Return the signal for Gauss-Newton fits of it; None if there is none."""
        return None

    def build_chart(self) -> Chart:
        """Return the true chart of a component."""
        return WhiteningChart(self.prior.component_marginals)
