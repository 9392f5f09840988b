"""Exact posteriors from approximate ones, given a likelihood."""

from .refine import RefinedPosterior, refine

__all__ = ["RefinedPosterior", "refine"]
