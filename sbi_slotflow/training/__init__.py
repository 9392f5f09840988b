"""Training of slot density estimators."""

from .trainer import SlotNPE

__all__ = ["SlotNPE"]
