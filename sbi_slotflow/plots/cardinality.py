"""The posterior of the number of components."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from torch.distributions import Categorical

from .style import DATA, POSTERIOR, SMALL, TRUTH, Figure, dress, legend_above

__all__ = ["plot_cardinality"]

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

    Returns:
        A figure with one axes.

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
    if isinstance(cardinality, Categorical):
        cardinality = cardinality.probs
    probs = torch.as_tensor(cardinality).detach().cpu().double().numpy()
    if probs.ndim != 1 or not len(probs):
        raise ValueError(
            f"{name} must hold the probabilities of one observation, shape "
            f"(Kmax + 1,), got shape {probs.shape}."
        )
    if not (probs >= 0).all() or abs(probs.sum() - 1) > 1e-3:
        raise ValueError(
            f"{name} must hold probabilities that add up to 1, got {probs.tolist()}."
        )
    return probs
