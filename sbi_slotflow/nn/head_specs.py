"""Component heads from their description."""

from typing import Any

from .autoregressive_head import AutoregressiveHead
from .cell_head import CellHead
from .cells import CellAxis
from .charts import chart_from_spec
from .component_head import ComponentHead
from .encoders import Encoding
from .flows import ConditionalFlow
from .gauss_newton import SignalFit
from .independent_head import IndependentHead
from .registry import build
from .slots import slots_from_spec
from .spec import EstimatorSpec

__all__ = ["component_head_from_spec"]


def component_head_from_spec(
    spec: EstimatorSpec, probe: Encoding, fit: SignalFit | None = None
) -> ComponentHead | CellHead:
    """Build the head that ``spec.slots`` describes.

    Args:
        spec: The estimator's description.
        probe: An encoding, for its sizes.
        fit: The signal that refined slots fit, if the spec does not describe it.

    Raises:
        ValueError: If the encoder or the fit lacks what the slots need.
    """
    chart = chart_from_spec(spec.chart)
    options: dict[str, Any] = dict(spec.slots)
    if options.get("kind") != "anchored":
        slots = slots_from_spec(options, probe, spec.layout.max_cardinality)
        flow = ConditionalFlow(chart.num_features, slots.num_features, **spec.flow)
        return ComponentHead(chart, slots, flow)
    del options["kind"]
    axis = CellAxis(**options.pop("axis"))
    described = options.pop("fit")
    if fit is None and described is not None:
        fit = build("fit", described)
    if probe.tokens is None or probe.tokens.shape[-2] != axis.num_cells:
        raise ValueError(
            f"slots='anchored' need an encoder that keeps {axis.num_cells} tokens, "
            "one for each cell of the location axis; use slots='attention' or "
            "slots='global' with this one."
        )
    if axis.parameter != spec.layout.order_by:
        raise ValueError(
            "slots='anchored' need components in the order of their location: order_by "
            f"must be {axis.parameter}, got {spec.layout.order_by}."
        )
    sizes = probe.tokens.shape[-1], spec.layout.max_cardinality
    coupling, refine_steps = options.pop("coupling"), options.pop("refine_steps")
    if coupling == "joint":
        return AutoregressiveHead(
            chart,
            axis,
            *sizes,
            flow=spec.flow,
            fit=fit,
            refine_steps=refine_steps,
            **options,
        )
    if refine_steps:
        raise ValueError(
            "refine_slots fits all components together; it needs coupling='joint'."
        )
    return IndependentHead(chart, axis, *sizes, flow=spec.flow, **options)
