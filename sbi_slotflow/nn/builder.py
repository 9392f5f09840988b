"""Builders of slot density estimators, for sbi's ``density_estimator=`` argument."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from ..sets.checks import as_count, as_weights, check_finite
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior
from .cells import CellAxis
from .charts import Chart, WhiteningChart
from .encoders import MLPEncoder, encode
from .estimator import SlotDensityEstimator
from .gauss_newton import SignalFit
from .paper import PAPER, CircleChart
from .spec import EstimatorSpec, Matching, describe, single_precision

__all__ = ["Coupling", "ProblemLike", "slot_nn"]

Coupling = Literal["joint", "factorised"]

_GAUSS_NEWTON_STEPS = 3
_CHOICES: dict[str, tuple[str, ...]] = {
    "chart": ("default", "circle"),
    "slots": ("default", "anchored", "ordered", "attention", "global"),
    "coupling": get_args(Coupling),
    "matching": get_args(Matching),
    "flow_network": ("projected", "residual"),
}
# Least values of the options that are integers.
_INTEGERS = {
    "flow_layers": 0,
    "refine_slots": 0,
    "weighed_sets": 0,
    "hidden_features": 1,
    "trunk_features": 1,
    "flow_hidden_features": 1,
    "flow_bins": 2,
    "flow_blocks": 1,
}
_FLAGS = (
    "mean_flow_loss",
    "z_score_x",
    "shared_head",
    "condition_on_cardinality",
    "location_scale",
)
# Options that only some networks have.
_OF_ENCODER = ("hidden_features", "encoder_options", "domains")
_JOINT = "slots='anchored', coupling='joint'"
_OF_SLOTS = ("condition_on_cardinality", "location_scale")
_OF_LAYERS = ("flow_bins", "flow_blocks", "flow_network", "tail_bound")


@runtime_checkable
class ProblemLike(Protocol):
    """What a builder asks of a problem; see :class:`~sbi_slotflow.problems.Problem`."""

    @property
    def prior(self) -> VariableKPrior:
        """Prior over theta rows."""
        ...

    def build_encoder(self, **options: Any) -> nn.Module:
        """Return a fresh encoder for this problem's data."""
        ...

    def build_token_encoder(self, **options: Any) -> nn.Module | None:
        """Return a fresh encoder with a token for each cell of the location axis."""
        ...

    def build_chart(self) -> Chart:
        """Return the true chart of a component."""
        ...

    def location_axis(self) -> CellAxis | None:
        """Return the location axis; None if components have no location."""
        ...

    def build_fit(self) -> SignalFit | None:
        """Return the signal for Gauss-Newton fits; None if there is none."""
        ...

    @property
    def noise_level(self) -> int | None:
        """Index of the shared parameter that is white noise's sigma, if one is."""
        ...


@dataclass(frozen=True)
class slot_nn:  # noqa: N801  (a builder, named like sbi's posterior_nn)
    r"""Builds a :class:`SlotDensityEstimator` from a first batch of (theta, x).

    ``NPE(prior, density_estimator=slot_nn(problem))``. The defaults are those of the
    shipped weights: components in cells of the location axis where the problem has one,
    with Gauss-Newton steps where its signal can be fitted. An option at None takes the
    default that is named here. One that is set but has nothing to configure raises a
    ValueError when the network is built.

    Attributes:
        problem: The problem, or a bare :class:`~sbi_slotflow.VariableKPrior` (each
            parameter is then whitened on its own and x read by an MLP). ``SlotNPE``
            fills it in from its prior.
        chart: ``"default"`` (the problem's true chart), ``"circle"`` (the paper's
            :class:`CircleChart`), or a chart of your own.
        encoder: A module of your own, mapping x ``(B, T)`` to ``(B, C)``, as sbi's
            embedding nets do, or to an Encoding. None asks the problem for one.
        slots: ``"anchored"`` (each component in a cell of the location axis, see
            :mod:`.cell_head`), ``"attention"`` (each slot looks for its component among
            the encoder's tokens) or ``"global"`` (the paper: all slots read one pooled
            vector). ``"default"`` is anchored where the problem declares a location and
            nothing is asked of encoder or chart; else attention where there are tokens.
        flow_layers: Coupling layers of the flow (4). 0 for none: with Gauss-Newton
            steps, the Laplace approximations alone, cut off at their cells' ends.
        mean_flow_loss: Whether the flow's loss is averaged over components (no).
        z_score_x: Whether x is shifted and scaled by one number each (yes).
        loss_weights: Weights of the cardinality, flow and shared terms (1 each).
        shared_head: Of shared parameters: whether they are inferred (yes); else draws
            come from their prior.
        hidden_features: Of the problem's encoder: width of its embeddings (128).
        encoder_options: Of the problem's encoder: further options.
        domains: Of a :class:`DualStreamEncoder`: domain of each stream.
        coupling: Of anchored slots: ``"joint"`` (each component given those below it;
            the default) or ``"factorised"`` (independent given x and K, eq. 18).
        refine_slots: Of joint anchored slots: Gauss-Newton steps (3 where the problem's
            signal can be fitted, else 0).
        weighed_sets: Of Gauss-Newton steps: sets of cells at most that are weighed by
            their evidence, for each observation and K (512; 0 where the prior's
            components depend on shared parameters, of which evidence knows nothing); 0
            for none.
        matching: Of independent slots: ``"hungarian"`` (the paper; the default; slots
            part ways soonest), ``"permanent"`` (the likelihood of the set; the highest
            where components overlap) or ``"ordered"`` (slot i learns the i-th component
            in canonical order).
        condition_on_cardinality: Of attention and global slots: whether a slot sees K
            (yes).
        location_scale: Of attention and global slots: whether a Gaussian layer stands
            next to the data (yes).
        trunk_features: Width of a component's context (128; of ordered slots 64); None,
            of global slots only, leaves the parts of the context side by side.
        flow_hidden_features, flow_bins, flow_blocks: Of the flow: width of its networks
            (64), bins of the splines (8), residual blocks in each network (1).
        flow_network: Of the flow: ``"projected"`` (the default) or ``"residual"``, see
            :class:`ConditionalFlow`.
        tail_bound: Of the flow: half width of the splines' interval (5).
        phase_weight, frequency_weight: Of the paper's chart: w_phi and w_f (1 each).

    Raises:
        TypeError, ValueError: If an option is out of range or misspelt.
    """

    problem: ProblemLike | VariableKPrior | None = None
    chart: Literal["default", "circle"] | Chart = "default"
    encoder: nn.Module | None = None
    slots: Literal["default", "anchored", "ordered", "attention", "global"] = "default"
    flow_layers: int = 4
    mean_flow_loss: bool = False
    z_score_x: bool = True
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shared_head: bool = True
    hidden_features: int | None = None
    encoder_options: dict[str, Any] | None = None
    domains: Sequence[str] | None = None
    coupling: Coupling | None = None
    refine_slots: int | None = None
    weighed_sets: int | None = None
    matching: Matching | None = None
    condition_on_cardinality: bool | None = None
    location_scale: bool | None = None
    trunk_features: int | Literal["default"] | None = "default"
    flow_hidden_features: int | None = None
    flow_bins: int | None = None
    flow_blocks: int | None = None
    flow_network: Literal["projected", "residual"] | None = None
    tail_bound: float | None = None
    phase_weight: float | None = None
    frequency_weight: float | None = None

    def __post_init__(self) -> None:
        known = VariableKPrior | ProblemLike | None
        if not isinstance(self.problem, known):
            kind = type(self.problem).__name__
            raise TypeError(f"problem must be a Problem or VariableKPrior, got {kind}.")
        if not isinstance(self.encoder, nn.Module | None):
            kind = type(self.encoder).__name__
            raise TypeError(f"encoder must be a torch module, got {kind}.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, Chart) or value is None:
                continue
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}, got {value!r}."
                )
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value not in (None, "default"):
                as_count(value, name, least)
        for name in ("tail_bound", "phase_weight", "frequency_weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool | None):
                raise TypeError(f"{name} must be a bool, got {value!r}.")
        as_weights(torch.tensor(self.loss_weights), 3, "loss_weights")

    @classmethod
    def paper(cls, problem: ProblemLike | None = None, **changes: Any) -> "slot_nn":
        """The paper's network of 31 million parameters; see :mod:`.paper`.

        Its chart is a surface, so ``log_prob`` raises; sampling works, and training by
        ``SlotNPE.train_online`` (sbi's own loop evaluates ``log_prob``). Use the
        default ``slot_nn()`` for densities.

        Args:
            problem: A sinusoid problem; see the class.
            changes: Fields to change, for the paper's ablations: ``domains``,
                ``phase_weight``, ``frequency_weight``, ``flow_layers``,
                ``shared_head``.
        """
        return replace(cls(problem=problem, **PAPER), **changes)

    @single_precision()
    def __call__(
        self, theta: Tensor, x: Tensor, *, num_components: int | None = None
    ) -> SlotDensityEstimator:
        """Build an estimator.

        Args:
            theta: Theta rows, shape ``(B, E)``; checked against the prior's layout.
            x: Data, shape ``(B, *event)``; gives the shape of x and its scale.
            num_components: What sbi's NPE-A passes, which needs mixtures of Gaussians;
                only None.

        Returns:
            An untrained estimator.

        Raises:
            NotImplementedError: If NPE-A asks for a mixture.
            TypeError, ValueError: If theta or x is malformed, a field does not fit, or
                the problem is missing.
        """
        if num_components is not None:
            raise NotImplementedError(
                "sbi's NPE_A needs a mixture of Gaussians, which slots are not: train "
                "with SlotNPE, and for further rounds of one observation draw from "
                "posterior.truncated_prior(x)."
            )
        prior = self._prior
        prior.layout.validate(theta)
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}.")
        if x.ndim < 2:
            raise ValueError(
                f"x must have shape (batch, *event), got {tuple(x.shape)}."
            )
        check_finite(x)
        if len(theta) != len(x):
            raise ValueError(
                "theta and x must be batches of one size, got "
                f"{len(theta)} and {len(x)}."
            )
        known = getattr(self._known, "event_shape", None)
        if x.ndim > 2 and known is not None and x.shape[1:] != known:
            sizes = ", ".join(map(str, known))
            raise ValueError(
                f"x must have shape (batch, {sizes}), got {tuple(x.shape)}."
            )
        event = x.shape[1:]
        self._check_classes()
        self._check_population()
        encoder, described = self._encoder(event.numel())
        slots = self._slots(encoder, x)
        self._check_used(slots)
        shared = prior.shared_marginals
        spec = EstimatorSpec(
            layout=prior.layout,
            num_data=event.numel(),
            event_shape=tuple(event) if len(event) > 1 else None,
            cardinality_weights=tuple(prior.cardinality_probs.tolist()),
            chart=self._chart().spec,
            shared_chart=WhiteningChart(shared).spec if shared else None,
            encoder=described,
            shared_head=self.shared_head,
            noise_from_fit=bool(slots.get("refine_steps")) and self._noise_alone,
            noise_index=None if self._known is None else self._known.noise_level,
            sees_components=prior.population is not None,
            flow=self._flow(slots),
            slots=slots,
            matching="ordered" if _is_joint(slots) else self.matching or "hungarian",
            mean_flow_loss=self.mean_flow_loss,
            loss_weights=self.loss_weights,
        )
        fit = self._fit if slots.get("refine_steps") else None
        space = getattr(fit, "space", None)
        if space is not None:
            spec = replace(spec, white_space=space.mark)
        estimator = SlotDensityEstimator(spec, encoder, fit)
        if self.z_score_x and not estimator.reads_records:
            estimator.standardize(x)
        return estimator

    @property
    def _prior(self) -> VariableKPrior:
        if self.problem is None:
            raise ValueError(
                "slot_nn needs to know the layout of theta: pass slot_nn(problem) or "
                "slot_nn(prior). SlotNPE fills it in from its prior."
            )
        if isinstance(self.problem, VariableKPrior):
            return self.problem
        return self.problem.prior

    def _encoder(self, num_data: int) -> tuple[nn.Module, dict[str, Any] | None]:
        """Return an encoder, and its spec if the package can rebuild it."""
        options = dict(self.encoder_options or {})
        if self.domains is not None:
            options["domains"] = tuple(self.domains)
        if self.encoder is not None:
            # A copy: two estimators from one builder share no weights.
            return deepcopy(self.encoder), describe("encoder", self.encoder)
        options["hidden_features"] = self.hidden_features or 128
        encoder: nn.Module | None = None
        if self._known is None:
            encoder = MLPEncoder(num_data, **options)
        elif self._anchored:
            encoder = self._known.build_token_encoder(**options)
        if encoder is None:
            assert self._known is not None
            encoder = self._known.build_encoder(**options)
        return encoder, describe("encoder", encoder)

    @property
    def _known(self) -> ProblemLike | None:
        """The problem, if it is more than a prior."""
        return None if isinstance(self.problem, VariableKPrior) else self.problem

    @property
    def _axis(self) -> CellAxis | None:
        return None if self._known is None else self._known.location_axis()

    @property
    def _fit(self) -> SignalFit | None:
        return None if self._known is None else self._known.build_fit()

    @property
    def _noise_alone(self) -> bool:
        """Whether the noise is all that components share, a background aside.

        Its level, and parameters on which its shape depends.
        """
        assert isinstance(self.problem, ProblemLike)
        marginals, level = self._prior.shared_marginals, self.problem.noise_level
        linear = getattr(self._fit, "linear_shared", ())
        noise: set[int] = set(getattr(self._fit, "noise_shape", ()))
        others = {i for i in range(len(marginals)) if i not in linear}
        if level is not None:
            noise.add(level)
            if marginals[level].bounds[0] < 0:
                return False
        return bool(noise) and others == noise

    @property
    def _anchored(self) -> bool:
        if self.slots != "default":
            return self.slots == "anchored"
        asked = (self.encoder, self.domains, self.encoder_options)
        usual = self.chart == "default" and self.trunk_features is not None
        return (
            usual
            and not any(option is not None and option != {} for option in asked)
            and self._axis is not None
        )

    @torch.no_grad()
    def _slots(self, encoder: nn.Module, x: Tensor) -> dict[str, Any]:
        """Kind and options of the slots."""
        trunk = 128 if self.trunk_features == "default" else self.trunk_features
        if not self._anchored:
            kind = self.slots
            if kind == "default":
                keeps_tokens = encode(encoder, x[:2]).tokens is not None
                usual = getattr(encoder, "usual_slots", "attention")
                kind = usual if keeps_tokens and trunk is not None else "global"
            if kind == "ordered":
                width = 64 if self.trunk_features == "default" else trunk
                return {"kind": kind, "trunk_features": width}
            sees_k = self.condition_on_cardinality
            return {
                "kind": kind,
                "trunk_features": trunk,
                "condition_on_cardinality": True if sees_k is None else sees_k,
            }
        axis = self._axis
        if axis is None:
            raise ValueError(
                "slots='anchored' need a problem that declares where components are: "
                "location_axis() and build_token_encoder(), see Problem."
            )
        coupling, steps = self.coupling or "joint", self.refine_slots
        if steps is None:
            can = coupling == "joint" and self._fit is not None
            steps = _GAUSS_NEWTON_STEPS if can else 0
        options = {
            "kind": "anchored",
            "axis": asdict(axis),
            "coupling": coupling,
            "trunk_features": trunk,
            "refine_steps": steps,
            "fit": describe("fit", self._fit) if steps else None,
        }
        if steps:
            # The evidence of cells takes components as independent of each other.
            usual = 512 if self._prior.population is None else 0
            sets = self.weighed_sets
            options["weighed_sets"] = usual if sets is None else sets
        return options

    def _flow(self, slots: dict[str, Any]) -> dict[str, Any]:
        """Options of the flow; cells have no use for a Gaussian layer."""
        pooled = slots["kind"] != "anchored"
        scale = pooled if self.location_scale is None else self.location_scale
        return {
            "hidden_features": self.flow_hidden_features or 64,
            "num_layers": self.flow_layers,
            "num_bins": self.flow_bins or 8,
            "tail_bound": self.tail_bound or 5.0,
            "num_blocks": self.flow_blocks or 1,
            "network": self.flow_network or "projected",
            "location_scale": scale,
        }

    def _check_classes(self) -> None:
        """Raise ValueError where components have classes and slots know none."""
        if not isinstance(self._prior, MultiClassPrior):
            return
        if self._known is None:
            raise ValueError(
                "slot_nn needs a problem where components have classes, which says "
                "where those of each are: sbi_slotflow.problems.Classes."
            )
        if not self._anchored:
            raise ValueError(
                "components of several classes need cells: leave slots, encoder and "
                "chart at their defaults."
            )
        if self.coupling == "factorised":
            raise ValueError(
                "components of several classes need coupling='joint', got "
                f"{self.coupling!r}."
            )

    def _check_population(self) -> None:
        """Raise ValueError if options do not go with components of a population."""
        if self._prior.population is None:
            return
        if not self.shared_head:
            raise ValueError(
                "shared_head=False draws shared parameters from their prior, on which "
                "the components of this prior depend: leave it True."
            )
        if self.weighed_sets:
            raise ValueError(
                "weighed_sets must be 0 where the prior's component is a function of "
                "shared parameters: the evidence of cells takes components as "
                f"independent of each other, got {self.weighed_sets}."
            )

    def _check_used(self, slots: dict[str, Any]) -> None:
        """Raise ValueError if an option is set that has nothing to configure."""
        anchored, joint = slots["kind"] == "anchored", _is_joint(slots)
        pooled = slots["kind"] in ("attention", "global")
        steps, layers = slots.get("refine_steps", 0), self.flow_layers
        scaled = not anchored and self.location_scale is not False
        shared = bool(self._prior.shared_marginals)
        asked = {
            **vars(self),
            "trunk_features": self.trunk_features != "default",
            "trunk_features=None": self.trunk_features is None,
            "shared_head=False": not self.shared_head,
            "loss_weights[2]": self.loss_weights[2] != 1.0,
        }
        for name in _OF_SLOTS:
            asked[name] = asked[name] is not None
        # Whether what options configure is there, what it is, and the options.
        for used, need, *names in (
            (self.encoder is None, "the problem's own encoder", *_OF_ENCODER),
            (anchored, "slots='anchored'", "coupling"),
            (anchored and joint, _JOINT, "refine_slots"),
            (steps, "refine_slots", "weighed_sets"),
            (not joint, "slots that are independent", "matching"),
            (pooled, "slots='attention' or slots='global'", *_OF_SLOTS),
            (
                layers or not steps,
                "a flow: flow_layers=0 with refine_slots has no trunk",
                "trunk_features",
            ),
            (slots["kind"] == "global", "slots='global'", "trunk_features=None"),
            (layers, "flow_layers > 0", *_OF_LAYERS),
            (layers or scaled, "flow_layers > 0", "flow_hidden_features"),
            (shared, "shared parameters", "shared_head=False", "loss_weights[2]"),
        ):
            for name in names:
                if asked[name] and not used:
                    raise ValueError(f"{name} would do nothing: it needs {need}.")

    def _chart(self) -> Chart:
        if self.chart == "circle":
            return CircleChart(
                self._prior.component_marginals,
                self.phase_weight or 1.0,
                self.frequency_weight or 1.0,
            )
        if self.phase_weight is not None or self.frequency_weight is not None:
            raise ValueError(
                "phase_weight and frequency_weight scale the paper's coordinates; set "
                'chart="circle" to use them (a true chart has nothing to weight).'
            )
        if isinstance(self.chart, Chart):
            return self.chart
        if self._known is None:
            return WhiteningChart(self._prior.component_marginals)
        return self._known.build_chart()


def _is_joint(slots: dict[str, Any]) -> bool:
    return slots["kind"] == "ordered" or slots.get("coupling") == "joint"
