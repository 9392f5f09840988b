"""Posteriors over sets: the network's, draws, and the exact one by refinement."""

from .draws import PosteriorDraws, RefinedPosterior, UnreliableWeights
from .network import SlotPosterior
from .refine import refine

__all__ = [
    "PosteriorDraws",
    "RefinedPosterior",
    "SlotPosterior",
    "UnreliableWeights",
    "refine",
]
