"""The network: encoder, heads, slots, chart, flow, matching, and their builder."""

from ..sets.matching import hungarian, log_permanent
from .builder import slot_nn
from .charts import Chart, WhiteningChart
from .component_head import AttentionSlots, ComponentHead, GlobalSlots
from .encoders import Encoding, MLPEncoder
from .estimator import SlotDensityEstimator
from .flows import ConditionalFlow, RowContext
from .heads import CardinalityHead, PriorSharedHead, SharedHead
from .spec import EstimatorSpec

__all__ = [
    "AttentionSlots",
    "CardinalityHead",
    "Chart",
    "ComponentHead",
    "ConditionalFlow",
    "Encoding",
    "EstimatorSpec",
    "GlobalSlots",
    "MLPEncoder",
    "PriorSharedHead",
    "RowContext",
    "SharedHead",
    "SlotDensityEstimator",
    "WhiteningChart",
    "hungarian",
    "log_permanent",
    "slot_nn",
]
