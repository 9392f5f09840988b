"""The posterior of the number of components."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.distributions import Categorical

from .style import POSTERIOR, SMALL, TRUTH, dress, legend_above


def plot_cardinality(
    cardinality: Categorical | Tensor | Sequence[float],
    true_cardinality: int | None = None,
) -> Figure:
    """Plot p(K | x) as bars.

    Args:
        cardinality: What ``posterior.cardinality(x)`` returns, or the probabilities of
            K = 0..Kmax, shape ``(Kmax + 1,)``.
        true_cardinality: The true K if known; a triangle marks it.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If the probabilities are not a vector of non-negative numbers that
            add up to 1, or the true K is out of range.
    """
    if isinstance(cardinality, Categorical):
        cardinality = cardinality.probs
    probs = torch.as_tensor(cardinality).detach().cpu().double().numpy()
    if probs.ndim != 1 or not len(probs):
        raise ValueError(
            "cardinality must hold the probabilities of one observation, shape "
            f"(Kmax + 1,), got shape {probs.shape}."
        )
    if not (probs >= 0).all() or abs(probs.sum() - 1) > 1e-3:
        raise ValueError(
            "cardinality must hold probabilities that add up to 1, got "
            f"{probs.tolist()}."
        )
    if true_cardinality is not None and not 0 <= true_cardinality < len(probs):
        raise ValueError(
            f"true_cardinality must lie in 0..{len(probs) - 1}, got {true_cardinality}."
        )
    figure = Figure(figsize=(max(3.2, 1.6 + 0.5 * len(probs)), 3.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    bars = axes.bar(np.arange(len(probs)), probs, width=0.7, color=POSTERIOR)
    labels = [f"{p:.2f}" if p >= 0.005 else "" for p in probs]
    axes.bar_label(bars, labels, padding=2, fontsize=SMALL)
    highest = probs.max()
    if true_cardinality is not None:
        where = (true_cardinality, probs[true_cardinality] + 0.13 * highest)
        style = {"marker": "v", "ms": 7, "ls": "", "color": TRUTH}
        axes.plot(*where, **style)
        legend_above(figure, [Line2D([], [], label="truth", **style)])
    axes.set_xticks(np.arange(len(probs)))
    axes.set_ylim(0, 1.2 * highest)
    dress(axes, "number of components K", "p(K | x)")
    return figure
