"""The network of the paper: dual-stream encoder and circle chart."""

from .circle import CircleChart
from .dual_stream import DualStreamEncoder

__all__ = ["CircleChart", "DualStreamEncoder"]
