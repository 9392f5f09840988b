"""Answers as trees of datasets, of one signal or of many."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..posterior.datatree import to_datatree
from ..seeding import generator_for
from .answers import Answers, Settings
from .models import Model

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["GROUPS", "batch_tree", "signal_tree"]

GROUPS = {
    "cardinality": "observation",
    "posterior": "observation",
    "sample_stats": "observation",
    "catalogue": "source",
}
"""Groups of a result of many signals, and the dimension along which they grow."""

_TREE = 2  # stream of a seed
_NUM_PREDICTIVE, _NUM_PRIOR = 100, 1_000


def signal_tree(
    model: Model,
    x: Tensor,
    answers: Answers,
    settings: Settings,
    attrs: dict[str, Any],
    true_theta: Tensor | None = None,
) -> "DataTree":
    """ArviZ tree of one signal, with the groups ``cardinality`` and ``catalogue``.

    Args:
        model: The model.
        x: The signal, shape ``(1, T)``.
        answers: Its posterior.
        settings: How it was analysed.
        attrs: Attributes of the tree.
        true_theta: The true row if known, shape ``(E,)``.
    """
    from xarray import DataTree

    generator = generator_for(settings.seed, _TREE)
    log_prob = answers.log_prob
    tree = to_datatree(
        answers.draws,
        model.posterior.prior.layout,
        x=x[0],
        true_theta=true_theta,
        log_prob=log_prob,
        statistics={name: float(v[0]) for name, v in answers.statistics.items()},
        simulator=None if model.problem is None else model.problem.simulator,
        num_predictive=_NUM_PREDICTIVE,
        prior_samples=model.posterior.prior.sample((_NUM_PRIOR,), generator=generator),
        generator=generator,
        model_card=model.posterior.model_card,
        attrs=attrs,
    )
    tree["cardinality"] = DataTree(_cardinality(answers).isel(observation=0, drop=True))
    tree["catalogue"] = DataTree(answers.catalogues[0])
    return tree


def batch_tree(
    model: Model, answers: Answers, start: int, attrs: Mapping[str, Any]
) -> "DataTree":
    """Tree of a batch of signals, with a leading dimension ``observation``.

    Sources of all signals follow one another in ``catalogue``, where the variable
    ``observation`` tells whose they are.

    Args:
        model: The model.
        answers: Posteriors of the signals.
        start: Number of the first signal.
        attrs: Attributes of the tree.
    """
    from xarray import DataTree

    num = len(answers.draws)
    observation = np.arange(start, start + num)
    # One chain a signal, to name and mask the parameters as everywhere else.
    tree = to_datatree(
        answers.draws,
        model.posterior.prior.layout,
        log_prob=answers.log_prob,
        generator=generator_for(0),
        model_card=model.posterior.model_card,
        attrs=attrs,
    )
    renamed = {
        name: tree[name]
        .to_dataset()
        .rename(chain="observation")
        .assign_coords(observation=observation)
        .drop_attrs()
        for name in ("posterior", "sample_stats")
    }
    statistics = {
        name: ("observation", values.numpy())
        for name, values in answers.statistics.items()
    }
    stats = renamed["sample_stats"].drop_vars("active").assign(statistics)
    cardinality = _cardinality(answers).assign_coords(observation=observation)
    groups = {
        "cardinality": cardinality,
        "posterior": renamed["posterior"],
        "sample_stats": stats.drop_vars("draw") if "lp" not in stats else stats,
        "catalogue": _catalogue(answers.catalogues, start),
    }
    result = DataTree.from_dict(groups)
    result.attrs = dict(tree.attrs)
    return result


def _cardinality(answers: Answers) -> "Dataset":
    from xarray import Dataset

    probs = answers.probs.double()
    return Dataset(
        {"probability": (("observation", "cardinality"), probs.numpy())},
        coords={"cardinality": np.arange(probs.shape[-1])},
    )


def _catalogue(catalogues: "list[Dataset]", start: int) -> "Dataset":
    import xarray

    owners = [torch.full((len(c["source"]),), i) for i, c in enumerate(catalogues)]
    joined = xarray.concat(
        [c.drop_vars("source").drop_attrs() for c in catalogues], dim="source"
    )
    return joined.assign(observation=("source", start + torch.cat(owners).numpy()))
