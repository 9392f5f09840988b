"""Weights that come with the package, their cards, and how they are made."""

from .recipes import available_weights, load_pretrained, model_card

__all__ = ["available_weights", "load_pretrained", "model_card"]
