"""The description of an estimator: everything but its weights, as plain JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch.distributions import Distribution

from ..sets.described import describe_distribution
from ..sets.layout import ThetaLayout

__all__ = ["EstimatorSpec", "Matching"]

Matching = Literal["hungarian", "permanent", "ordered"]


@dataclass(frozen=True)
class EstimatorSpec:
    """Everything that rebuilds an estimator but its weights.

    Attributes:
        layout: Layout of theta.
        num_data: Length T of x.
        cardinality_weights: Training prior p(K), K = 0..Kmax.
        chart: Spec of the components' chart.
        shared_chart: Spec of the shared parameters' chart, or None if there are none.
        encoder: Spec of the encoder, or None for a module of the user's own.
        shared_head: Whether the shared parameters are inferred; else draws come from
            their prior.
        noise_from_fit: Whether the shared parameter is the noise level and is read from
            what the fit of refined slots leaves.
        flow: Options of the :class:`~sbi_slotflow.nn.ConditionalFlow`.
        slots: Kind and options of the slots, see
            :func:`~sbi_slotflow.nn.slots.slots_from_spec`.
        matching: How training matches slots with components.
        mean_flow_loss: Whether the flow's loss is averaged over components (the
            paper) instead of summed (the likelihood of the set).
        loss_weights: Weights of the cardinality, flow and shared terms of the loss.
    """

    layout: ThetaLayout
    num_data: int
    cardinality_weights: tuple[float, ...]
    chart: dict[str, Any]
    shared_chart: dict[str, Any] | None
    encoder: dict[str, Any] | None
    shared_head: bool = True
    noise_from_fit: bool = False
    flow: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    matching: Matching = "hungarian"
    mean_flow_loss: bool = False
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON would give it back: lists for tuples.

        Raises:
            ValueError: If a prior's distribution is of a class of the user's own.
        """
        entries = _lists(asdict(self))
        # Whether a parameter is circular is the prior's to say; nothing here needs it.
        del entries["layout"]["periods"]
        return entries

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> "EstimatorSpec":
        """Rebuild a spec from :meth:`to_json`.

        Raises:
            ValueError: If an entry is missing, unknown or malformed.
        """
        try:
            names = {f.name for f in fields(cls)}
            if set(entries) != names:
                raise ValueError(f"unexpected fields {sorted(set(entries) ^ names)}")
            layout: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in entries["layout"].items()
            }
            changes = {
                "layout": ThetaLayout(**layout),
                "cardinality_weights": tuple(entries["cardinality_weights"]),
                "loss_weights": tuple(entries["loss_weights"]),
            }
            return cls(**{**entries, **changes})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"no readable estimator spec: {error}.") from error


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(entry) for entry in value]
    # Only a distribution of the user's own is not described yet: it is refused here.
    return describe_distribution(value) if isinstance(value, Distribution) else value
