"""Reference samplers of the exact posterior, and a proposal made by hand.

What builds on Eryn, an optional dependency, is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..posterior.draws import ChainDraws
from .exact import collapsed, fixed_k, laplace_proposal

if TYPE_CHECKING:
    from .eryn_bridge import ErynSampler, eryn_sampler
    from .eryn_moves import SlotFlowMove

__all__ = [
    "ChainDraws",
    "ErynSampler",
    "SlotFlowMove",
    "collapsed",
    "eryn_sampler",
    "fixed_k",
    "laplace_proposal",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "eryn_moves" if name == "SlotFlowMove" else "eryn_bridge"
    return getattr(import_module(f".{module}", __name__), name)
