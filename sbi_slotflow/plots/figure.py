"""Figures that show themselves in a notebook.

matplotlib teaches notebooks to draw figures when pyplot makes one. The library's
figures are none of pyplot's, so they bring their picture along.
"""

from io import BytesIO

from matplotlib.figure import Figure as _Figure

__all__ = ["Figure"]

_DPI = 80


class Figure(_Figure):
    """A ``matplotlib.figure.Figure`` with a picture for notebooks."""

    def _repr_png_(self) -> bytes:
        """The figure as PNG: what IPython shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()
