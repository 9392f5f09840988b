"""The table of a posterior's sources: existence, medians and intervals."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..sets.checks import as_row
from ..sets.circular import near, unwrap
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout
from .sources import Sources, checked_weights, fit_sources

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["build_catalogue"]


def build_catalogue(
    samples: Tensor,
    layout: ThetaLayout,
    *,
    weights: Tensor | None = None,
    ci_prob: float = 0.9,
    min_probability: float = 0.1,
    true_theta: Tensor | None = None,
) -> "Dataset":
    r"""Turn draws of sets into a list of sources.

    The module :mod:`sbi_slotflow.catalogue.sources` says what a source is and how
    sources are found. One may be as wide as the prior: a weak component somewhere.
    ``catalogue.to_dataframe()`` gives a table with a row a source.

    The existence probability of source i and its summaries are

    .. math::
        p_i = \sum_s w_s [\text{draw s has a component of source i}]

    and quantiles of these components, given that the source is there. The posterior is
    right about the sources that it lists if, over many observations, a share :math:`p`
    of those with existence p are there, and a share ``ci_prob`` of these inside their
    intervals.

    Args:
        samples: Theta rows in any order, shape ``(S, E)``.
        layout: Layout of theta; its ``periods`` say what is circular.
        weights: Importance weights, shape ``(S,)``.
        ci_prob: Probability inside the equal-tailed credible intervals.
        min_probability: Sources that are less probable are not listed.
        true_theta: A true theta row, if known, shape ``(E,)`` or ``(1, E)``.

    Returns:
        A dataset with the dimension ``source``, ascending in the ``order_by``
        parameter. Of each component parameter, "frequency" say, it holds
        ``frequency``, the median, ``frequency_mean``, ``frequency_std``,
        ``frequency_low`` and ``frequency_high``, the interval; beside them
        ``existence`` and ``existence_error``, its Monte Carlo error. Circular
        parameters are summarised on the circle: the mean lies in [0, period), the
        others within half a period of it. With a ``true_theta`` there is
        ``true_frequency``, on the same turn of the circle, NaN where no true component
        belongs to the source. Attributes hold ``expected_cardinality``, the part of it
        that is in no listed source, ``expected_unlisted``, and the number of draws.

        Of components of several classes, sources of one class follow those of another:
        the coordinate ``class`` tells which is which, and names begin with the class,
        as in ``line.frequency``; they are NaN for the other classes' sources.

    Raises:
        TypeError: If samples or ``true_theta`` is not a floating-point tensor.
        ValueError: If an argument is malformed or out of range.
    """
    import xarray

    weights = checked_weights(samples, layout, weights)
    if not 0 < ci_prob < 1:
        raise ValueError(f"ci_prob must lie in (0, 1), got {ci_prob}.")
    if isinstance(layout, ClassLayout):
        options = {"ci_prob": ci_prob, "min_probability": min_probability}
        return _of_classes(samples, layout, weights, true_theta, **options)
    samples = samples.detach().cpu()
    sources = fit_sources(
        samples, layout, weights=weights, min_probability=min_probability
    )
    owner = sources.assign(samples)
    components = _components(samples, layout, owner)
    columns = _summaries(components, owner >= 0, weights, layout, ci_prob)
    if true_theta is not None:
        columns |= _truth(true_theta, sources, columns)
    existence = columns["existence"]
    expected = float((layout.cardinality(samples) * weights).sum())
    dataset = xarray.Dataset(
        {name: ("source", values) for name, values in columns.items()},
        coords={"source": np.arange(1, len(sources) + 1)},
        attrs={
            "ci_prob": ci_prob,
            "min_probability": min_probability,
            "num_draws": len(samples),
            "ess": float(1 / weights.square().sum()),
            "expected_cardinality": expected,
            "expected_unlisted": expected - float(existence.sum()),
        },
    )
    dataset["existence"].attrs["long_name"] = "probability that the source is there"
    for name in layout.component_names:
        dataset[name].attrs["long_name"] = f"median of {name}, given existence"
    return dataset


def _of_classes(
    samples: Tensor,
    layout: ClassLayout,
    weights: Tensor,
    true_theta: Tensor | None,
    **options: float,
) -> "Dataset":
    """The catalogues of all classes in one."""
    import xarray

    row = None if true_theta is None else as_row(true_theta, layout)
    parts, first = [], 1
    attrs: dict[str, Any] = dict(options)
    for name in layout.class_names:
        own: Dataset = build_catalogue(
            layout.view(samples, name),
            layout.of_class(name),
            weights=weights,
            true_theta=None if row is None else layout.view(row, name),
            **options,
        )
        for key in ("expected_cardinality", "expected_unlisted"):
            attrs[key] = attrs.get(key, 0.0) + own.attrs[key]
            attrs[f"{key}_{name}"] = own.attrs[key]
        attrs |= {key: own.attrs[key] for key in ("num_draws", "ess")}
        known = [str(key) for key in own.data_vars if "existence" not in str(key)]
        names = {key: f"{name}.{key}" for key in known}
        names |= {
            key: f"true_{name}.{key.removeprefix('true_')}"
            for key in known
            if key.startswith("true_")
        }
        own = own.rename(names).assign_coords(
            {
                "source": np.arange(first, first + own.sizes["source"]),
                "class": ("source", np.full(own.sizes["source"], name, dtype=object)),
            }
        )
        parts.append(own.drop_attrs(deep=False))
        first += own.sizes["source"]
    whole = xarray.merge(parts, join="outer", compat="no_conflicts")
    return whole.assign_attrs(attrs)


def _components(samples: Tensor, layout: ThetaLayout, owner: Tensor) -> Tensor:
    """Components by source, float64, NaN where there is none, shape ``(S, N, D)``."""
    components = layout.unpack(layout.canonical(samples)).components.double()
    index = owner.clamp(min=0).unsqueeze(-1).expand(-1, -1, components.shape[-1])
    there = (owner >= 0).unsqueeze(-1)
    return torch.where(there, components.gather(1, index), torch.nan)


def _summaries(
    components: Tensor,
    there: Tensor,
    weights: Tensor,
    layout: ThetaLayout,
    ci_prob: float,
) -> dict[str, np.ndarray]:
    num_sources = there.shape[1]
    # Rounding may add up to more than one.
    existence = (there * weights.unsqueeze(-1)).sum(0).clamp(max=1.0)
    variance = existence * (1 - existence) * weights.square().sum()
    columns = {
        "existence": existence.numpy(),
        "existence_error": variance.sqrt().numpy(),
    }
    tail = 0.5 * (1 - ci_prob)
    for d, name in enumerate(layout.component_names):
        period = layout.component_periods[d]
        table = np.empty((num_sources, 5))
        for i in range(num_sources):
            chosen = there[:, i]
            values, share = components[chosen, i, d], weights[chosen]
            if math.isfinite(period):
                values = unwrap(values, period, share)
            share = share / share.sum()
            mean = (share * values).sum()
            std = (share * (values - mean).square()).sum().sqrt()
            quantiles = _quantiles(values, share, (0.5, tail, 1 - tail))
            table[i] = quantiles[0], mean, std, *quantiles[1:]
        endings = ("", "_mean", "_std", "_low", "_high")
        columns |= {f"{name}{e}": table[:, c] for c, e in enumerate(endings)}
    return columns


def _quantiles(values: Tensor, weights: Tensor, probs: tuple[float, ...]) -> np.ndarray:
    """Quantiles of weighted values; each stands in the middle of its weight."""
    order = values.argsort()
    middle = weights[order].cumsum(0) - 0.5 * weights[order]
    return np.interp(probs, middle.numpy(), values[order].numpy())


def _truth(
    true_theta: Tensor, sources: Sources, columns: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The true component of each source, on the turn of the source's median."""
    layout = sources.layout
    row, names = as_row(true_theta, layout), layout.component_names
    found = _components(row, layout, sources.assign(row))[0]
    medians = torch.from_numpy(np.stack([columns[name] for name in names], -1))
    values = near(found, medians, layout.component_periods).numpy()
    return {f"true_{name}": values[:, d] for d, name in enumerate(names)}
