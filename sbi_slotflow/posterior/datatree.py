r"""Draws as an ArviZ ``DataTree``.

==================== ===========================================================
group                what it holds
==================== ===========================================================
posterior            K, the shared parameters, and the components' parameters,
                     (chain, draw, component), NaN where a draw has no such one; of
                     classes K_line, line.frequency (chain, draw, line.component)
posterior_given_k    the draws of the most probable K alone, without NaN
sample_stats         ``active``, True where the posterior's entries are no
                     padding; ``lp``; ``weight``; ``ess`` and other diagnostics
observed_data        x
posterior_predictive ``signal``, noise-free; ``x``, with new noise
pit                  PIT of each entry of x under the posterior predictive
prior                draws of the prior, as in the posterior
constant_data        the true theta, where it is known
==================== ===========================================================

``posterior_given_k`` is there because many of ArviZ's functions stop at a NaN. Its
draws have equal weight, and its circular parameters are shifted by whole periods to
near their circular mean. Of ``posterior``, ``summary(tree, skipna=True)`` speaks of
those draws that have the component. On Python 3.11, where ArviZ 1.x does not run, its
parts ``arviz-base``, ``arviz-stats`` and ``arviz-plots`` do.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..seeding import draw_seed, generator_for
from ..sets.checks import as_row, simulate
from ..sets.circular import unwrap
from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout
from .weights import systematic

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["SignalModel", "to_datatree"]

_PACKAGES = ("sbi-slotflow", "sbi", "torch", "arviz-base")


class SignalModel(Protocol):
    """A simulator that knows its signal without noise."""

    def signal(self, theta: Tensor) -> Tensor:
        """Return the noise-free signals of theta rows."""
        ...


def to_datatree(
    samples: Tensor,
    layout: ThetaLayout,
    *,
    x: Tensor | None = None,
    true_theta: Tensor | None = None,
    weights: Tensor | None = None,
    log_prob: Tensor | None = None,
    statistics: Mapping[str, float] | None = None,
    simulator: SignalModel | None = None,
    num_predictive: int = 100,
    prior_samples: Tensor | None = None,
    generator: torch.Generator | None = None,
    model_card: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> "DataTree":
    """Turn theta rows into an ArviZ ``DataTree``; see the module.

    ``to_netcdf(path, engine="h5netcdf")`` and, with zarr installed, ``to_zarr(path)``
    write the tree, ``xarray.open_datatree`` reads it.

    Args:
        samples: Theta rows, shape ``(draws, E)`` or ``(chains, draws, E)``.
        layout: Layout of theta.
        x: The observation, shape ``(T,)``.
        true_theta: A true theta row, if known.
        weights: Importance weights, shape ``(chains, draws)``.
        log_prob: Log densities of the rows as sets, shape ``(chains, draws)``.
        statistics: Numbers for ``sample_stats``, such as the effective sample size.
        simulator: Simulator of x, whose method ``signal`` gives noise-free signals; if
            it can be called, ``simulator(theta, generator)`` gives replicates of x too.
        num_predictive: Draws in ``posterior_predictive``, resampled if there are
            weights, else evenly spaced; 0 for none.
        prior_samples: Rows of the prior, shape ``(draws, E)``.
        generator: Source of what is resampled and simulated; torch's global one if
            None.
        model_card: How the network was trained, kept as JSON in the attributes.
        attrs: Further attributes, beside the packages' versions and the names of the
            parameters.

    Raises:
        TypeError: If the rows are not floating-point.
        ValueError: If rows do not fit the layout, a shape is wrong, or
            ``num_predictive`` is negative.
    """
    samples = _chains(samples, layout)
    for name, values in (("weights", weights), ("log_prob", log_prob)):
        if values is not None and values.shape != samples.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {tuple(samples.shape[:-1])}, got "
                f"{tuple(values.shape)}."
            )
    if num_predictive < 0:
        raise ValueError(f"num_predictive must not be negative, got {num_predictive}.")
    generator = generator or generator_for(draw_seed(None))
    columns = {}
    for name, values in (("lp", log_prob), ("weight", weights)):
        if values is not None:
            columns[name] = values.detach().cpu().numpy()
    numbers = {name: float(value) for name, value in (statistics or {}).items()}
    groups = {
        "posterior": _dataset(samples, layout),
        "posterior_given_k": _given_k(samples, layout, weights, generator),
        "sample_stats": _statistics(columns, samples, layout).assign(numbers),
    }
    if x is not None:
        groups["observed_data"] = _streams({"x": x.detach().cpu().reshape(-1).numpy()})
    if simulator is not None and num_predictive:
        rows = _resampled(samples, weights, num_predictive, generator).float()
        predictive = {}
        if hasattr(simulator, "signal"):
            predictive["signal"] = simulator.signal(rows).flatten(1).cpu().numpy()[None]
        if callable(simulator):
            found = simulate(simulator, rows, generator).flatten(1)
            predictive["x"] = found.cpu().numpy()[None]
        groups["posterior_predictive"] = _streams(predictive, ("chain", "draw"))
        if x is not None and "x" in predictive:
            groups["pit"] = _pit(predictive["x"][0], x, generator)
    if prior_samples is not None:
        prior_rows = _chains(prior_samples, layout, "prior_samples")
        groups["prior"] = _dataset(prior_rows, layout)
    if true_theta is not None:
        row = as_row(true_theta, layout).unsqueeze(0)
        dataset = _dataset(row, layout).isel(chain=0, draw=0, drop=True)
        names = {name: f"true_{name}" for name in map(str, dataset.data_vars)}
        groups["constant_data"] = dataset.rename(names)
    from xarray import DataTree

    tree = DataTree.from_dict(groups)
    tree.attrs = _attributes(layout, model_card) | dict(attrs or {})
    return tree


def _dataset(samples: Tensor, layout: ThetaLayout) -> "Dataset":
    """K, shared parameters and components of rows ``(chains, draws, E)``."""
    shared = layout.unpack(samples).shared.numpy()
    found = {name: shared[..., i] for i, name in enumerate(layout.shared_names)}
    variables, dims, coords = {}, {}, {}
    for one in _classes(layout, samples):
        parts = one.layout.unpack(one.rows)
        active = parts.mask.unsqueeze(-1)
        components = torch.where(active, parts.components, torch.nan).numpy()
        variables[one.number] = parts.cardinality.numpy()
        for i, name in enumerate(one.layout.component_names):
            found[one.dot + name] = components[..., i]
            dims[one.dot + name] = [one.dimension]
        coords[one.dimension] = np.arange(1, one.layout.max_cardinality + 1)
    import arviz_base

    return arviz_base.dict_to_dataset(variables | found, dims=dims, coords=coords)


def _statistics(
    columns: dict[str, np.ndarray], samples: Tensor, layout: ThetaLayout
) -> "Dataset":
    """Columns, and which entries of the posterior are no padding."""
    import arviz_base

    variables, dims, coords = {}, {}, {}
    for one in _classes(layout, samples):
        name = f"{one.dot}active"
        variables[name] = one.layout.unpack(one.rows).mask.numpy()
        dims[name] = [one.dimension]
        coords[one.dimension] = np.arange(1, one.layout.max_cardinality + 1)
    return arviz_base.dict_to_dataset(variables | columns, dims=dims, coords=coords)


class _OneClass(NamedTuple):
    """Rows of one class, and how its variables are called."""

    number: str  # Name of K
    dot: str  # What stands before other names
    dimension: str  # Name of the dimension of components
    layout: ThetaLayout
    rows: Tensor


def _classes(layout: ThetaLayout, samples: Tensor) -> list[_OneClass]:
    if not isinstance(layout, ClassLayout):
        return [_OneClass("K", "", "component", layout, samples)]
    pairs = zip(layout.classes, layout.views(samples), strict=True)
    return [
        _OneClass(f"K_{name}", f"{name}.", f"{name}.component", own, rows)
        for (name, own), rows in pairs
    ]


def _given_k(
    samples: Tensor,
    layout: ThetaLayout,
    weights: Tensor | None,
    generator: torch.Generator,
) -> "Dataset":
    """Draws of the most probable K, with equal weight and without NaN."""
    cardinality = layout.kind(samples)
    counted = None if weights is None else weights.flatten().double()
    k = int(torch.bincount(cardinality.flatten(), counted).argmax())
    chosen = cardinality == k
    num = chosen.sum(-1)
    if weights is not None:
        picked = systematic(weights[chosen], int(num.sum()), generator)
        given = samples[chosen][picked].unsqueeze(0)
    elif num.min() * 2 >= num.max():
        # Chains of one length keep ArviZ's diagnostics of convergence.
        short = int(num.min())
        pairs = zip(samples, chosen, strict=True)
        given = torch.stack([chain[which][:short] for chain, which in pairs])
    else:
        given = samples[chosen].unsqueeze(0)
    dataset, periods = _dataset(given, layout), dict(layout.periods)
    for one in _classes(layout, given):
        k = int(one.layout.cardinality(one.rows).flatten()[0])
        dataset = dataset.isel({one.dimension: slice(0, k)}).drop_vars(one.number)
        if k == 0:
            names = [one.dot + name for name in one.layout.component_names]
            dataset = dataset.drop_vars(names)
        dataset.attrs[one.number.lower() if one.number == "K" else one.number] = k
        periods |= {one.dot + name: p for name, p in one.layout.periods.items()}
    for name in set(periods) & set(map(str, dataset.data_vars)):
        values = torch.from_numpy(dataset[name].values)
        columns = values.reshape(*given.shape[:2], -1).unbind(-1)
        near = [unwrap(column, periods[name]) for column in columns]
        near = torch.stack(near, dim=-1).reshape(values.shape)
        dataset[name] = (dataset[name].dims, near.numpy())
    return dataset


def _streams(
    values: Mapping[str, np.ndarray], sample_dims: Sequence[str] = ()
) -> "Dataset":
    """Arrays whose last axis is that of x."""
    import arviz_base

    return arviz_base.dict_to_dataset(
        dict(values),
        dims={name: ["sample_index"] for name in values},
        sample_dims=list(sample_dims),
    )


def _pit(replicates: np.ndarray, x: Tensor, generator: torch.Generator) -> "Dataset":
    r"""Ranks of x among its S replicates, :math:`(r + u) / (S + 1)`, u uniform."""
    data = x.detach().cpu().reshape(-1)
    ranks = torch.from_numpy(replicates < data.numpy()).sum(0)
    jitter = torch.rand(len(data), generator=generator)
    return _streams({"x": ((ranks + jitter) / (len(replicates) + 1)).numpy()})


def _attributes(
    layout: ThetaLayout, model_card: Mapping[str, Any] | None
) -> dict[str, Any]:
    classes = _classes(layout, torch.zeros(1, layout.size))
    periods = dict(layout.periods)
    for one in classes:
        periods |= {one.dot + name: p for name, p in one.layout.periods.items()}
    names = [one.dot + name for one in classes for name in one.layout.component_names]
    order = [
        one.dot + one.layout.component_names[one.layout.order_by] for one in classes
    ]
    attributes: dict[str, Any] = {
        "component_parameters": ", ".join(names),
        "shared_parameters": ", ".join(layout.shared_names),
        "order_by": ", ".join(order),
        "periods": json.dumps(periods),
    }
    for package in _PACKAGES:
        try:
            attributes[f"{package.replace('-', '_')}_version"] = version(package)
        except PackageNotFoundError:
            continue
    if model_card is not None:
        attributes["model_card"] = json.dumps(dict(model_card))
    return attributes


def _chains(samples: Tensor, layout: ThetaLayout, name: str = "samples") -> Tensor:
    """Rows as ``(chains, draws, E)`` on the CPU."""
    layout.validate(samples, name)
    if samples.ndim not in (2, 3) or not samples.numel():
        raise ValueError(
            f"{name} must have shape (draws, E) or (chains, draws, E) with at least "
            f"one draw, got {tuple(samples.shape)}."
        )
    samples = samples.detach().cpu()
    return samples.unsqueeze(0) if samples.ndim == 2 else samples


def _resampled(
    samples: Tensor, weights: Tensor | None, num: int, generator: torch.Generator
) -> Tensor:
    """About ``num`` rows of equal weight, shape ``(draws, E)``."""
    rows = samples.flatten(0, 1)
    num = min(num, len(rows))
    if weights is None:
        return rows[torch.linspace(0, len(rows) - 1, num).round().long()]
    return rows[systematic(weights.flatten(), num, generator)]
