"""Builders of slot density estimators, for sbi's ``density_estimator=`` argument."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from ..sets.prior import VariableKPrior
from .cells import CellAxis
from .charts import Chart, WhiteningChart
from .encoders import MLPEncoder, encode
from .estimator import SlotDensityEstimator
from .gauss_newton import SignalFit
from .paper.circle import CircleChart
from .registry import describe
from .spec import EstimatorSpec, Matching

__all__ = ["Coupling", "ProblemLike", "slot_nn"]

Coupling = Literal["joint", "factorised"]


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

    ``NPE(prior, density_estimator=slot_nn(problem))``. The defaults are the paper's
    architecture in small sizes with a true chart: training on simulations takes
    minutes on a CPU. :meth:`paper` gives the paper's sizes.

    Attributes:
        problem: The problem, or a bare :class:`~sbi_slotflow.VariableKPrior` (then
            each parameter is whitened on its own and x read by an MLP, unless
            ``chart`` and ``encoder`` say otherwise). ``SlotNPE`` fills it in from its
            prior if it is None.
        chart: ``"default"`` asks the problem for a true chart, ``"circle"`` takes the
            paper's (:class:`CircleChart`); or a chart of your own.
        encoder: A module of your own, mapping x ``(B, T)`` to ``(B, C)``; sbi's
            embedding nets fit. None asks the problem for one.
        domains: Domain of each stream, see :class:`DualStreamEncoder`; None leaves the
            problem's own.
        matching: ``"hungarian"`` (the paper), ``"permanent"`` (the likelihood of the
            set) or ``"ordered"`` (slot i learns the i-th component in canonical order).
            Slots part ways soonest under the first; the second ends at the highest
            likelihood where components overlap.
        phase_weight: Weight w_phi of the paper's chart; needs ``chart="circle"``.
        frequency_weight: Weight w_f of the paper's chart; needs ``chart="circle"``.
        slots: ``"anchored"`` (each slot is anchored at a token of the problem's
            location axis, see :mod:`.cell_head`), ``"attention"`` (each slot looks
            for its component among the encoder's tokens) or ``"global"`` (the paper:
            all slots read one pooled vector). ``"default"`` is anchored where the
            problem declares a location and nothing is asked of encoder or chart; else
            attention where the encoder keeps tokens.
        coupling: Of anchored slots: ``"joint"`` (each component given those below it)
            or ``"factorised"`` (independent given x and K, the paper's eq. 18).
        refine_slots: Gauss-Newton steps from the anchors, of joint anchored slots; 0
            for none. They need a problem whose signal can be fitted.
        weighed_sets: Sets of anchors at most that refined slots weigh by their evidence
            at inference, for each observation and K; 0 leaves them to the network.
        shared_head: Whether the shared parameters are inferred (the paper's noise
            head); else draws come from their prior.
        condition_on_cardinality: Whether a slot sees K.
        mean_flow_loss: Whether the flow's loss is averaged over components.
        hidden_features: Width of the encoder's embeddings.
        trunk_features: Width of the slots; None, for global slots only, leaves the
            parts of a slot's context side by side.
        flow_layers: Coupling layers of the flow; 0 for none: with ``refine_slots``,
            the Gaussians that were fitted, cut off at their cells' ends.
        flow_hidden_features: Width of the flow's networks.
        flow_bins: Bins of the splines.
        flow_blocks: Residual blocks in each of the flow's networks.
        flow_network: ``"projected"`` or ``"residual"``, see :class:`ConditionalFlow`.
        tail_bound: Half width of the splines' interval.
        location_scale: Whether a Gaussian layer stands next to the data.
        encoder_options: Further options of the problem's encoder.
        z_score_x: Whether x is shifted and scaled by one number each.
        loss_weights: Weights of the cardinality, flow and shared terms.
    """

    problem: ProblemLike | VariableKPrior | None = None
    chart: Literal["default", "circle"] | Chart = "default"
    encoder: nn.Module | None = None
    domains: Sequence[str] | None = None
    matching: Matching = "hungarian"
    phase_weight: float = 1.0
    frequency_weight: float = 1.0
    slots: Literal["default", "anchored", "attention", "global"] = "default"
    coupling: Coupling = "joint"
    refine_slots: int = 0
    weighed_sets: int = 512
    shared_head: bool = True
    condition_on_cardinality: bool = True
    mean_flow_loss: bool = False
    hidden_features: int = 128
    trunk_features: int | None = 128
    flow_layers: int = 4
    flow_hidden_features: int = 64
    flow_bins: int = 8
    flow_blocks: int = 1
    flow_network: Literal["projected", "residual"] = "projected"
    tail_bound: float = 5.0
    location_scale: bool = True
    encoder_options: dict[str, Any] | None = None
    z_score_x: bool = True
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        _check_choice("matching", self.matching, get_args(Matching))
        _check_choice("flow_network", self.flow_network, ("projected", "residual"))
        kinds = ("default", "anchored", "attention", "global")
        _check_choice("slots", self.slots, kinds)
        _check_choice("coupling", self.coupling, get_args(Coupling))
        if self.refine_slots < 0:
            raise ValueError(
                f"refine_slots must not be negative, got {self.refine_slots}."
            )
        if self.weighed_sets < 0:
            raise ValueError(
                f"weighed_sets must not be negative, got {self.weighed_sets}."
            )
        if not isinstance(self.chart, Chart):
            _check_choice("chart", self.chart, ("default", "circle"))

    @classmethod
    def paper(cls, problem: ProblemLike | None = None, **changes: Any) -> "slot_nn":
        r"""The paper's network: embeddings of 256, flow of 768, 31 million parameters.

        Where the paper's text and its authors' code differ, this preset follows

        - the text: couplings (the code has masked autoregressive layers with reversed
          instead of random permutations);
        - the text: signals are cosines (the code generates sines); the encoder does
          not care, the simulator does;
        - both: convolution strides 2, 2, 1 with kernels 8, 8, 5 (section 3.1; section
          3.6 has kernel 8 and stride 2 throughout);
        - the code: a global context of 2 x 256, which with the flow's residual networks
          gives the 31 million parameters (eq. 12 has 256);
        - the code: frequencies are centred on the middle of the band, 2.75 Hz (the text
          says so too, but its formula subtracts 2.7);
        - the text: weights w_phi = 2 and w_f = 3, Hungarian matching, the flow's loss
          averaged over components, no K in the slot contexts, tail bound 2 (which the
          weighted phase circle touches);
        - neither for the noise: instead of regressing a sampled sigma, sigma has a
          density trained by likelihood, read from convolutions of its own.

        Its chart is a surface, so ``log_prob`` raises; sampling works, and training by
        ``SlotNPE.train_online`` (sbi's own loop evaluates ``log_prob``). Use the
        default ``slot_nn()`` for densities.

        Args:
            problem: A sinusoid problem; see the class.
            changes: Fields to change, for the paper's ablations: ``domains``,
                ``phase_weight``, ``frequency_weight``, ``flow_layers``,
                ``shared_head``.
        """
        preset = cls(
            problem=problem,
            chart="circle",
            matching="hungarian",
            slots="global",
            phase_weight=2.0,
            frequency_weight=3.0,
            condition_on_cardinality=False,
            mean_flow_loss=True,
            hidden_features=256,
            trunk_features=None,
            flow_layers=8,
            flow_hidden_features=768,
            flow_bins=48,
            flow_blocks=2,
            flow_network="residual",
            tail_bound=2.0,
            location_scale=False,
            z_score_x=False,
            encoder_options={
                "channels": (32, 64, 128),
                "kernels": (8, 8, 5),
                "strides": ((2, 2, 1), (2, 2, 1)),
                "context_features": 512,
                "noise_stack": True,
                "residual": False,
                "centre_phase": False,
                "bands": None,
            },
        )
        return replace(preset, **changes)

    def __call__(self, theta: Tensor, x: Tensor) -> SlotDensityEstimator:
        """Build an estimator.

        Args:
            theta: Theta rows, shape ``(B, E)``; checked against the prior's layout.
            x: Data, shape ``(B, T)``; gives the length of x and its scale.

        Returns:
            An untrained estimator.

        Raises:
            TypeError, ValueError: If theta or x is malformed, a field does not fit, or
                the problem is missing.
        """
        prior = self._prior
        prior.layout.validate(theta)
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}.")
        if x.ndim != 2:
            raise ValueError(f"x must have shape (batch, T), got {tuple(x.shape)}.")
        if not torch.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or Inf.")
        if len(theta) != len(x):
            raise ValueError(
                "theta and x must be batches of one size, got "
                f"{len(theta)} and {len(x)}."
            )
        encoder, described = self._encoder(x.shape[-1])
        chart = self._chart()
        shared = prior.shared_marginals
        spec = EstimatorSpec(
            layout=prior.layout,
            num_data=x.shape[-1],
            cardinality_weights=tuple(prior.cardinality_probs.tolist()),
            chart=chart.spec,
            shared_chart=WhiteningChart(shared).spec if shared else None,
            encoder=described,
            shared_head=self.shared_head,
            noise_from_fit=self._noise_from_fit,
            flow={
                "hidden_features": self.flow_hidden_features,
                "num_layers": self.flow_layers,
                "num_bins": self.flow_bins,
                "tail_bound": self.tail_bound,
                "num_blocks": self.flow_blocks,
                "network": self.flow_network,
                "location_scale": self.location_scale,
            },
            slots=self._slots(encoder, x),
            matching=self.matching,
            mean_flow_loss=self.mean_flow_loss,
            loss_weights=self.loss_weights,
        )
        fit = self._fit if self.refine_slots else None
        estimator = SlotDensityEstimator(spec, encoder, fit)
        if self.z_score_x:
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
            if options:
                raise ValueError(
                    "domains and encoder_options configure the problem's encoder; they "
                    "do nothing beside an encoder of your own."
                )
            # A copy: two estimators from one builder share no weights.
            return deepcopy(self.encoder), describe("encoder", self.encoder)
        if isinstance(self.problem, VariableKPrior):
            encoder: nn.Module = MLPEncoder(
                num_data, hidden_features=self.hidden_features, **options
            )
        else:
            assert self.problem is not None
            built = None
            if self._anchored:
                built = self.problem.build_token_encoder(
                    hidden_features=self.hidden_features, **options
                )
            encoder = built or self.problem.build_encoder(
                hidden_features=self.hidden_features, **options
            )
        return encoder, describe("encoder", encoder)

    @property
    def _axis(self) -> CellAxis | None:
        if self.problem is None or isinstance(self.problem, VariableKPrior):
            return None
        return self.problem.location_axis()

    @property
    def _fit(self) -> SignalFit | None:
        if self.problem is None or isinstance(self.problem, VariableKPrior):
            return None
        return self.problem.build_fit()

    @property
    def _noise_from_fit(self) -> bool:
        """Whether sigma of white noise is all that components share."""
        if not self.refine_slots or not isinstance(self.problem, ProblemLike):
            return False
        marginals = self._prior.shared_marginals
        alone = self.problem.noise_level == 0 and len(marginals) == 1
        return alone and marginals[0].bounds[0] >= 0

    @property
    def _anchored(self) -> bool:
        if self.slots != "default":
            return self.slots == "anchored"
        asked = (self.encoder, self.domains, self.encoder_options)
        usual = self.chart == "default" and self.trunk_features is not None
        return (
            usual and all(option is None for option in asked) and self._axis is not None
        )

    @torch.no_grad()
    def _slots(self, encoder: nn.Module, x: Tensor) -> dict[str, Any]:
        if self._anchored:
            axis = self._axis
            if axis is None:
                raise ValueError(
                    "slots='anchored' need a problem that declares where components "
                    "are: location_axis() and build_token_encoder(), see Problem."
                )
            options = {
                "kind": "anchored",
                "axis": asdict(axis),
                "coupling": self.coupling,
                "trunk_features": self.trunk_features or 128,
                "refine_steps": self.refine_slots,
                "fit": None,
            }
            if self.refine_slots:
                options["fit"] = describe("fit", self._fit)
                options["weighed_sets"] = self.weighed_sets
            return options
        if self.refine_slots:
            raise ValueError("refine_slots needs slots='anchored'.")
        kind = self.slots
        if kind == "default":
            keeps_tokens = encode(encoder, x[:2]).tokens is not None
            attention = keeps_tokens and self.trunk_features is not None
            kind = "attention" if attention else "global"
        return {
            "kind": kind,
            "trunk_features": self.trunk_features,
            "condition_on_cardinality": self.condition_on_cardinality,
        }

    def _chart(self) -> Chart:
        weighted = self.phase_weight != 1.0 or self.frequency_weight != 1.0
        if self.chart == "circle":
            return CircleChart(
                self._prior.component_marginals,
                self.phase_weight,
                self.frequency_weight,
            )
        if weighted:
            raise ValueError(
                "phase_weight and frequency_weight scale the paper's coordinates; set "
                'chart="circle" to use them (a true chart has nothing to weight).'
            )
        if isinstance(self.chart, Chart):
            return self.chart
        if isinstance(self.problem, VariableKPrior):
            return WhiteningChart(self.problem.component_marginals)
        assert self.problem is not None
        return self.problem.build_chart()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")
