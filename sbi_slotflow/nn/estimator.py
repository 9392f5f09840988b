r"""The trans-dimensional density estimator q(K, Theta, s | x).

.. math::
    \log q = \log q(K | x) + \log q(s | x, K) + \log q(\{\theta_1..\theta_K\} | x, K)

An encoder embeds x; three heads give the three terms: the cardinality's classifier,
the shared parameters' density, and the components' (the paper's eq. 18, summed over
assignments, so that it is the density of the *set*).
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn

from ..seeding import forked_rng, generator_for
from ..sets.checks import check_finite
from ..sets.marginals import Marginal
from ..sets.prior import cardinality_weights
from ..sets.records import filled
from ..storage import read_tensors, write_tensors
from .autoregressive_head import NO_FIT, AutoregressiveHead
from .background_head import BackgroundHead
from .cardinality_evidence import CardinalityEvidence
from .charts import Chart, chart_from_spec
from .encoders import Encoding, Observations, encode
from .gauss_newton import SignalFit
from .heads import (
    CardinalityHead,
    SharedGivenX,
)
from .heads_from_spec import component_head_from_spec, shared_head_from_spec
from .set_distribution import NetworkSets, SetsGivenK
from .shape_head import ShapeHead
from .spec import EstimatorSpec, build, single_precision

__all__ = ["SlotDensityEstimator"]

_FORMAT = "sbi_slotflow.SlotDensityEstimator"
_VERSION = 2
# Standard deviations of the training data beyond which x is refused: powers of it would
# overflow.
_FARTHEST = 1e12


class SlotDensityEstimator(ConditionalDensityEstimator):
    """Density estimator over theta rows; what :class:`~sbi_slotflow.slot_nn` builds.

    Args:
        spec: The estimator's description.
        encoder: The encoder, if ``spec.encoder`` does not describe one.
        fit: The signal that refined slots fit, if the spec does not describe it.

    Raises:
        ValueError: If neither gives an encoder, or a fit where one is needed.
    """

    x_shift: Tensor
    x_scale: Tensor
    white_scale: Tensor

    @single_precision()
    def __init__(
        self,
        spec: EstimatorSpec,
        encoder: nn.Module | None = None,
        fit: SignalFit | None = None,
    ) -> None:
        if encoder is None:
            if spec.encoder is None:
                raise ValueError(
                    "encoder must be given: this estimator was built with a module of "
                    "the user's own, which a file cannot describe."
                )
            encoder = cast(nn.Module, build("encoder", spec.encoder))
        described = spec.slots.get("fit")
        if fit is None and described is not None:
            fit = cast(SignalFit, build("fit", described))
        if fit is None and spec.slots.get("refine_steps"):
            raise ValueError(NO_FIT)
        layout = spec.layout
        super().__init__(encoder, torch.Size((layout.size,)), spec.event)
        self.spec = spec
        self.layout = layout
        with torch.no_grad():
            probe = encode(encoder, torch.zeros(2, *spec.event))
        weights = torch.tensor(spec.cardinality_weights)
        self.cardinality_head = CardinalityHead(
            probe.cardinality.shape[-1], weights.log()
        )
        # Where noise is white and a background gone, if that is not where data are.
        self.fit, self.white_space = fit, getattr(fit, "space", None)
        mark = None if self.white_space is None else self.white_space.mark
        if not _same(mark, spec.white_space):
            raise ValueError(
                "fit is not the one that this estimator was built with: its noise or "
                "background is another."
            )
        self.shared_head = shared_head_from_spec(spec, probe.shared.shape[-1], fit)
        self.component_head = component_head_from_spec(spec, probe, fit)
        self.register_buffer("x_shift", torch.zeros(()))
        self.register_buffer("x_scale", torch.ones(()))
        if self.white_space is not None:
            self.register_buffer("white_scale", torch.ones(()))

    @property
    def chart(self) -> Chart:
        """The components' chart."""
        return self.component_head.chart

    @property
    def keeps_separation(self) -> bool:
        """Whether draws keep the prior's least separation by construction."""
        return self.component_head.keeps_separation

    @property
    def reads_records(self) -> bool:
        """Whether x is records of time, value and error.

        See :mod:`~sbi_slotflow.sets.records`.
        """
        return bool(getattr(self.net, "reads_records", False))

    def filled(self, x: Tensor) -> Tensor:
        """Observations ``(..., *event)`` without NaN, where x may have gaps."""
        return getattr(self.net, "filled", filled)(x)

    @property
    def embedding_net(self) -> nn.Module:
        """The encoder."""
        return self.net

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Return the training loss ``(B,)``: the weighted sum of :meth:`loss_terms`.

        Other keywords, which sbi's trainers may pass, are ignored.
        """
        return self.weigh(self.loss_terms(input, condition))

    def weigh(self, terms: dict[str, Tensor]) -> Tensor:
        """Add up the terms of :meth:`loss_terms` with the spec's weights (eq. 20)."""
        names = ("cardinality", "flow", "shared")
        pairs = zip(self.spec.loss_weights, names, strict=True)
        return torch.stack([weight * terms[name] for weight, name in pairs]).sum(0)

    def loss_terms(
        self, input: Tensor, condition: Tensor, part: Literal["all", "cells"] = "all"
    ) -> dict[str, Tensor]:
        """Return the unweighted terms of the loss, each of shape ``(B,)``.

        ``cardinality`` is the cross-entropy, ``flow`` the matched components' negative
        log density in the chart's coordinates where the chart is no density, else in
        theta; ``shared`` the shared parameters' negative log density. ``correct`` is 1
        where the most probable K is the true one; it carries no gradient.

        Args:
            input: Theta rows, shape ``(B, E)``.
            condition: Data, shape ``(B, *event)``.
            part: ``"cells"`` leaves out all densities but those of the cardinality and
                of the components' cells: a first stage of training without fits.

        Raises:
            TypeError, ValueError: If theta or x is malformed, the training prior
                excludes a row's K, or there are no cells to train.
        """
        self.layout.validate(input, "input")
        condition = self.checked(condition)
        if len(input) != len(condition):
            raise ValueError(
                "input and condition must be batches of one size, got "
                f"{len(input)} and {len(condition)}."
            )
        parts = self.layout.unpack(self.layout.canonical(input))
        excluded = ~torch.isfinite(self.cardinality_head.log_prior)[parts.cardinality]
        if excluded.any():
            raise ValueError(
                "input holds a cardinality that the training prior excludes: K = "
                f"{int(parts.cardinality[excluded][0])}."
            )
        encoding = self.encode(condition)
        log_k = self.cardinality_head(encoding.cardinality)
        owner = torch.arange(len(input), device=input.device)
        head = self.component_head
        shared_head = self.shared_given(encoding, condition)
        if part == "all":
            matching = self.spec.matching
            data = Observations(condition, self._unit)
            sets = head.in_training(encoding, data, shared_head, matching)
            log_flow, log_shared = sets.log_terms(parts, owner)
        elif isinstance(head, AutoregressiveHead):
            log_flow = head.log_prob_cells(parts, encoding)
            log_shared = torch.zeros_like(log_flow)
        else:
            raise ValueError("part='cells' needs slots that stand in cells, jointly.")
        flow, shared = -log_flow, -log_shared
        if self.spec.mean_flow_loss:
            flow = flow / parts.cardinality.clamp(min=1)
        chosen = log_k.gather(-1, parts.cardinality.unsqueeze(-1)).squeeze(-1)
        return {
            "cardinality": -chosen,
            "flow": flow,
            "shared": shared,
            "correct": (log_k.argmax(-1) == parts.cardinality).float().detach(),
        }

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Evaluate the log density of sets.

        Args:
            input: Theta rows, shape ``(S, B, E)`` or ``(B, E)``, in any order.
            condition: Data, shape ``(B, *event)`` (or ``(S, B, *event)``).
            kwargs: Ignored; sbi may pass its own.

        Returns:
            Log densities, shape ``(S, B)`` (S = 1 if ``input`` has no sample axis).

        Raises:
            NotImplementedError: If the chart's image is a surface, as in
                ``slot_nn.paper()``: its likelihood is no density of theta.
            TypeError, ValueError: If theta or x is malformed.
        """
        self.layout.validate(input, "input")
        event = self.condition_shape
        if isinstance(condition, Tensor) and condition.ndim > 1 + len(event):
            input, condition, _ = self._broadcast_and_align(input, condition)
            flat = self.log_prob(
                input.reshape(-1, input.shape[-1]), condition.reshape(-1, *event)
            )
            return flat.reshape(input.shape[:2])
        condition = self.checked(condition)
        if input.ndim == 2:
            input = input.unsqueeze(0)
        num = max(input.shape[1], len(condition))
        if input.shape[1] not in (1, num) or len(condition) not in (1, num):
            raise ValueError(
                "input and condition must have matching batch sizes, got "
                f"{input.shape[1]} and {len(condition)}."
            )
        return self.given(condition).log_prob(input)

    def log_prob_cardinality(self, condition: Tensor) -> Tensor:
        """Evaluate log q(K | x) of data ``(B, *event)``, shape ``(B, Kmax + 1)``."""
        return self.given(condition).log_cardinality

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int],
        condition: Tensor,
        cardinality: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draw theta rows, in canonical order, in one batched pass.

        Args:
            sample_shape: Shape of the draws for each observation.
            condition: Data, shape ``(B, *event)``.
            cardinality: K of each draw, broadcastable to ``(*sample_shape, B)``; drawn
                from q(K | x) if None.
            generator: Source of randomness; torch's global generator if None.
            kwargs: Ignored; sbi may pass its own.

        Returns:
            Rows of shape ``(*sample_shape, B, E)``.

        Raises:
            TypeError, ValueError: If x is malformed or a K is out of range.
        """
        sets = self.given(condition)
        if cardinality is None:
            return sets.sample(sample_shape, generator=generator)
        shape = torch.Size((*sample_shape, len(condition)))
        k = self._checked_cardinality(cardinality).expand(shape).reshape(-1)
        owner = sets.owners(shape[:-1].numel())
        return sets.draw(owner, k, generator).reshape(*shape, self.layout.size)

    @property
    def has_evidence(self) -> bool:
        """Whether sets of cells are weighed, so that p(K | x) can be."""
        head = self.component_head
        if not isinstance(head, AutoregressiveHead) or head.find_modes is None:
            return False
        known = getattr(self.fit, "variance", None) is not None
        return head.weighed_sets > 0 and (known or self._noise is not None)

    @property
    def _noise(self) -> Marginal | None:
        """Prior of the noise level, if components share it."""
        spec, index = self.spec, self.spec.noise_index
        if spec.shared_chart is None or (index is None and not spec.noise_from_fit):
            return None
        # Where files do not say which it is, it is the only one.
        return chart_from_spec(spec.shared_chart).marginals[index or 0]

    def given(self, x: Tensor, by_evidence: float = 0.0) -> NetworkSets:
        """Return the distribution over sets given data ``(B, *event)``.

        It encodes x once and holds all that is remembered of it.

        Args:
            x: Data.
            by_evidence: Share of the evidence of sets of cells in q(K | x), see
                :mod:`.cardinality_evidence`; the rest is the classifier's.

        Raises:
            TypeError, ValueError: If x is malformed, or there is no evidence.
        """
        if by_evidence and not self.has_evidence:
            raise ValueError(
                "by_evidence needs sets of cells that are weighed: joint slots in "
                "cells, Gauss-Newton steps, and noise whose level is known or shared."
            )
        x = self.checked(x)
        encoding, head = self.encode(x), self.component_head
        log_k = self.cardinality_head(encoding.cardinality)

        def sets() -> SetsGivenK:
            data = Observations(x, self._unit)
            shared = self.shared_given(encoding, x)
            return head.given(encoding, data, shared)

        def weigh(sets: SetsGivenK, log_network: Tensor) -> Tensor:
            evidence = self._evidence(x, 1 - by_evidence)
            return evidence(cast(Any, sets).parts, log_network)

        weighing = weigh if by_evidence else None
        return NetworkSets(self.layout, log_k, head, sets, weighing)

    def _evidence(self, x: Tensor, share: float = 0.0) -> CardinalityEvidence:
        """What turns the evidence of cells of x into p(K | x)."""
        head = cast(AutoregressiveHead, self.component_head)
        least = cast(SignalFit, self.fit).given(x)
        counts = least.counts
        if counts is None:
            counts = torch.full((len(x),), least.data.shape[-1], device=x.device)
        noise = None if least.variance is not None else self._noise
        log_prior = self.cardinality_head.log_prior.double()
        taken = len(self._linear_shared()) + len(getattr(self.fit, "noise_shape", ()))
        counts = counts - taken
        return CardinalityEvidence(head.local_chart, log_prior, counts, noise, share)

    def encode(self, condition: Tensor) -> Encoding:
        """Embed checked data; see :class:`~sbi_slotflow.nn.Encoding`."""
        if self.white_space is not None:
            seen = self.white_space.given(condition).data / self._unit.double()
            return encode(self.net, seen.to(self.x_scale).reshape(condition.shape))
        return encode(self.net, (condition - self.x_shift) / self.x_scale)

    def shared_given(
        self, encoding: Encoding, x: Tensor | None = None
    ) -> SharedGivenX | None:
        """Return the shared parameters' density given x; None if there are none.

        x ``(B, T)`` itself is asked for where they are read off a fit's residual.
        """
        if self.shared_head is None:
            return None
        sizes, moments = self.layout.max_cardinality + 1, None
        if isinstance(self.shared_head, BackgroundHead | ShapeHead):
            assert self.fit is not None
            assert x is not None
            moments = self.shared_head.reads(self.fit.given(x))
        return SharedGivenX(self.shared_head, encoding.shared, sizes, moments)

    @property
    def _unit(self) -> Tensor:
        """The unit in which networks are told of levels, ``()``."""
        return self.x_scale if self.white_space is None else self.white_scale

    def _linear_shared(self) -> tuple[int, ...]:
        """Shared parameters in which a background is linear that is fitted beside."""
        return getattr(self.fit, "linear_shared", ())

    def set_cardinality_prior(self, weights: Sequence[float] | Tensor) -> None:
        """Put another prior p(K) into eq. 10, in place.

        Args:
            weights: Weights of K = 0..Kmax; zero excludes a cardinality.

        Raises:
            ValueError: If they are not Kmax + 1 valid weights, or give weight to a
                cardinality that training excluded.
        """
        probs = cardinality_weights(weights)
        trained = torch.tensor(self.spec.cardinality_weights)
        if len(probs) != len(trained):
            raise ValueError(
                f"weights must hold {len(trained)} numbers for K = "
                f"0..{len(trained) - 1}, got {len(probs)}."
            )
        if (probs[trained == 0] > 0).any():
            raise ValueError(
                "weights must be zero where the training prior is zero: the network "
                "never saw those cardinalities."
            )
        self.cardinality_head.log_prior.copy_(probs.log())

    def standardize(self, x: Tensor) -> None:
        """Fix the shift and scale of x from a batch of data, in place."""
        x = x.double()  # squares of float32 may vanish or overflow
        scale = x.std()
        self.x_shift.copy_(x.mean())
        self.x_scale.copy_(scale if scale > 0 else torch.ones_like(scale))
        if self.white_space is not None:
            scale = self.white_space.given(x).data.std()
            self.white_scale.copy_(scale if scale > 0 else torch.ones_like(scale))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to one file: safetensors, the spec as JSON in its header.

        The file, by custom ``*.safetensors``, is written aside and moved into place, so
        that an interrupted save leaves the old one whole.
        """
        meta = {"format": _FORMAT, "version": _VERSION, "spec": self.spec.to_json()}
        write_tensors(path, self.state_dict(), meta)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        encoder: nn.Module | None = None,
        fit: SignalFit | None = None,
    ) -> "SlotDensityEstimator":
        """Read an estimator; nothing in the file is executed.

        Args:
            path: A file that :meth:`save` wrote.
            encoder: The encoder's architecture, if it was the user's own; its weights
                are read from the file.
            fit: The signal of refined slots, if it was the user's own.

        Returns:
            The estimator, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is corrupt, holds something else, or does not fit
                the encoder.
        """
        tensors, meta = read_tensors(path, _FORMAT, _VERSION)
        try:
            spec = EstimatorSpec.from_json(meta["spec"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            # The initial weights are overwritten: their draws leave no trace.
            with forked_rng(generator_for(0)):
                estimator = cls(spec, encoder, fit)
            estimator.load_state_dict(tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit its spec: {error}") from error
        return estimator.eval()

    def checked(self, condition: Tensor) -> Tensor:
        """Return x in float32, if it is a finite batch on the data's scale.

        Raises:
            TypeError, ValueError: If it is not.
        """
        if not isinstance(condition, Tensor) or not condition.is_floating_point():
            kind = getattr(condition, "dtype", type(condition).__name__)
            raise TypeError(f"x must be a floating-point tensor, got {kind}.")
        event = self.condition_shape
        if condition.ndim != 1 + len(event) or condition.shape[1:] != event:
            sizes = ", ".join(map(str, event))
            raise ValueError(
                f"x must have shape (batch, {sizes}), got {tuple(condition.shape)}."
            )
        if self.reads_records:
            condition = self.filled(condition)
        # Beneath a background, digits are kept until it is taken away; those of times
        # are kept too.
        keeps = self.white_space is not None or self.reads_records
        kept = keeps and condition.dtype == torch.float64
        condition = condition if kept else condition.to(self.x_scale.dtype)
        far = (condition - self.x_shift).abs().amax() if condition.numel() else 0.0
        if not far < _FARTHEST * self.x_scale:  # nor is NaN
            check_finite(condition)
            if getattr(self.net, "reads_any_scale", False):
                return condition
            raise ValueError(
                f"x must be on the scale of the training data, {self.x_scale:.3g}, got "
                f"values as far as {far:.3g} from their mean."
            )
        return condition

    def _checked_cardinality(self, cardinality: Tensor) -> Tensor:
        k = torch.as_tensor(cardinality, device=self.x_scale.device)
        largest = self.layout.max_cardinality
        if k.is_floating_point() or ((k < 0) | (k > largest)).any():
            raise ValueError(
                f"cardinality must hold integers in 0..{largest}, got "
                f"{k.flatten()[:5].tolist()}."
            )
        return cast(Tensor, k.long())


def _same(found: tuple[float, ...] | None, expected: tuple[float, ...] | None) -> bool:
    """Whether numbers agree but for rounding."""
    if found is None or expected is None or len(found) != len(expected):
        return found is None and expected is None
    pairs = zip(found, expected, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs)
