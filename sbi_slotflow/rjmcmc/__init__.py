"""Reference samplers of the exact posterior, and a proposal made by hand.

``SlotFlowMove`` subclasses a move of Eryn, which is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from ..posterior.chains import CollapsedDraws
from .eryn_bridge import ErynSampler, eryn_sampler
from .exact import collapsed, laplace_proposal
from .fixed_k import fixed_k

if TYPE_CHECKING:
    from .eryn_moves import SlotFlowMove

__all__ = [
    "CollapsedDraws",
    "ErynSampler",
    "SlotFlowMove",
    "collapsed",
    "eryn_sampler",
    "fixed_k",
    "laplace_proposal",
]


def __getattr__(name: str) -> Any:
    if name == "SlotFlowMove":
        from .eryn_moves import SlotFlowMove

        return SlotFlowMove
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
