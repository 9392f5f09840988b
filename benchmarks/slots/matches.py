r"""What the slots of an estimator look for: matched components, stability, contexts.

A draw given K comes slot by slot. Its components are assigned to the true ones so that
the sum of squared differences, in units of the prior's standard deviations and on the
circle where a parameter is circular, is least. That says which true component each slot
drew: over many signals, whether slots specialise (the paper's figure 4), over many
draws of one signal, whether they are stable (figure 15).

Slots in cells of the location axis, drawn one after the other, stand in the order of
their location: there slot k is the k-th component by construction.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.cell_head import IndependentHead
from sbi_slotflow.nn.component_head import ComponentHead
from sbi_slotflow.nn.encoders import Observations
from sbi_slotflow.nn.set_distribution import SetHead
from sbi_slotflow.posterior.network import SlotPosterior
from sbi_slotflow.sets.circular import near
from sbi_slotflow.sets.layout import ThetaLayout, ThetaParts
from sbi_slotflow.sets.matching import hungarian

__all__ = ["SlotMatches", "match_slots", "slot_stability"]


@dataclass(frozen=True)
class SlotMatches:
    """True components by the slot that drew them, of B signals with K components.

    Attributes:
        layout: Layout of theta.
        components: Components in slot order, shape ``(B, K, D)``.
        contexts: Slot contexts, shape ``(B, K, C)``.
    """

    layout: ThetaLayout
    components: Tensor
    contexts: Tensor

    @property
    def order(self) -> Tensor:
        """Slots, ascending in their mean ``order_by`` parameter, shape ``(K,)``."""
        return self.components[..., self.layout.order_by].mean(0).argsort()


@torch.no_grad()
def match_slots(
    posterior: SlotPosterior,
    theta: Tensor,
    x: Tensor,
    generator: torch.Generator | None = None,
) -> SlotMatches:
    """Match one draw of each signal with its true components.

    Args:
        posterior: The posterior.
        theta: True rows, all with the same K >= 1, shape ``(B, E)``.
        x: Their data, shape ``(B, T)``.
        generator: Source of randomness.

    Returns:
        The matches.

    Raises:
        TypeError: If theta or x is not a floating-point tensor.
        ValueError: If theta or x is malformed, or K is not the same throughout.
    """
    head, parts, given = _given(posterior, theta, x)
    k = int(parts.cardinality[0])
    owner = torch.arange(len(theta), device=theta.device)
    drawn = given.sample(parts.mask, owner, generator)[0][:, :k]
    truth = parts.components[:, :k]
    matched = _matched(posterior, drawn, truth)
    components = truth.gather(1, matched.unsqueeze(-1).expand_as(truth))
    contexts = _contexts(head, parts, given, owner)[:, :k]
    if isinstance(
        head, AutoregressiveHead | IndependentHead
    ):  # contexts of true components
        index = matched.unsqueeze(-1).expand_as(contexts)
        contexts = contexts.gather(1, index)
    return SlotMatches(posterior.prior.layout, components, contexts)


@torch.no_grad()
def slot_stability(
    posterior: SlotPosterior,
    theta: Tensor,
    x: Tensor,
    num_draws: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Measure how often each slot draws each component of one signal.

    Args:
        posterior: The posterior.
        theta: The true row, K >= 1, shape ``(E,)`` or ``(1, E)``.
        x: Its data, shape ``(T,)`` or ``(1, T)``.
        num_draws: Number of draws.
        generator: Source of randomness.

    Returns:
        Shares (slot, component), rows summing to one, shape ``(K, K)``. Components are
        in canonical order.

    Raises:
        TypeError: If theta or x is not a floating-point tensor.
        ValueError: If theta or x is malformed, or ``num_draws`` not positive.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    theta, x = torch.atleast_2d(theta), torch.atleast_2d(x)
    if len(theta) != 1 or len(x) != 1:
        raise ValueError("theta and x must be of one signal.")
    _, parts, given = _given(posterior, theta, x)
    k = int(parts.cardinality)
    mask = parts.mask.expand(num_draws, -1)
    owner = torch.zeros(num_draws, dtype=torch.int64, device=theta.device)
    drawn, _ = given.sample(mask, owner, generator)
    drawn = drawn[:, :k]
    truth = parts.components[:, :k].expand_as(drawn)
    matched = _matched(posterior, drawn, truth)
    return torch.nn.functional.one_hot(matched, k).double().mean(0)


def _given(
    posterior: SlotPosterior, theta: Tensor, x: Tensor
) -> tuple[SetHead, ThetaParts, Any]:
    """The head, true sets taken apart, and the head's distribution given x."""
    estimator = posterior.posterior_estimator.eval()
    layout = posterior.prior.layout
    layout.validate(theta)
    x = estimator.checked(x)
    if theta.ndim != 2 or len(theta) != len(x) or not len(theta):
        raise ValueError(
            f"theta and x must be batches of one size, got {tuple(theta.shape)} and "
            f"{tuple(x.shape)}."
        )
    parts = layout.unpack(layout.canonical(theta))
    values = parts.cardinality.unique().tolist()
    if len(values) != 1 or values[0] == 0:
        raise ValueError(
            f"theta must hold one cardinality, at least 1, got K = {values}."
        )
    data = Observations(x, estimator.x_scale)
    head = estimator.component_head
    return head, parts, head.given(estimator.encode(x), data, None)


def _matched(posterior: SlotPosterior, drawn: Tensor, truth: Tensor) -> Tensor:
    """True component of each slot, shape ``(B, K)``."""
    prior = posterior.prior
    rows = prior.component.sample(torch.Size((1_000,)))
    scale = rows.reshape(1_000, -1).std(0).to(drawn)
    periods = prior.layout.component_periods
    here, there = drawn.unsqueeze(2), truth.unsqueeze(1)
    gaps = (near(here, there, periods) - there) / scale
    counts = torch.full((len(drawn),), drawn.shape[1])
    return hungarian(-gaps.square().sum(-1), counts)


def _contexts(
    head: torch.nn.Module, parts: ThetaParts, given: Any, owner: Tensor
) -> Tensor:
    """Contexts ``(B, Kmax, C)`` of slots, or of components where slots have cells."""
    row, slot = parts.mask.nonzero(as_tuple=True)
    if isinstance(head, ComponentHead):
        found = given.contexts(parts.mask, owner)
        values = found.values[found.which]
    elif isinstance(head, AutoregressiveHead | IndependentHead):
        position = head.coordinates(parts)[0][..., 0]
        cells = head.axis.cells(position, given.edges[owner])
        cells = torch.where(parts.mask, cells, 0)
        if isinstance(head, AutoregressiveHead):
            sets = given.conditioned(owner, cells, parts.mask)
            each = sets.contexts.unflatten(0, sets.cells.cells.shape)[sets.which]
            values = each[row, slot]
        else:
            count = parts.cardinality[row]
            found = given.in_cells(owner[row], count, cells[row, slot])[1][-1]
            values = found.values[found.which]
    else:
        raise TypeError(f"no slot contexts in a {type(head).__name__}.")
    padded = values.new_full((*parts.mask.shape, values.shape[-1]), math.nan)
    padded[row, slot] = values
    return padded
