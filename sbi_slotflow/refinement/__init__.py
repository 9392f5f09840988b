"""Exact posteriors from approximate ones, given a likelihood."""

from .refine import RefinedPosterior, UnreliableWeights, refine

__all__ = ["RefinedPosterior", "UnreliableWeights", "refine"]
