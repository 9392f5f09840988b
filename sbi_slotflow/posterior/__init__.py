"""Posteriors over sets: the network's, draws, and the exact one by refinement."""

from .draws import PosteriorDraws
from .network import SlotPosterior
from .refine import refine
from .refined import RefinedPosterior, UnreliableWeights

__all__ = [
    "PosteriorDraws",
    "RefinedPosterior",
    "SlotPosterior",
    "UnreliableWeights",
    "refine",
]
