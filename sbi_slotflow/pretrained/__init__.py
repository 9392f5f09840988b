"""Weights that come with the package, their cards, and how they are made."""

from .cards import available_weights, model_card
from .load import load_pretrained

__all__ = ["available_weights", "load_pretrained", "model_card"]
