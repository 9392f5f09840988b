"""From draws of sets to a list of sources.

:func:`build_catalogue` makes the list, which ``posterior.catalogue(x)`` and
``draws.catalogue()`` call; :class:`Sources` says what a source is.
"""

from .sources import Sources, fit_sources
from .table import build_catalogue

__all__ = ["Sources", "build_catalogue", "fit_sources"]
