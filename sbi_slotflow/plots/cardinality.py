r"""The posterior of K, and how posteriors widen with K (the paper's figure 9).

.. math::
    \sigma_K = \mathbb{E}_{x | K}\, \operatorname{std}\, p(\theta_k | x, K)

is averaged over signals and their components.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from torch.distributions import Categorical

from ..sets.checks import as_count, as_probabilities
from ..sets.circular import circular_mean, near
from .style import DATA, POSTERIOR, SMALL, TRUTH, Figure, dress, legend_above

if TYPE_CHECKING:
    from ..posterior.base import Posterior

__all__ = ["plot_cardinality", "plot_width_scaling", "posterior_widths"]


Probabilities = Categorical | Tensor | Sequence[float]


def plot_cardinality(
    cardinality: Probabilities,
    true_cardinality: int | None = None,
    *,
    reference: Probabilities | None = None,
    labels: tuple[str, str] = ("posterior", "reference"),
) -> Figure:
    """Plot p(K | x) as bars.

    Args:
        cardinality: What ``posterior.cardinality(x)`` returns, or the probabilities of
            K = 0..Kmax, shape ``(Kmax + 1,)``.
        true_cardinality: The true K if known; a triangle marks it.
        reference: Another posterior's, of the same length: grey bars beside the blue.
        labels: What to call the two in the legend.

    Raises:
        ValueError: If the probabilities are not a vector of non-negative numbers that
            add up to 1, the two have different lengths, or the true K is out of range.
    """
    probs = _checked(cardinality, "cardinality")
    bars = [(probs, POSTERIOR, labels[0])]
    if reference is not None:
        other = _checked(reference, "reference")
        if other.shape != probs.shape:
            raise ValueError(
                f"reference must hold {len(probs)} probabilities, got {len(other)}."
            )
        bars.append((other, DATA, labels[1]))
    if true_cardinality is not None and not 0 <= true_cardinality < len(probs):
        raise ValueError(
            f"true_cardinality must lie in 0..{len(probs) - 1}, got {true_cardinality}."
        )
    size = 0.5 if len(bars) == 1 else 0.72  # inches a K
    figure = Figure(
        figsize=(max(3.2, 1.6 + size * len(probs)), 3.0), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.7 if len(bars) == 1 else 0.42
    places = np.arange(len(probs))
    handles: list[Artist] = []
    for number, (heights, colour, label) in enumerate(bars):
        shift = width * (number - 0.5 * (len(bars) - 1))
        drawn = axes.bar(places + shift, heights, width=width, color=colour)
        values = [f"{p:.2f}" if p >= 0.005 else "" for p in heights]
        axes.bar_label(drawn, values, padding=2, fontsize=SMALL - (len(bars) - 1))
        if len(bars) > 1:
            handles.append(Patch(color=colour, label=label))
    tallest = np.max([heights for heights, _, _ in bars], axis=0)
    highest = tallest.max()
    if true_cardinality is not None:
        where = (true_cardinality, tallest[true_cardinality] + 0.13 * highest)
        style = {"marker": "v", "ms": 7, "ls": "", "color": TRUTH}
        axes.plot(*where, **style)
        handles.append(Line2D([], [], label="truth", **style))
    if handles:
        legend_above(figure, handles)
    axes.set_xticks(places)
    axes.set_ylim(0, 1.2 * highest)
    dress(axes, "number of components K", "p(K | x)")
    return figure


def _checked(cardinality: Probabilities, name: str) -> np.ndarray:
    probs = as_probabilities(cardinality, name).numpy()
    if probs.ndim != 1 or not len(probs):
        raise ValueError(
            f"{name} must hold the probabilities of one observation, shape "
            f"(Kmax + 1,), got shape {probs.shape}."
        )
    return probs


def posterior_widths(
    posterior: "Posterior",
    theta: Tensor,
    x: Tensor,
    *,
    num_samples: int = 500,
    relative: Sequence[str] = ("amplitude",),
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Measure the posterior's standard deviations given the true K.

    Components are taken in canonical order.

    Args:
        posterior: The posterior.
        theta: True rows, K >= 1, shape ``(B, E)``.
        x: Their data, shape ``(B, T)``.
        num_samples: Draws a signal.
        relative: Parameters whose widths are divided by the true values.
        generator: Source of randomness.

    Returns:
        Mean width over the components of each signal, shape ``(B,)``, by parameter.

    Raises:
        ValueError: If a row has K = 0 or a number is too small.
    """
    layout = posterior.prior.layout
    if layout.num_counts > 1:
        raise ValueError(
            "posterior must be of one class of components: its widths are asked for."
        )
    layout.validate(theta)
    if theta.ndim != 2 or len(theta) != len(x):
        raise ValueError(
            f"theta and x must be batches of one size, got {tuple(theta.shape)} and "
            f"{tuple(x.shape)}."
        )
    num_samples = as_count(num_samples, "num_samples", 2)
    truth = layout.unpack(layout.canonical(theta).cpu())
    if (truth.cardinality < 1).any():
        raise ValueError("theta must hold rows with K >= 1, got K = 0.")
    periods = layout.component_periods
    widths = torch.empty(len(theta), layout.num_component_params, dtype=torch.float64)
    for i, k in enumerate(truth.cardinality.tolist()):
        rows = posterior.sample((num_samples,), x[i], k=k, generator=generator)
        components = layout.unpack(rows.cpu()).components[:, :k].double()
        mean = circular_mean(components, periods)
        std = (near(components, mean, periods) - mean).square().mean(0).sqrt()
        for d, name in enumerate(layout.component_names):
            unit = truth.components[i, :k, d].abs() if name in relative else 1.0
            widths[i, d] = (std[:, d] / unit).mean()
    return dict(zip(layout.component_names, widths.unbind(-1), strict=True))


def plot_width_scaling(
    cardinality: Tensor,
    widths: Mapping[str, Tensor],
    labels: Mapping[str, str] | None = None,
) -> Figure:
    r"""Plot posterior widths against the true K, a panel for each parameter.

    Points are means over signals with their standard errors. The line is a power law
    :math:`\sigma_K \propto K^b`, fitted to the logarithms of the means; its exponent
    stands above.

    Args:
        cardinality: True K of each signal, K >= 1, shape ``(B,)``.
        widths: Widths of each signal, shape ``(B,)``, by parameter: what
            :func:`posterior_widths` returns.
        labels: Labels of the axes by parameter, with units; the names if None.

    Raises:
        ValueError: If a shape is wrong, a K or a width is not positive, or there is
            nothing to plot.
    """
    k = torch.as_tensor(cardinality).cpu().numpy()
    if k.ndim != 1 or not len(k) or (k < 1).any():
        raise ValueError("cardinality must hold K >= 1 of at least one signal, (B,).")
    if not widths:
        raise ValueError("widths must hold at least one parameter.")
    distinct = np.unique(k)
    size = (0.6 + 2.6 * len(widths), 2.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False)[0]
    for axes, (name, width) in zip(panels, widths.items(), strict=True):
        values = torch.as_tensor(width).cpu().double().numpy()
        if values.shape != k.shape or not (values > 0).all():
            raise ValueError(
                f"widths of {name!r} must be positive and of shape {k.shape}, got "
                f"shape {values.shape}."
            )
        groups = [values[k == number] for number in distinct]
        means = np.array([group.mean() for group in groups])
        errors = [
            g.std(ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0 for g in groups
        ]
        title = ""
        if len(distinct) > 1:
            slope, start = np.polyfit(np.log(distinct), np.log(means), 1)
            fine = np.geomspace(distinct[0], distinct[-1], 50)
            axes.plot(fine, np.exp(start) * fine**slope, color=DATA, linewidth=1.1)
            title = f"proportional to K^{slope:.1f}"
        axes.errorbar(
            distinct, means, errors, fmt="o", ms=4, capsize=2, color=POSTERIOR
        )
        axes.set_ylim(0, 1.15 * (means + errors).max())
        axes.set_xticks(distinct)
        label = (labels or {}).get(name, name)
        dress(axes, "true K", f"posterior width: {label}", title)
        axes.tick_params(labelsize=SMALL)
    return figure
