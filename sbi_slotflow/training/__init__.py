"""Training of slot density estimators."""

from .stages import Stage, train_stages
from .trainer import SlotNPE

__all__ = ["SlotNPE", "Stage", "train_stages"]
