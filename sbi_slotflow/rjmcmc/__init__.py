"""Reference samplers of the exact posterior, and a proposal made by hand."""

from .collapsed import CollapsedDraws, collapsed
from .laplace import LaplaceProposal, laplace_proposal

__all__ = ["CollapsedDraws", "LaplaceProposal", "collapsed", "laplace_proposal"]
