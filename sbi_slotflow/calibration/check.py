"""What every calibration check returns: p-values, a verdict and a figure."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Check"]


@dataclass(frozen=True, eq=False)
class Check(ABC):
    """Base of the results.

    Attributes:
        p_values: A p-value for each quantity that was tested.
        false_alarm_rate: Probability that an exact posterior fails the check, at most
            (Bonferroni: each of the m p-values is held against this rate over m).
    """

    title: ClassVar[str]
    """What is checked, in a few words."""
    explanation: ClassVar[str]
    """How to read the figure, in a sentence or two."""

    p_values: Mapping[str, float]
    false_alarm_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(
                "false_alarm_rate must lie between 0 and 1, got "
                f"{self.false_alarm_rate}."
            )
        if not self.p_values:
            raise ValueError("p_values must hold at least one p-value, got none.")

    @property
    def level(self) -> float:
        """Level that each p-value is held against."""
        return self.false_alarm_rate / len(self.p_values)

    @property
    def p_value(self) -> float:
        """The smallest p-value, corrected for their number."""
        return min(1.0, len(self.p_values) * min(self.p_values.values()))

    @property
    def passed(self) -> bool:
        """Whether no p-value is at or below :attr:`level`."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the quantities at or below :attr:`level`."""
        return tuple(name for name, p in self.p_values.items() if p <= self.level)

    @property
    @abstractmethod
    def numbers(self) -> Mapping[str, Any]:
        """What was measured, ready for JSON."""

    @abstractmethod
    def plot(self) -> "Figure":
        """Return the check's figure."""

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and the numbers, ready for JSON."""
        return {
            "title": self.title,
            "passed": self.passed,
            "p_value": self.p_value,
            "false_alarm_rate": self.false_alarm_rate,
            "p_values": dict(self.p_values),
            "failures": list(self.failures),
            "numbers": dict(self.numbers),
        }

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        word = "passed" if self.passed else f"FAILED ({', '.join(self.failures)})"
        rate = f"false-alarm rate {self.false_alarm_rate:.2g}"
        return f"{word}, p = {self.p_value:.2g} ({rate})"

    def __str__(self) -> str:
        return f"{self.title}: {self.verdict}"
