"""What a comparison found, and how it is printed."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Comparison", "ParameterDistance"]


@dataclass(frozen=True)
class ParameterDistance:
    """One parameter's marginal against the reference's, given K.

    Attributes:
        name: Name of the parameter; those of components end in the number of the
            component, ascending in the ordering parameter.
        w2: Wasserstein-2 distance in standard deviations of the reference.
        w2_raw: The same in the parameter's unit.
        std_ratio: Standard deviation over the reference's.
    """

    name: str
    w2: float
    w2_raw: float
    std_ratio: float


@dataclass(frozen=True)
class Comparison:
    """Distances of a posterior from a reference.

    Attributes:
        k: Cardinality K that all but the first two are given.
        total_variation: Between the two p(K | x).
        jensen_shannon: Between the two p(K | x), in nats.
        sliced_w2: Sliced Wasserstein-2 distance of whitened vectors, in standard
            deviations of the reference.
        c2st: Accuracy of a classifier that tells the two apart; 0.5 is none.
        correlation_error: Mean absolute difference of the correlations between
            different components; None where K < 2.
        parameters: Shared parameters, then those of the components.
        num_draws: Number of draws of K components.
        num_reference: Number of the reference's draws of K components.
        floor: The same between a second run of the reference and the reference.
    """

    k: int
    total_variation: float
    jensen_shannon: float
    sliced_w2: float
    c2st: float
    correlation_error: float | None
    parameters: tuple[ParameterDistance, ...]
    num_draws: int
    num_reference: int
    floor: "Comparison | None" = None

    @property
    def mean_w2(self) -> float:
        """Mean of the parameters' ``w2``."""
        return sum(p.w2 for p in self.parameters) / len(self.parameters)

    def __getitem__(self, name: str) -> ParameterDistance:
        """Return a parameter by name, ``"frequency_1"`` say."""
        found = {parameter.name: parameter for parameter in self.parameters}
        if name not in found:
            raise KeyError(f"no parameter {name!r}; there are {list(found)}.")
        return found[name]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Print every value beside its floor, a dash where there is none."""
        lines = [
            f"K = {self.k}: {self.num_draws} draws, reference {self.num_reference}",
            _line("", ["value", "floor"]),
        ]
        floors = self.floor._totals() if self.floor else {}
        for name, value in self._totals().items():
            lines.append(_line(name, [_number(value), _number(floors.get(name))]))
        heads = ["W2 (sd)", "floor", "W2 (raw)", "floor", "sd ratio", "floor"]
        lines += ["", _line(f"given K = {self.k}", heads)]
        for parameter in self.parameters:
            floor = self.floor[parameter.name] if self.floor else None
            cells = []
            for field in ("w2", "w2_raw", "std_ratio"):
                cells.append(_number(getattr(parameter, field)))
                cells.append(_number(getattr(floor, field, None)))
            lines.append(_line(parameter.name, cells))
        return "\n".join(lines)

    def _totals(self) -> dict[str, float | None]:
        return {
            "total variation of p(K)": self.total_variation,
            "Jensen-Shannon of p(K) (nats)": self.jensen_shannon,
            "mean W2 (sd)": self.mean_w2,
            "sliced W2 (sd)": self.sliced_w2,
            "C2ST": self.c2st,
            "correlation error": self.correlation_error,
        }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<30}" + "".join(f"{cell:>11}" for cell in cells)
