r"""All distances between two posteriors at once, beside the run-to-run floor.

Marginals need labels. In canonical order the i-th component of one draw may be another
tone's than the i-th of the next, where their frequencies overlap. Labels that follow
the tones come from :class:`ReferencePoints` (Stephens 2000): each draw's components are
assigned to the points so that independent normals around them are most likely,

.. math::
    \min_\pi \sum_{i,d} \frac{(\theta_{\pi(i),d} - m_{i,d})^2}{2 s_{i,d}^2}
    + \log s_{i,d},

then centres m and scales s are those of the labelled draws, until no label changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..seeding import generator_for
from ..sets.checks import as_rows
from ..sets.circular import circular_mean, near
from ..sets.layout import ThetaLayout
from ..sets.matching import hungarian
from .distances import (
    FEWEST_DRAWS,
    c2st,
    correlation_error,
    jensen_shannon,
    sliced_wasserstein2,
    total_variation,
    wasserstein2,
)

__all__ = [
    "Comparison",
    "Frame",
    "ParameterDistance",
    "ReferencePoints",
    "Samples",
    "compare",
]

# Draws below which components stay in canonical order.
_FEWEST_TO_MATCH = 50
_MAX_ROUNDS = 20


@dataclass(frozen=True)
class ReferencePoints:
    """Points that components are labelled by.

    Attributes:
        centre: Centres m, shape ``(K, D)``, ascending in the ordering parameter.
        scale: Scales s, shape ``(K, D)``.
        periods: D periods, infinite where a parameter is not circular.
    """

    centre: Tensor
    scale: Tensor
    periods: tuple[float, ...]

    @classmethod
    def of(
        cls, components: Tensor, periods: Sequence[float], order_by: int = 0
    ) -> "ReferencePoints":
        """Find the points of a posterior given K.

        The first points are the draw that lies closest to the means in canonical order:
        a single draw, unlike a mean, keeps the tones apart.
        """
        _, k, size = components.shape
        mean = circular_mean(components, periods)
        offsets = near(components, mean, periods) - mean
        scale = offsets.square().mean((0, 1)).sqrt().expand(k, size)
        closest = (offsets / scale).square().sum((1, 2)).argmin()
        points = cls(components[closest], scale, tuple(periods))
        order = points.assign(components)
        for _ in range(_MAX_ROUNDS):
            labelled = points.label(components, order)
            centre = labelled.mean(0)
            scale = (labelled - centre).square().mean(0).sqrt()
            points = cls(centre, scale, points.periods)
            previous, order = order, points.assign(components)
            if torch.equal(order, previous):
                break
        rank = points.centre[:, order_by].argsort()
        return cls(points.centre[rank], points.scale[rank], points.periods)

    def assign(self, components: Tensor) -> Tensor:
        """Find the component of each point by the Hungarian method."""
        centre, scale = self.centre.unsqueeze(1), self.scale.unsqueeze(1)
        pairs = near(components.unsqueeze(1), centre, self.periods)
        density = -0.5 * ((pairs - centre) / scale).square() - scale.log()
        counts = torch.full((len(components),), len(self.centre))
        return hungarian(density.sum(-1), counts)

    def label(self, components: Tensor, order: Tensor | None = None) -> Tensor:
        """Put components in the order of the points, circular values near them."""
        if order is None:
            order = self.assign(components)
        index = order.unsqueeze(-1).expand_as(components)
        return near(components.gather(1, index), self.centre, self.periods)


class Frame:
    """Reads rows of k components as vectors, in a way that a posterior fixes.

    A vector holds the shared parameters, then the components, all in double precision.
    Circular parameters are cut opposite to the posterior's circular mean. Components
    are labelled by the posterior's :class:`ReferencePoints`, unless a parameter does
    not vary or there are fewer than 50 draws.

    Attributes:
        names: Name of each entry of a vector, and the number of its component, from 1;
            0 for shared parameters.
    """

    def __init__(
        self,
        rows: Tensor,
        layout: ThetaLayout,
        k: int,
        periods: Mapping[str, float] | None = None,
        match: bool = True,
    ) -> None:
        periods = layout.periods if periods is None else periods
        known = (*layout.shared_names, *layout.component_names)
        if unknown := sorted(set(periods) - set(known)):
            raise ValueError(f"periods must name parameters of {known}, got {unknown}.")
        for name, period in periods.items():
            if not period > 0:
                raise ValueError(f"period must be positive, got {period} of {name}.")
        self._layout, self._k = layout, k
        numbers = [(n, i) for i in range(1, k + 1) for n in layout.component_names]
        self.names = (*((name, 0) for name in layout.shared_names), *numbers)
        self._periods = [periods.get(name, math.inf) for name, _ in self.names]
        vectors = self._vectors(rows)
        self._cut = circular_mean(vectors, self._periods)
        self._points: ReferencePoints | None = None
        components = self.components(vectors)
        varies = k > 0 and bool((components.std(0, correction=0) > 0).all())
        if match and varies and len(rows) >= _FEWEST_TO_MATCH:
            each = self._periods[layout.num_shared :][: components.shape[-1]]
            found = ReferencePoints.of(components, each, layout.order_by)
            if (found.scale > 0).all():
                self._points = found

    def ordered(self, rows: Tensor) -> Tensor:
        """Vectors ``(S, C)`` with components in canonical order."""
        return near(self._vectors(rows), self._cut, self._periods)

    def labelled(self, rows: Tensor) -> Tensor:
        """Vectors ``(S, C)`` with components in the order of the points."""
        vectors = self.ordered(rows)
        if self._points is None:
            return vectors
        shared = vectors[:, : self._layout.num_shared]
        components = self._points.label(self.components(vectors))
        return torch.cat([shared, components.flatten(1)], dim=-1)

    def components(self, vectors: Tensor) -> Tensor:
        """Components ``(S, K, D)`` of vectors."""
        components = vectors[:, self._layout.num_shared :]
        return components.reshape(len(vectors), self._k, -1 if self._k else 1)

    def _vectors(self, rows: Tensor) -> Tensor:
        parts = self._layout.unpack(self._layout.canonical(rows).double())
        components = parts.components[:, : self._k].flatten(1)
        return torch.cat([parts.shared, components], dim=-1)


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


class Samples(Protocol):
    """A posterior of one observation that can be sampled given K.

    Such are a :class:`~sbi_slotflow.SlotPosterior` with a default x and
    :class:`~sbi_slotflow.posterior.draws.PosteriorDraws`.
    """

    def sample(
        self,
        sample_shape: Sequence[int] = ...,
        *,
        k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw theta rows of k components."""
        ...

    def cardinality(self) -> Categorical:
        """Return p(K | x)."""
        ...


def compare(
    draws: Tensor | Samples,
    reference: Tensor | Samples,
    floor: Tensor | Samples | None = None,
    *,
    layout: ThetaLayout,
    k: int | None = None,
    periods: Mapping[str, float] | None = None,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare a posterior over sets with a reference.

    Marginals and correlations are compared after labelling the components of all draws
    by the reference's :class:`~sbi_slotflow.metrics.ReferencePoints`, joint
    distributions (``sliced_w2``, ``c2st``) in canonical order, which needs no labels.
    Circular parameters are cut opposite to the reference's circular mean.

    Args:
        draws: Theta rows of one observation's posterior, shape ``(S, E)``, or a
            posterior that can be sampled.
        reference: The posterior to compare with, likewise.
        floor: A second, independent run of the reference, likewise.
        layout: Layout of theta.
        k: Cardinality to condition on; the reference's most probable if None.
        periods: Periods of circular parameters by name; the layout's if None.
        num_samples: Number of draws of k components taken from what can be sampled. Of
            rows, all with k components count.
        seed: Seed of all that is random here.

    Returns:
        The distances, those of the floor beside them.

    Raises:
        TypeError: If an argument is neither rows nor can be sampled.
        ValueError: If rows do not fit the layout or are not finite, a period is unknown
            or not positive, k is not in 0..Kmax, fewer than 50 draws have k components,
            theta has no parameters at k, or the reference does not vary in each.
    """
    given = {"draws": draws, "reference": reference}
    if floor is not None:
        given["floor"] = floor
    probs = {name: _probs(source, layout, name) for name, source in given.items()}
    if k is None:
        k = int(probs["reference"].argmax())
    if not 0 <= k <= layout.max_cardinality:
        raise ValueError(f"k must lie in 0..{layout.max_cardinality}, got {k}.")
    if k == 0 and layout.num_shared == 0:
        raise ValueError("k must be positive without shared parameters, got 0.")
    generator = generator_for(seed)
    rows = {
        name: _rows(source, probs[name], name, layout, k, num_samples, generator)
        for name, source in given.items()
    }
    frame = Frame(rows["reference"], layout, k, periods)
    names = [f"{name}_{i}" if i else name for name, i in frame.names]
    target, labels = (f(rows["reference"]) for f in (frame.ordered, frame.labelled))
    spread = target.std(0)
    if still := [name for name, s in zip(names, spread, strict=True) if not s > 0]:
        raise ValueError(
            "reference must vary in every parameter, got one value of "
            f"{', '.join(still)}."
        )

    def measured(name: str, floor: Comparison | None = None) -> Comparison:
        ordered, labelled = frame.ordered(rows[name]), frame.labelled(rows[name])
        pair = frame.components(labelled), frame.components(labels)
        raw, std = wasserstein2(labelled, labels), labels.std(0)
        columns = torch.stack([raw / std, raw, labelled.std(0) / std], dim=-1).tolist()
        pairs = zip(names, columns, strict=True)
        parameters = [ParameterDistance(name, *column) for name, column in pairs]
        generator = generator_for(seed, 1)
        return Comparison(
            k=k,
            total_variation=float(total_variation(probs[name], probs["reference"])),
            jensen_shannon=float(jensen_shannon(probs[name], probs["reference"])),
            sliced_w2=sliced_wasserstein2(ordered, target, generator=generator),
            c2st=c2st(ordered, target, generator=generator),
            correlation_error=correlation_error(*pair) if k > 1 else None,
            parameters=tuple(parameters),
            num_draws=len(ordered),
            num_reference=len(target),
            floor=floor,
        )

    return measured("draws", None if floor is None else measured("floor"))


def _probs(source: Tensor | Samples, layout: ThetaLayout, name: str) -> Tensor:
    """p(K) of a source, shape ``(Kmax + 1,)``."""
    if isinstance(source, Tensor):
        counts = layout.cardinality(as_rows(source, layout, name))
        counts = counts.bincount(minlength=layout.max_cardinality + 1)
        return counts.double() / len(source)
    if not (hasattr(source, "sample") and hasattr(source, "cardinality")):
        raise TypeError(
            f"{name} must be theta rows or have sample and cardinality, got "
            f"{type(source).__name__}."
        )
    return source.cardinality().probs.squeeze(0)


def _rows(
    source: Tensor | Samples,
    probs: Tensor,
    name: str,
    layout: ThetaLayout,
    k: int,
    num_samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Rows of k components, float64 on the CPU."""
    if not probs[k] > 0:
        raise ValueError(
            f"{name} must hold draws with K={k}, got p(K={k}) = 0; its K are "
            f"{probs.nonzero().flatten().tolist()}."
        )
    if isinstance(source, Tensor):
        rows = source[layout.cardinality(source) == k]
    else:
        rows = source.sample((num_samples,), k=k, generator=generator)
        layout.validate(rows, name)
    if len(rows) < FEWEST_DRAWS:
        raise ValueError(
            f"{name} must hold at least {FEWEST_DRAWS} draws with K={k}, got "
            f"{len(rows)}."
        )
    return rows.detach().double().cpu()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<30}" + "".join(f"{cell:>11}" for cell in cells)
