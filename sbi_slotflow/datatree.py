"""Draws as an ArviZ ``DataTree``.

ArviZ 1.x needs Python 3.12; its parts ``arviz-base``, ``arviz-stats`` and
``arviz-plots`` also run on 3.11 and are the same there. This package uses the parts,
here and in :mod:`sbi_slotflow.psis`.
"""

from typing import TYPE_CHECKING

import arviz_base
import numpy as np
import torch
from torch import Tensor

from .layout import ThetaLayout

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["to_datatree"]


def to_datatree(
    samples: Tensor,
    layout: ThetaLayout,
    *,
    x: Tensor | None = None,
    true_theta: Tensor | None = None,
    weights: Tensor | None = None,
) -> "DataTree":
    """Turn theta rows into an ArviZ ``DataTree``.

    The posterior group holds ``K`` and the shared parameters, each (chain, draw), and
    the component parameters, each (chain, draw, component), NaN where a draw has no
    such component, so that ArviZ's summaries skip them. ``to_netcdf`` writes the tree.

    Args:
        samples: Theta rows, shape ``(draws, E)`` or ``(chains, draws, E)``.
        layout: Layout of theta.
        x: The observation, kept in the group ``observed_data``.
        true_theta: A true theta row, kept in ``constant_data`` if known.
        weights: Importance weights, shape ``(chains, draws)``, kept in
            ``sample_stats``.

    Returns:
        The tree.

    Raises:
        ValueError: If the rows do not fit the layout.
    """
    layout.validate(samples, "samples")
    if samples.ndim == 2:
        samples = samples.unsqueeze(0)
    if samples.ndim != 3:
        raise ValueError(
            "samples must have shape (draws, E) or (chains, draws, E), got "
            f"{tuple(samples.shape)}."
        )
    groups = {"posterior": _variables(samples, layout)}
    dims = {name: ["component"] for name in layout.component_names}
    if weights is not None:
        groups["sample_stats"] = {"weight": weights.detach().cpu().numpy()}
    if x is not None:
        groups["observed_data"] = {"x": x.detach().cpu().numpy()}
        dims["x"] = ["sample_index"]
    if true_theta is not None:
        groups["constant_data"] = {
            f"true_{name}": value
            for name, value in _variables(true_theta, layout).items()
        }
        dims |= {f"true_{name}": ["component"] for name in layout.component_names}
    coords = {"component": np.arange(1, layout.max_cardinality + 1)}
    return arviz_base.from_dict(groups, coords=coords, dims=dims)


def _variables(theta: Tensor, layout: ThetaLayout) -> dict[str, np.ndarray]:
    parts = layout.unpack(theta.detach().cpu())
    active = parts.mask.unsqueeze(-1)
    components = torch.where(active, parts.components, torch.nan).numpy()
    shared = parts.shared.numpy()
    variables = {"K": parts.cardinality.numpy()}
    variables |= {name: shared[..., i] for i, name in enumerate(layout.shared_names)}
    variables |= {
        name: components[..., i] for i, name in enumerate(layout.component_names)
    }
    return variables
