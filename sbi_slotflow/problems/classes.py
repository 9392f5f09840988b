r"""Problems whose components are of several classes, lines and bursts for one.

.. math::
    x = b(s) + \sum_c \sum_{k=1}^{K_c} s_c(\theta_{c,k}) + \epsilon

Each class is a problem of its own, which says what its components look like, where they
are and how x is read for them. :class:`Classes` joins them.

See Also:
    :mod:`sbi_slotflow.nn.classes`, how a network sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

from torch import Tensor

from ..nn.class_cells import ClassAxis
from ..nn.class_encoder import ClassEncoder
from ..nn.classes import ClassChart
from ..nn.encoders import TokenEncoder
from ..nn.spec import build, describe, register
from ..sets.classes import ClassLayout, ClassMarginals, layout_from_spec
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior
from .base import Problem, Stream
from .least_squares import AdditiveFit, AdditiveLeastSquares, signal_slopes
from .linear import ClassForm
from .simulator import AdditiveSimulator, ClassSignal
from .white_space import known_variance, white_space

__all__ = ["ClassFit", "Classes"]


@dataclass(frozen=True)
class Classes(Problem):
    """Several one-class problems in one x.

    Their priors multiply, their signals add up. All must see the same x, with the same
    noise, background and shared parameters, which are then those of the whole. A least
    separation holds within its class.

    Attributes:
        name: Name of the problem.
        members: A problem for each class by its name; each says where its components
            are, as a :class:`~sbi_slotflow.problems.Trace`, an image or sinusoids do.

    Args:
        cardinality: Other numbers of components than the members' own, as
            :meth:`MultiClassPrior.with_cardinality` takes them: weights of K of each
            class, by name, or of all together ("at most one of any kind").

    Raises:
        TypeError: If a member is no problem with an ``AdditiveSimulator``.
        ValueError: If members do not fit each other.

    Example:
        Steps and pulses in one trace:

        >>> from torch.distributions import Independent, Uniform
        >>> import torch
        >>> import sbi_slotflow as sf
        >>> low, high = torch.tensor([0.0, 2.0]), torch.tensor([128.0, 9.0])
        >>> time = torch.arange(128.0) + 0.5
        >>> def prior():
        ...     return sf.VariableKPrior(
        ...         Independent(Uniform(low, high), 1), [1, 1, 1],
        ...         component_names=("time", "height"))
        >>> def step(c):
        ...     return c[..., 1:] * torch.sigmoid(time - c[..., :1])
        >>> def pulse(c):
        ...     return c[..., 1:] * torch.exp(-0.5 * (time - c[..., :1]) ** 2)
        >>> members = {}
        >>> for name, signal in (("step", step), ("pulse", pulse)):
        ...     simulator = sf.AdditiveSimulator(
        ...         signal, sf.WhiteNoise(1.0), prior().layout)
        ...     members[name] = sf.problems.Trace(name, prior(), simulator, cells=32)
        >>> problem = sf.problems.Classes("steps and pulses", members)
        >>> problem.layout.names[:4]
        ['K_step', 'K_pulse', 'step.time_1', 'step.height_1']
    """

    prior: MultiClassPrior = field(init=False)
    simulator: AdditiveSimulator = field(init=False)
    members: Mapping[str, Problem] = field(default_factory=dict)

    def __init__(
        self,
        name: str,
        members: Mapping[str, Problem],
        *,
        cardinality: Sequence[float] | Tensor | Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(members, Mapping) or not members:
            raise TypeError(
                f"members must map names to problems, at least one, got {members!r}."
            )
        for key, member in members.items():
            simulator = getattr(member, "simulator", None)
            if isinstance(member, Classes):
                raise TypeError(f"member {key!r} must not have classes of its own.")
            if not isinstance(simulator, AdditiveSimulator):
                raise TypeError(
                    f"member {key!r} must be a problem with an AdditiveSimulator, got "
                    f"{type(member).__name__} with {type(simulator).__name__}."
                )
        first_name, first = next(iter(members.items()))
        for key, member in members.items():
            _check_alike(first_name, first, key, member)
        prior = MultiClassPrior(
            {key: _without_shared(member.prior) for key, member in members.items()},
            shared=first.prior.shared,
            shared_names=first.shared_names or None,
            periods={
                name: period
                for name, period in first.layout.periods.items()
                if name in first.shared_names
            },
        )
        if cardinality is not None:
            prior = prior.with_cardinality(cardinality)
        signals = {
            key: member.simulator.component_signal for key, member in members.items()
        }
        simulator = AdditiveSimulator(
            signals,
            first.simulator.noise,
            prior.layout,
            background=first.simulator.background,
        )
        for key, value in (
            ("name", name),
            ("prior", prior),
            ("simulator", simulator),
            ("members", dict(members)),
        ):
            object.__setattr__(self, key, value)
        super().__post_init__()

    @property
    def layout(self) -> ClassLayout:
        """Layout of theta."""
        return self.prior.layout

    @property
    def units(self) -> dict[str, str]:
        """Units of parameters by name, those of a class as ``"line.frequency"``."""
        found: dict[str, str] = {}
        for name, member in self.members.items():
            for parameter, unit in member.units.items():
                shared = parameter in self.layout.shared_names
                found[parameter if shared else f"{name}.{parameter}"] = unit
        return found

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The records that x concatenates."""
        return next(iter(self.members.values())).streams

    @property
    def num_data(self) -> int:
        """How many numbers one x holds."""
        return next(iter(self.members.values())).num_data

    def location_axis(self) -> ClassAxis:
        """The places of all classes, one after the other.

        Raises:
            ValueError: If a class has no place.
        """
        axes = []
        for name, member in self.members.items():
            axis = member.location_axis()
            if axis is None:
                raise ValueError(
                    f"class {name!r} must say where its components are, by "
                    "location_axis(), as a Trace does."
                )
            axes.append(axis)
        return ClassAxis.of(axes, self.prior.log_counts)

    def build_token_encoder(self, **options: Any) -> ClassEncoder:
        """Return a :class:`ClassEncoder` with a token for each class's cells."""
        members = [
            cast(TokenEncoder, member.build_token_encoder(**options))
            for member in self.members.values()
        ]
        width = options.get("hidden_features", 128)
        return ClassEncoder(members, hidden_features=width)

    def build_chart(self) -> ClassChart:
        """Return the charts of all classes."""
        charts = [member.build_chart() for member in self.members.values()]
        return ClassChart(self.layout, charts)

    def linear_form(self) -> ClassForm | None:
        """Return in what components are linear; None if a class says nothing."""
        forms = [member.linear_form() for member in self.members.values()]
        if any(form is None for form in forms):
            return None
        signal = self.simulator.component_signal
        return ClassForm(signal, self.layout, [form for form in forms if form])

    def laplace_proposal(self, x: Tensor, **options: Any) -> Any:
        """Raise TypeError: of several classes there is none."""
        raise TypeError(
            f"problem {self.name!r} has no Laplace proposal: it knows components of "
            "one class."
        )

    def build_fit(self) -> "ClassFit | None":
        """Return the least squares of all classes together; None if a class has none.

        Raises:
            TypeError: If noise or background allow no least squares.
        """
        if any(member.build_fit() is None for member in self.members.values()):
            return None
        space = white_space(self.simulator, self.prior)
        return ClassFit(
            self.simulator.component_signal,
            self.prior.component_marginals,
            self.location_axis().parameters,
            space,
            known_variance(self.simulator.noise, space),
            places=[axis.parameters for axis in self.location_axis().axes],
        )


@register("fit")
@dataclass(frozen=True)
class ClassFit(AdditiveFit):
    """Normal equations of components of several classes.

    Attributes:
        places: Indices of the locations among each class's own parameters.
    """

    places: Sequence[tuple[int, ...]] = ()

    kind: ClassVar[str] = "classes"

    def candidates(self, low: Tensor, high: Tensor, num: int = 24) -> Tensor:
        """Candidates; the ends' first column is the class, see the base."""
        marginals = cast(ClassMarginals, self.marginals)
        label, layout, found = low[..., 0], marginals.layout, None
        signals = cast(ClassSignal, self.component_signal).signals
        for c, (own, place) in enumerate(
            zip(marginals.classes, self.places, strict=True)
        ):
            fit = AdditiveFit(signals[c], own, place)
            each = fit.candidates(low[..., 1:], high[..., 1:], num)
            each = layout.from_class(each, c)
            there = (label == c)[..., None, None]
            found = each if found is None else each.where(there, found)
        assert found is not None
        return found

    @property
    def least_squares(self) -> "type[ClassLeastSquares]":
        """What to make of observations."""
        return ClassLeastSquares

    @property
    def spec(self) -> dict[str, Any] | None:
        """Description for :meth:`from_spec`; None if a signal or space has none."""
        signal = cast(ClassSignal, self.component_signal)
        parts = [describe("signal", part) for part in signal.signals]
        if any(part is None for part in parts) or self.space is not None:
            return None
        return {
            "kind": self.kind,
            "signals": parts,
            "marginals": cast(ClassMarginals, self.marginals).spec,
            "layout": asdict(signal.layout),
            "location": self.location,
            "places": list(self.places),
            "variance": self.variance,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "ClassFit":
        """Rebuild a fit from :attr:`spec`."""
        layout = cast(ClassLayout, layout_from_spec(spec["layout"]))
        signals = [build("signal", part) for part in spec["signals"]]
        named = dict(zip(layout.class_names, signals, strict=True))
        places = [tuple(part) for part in spec["places"]]
        return cls(
            ClassSignal(layout, named),
            ClassMarginals.from_spec(spec["marginals"]),
            tuple(spec["location"]),
            variance=spec["variance"],
            places=places,
        )


class ClassLeastSquares(AdditiveLeastSquares):
    """Least squares of components of several classes."""

    def slopes(self, components: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Signals and derivatives; see the base. That of the class is zero."""
        signal = cast(ClassSignal, self.fit.component_signal)
        num = self.data.shape[-1]
        value = components.new_zeros(len(components), num)
        slopes = components.new_zeros(*components.shape, num)
        for c, one in enumerate(signal.signals):
            rows = (components[:, 0] == c).nonzero().squeeze(-1)
            if not len(rows):
                continue
            own = signal.layout.to_class(components[rows], c)
            here, steep = signal_slopes(lambda c, s=one: s(c).flatten(1), own)
            value[rows] = here.to(value)
            steep = signal.layout.from_class(steep.mT, c).mT.to(slopes)
            steep[:, 0] = 0.0  # the class, which from_class put there
            slopes[rows] = steep
        return value, slopes


def _without_shared(prior: VariableKPrior) -> VariableKPrior:
    if prior.population is not None:
        raise ValueError(
            "members must have components that are independent of the shared "
            "parameters, got a prior whose component is a function of them: one class "
            "alone may have a population."
        )
    layout = prior.layout
    return VariableKPrior(
        prior.component,
        prior.cardinality_probs,
        min_separation=prior.min_separation,
        order_by=layout.order_by,
        component_names=layout.component_names,
        periods={
            name: period
            for name, period in layout.periods.items()
            if name in layout.component_names
        },
    )


def _check_alike(first: str, one: Problem, second: str, other: Problem) -> None:
    """Raise ValueError unless two problems see the same x in the same noise."""
    for what, a, b in (
        ("event shapes", tuple(one.event_shape), tuple(other.event_shape)),
        ("shared parameters", one.shared_names, other.shared_names),
        ("noise", one.simulator.noise, other.simulator.noise),
        (
            "priors of shared parameters",
            one.prior.shared_marginals,
            other.prior.shared_marginals,
        ),
        ("backgrounds", one.simulator.background, other.simulator.background),
    ):
        if a != b:
            known = f", got {a} and {b}" if isinstance(a, tuple) else ""
            raise ValueError(
                f"members must have the same {what}, those of {first!r} and {second!r} "
                f"differ{known}. Functions, and noise of arrays, must be one object."
            )
