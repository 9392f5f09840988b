"""Figures of what slots look for: specialisation, stability, their contexts' space."""

import math
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from sbi_slotflow.plots.style import FONT, POSTERIOR, SHADES, SMALL, Figure, dress

from .matches import SlotMatches

__all__ = [
    "draw_contexts",
    "draw_specialisation",
    "draw_stability",
    "embedded",
    "plot_slot_contexts",
    "plot_slot_specialisation",
    "plot_slot_stability",
]

_MOST_POINTS = 3_000


def plot_slot_specialisation(
    matches: SlotMatches, parameter: str | None = None, unit: str = ""
) -> Figure:
    """Plot which values of a parameter each slot draws (the paper's figure 4).

    Boxes hold the middle half of the signals, whiskers 90 %, points the rest. Slots are
    numbered as the network has them and stand in ascending order of their mean.

    Args:
        matches: What :func:`~.matches.match_slots` returns.
        parameter: Name of a component parameter; the ``order_by`` one if None.
        unit: Its unit, for the label.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If the parameter is unknown.
    """
    layout = matches.layout
    name = parameter or layout.component_names[layout.order_by]
    if name not in layout.component_names:
        raise ValueError(
            f"parameter must be one of {list(layout.component_names)}, got {name!r}."
        )
    order = matches.order
    index = layout.component_names.index(name)
    values = matches.components[:, order, index].cpu().numpy()
    num = values.shape[1]
    figure = Figure(figsize=(max(4.0, 1.5 + 0.6 * num), 3.6), layout="constrained")
    axes = figure.subplots()
    draw_specialisation(axes, values)
    axes.set_xticks(np.arange(1, num + 1), [str(int(slot) + 1) for slot in order])
    label = f"{name} ({unit})" if unit else name
    title = f"{len(values):,} signals with K = {num}"
    dress(axes, "slot", f"matched {label}", title)
    return figure


def plot_slot_stability(shares: Tensor) -> Figure:
    """Plot how often each slot draws each component (the paper's figure 15).

    Args:
        shares: What :func:`~.matches.slot_stability` returns, shape ``(K, K)``
            (slot, component).

    Returns:
        A figure with one axes and a colour bar. Its title tells the consistency, the
        probability that two draws of one slot are of the same component, averaged over
        slots.

    Raises:
        ValueError: If the shares are no square matrix with rows that sum to one.
    """
    values = torch.as_tensor(shares).detach().cpu().double()
    square = values.ndim == 2 and values.shape[0] == values.shape[1] > 0
    if not square or (values.sum(-1) - 1).abs().max() > 1e-6 or (values < 0).any():
        raise ValueError(
            "shares must be a square matrix of shares whose rows sum to one, got shape "
            f"{tuple(values.shape)}."
        )
    matrix, num = values.numpy(), len(values)
    consistency = float(values.square().sum(-1).mean())
    figure = Figure(figsize=(1.9 + 0.42 * num, 1.5 + 0.42 * num), layout="constrained")
    axes = figure.subplots()
    image = draw_stability(axes, matrix)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of draws", fontsize=FONT)
    bar.ax.tick_params(labelsize=SMALL)
    dress(axes, "component", "slot", f"Consistency {consistency:.2f}")
    return figure


def plot_slot_contexts(
    matches: SlotMatches,
    method: Literal["tsne", "isomap"] = "tsne",
    *,
    slot: int | None = None,
    seed: int = 0,
) -> Figure:
    """Plot slot contexts in two dimensions, coloured by each parameter.

    t-SNE of all slots is the paper's figure 16, Isomap of one slot its figure 17. At
    most 3,000 contexts are used, evenly spaced. Circular parameters have a circular
    colour map.

    Args:
        matches: What :func:`~.matches.match_slots` returns.
        method: ``"tsne"`` or ``"isomap"``.
        slot: Slot to show, from 1; all if None.
        seed: Seed of t-SNE.

    Returns:
        A figure with an axes and a colour bar for each component parameter.

    Raises:
        ValueError: If the method is unknown, there is no such slot, or there are fewer
            than 20 contexts.
    """
    if method not in ("tsne", "isomap"):
        raise ValueError(f"method must be 'tsne' or 'isomap', got {method!r}.")
    contexts, components = matches.contexts, matches.components
    num_slots = contexts.shape[1]
    if slot is not None:
        if not 1 <= slot <= num_slots:
            raise ValueError(f"slot must lie in 1..{num_slots}, got {slot}.")
        contexts = contexts[:, slot - 1 : slot]
        components = components[:, slot - 1 : slot]
    vectors = contexts.flatten(0, 1).double().cpu().numpy()
    values = components.flatten(0, 1).cpu().numpy()
    step = math.ceil(len(vectors) / _MOST_POINTS)
    vectors, values = vectors[::step], values[::step]
    if len(vectors) < 20:
        raise ValueError(f"matches must hold 20 contexts or more, got {len(vectors)}.")
    points = embedded(vectors, method, seed)
    layout = matches.layout
    num = len(layout.component_names)
    figure = Figure(figsize=(1.0 + 2.9 * num, 3.2), layout="constrained")
    panels = figure.subplots(1, num, squeeze=False)[0]
    for axes, name, colours in zip(
        panels, layout.component_names, values.T, strict=True
    ):
        draw_contexts(axes, points, colours, circular=name in layout.periods)
        dress(axes, "", "", name)
    what = "all slots" if slot is None else f"slot {slot}"
    title = {"tsne": "t-SNE", "isomap": "Isomap"}[method]
    figure.suptitle(f"{title} of the contexts of {what}", fontsize=FONT + 1)
    return figure


def draw_specialisation(axes: Axes, values: np.ndarray) -> None:
    """Boxes of values ``(signals, slots)``."""
    axes.boxplot(
        list(values.T),
        whis=(5, 95),
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": SHADES[0.9], "edgecolor": POSTERIOR},
        medianprops={"color": POSTERIOR, "linewidth": 1.8},
        whiskerprops={"color": POSTERIOR},
        capprops={"color": POSTERIOR},
        flierprops={"marker": ".", "ms": 2.5, "mec": "none", "mfc": POSTERIOR},
    )


def draw_stability(axes: Axes, shares: np.ndarray) -> AxesImage:
    """Shares (slot, component) as numbers on colours."""
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(shares >= 0.005):
        colour = "white" if shares[i, j] > 0.6 else "black"
        text = f"{shares[i, j]:.2f}".removeprefix("0") if shares[i, j] < 0.995 else "1"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=SMALL - 1, color=colour
        )
    ticks = np.arange(len(shares))
    axes.set_xticks(ticks, [str(i + 1) for i in ticks])
    axes.set_yticks(ticks, [str(i + 1) for i in ticks])
    return image


def draw_contexts(
    axes: Axes, points: np.ndarray, colours: np.ndarray, *, circular: bool = False
) -> None:
    """Points ``(N, 2)`` coloured by a parameter, with its colour bar."""
    shown = axes.scatter(
        *points.T,
        c=colours,
        s=5,
        linewidths=0,
        cmap="twilight" if circular else "viridis",
        rasterized=True,
    )
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.85, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL)
    axes.set_xticks([])
    axes.set_yticks([])


def embedded(vectors: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Vectors ``(N, C)`` in two dimensions, by t-SNE or Isomap."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, Isomap

    spread = vectors.std(0)
    vectors = (vectors - vectors.mean(0)) / np.where(spread > 0, spread, 1.0)
    if method == "isomap":
        return Isomap(n_neighbors=min(15, len(vectors) - 1)).fit_transform(vectors)
    size = min(30, *vectors.shape)
    reduced = PCA(size, random_state=seed).fit_transform(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        reduced
    )
