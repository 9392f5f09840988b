"""The network: encoder, heads, slots, chart, flow, matching, and their builder."""

from .builder import slot_nn
from .charts import Chart, CircleChart, PolarChart, WhiteningChart
from .component_head import ComponentHead
from .encoders import DualStreamEncoder, Encoding, MLPEncoder
from .estimator import SlotDensityEstimator
from .flows import ConditionalFlow, RowContext
from .heads import CardinalityHead, PriorSharedHead, SharedHead
from .matching import hungarian, log_permanent
from .slots import AttentionSlots, GlobalSlots
from .spec import EstimatorSpec

__all__ = [
    "AttentionSlots",
    "CardinalityHead",
    "Chart",
    "CircleChart",
    "ComponentHead",
    "ConditionalFlow",
    "DualStreamEncoder",
    "Encoding",
    "EstimatorSpec",
    "GlobalSlots",
    "MLPEncoder",
    "PolarChart",
    "PriorSharedHead",
    "RowContext",
    "SharedHead",
    "SlotDensityEstimator",
    "WhiteningChart",
    "hungarian",
    "log_permanent",
    "slot_nn",
]
