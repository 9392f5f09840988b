"""How a training went."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.lines import Line2D

from .style import DATA, FONT, POSTERIOR, REFERENCE, Figure, dress, legend_above

__all__ = ["plot_training"]

_TITLES = {
    "cardinality": "cardinality (nats)",
    "flow": "components (nats)",
    "shared": "shared parameters (nats)",
    "correct": "share of signals with the right K",
}
# A rate that falls below this share of the last one, and this many times as much as it
# fell before and falls next, was dropped, not annealed.
_DROP, _SUDDEN = 0.6, 2.5


def plot_training(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plot each term of the loss and the accuracy of K over the steps of a training.

    Training values are means over the steps since the last validation, of the weights
    as they then were; validation values are those of the averaged weights. Vertical
    lines mark learning-rate drops, where the rate falls by 40 % or more from one
    validation to the next, and not as part of a smooth decay; the last panel shows the
    rate itself. The paper's figure 20 shows the total.

    Args:
        history: Entries with ``step``, ``learning_rate``, and ``train_*`` and
            ``val_*`` for each term: ``SlotNPE.history`` after ``train_online``.

    Raises:
        ValueError: If the history is empty or lacks a key.
    """
    if not history:
        raise ValueError("history must hold at least one entry; call train_online.")
    needed = {"step", "learning_rate"}
    needed |= {f"{kind}_{term}" for kind in ("train", "val") for term in _TITLES}
    if missing := sorted(needed - set(history[0])):
        raise ValueError(f"history must have the keys {missing} in its entries.")
    columns = {name: np.array([entry[name] for entry in history]) for name in needed}
    steps, rate = columns["step"], columns["learning_rate"]
    falls = np.maximum(-np.diff(rate), 0.0)
    beside = np.concatenate([[0.0], falls, [0.0]])
    sudden = falls > _SUDDEN * np.maximum(beside[:-2], beside[2:])
    drops = steps[1:][(rate[1:] < _DROP * rate[:-1]) & sudden]
    terms = [t for t in _TITLES if columns[f"val_{t}"].any()]
    num = len(terms) + 1
    rows = (num + 1) // 2
    figure = Figure(figsize=(8.0, 0.5 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    for axes, term in zip(panels, terms, strict=False):
        for kind, colour in (("train", DATA), ("val", POSTERIOR)):
            values = columns[f"{kind}_{term}"]
            mark = "." if len(steps) < 30 else ""
            axes.plot(steps, values, mark + "-", color=colour, linewidth=1.2)
        dress(axes, "", "", _TITLES[term])
    last = panels[num - 1]
    last.plot(steps, rate, color=REFERENCE, linewidth=1.2)
    last.set_ylim(bottom=0)
    dress(last, "", "", "learning rate")
    for axes in panels[:num]:
        axes.set_xlabel("step", fontsize=FONT)
        axes.tick_params(labelbottom=True)
        for step in drops:
            axes.axvline(step, color=REFERENCE, linestyle=":", linewidth=0.9)
    for axes in panels[num:]:
        axes.remove()
    handles = [
        Line2D([], [], color=DATA, label="training"),
        Line2D([], [], color=POSTERIOR, label="validation"),
    ]
    if len(drops):
        label = "learning rate drops"
        handles.append(Line2D([], [], color=REFERENCE, linestyle=":", label=label))
    legend_above(figure, handles)
    return figure
