"""Other methods for the same question, each behind one interface: :class:`Rival`."""

from collections.abc import Callable

from .base import Answer, Rival, Training
from .classical import PursuitLaplace, SubspaceMDL
from .masked import FixedCapacity, Saturated
from .plain_sbi import MixedNPE, OneForEachK
from .samplers import Eryn, NestedByK, SMCByK
from .slots import Default, Paper, Shipped

__all__ = ["RIVALS", "Answer", "Rival", "Training"]

RIVALS: dict[str, Callable[[], Rival]] = {
    "ours": Default,
    "ours, shipped": lambda: Shipped("sinusoids-tiny"),
    "MNPE": MixedNPE,
    "NPE for each K": OneForEachK,
    "saturated flow": Saturated,
    "fixed capacity": FixedCapacity,
    "paper's network": Paper,
    "pursuit + BIC": lambda: PursuitLaplace("bic"),
    "pursuit + Laplace": lambda: PursuitLaplace("evidence"),
    "ESPRIT + MDL": SubspaceMDL,
    "Eryn, from the prior": lambda: Eryn("prior", 300),
    "Eryn, from the truth": lambda: Eryn("truth", 300),
    "SMC for each K": lambda: SMCByK(250),
    "nested sampling": lambda: NestedByK(80),
}
"""Rivals by name, for ``tiny``."""
