"""The heads that an estimator's spec describes."""

from typing import Any

from .autoregressive_head import AutoregressiveHead
from .background_head import BackgroundHead
from .cell_head import IndependentHead
from .charts import Chart, WhiteningChart, chart_from_spec
from .class_cells import axis_from_spec
from .component_head import ComponentHead, slots_from_spec
from .encoders import Encoding
from .flows import ConditionalFlow
from .gauss_newton import SignalFit
from .heads import NoiseHead, PriorSharedHead, SetSummary, SharedHead
from .ordered_slots import OrderedHead
from .set_distribution import SetHead
from .shape_head import ShapeHead
from .spec import EstimatorSpec

__all__ = ["component_head_from_spec", "shared_head_from_spec"]


def shared_head_from_spec(
    spec: EstimatorSpec, features: int, fit: SignalFit | None = None
) -> SharedHead | NoiseHead | BackgroundHead | None:
    """Build the head of the shared parameters; None if there are none."""
    if spec.shared_chart is None:
        return None
    chart, largest = chart_from_spec(spec.shared_chart), spec.layout.max_cardinality
    if not spec.shared_head:
        return PriorSharedHead(chart)
    summary = None
    if spec.sees_components:
        summary = SetSummary(chart_from_spec(spec.chart), largest)
    linear, shape = getattr(fit, "linear_shared", ()), getattr(fit, "noise_shape", ())

    def rest(inner: Chart, level: int | None) -> SharedHead | NoiseHead:
        if not spec.noise_from_fit:
            return SharedHead(inner, features, largest, summary)
        if shape:
            return ShapeHead(inner, level, spec.num_data, features, largest)
        return NoiseHead(inner, spec.num_data, features, largest)

    if not linear:
        return rest(chart, spec.noise_index)
    others = [i for i in range(chart.num_features) if i not in linear]
    head, level = None, spec.noise_index
    if others:
        inner = WhiteningChart([chart.marginals[i] for i in others])
        head = rest(inner, None if level is None else others.index(level))
    return BackgroundHead(chart, linear, level, head)


def component_head_from_spec(
    spec: EstimatorSpec, probe: Encoding, fit: SignalFit | None = None
) -> SetHead:
    """Build the head that ``spec.slots`` describes."""
    chart = chart_from_spec(spec.chart)
    options: dict[str, Any] = dict(spec.slots)
    if options.get("kind") == "ordered":
        order_by, largest = spec.layout.order_by, spec.layout.max_cardinality
        width = options["trunk_features"]
        return OrderedHead(chart, order_by, probe, largest, width, spec.flow)
    if options.get("kind") != "anchored":
        slots = slots_from_spec(options, probe, spec.layout.max_cardinality)
        flow = ConditionalFlow(chart.num_features, slots.num_features, **spec.flow)
        return ComponentHead(chart, slots, flow)
    del options["kind"]
    axis = axis_from_spec(options.pop("axis"))
    del options["fit"]
    if probe.tokens is None or probe.tokens.shape[-2] != axis.num_cells:
        raise ValueError(
            f"slots='anchored' need an encoder that keeps {axis.num_cells} tokens, "
            "one for each cell of the location axis; use slots='attention' or "
            "slots='global' with this one."
        )
    if spec.layout.order_by not in axis.parameters:
        raise ValueError(
            "slots='anchored' need components in the order of their location: order_by "
            f"must be one of {axis.parameters}, got {spec.layout.order_by}."
        )
    sizes = probe.tokens.shape[-1], spec.layout.max_cardinality
    coupling, steps = options.pop("coupling"), options.pop("refine_steps")
    head = AutoregressiveHead if coupling == "joint" else IndependentHead
    if coupling == "joint":
        options |= {"fit": fit, "refine_steps": steps}
    elif steps:
        raise ValueError(
            "refine_slots fits all components together; it needs coupling='joint'."
        )
    return head(chart, axis, *sizes, flow=spec.flow, **options)
