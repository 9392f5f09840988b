"""What the slots of an estimator draw and see: matches with the truth, and figures."""

from .figures import plot_slot_contexts, plot_slot_specialisation, plot_slot_stability
from .matches import SlotMatches, match_slots, slot_stability

__all__ = [
    "SlotMatches",
    "match_slots",
    "plot_slot_contexts",
    "plot_slot_specialisation",
    "plot_slot_stability",
    "slot_stability",
]
