r"""The trans-dimensional density estimator q(K, Theta, s | x).

.. math::
    \log q = \log q(K | x) + \log q(s | x, K)
        + \log \mathrm{perm}\left[ q_i(\theta_j | x, K) \right]_{i, j \le K}

with :math:`q_i(\theta | x, K) = q(u | c_i) |\det \partial u / \partial \theta|`: slot
i's context conditions the shared flow, the chart carries its density back to theta. The
permanent makes the density that of the *set* (the paper's eq. 18, summed over
assignments); it is the same for every relabelling and integrates to 1 over the
canonical region.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn

from ..layout import ThetaLayout, ThetaParts
from ..prior import cardinality_weights
from ..storage import read_tensors, write_tensors
from .charts import Chart, chart_from_spec
from .encoders import Encoding, encode, encoder_from_spec
from .flows import ConditionalFlow
from .heads import CardinalityHead, PriorSharedHead, SharedHead
from .matching import hungarian, log_permanent
from .slots import IndexedSlots

__all__ = ["EstimatorSpec", "Matching", "SlotDensityEstimator"]

Matching = Literal["hungarian", "permanent", "ordered"]
_FORMAT = "sbi_slotflow.SlotDensityEstimator"
_VERSION = 1


@dataclass(frozen=True)
class EstimatorSpec:
    """Everything that rebuilds an estimator but its weights; plain JSON.

    Attributes:
        layout: Fields of the :class:`~sbi_slotflow.ThetaLayout`.
        num_data: Length T of x.
        cardinality_weights: Training prior p(K), K = 0..Kmax.
        chart: Spec of the components' chart.
        shared_chart: Spec of the shared parameters' chart, or None if there are none.
        encoder: Spec of the encoder, or None for a module of the user's own.
        shared_head: Whether the shared parameters are inferred; else draws come from
            their prior.
        flow: Options of the :class:`~sbi_slotflow.nn.ConditionalFlow`.
        slots: Options of the :class:`~sbi_slotflow.nn.IndexedSlots`.
        matching: How training matches slots with components.
        mean_flow_loss: Whether the flow's loss is averaged over components (the
            paper) instead of summed (the likelihood of the set).
        loss_weights: Weights of the cardinality, flow and shared terms of the loss.
    """

    layout: dict[str, Any]
    num_data: int
    cardinality_weights: list[float]
    chart: dict[str, Any]
    shared_chart: dict[str, Any] | None
    encoder: dict[str, Any] | None
    shared_head: bool = True
    flow: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    matching: Matching = "hungarian"
    mean_flow_loss: bool = False
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)


class SlotDensityEstimator(ConditionalDensityEstimator):
    """Density estimator over theta rows; what :class:`slot_nn` builds.

    Args:
        spec: The estimator's description.
        encoder: The encoder, if ``spec.encoder`` does not describe one.

    Raises:
        ValueError: If neither gives an encoder.
    """

    x_shift: Tensor
    x_scale: Tensor

    def __init__(self, spec: EstimatorSpec, encoder: nn.Module | None = None) -> None:
        if encoder is None:
            if spec.encoder is None:
                raise ValueError(
                    "encoder must be given: this estimator was built with a module of "
                    "the user's own, which a file cannot describe."
                )
            encoder = encoder_from_spec(spec.encoder)
        layout = ThetaLayout(
            **{
                **spec.layout,
                **{
                    name: tuple(spec.layout[name])
                    for name in ("component_names", "shared_names")
                },
            }
        )
        super().__init__(
            encoder, torch.Size((layout.size,)), torch.Size((spec.num_data,))
        )
        self.spec = spec
        self.layout = layout
        self.chart: Chart = chart_from_spec(spec.chart)
        with torch.no_grad():
            probe = encode(encoder, torch.zeros(2, spec.num_data))
        weights = torch.tensor(spec.cardinality_weights)
        self.cardinality_head = CardinalityHead(
            probe.cardinality.shape[-1], weights.log()
        )
        self.shared_head: SharedHead | PriorSharedHead | None = None
        if spec.shared_chart is not None:
            chart = chart_from_spec(spec.shared_chart)
            self.shared_head = (
                SharedHead(chart, probe.shared.shape[-1], layout.max_cardinality)
                if spec.shared_head
                else PriorSharedHead(chart)
            )
        self.slots = IndexedSlots(
            probe.context.shape[-1], layout.max_cardinality, **spec.slots
        )
        self.flow = ConditionalFlow(
            self.chart.num_features, self.slots.num_features, **spec.flow
        )
        self.register_buffer("x_shift", torch.zeros(()))
        self.register_buffer("x_scale", torch.ones(()))

    @property
    def embedding_net(self) -> nn.Module:
        """The encoder."""
        return self.net

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Return the training loss of each row.

        Args:
            input: Theta rows, shape ``(B, E)``.
            condition: Data, shape ``(B, T)``.
            kwargs: Ignored; sbi's trainers may pass their own.

        Returns:
            Shape ``(B,)``: the weighted sum of :meth:`loss_terms`.

        Raises:
            TypeError, ValueError: If theta or x is malformed, or the training prior
                excludes a row's K.
        """
        return self.weigh(self.loss_terms(input, condition))

    def weigh(self, terms: dict[str, Tensor]) -> Tensor:
        """Add up the terms of :meth:`loss_terms` with the spec's weights (eq. 20)."""
        names = ("cardinality", "flow", "shared")
        pairs = zip(self.spec.loss_weights, names, strict=True)
        return torch.stack([weight * terms[name] for weight, name in pairs]).sum(0)

    def loss_terms(self, input: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms of the loss, each of shape ``(B,)``.

        ``cardinality`` is the cross-entropy, ``flow`` the matched components' negative
        log density in the chart's coordinates where the chart is no density, else in
        theta; ``shared`` the shared parameters' negative log density. ``correct`` is 1
        where the most probable K is the true one; it carries no gradient.
        """
        self.layout.validate(input, "input")
        self.check_condition(condition)
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
        shared = log_k.new_zeros(len(input))
        if self.shared_head is not None:
            shared = -self.shared_head.log_prob(
                parts.shared, encoding.shared, owner, parts.cardinality
            )
        flow = -self._matched_log_prob(encoding.context, parts)
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
            condition: Data, shape ``(B, T)`` (or ``(S, B, T)``).
            kwargs: Ignored; sbi may pass its own.

        Returns:
            Log densities, shape ``(S, B)`` (S = 1 if ``input`` has no sample axis).

        Raises:
            NotImplementedError: If the chart's image is a surface, as in
                ``slot_nn.paper()``: its likelihood is no density of theta.
            TypeError, ValueError: If theta or x is malformed.
        """
        if not self.chart.is_density:
            raise NotImplementedError(
                f"log_prob does not exist in the {self.chart.kind!r} chart: it puts "
                f"{self.layout.num_component_params} parameters on a surface in "
                f"{self.chart.num_features} dimensions, where the flow's likelihood is "
                "no density of theta. Use the default slot_nn() for densities."
            )
        self.layout.validate(input, "input")
        if condition.ndim > 2:
            input, condition, _ = self._broadcast_and_align(input, condition)
            flat = self.log_prob(
                input.reshape(-1, input.shape[-1]),
                condition.reshape(-1, condition.shape[-1]),
            )
            return flat.reshape(input.shape[:2])
        self.check_condition(condition)
        if input.ndim == 2:
            input = input.unsqueeze(0)
        num = max(input.shape[1], len(condition))
        if input.shape[1] not in (1, num) or len(condition) not in (1, num):
            raise ValueError(
                "input and condition must have matching batch sizes, got "
                f"{input.shape[1]} and {len(condition)}."
            )
        input = input.expand(-1, num, -1)
        owner = torch.arange(len(condition), device=input.device).expand(num)
        owner = owner.expand(input.shape[0], num).reshape(-1)
        parts = self.layout.unpack(input.reshape(-1, self.layout.size))
        encoding = self.encode(condition)
        log_k = self.cardinality_head(encoding.cardinality)
        result = log_k[owner, parts.cardinality]
        if self.shared_head is not None:
            result = result + self.shared_head.log_prob(
                parts.shared, encoding.shared, owner, parts.cardinality
            )
        pairs, log_det = self._pairwise_log_density(encoding.context, parts, owner)
        result = result + log_permanent(pairs, parts.cardinality) + log_det
        return result.reshape(input.shape[:2])

    def log_prob_cardinality(self, condition: Tensor) -> Tensor:
        """Evaluate log q(K | x).

        Args:
            condition: Data, shape ``(B, T)``.

        Returns:
            Shape ``(B, Kmax + 1)``.

        Raises:
            TypeError, ValueError: If x is malformed.
        """
        self.check_condition(condition)
        return self.cardinality_head(self.encode(condition).cardinality)

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
            condition: Data, shape ``(B, T)``.
            cardinality: K of each draw, broadcastable to ``(*sample_shape, B)``; drawn
                from q(K | x) if None.
            generator: Source of randomness; torch's global generator if None.
            kwargs: Ignored; sbi may pass its own.

        Returns:
            Rows of shape ``(*sample_shape, B, E)``.

        Raises:
            TypeError, ValueError: If x is malformed or a K is out of range.
        """
        self.check_condition(condition)
        shape, batch = torch.Size(sample_shape), len(condition)
        encoding = self.encode(condition)
        if cardinality is None:
            k = self.draw_cardinality(encoding, shape.numel(), generator)
        else:
            k = self._checked_cardinality(cardinality).expand(*shape, batch)
        owner = torch.arange(batch, device=condition.device).repeat(shape.numel())
        rows = self.draw(encoding, owner, k.reshape(-1), generator)
        return rows.reshape(*shape, batch, self.layout.size)

    def encode(self, condition: Tensor) -> Encoding:
        """Embed checked data ``(B, T)``; see :class:`~sbi_slotflow.nn.Encoding`."""
        return encode(self.net, (condition - self.x_shift) / self.x_scale)

    @torch.no_grad()
    def draw_cardinality(
        self, encoding: Encoding, num: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw K from q(K | x), shape ``(num, B)``."""
        probs = self.cardinality_head(encoding.cardinality).exp()
        if num == 0:
            return torch.zeros(0, len(probs), dtype=torch.int64, device=probs.device)
        return torch.multinomial(probs, num, replacement=True, generator=generator).mT

    @torch.no_grad()
    def draw(
        self,
        encoding: Encoding,
        owner: Tensor,
        cardinality: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw N theta rows given K, in canonical order.

        Args:
            encoding: Embeddings of B observations.
            owner: Observation of each row, shape ``(N,)``.
            cardinality: K of each row, shape ``(N,)``.
            generator: Source of randomness.

        Returns:
            Rows of shape ``(N, E)``.
        """
        layout = self.layout
        mask = layout.mask(cardinality)
        row, slot = mask.nonzero(as_tuple=True)
        context = self.slots(encoding.context, owner[row], cardinality[row], slot)
        components = self.chart.inverse(self.flow.sample(context, generator))
        padded = components.new_zeros(*mask.shape, layout.num_component_params)
        padded[mask] = components
        shared = None
        if self.shared_head is not None:
            shared = self.shared_head.sample(
                encoding.shared, owner, cardinality, generator
            )
        return layout.canonical(layout.pack(cardinality, padded, shared))

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
        self.x_shift.copy_(x.mean())
        self.x_scale.copy_(x.std().clamp(min=1e-12))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to one file: safetensors, the spec as JSON in its header.

        The file is written aside and moved into place, so that an interrupted save
        leaves the old file whole.

        Args:
            path: Where to write, by custom ending in ``.safetensors``.
        """
        meta = {"format": _FORMAT, "version": _VERSION, "spec": asdict(self.spec)}
        write_tensors(path, self.state_dict(), meta)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], encoder: nn.Module | None = None
    ) -> "SlotDensityEstimator":
        """Read an estimator; nothing in the file is executed.

        Args:
            path: A file that :meth:`save` wrote.
            encoder: The encoder's architecture, if it was the user's own; its weights
                are read from the file.

        Returns:
            The estimator, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is corrupt, holds something else, or does not fit
                the encoder.
        """
        tensors, meta = read_tensors(path, _FORMAT, _VERSION)
        try:
            known = {f.name for f in fields(EstimatorSpec)}
            spec = dict(meta["spec"])
            if set(spec) != known:
                raise ValueError(f"unexpected fields {sorted(set(spec) ^ known)}")
            spec["loss_weights"] = tuple(spec["loss_weights"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} has no readable estimator spec: {error}."
            ) from error
        estimator = cls(EstimatorSpec(**spec), encoder)
        try:
            estimator.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its spec: {error}") from error
        return estimator.eval()

    def _matched_log_prob(self, context: Tensor, parts: ThetaParts) -> Tensor:
        """Log density of each row's components under the training's matching."""
        owner = torch.arange(len(context), device=context.device)
        if self.spec.matching == "permanent":
            pairs, log_det = self._pairwise_log_density(context, parts, owner)
            return log_permanent(pairs, parts.cardinality) + log_det
        matched = torch.arange(parts.mask.shape[-1], device=context.device)
        matched = matched.expand_as(parts.mask)
        if self.spec.matching == "hungarian":
            with torch.no_grad():
                pairs, _ = self._pairwise_log_density(context, parts, owner)
            matched = hungarian(pairs, parts.cardinality)
        u, log_det = self.chart.forward(self._fill(parts.components, parts.mask))
        row, slot = parts.mask.nonzero(as_tuple=True)
        component = matched[row, slot]
        slot_context = self.slots(context, row, parts.cardinality[row], slot)
        value = self.flow.log_prob(u[row, component], slot_context)
        value = value + log_det[row, component]
        return value.new_zeros(len(context)).index_add(0, row, value)

    def _pairwise_log_density(
        self, context: Tensor, parts: ThetaParts, owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log densities of all components under all slots of their row.

        Returns:
            Log densities of the coordinates ``(N, Kmax, Kmax)`` (slot, component), zero
            outside the K x K block, and the rows' summed log-Jacobians ``(N,)``.
        """
        mask = parts.mask
        u, log_det = self.chart.forward(self._fill(parts.components, mask))
        log_det = torch.where(mask, log_det, log_det.new_zeros(())).sum(-1)
        block = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        row, slot, component = block.nonzero(as_tuple=True)
        slot_context = self.slots(context, owner[row], parts.cardinality[row], slot)
        values = self.flow.log_prob(u[row, component], slot_context)
        pairs = values.new_zeros(block.shape).masked_scatter(block, values)
        return pairs, log_det

    def _fill(self, components: Tensor, mask: Tensor) -> Tensor:
        """Put a point of the support where there is no component."""
        inside = self.chart.inverse(components.new_zeros(1, self.chart.num_features))
        return torch.where(mask.unsqueeze(-1), components, inside)

    def check_condition(self, condition: Tensor) -> None:
        """Raise unless x is a finite floating-point batch of the right length.

        Raises:
            TypeError: If x is not a floating-point tensor.
            ValueError: If its shape is not ``(B, T)`` or it has NaN or Inf.
        """
        if not isinstance(condition, Tensor) or not condition.is_floating_point():
            kind = (
                condition.dtype
                if isinstance(condition, Tensor)
                else type(condition).__name__
            )
            raise TypeError(f"x must be a floating-point tensor, got {kind}.")
        num = self.condition_shape[0]
        if condition.ndim != 2 or condition.shape[-1] != num:
            raise ValueError(
                f"x must have shape (batch, {num}), got {tuple(condition.shape)}."
            )
        if not torch.isfinite(condition).all():
            raise ValueError("x must be finite, got NaN or Inf.")

    def _checked_cardinality(self, cardinality: Tensor) -> Tensor:
        k = torch.as_tensor(cardinality, device=self.x_scale.device)
        largest = self.layout.max_cardinality
        if k.is_floating_point() or ((k < 0) | (k > largest)).any():
            raise ValueError(
                f"cardinality must hold integers in 0..{largest}, got "
                f"{k.flatten()[:5].tolist()}."
            )
        return cast(Tensor, k.long())
