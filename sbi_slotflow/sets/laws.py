r"""Torch distributions over vectors: their support, their density there, their JSON.

Many of torch's distributions have a finite ``log_prob`` outside their support when
their arguments are not validated: an Exponential at -1 for one. And the support that
torch reports for a transformed distribution is the whole image of its last transform:
that of a shifted Exponential is the real line. Here a transformed distribution is
followed back to its base, and a mixture to its components.

In a file, a distribution of torch or sbi is its class name with its parameters as
lists; the distributions inside another are described likewise. Nothing is unpickled.

Example:
    >>> from torch.distributions import AffineTransform, Exponential
    >>> shifted = TransformedDistribution(
    ...     Exponential(torch.ones(1)), AffineTransform(2.0, 1.0), validate_args=False
    ... )
    >>> log_density(shifted, torch.tensor([[1.5], [3.0]]))
    tensor([-inf, -1.])
    >>> bounds_of(shifted)
    (tensor([2.], dtype=torch.float64), tensor([inf], dtype=torch.float64))
    >>> spec = describe_distribution(shifted)
    >>> spec["base"], spec["transforms"][0]["name"]
    ({'name': 'Exponential', 'rate': [1.0]}, 'AffineTransform')
    >>> distribution_from(spec).log_prob(torch.tensor([3.0]))
    tensor([-1.], dtype=torch.float64)
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor, distributions
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.distributions.transforms import IndependentTransform

__all__ = [
    "bounds_of",
    "column_log_density",
    "describe_distribution",
    "distribution_from",
    "flattened",
    "log_density",
]

# In single precision, in which draws are made.
_PI = torch.tensor(math.pi, dtype=torch.float32).item()
# What a bound may miss of another by rounding.
_SLACK = 1e-6
_ADVICE = "Give parameters whose supports are intervals, each on its own"
# What is made of other parts: the arguments of its constructor, in their order, by
# their names in a file and as attributes.
_WHOLES: dict[type, dict[str, str]] = {
    Independent: {"base": "base_dist", "ndims": "reinterpreted_batch_ndims"},
    MultipleIndependent: {"parts": "dists"},
    MixtureSameFamily: {
        "weights": "mixture_distribution",
        "components": "component_distribution",
    },
    TransformedDistribution: {"base": "base_dist", "transforms": "transforms"},
    ComposeTransform: {"parts": "parts"},
    IndependentTransform: {
        "base": "base_transform",
        "ndims": "reinterpreted_batch_ndims",
    },
}
# Other transforms, with the arguments of their constructors.
_TRANSFORMS = {
    "AffineTransform": ("loc", "scale", "event_dim"),
    "ExpTransform": (),
    "PowerTransform": ("exponent",),
    "SigmoidTransform": (),
    "SoftplusTransform": (),
    "TanhTransform": (),
}
# Other names of a distribution's parameters, which are described already.
_REDUNDANT = {"probs", "covariance_matrix", "precision_matrix"}


def log_density(distribution: Distribution, values: Tensor) -> Tensor:
    """Log density ``(n,)`` of vectors ``(n, D)``, -inf outside their own support."""
    log_p = column_log_density(distribution, values)
    # An un-wrapped univariate distribution counts its parameters as a batch.
    return log_p.sum(-1) if log_p.ndim > 1 else log_p


def column_log_density(distribution: Distribution, values: Tensor) -> Tensor:
    """Log density in the shape of ``log_prob``: one each for a univariate batch."""
    if isinstance(distribution, MultipleIndependent):
        chunks = values.split([int(n) for n in distribution.dims_per_dist], dim=-1)
        pairs = zip(distribution.dists, chunks, strict=True)
        parts = [column_log_density(d, v).reshape(len(values), 1) for d, v in pairs]
        return torch.cat(parts, dim=1).sum(-1)
    if isinstance(distribution, Independent):
        inner = column_log_density(distribution.base_dist, values)
        return _sum_last(inner, distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, MixtureSameFamily):
        event = len(distribution.event_shape)
        each = column_log_density(
            distribution.component_distribution, values.unsqueeze(-1 - event)
        )
        weights = distribution.mixture_distribution.logits
        return torch.logsumexp(each + weights.log_softmax(-1), -1)
    if _is_plainly_transformed(distribution):
        return _log_density_of_image(distribution, values)
    log_p = distribution.log_prob(values)
    if isinstance(distribution, VonMises):  # whose support torch calls the real line
        inside = values.abs() <= _PI
    else:
        inside = distribution.support.check(values)  # pyright: ignore
    return torch.where(inside & ~log_p.isnan(), log_p, -math.inf)


def _sum_last(values: Tensor, count: int) -> Tensor:
    return values.flatten(-count).sum(-1) if count else values


def _log_density_of_image(
    distribution: TransformedDistribution, values: Tensor
) -> Tensor:
    """As torch's own, but -inf outside the images of the transforms."""
    event = len(distribution.event_shape)
    log_p = torch.zeros((), dtype=values.dtype, device=values.device)
    inside = torch.ones((), dtype=torch.bool, device=values.device)
    for transform in reversed(distribution.transforms):
        codomain = transform.codomain
        here = codomain.check(values)
        if event > codomain.event_dim:
            here = here.flatten(codomain.event_dim - event).all(-1)
        inside = inside & here
        before: Tensor = transform.inv(values)  # pyright: ignore[reportAssignmentType]
        event += transform.domain.event_dim - codomain.event_dim
        slope = transform.log_abs_det_jacobian(before, values)
        log_p = log_p - _sum_last(slope, event - transform.domain.event_dim)
        values = before
    base = distribution.base_dist
    inner = column_log_density(base, values)
    log_p = log_p + _sum_last(inner, event - len(base.event_shape))
    return torch.where(inside & ~log_p.isnan(), log_p, -math.inf)


def bounds_of(distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Least and largest value of each parameter, float64 ``(D,)``.

    Raises:
        ValueError: If the support is not a product of D intervals, such as a simplex,
            integers, or separate intervals.
    """
    low, high = _bounds(distribution)
    return low.reshape(-1), high.reshape(-1)


def _bounds(distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Ends in the shape of one draw."""
    if isinstance(distribution, MultipleIndependent):
        pairs = [bounds_of(part) for part in distribution.dists]
        low, high = (torch.cat(ends) for ends in zip(*pairs, strict=True))
        return low, high
    if isinstance(distribution, Independent):
        return _bounds(distribution.base_dist)
    if isinstance(distribution, MixtureSameFamily):
        return _bounds_of_union(distribution)
    if _is_plainly_transformed(distribution):
        low, high = _bounds(distribution.base_dist)
        for transform in distribution.transforms:
            low, high = _image(distribution, transform, low, high)
        return low, high
    shape = distribution.batch_shape + distribution.event_shape
    if isinstance(distribution, VonMises):
        ends = -_PI, _PI
    else:
        ends = _ends(distribution, distribution.support)
    low, high = (_double(end) for end in ends)
    return low.expand(shape), high.expand(shape)


def _bounds_of_union(distribution: MixtureSameFamily) -> tuple[Tensor, Tensor]:
    """Ends of the union of a mixture's components, which must be one box."""
    low, high = _bounds(distribution.component_distribution)
    event = len(distribution.event_shape)
    axis = low.ndim - 1 - event
    first = [end.narrow(axis, 0, 1) for end in (low, high)]
    if event and not (
        torch.equal(first[0].expand_as(low), low)
        and torch.equal(first[1].expand_as(high), high)
    ):
        raise ValueError(
            f"{_name(distribution)} joins boxes of different bounds, which is no "
            "product of intervals. Give all components of the mixture the same bounds."
        )
    if not event:
        order = low.argsort(axis)
        starts, reached = low.gather(axis, order), high.gather(axis, order)
        reached, others = reached.cummax(axis).values, low.shape[axis] - 1
        if (starts.narrow(axis, 1, others) > reached.narrow(axis, 0, others)).any():
            raise ValueError(
                f"the support of {_name(distribution)} has gaps. Give components "
                "whose intervals meet."
            )
    return low.amin(axis), high.amax(axis)


def _image(
    distribution: Distribution, transform: Transform, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Ends of the image of an interval."""
    least, most = (_double(end) for end in _ends(distribution, transform.codomain))
    single = _elementwise(transform)
    fault, images = "", torch.empty(0)
    if not transform.bijective:
        fault = "is not invertible"
    elif single is None:
        if not bool(low.isfinite().any() | high.isfinite().any()):
            shape = transform.forward_shape(low.shape)
            return least.expand(shape), most.expand(shape)
        fault = "mixes parameters that have bounds"
    else:
        first, last = (_double(end) for end in _ends(distribution, transform.domain))
        # Bounds may have been rounded to single precision on their way.
        if (low < first - _SLACK * (1 + first.abs())).any() or (
            high > last + _SLACK * (1 + last.abs())
        ).any():
            fault = f"takes {transform.domain} alone, and its base has other values"
        images = torch.stack([single(low), single(high)]).double()  # pyright: ignore
        if not fault and images.isnan().any():
            fault = "does not map the support of the base to an interval"
    if fault:
        name = type(transform).__name__
        raise ValueError(f"{name} {fault}, in {_name(distribution)}. {_ADVICE}.")
    # Rounding keeps the image of infinity off the end of the transform's own range.
    ends = torch.stack([low, high])
    for end in (least, most):
        near = ends.isinf() & ((images - end).abs() < 1e-9) & end.isfinite()
        images = torch.where(near, end, images)
    return images.amin(0), images.amax(0)


def _ends(
    distribution: Distribution, support: constraints.Constraint | None
) -> tuple[Tensor | float, Tensor | float]:
    """Ends of what a constraint allows."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is None or support.is_discrete:
        kind = "no support" if support is None else f"the discrete support {support}"
        raise ValueError(f"{_name(distribution)} has {kind}. {_ADVICE}.")
    if isinstance(support, constraints.cat):
        parts = zip(support.cseq, support.lengths, strict=True)
        pairs = [
            [_double(end).expand(n) for end in _ends(distribution, part)]
            for part, n in parts
        ]
        low, high = (torch.cat(ends) for ends in zip(*pairs, strict=True))
        return low, high
    low = getattr(support, "lower_bound", None)
    high = getattr(support, "upper_bound", None)
    if low is None and high is None and type(support) is not type(constraints.real):
        raise ValueError(
            f"{_name(distribution)} has the support {support}, which is no product of "
            f"intervals. {_ADVICE} (for proportions, all but the last of their "
            "logarithmic ratios)."
        )
    return -math.inf if low is None else low, math.inf if high is None else high


def flattened(distribution: Distribution) -> Distribution | None:
    """The same law as a batch of D univariate distributions; None if there is none."""
    if isinstance(distribution, Independent):
        return flattened(distribution.base_dist)
    if not distribution.event_shape:
        return distribution
    if _is_plainly_transformed(distribution):
        base = flattened(distribution.base_dist)
        single = [_elementwise(transform) for transform in distribution.transforms]
        if base is not None and None not in single:
            return TransformedDistribution(base, single, validate_args=False)  # pyright: ignore
    return None


def _elementwise(transform: Transform) -> Transform | None:
    """A transform that maps each number on its own, as one of numbers; else None."""
    if isinstance(transform, IndependentTransform):
        return _elementwise(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        parts = [_elementwise(part) for part in transform.parts]
        return None if None in parts else ComposeTransform(parts)  # pyright: ignore
    if isinstance(transform, AffineTransform):
        return AffineTransform(transform.loc, transform.scale)
    single = transform.domain.event_dim == transform.codomain.event_dim == 0
    return transform if single else None


def _is_plainly_transformed(
    distribution: Distribution,
) -> TypeGuard[TransformedDistribution]:
    """Whether it has the density and the support of ``TransformedDistribution``."""
    kind = type(distribution)
    return (
        isinstance(distribution, TransformedDistribution)
        and kind.log_prob is TransformedDistribution.log_prob
        and kind.support is TransformedDistribution.support
    )


def _double(end: Tensor | float) -> Tensor:
    return torch.as_tensor(end, dtype=torch.float64).detach().cpu()


def _name(distribution: Distribution) -> str:
    return type(distribution).__name__


def describe_distribution(part: Any) -> Any:
    """Return the JSON description of a distribution of torch or sbi.

    Likewise of a transform, a list of either, a tensor or a number.

    Raises:
        ValueError: If it, or a part of it, is of another class: a user's own, say.
    """
    if isinstance(part, list | tuple):
        return [describe_distribution(each) for each in part]
    if isinstance(part, Tensor):
        return part.detach().double().tolist()
    if not isinstance(part, Distribution | Transform):
        return part
    # sbi's is an Independent of a Uniform, whatever it adds to that.
    kind = Independent if isinstance(part, BoxUniform) else type(part)
    name = kind.__name__
    if kind in _WHOLES:
        keys = _WHOLES[kind]
    elif name == "_InverseTransform":
        keys = {"base": "inv"}
    elif kind is not getattr(distributions, name, None) or (
        isinstance(part, Transform) and name not in _TRANSFORMS
    ):
        raise ValueError(
            f"a file cannot describe {name}, which is no distribution or transform of "
            "torch that is known here. Build the prior of torch's own, or give it anew "
            "when the file is loaded."
        )
    elif isinstance(part, Transform):
        keys = {key: key for key in _TRANSFORMS[name]}
    else:
        names = [key for key in part.arg_constraints if key not in _REDUNDANT]
        names += ["temperature"] if hasattr(part, "temperature") else []
        keys = {key: key for key in names}
    values = {
        key: describe_distribution(getattr(part, name)) for key, name in keys.items()
    }
    return {"name": name, **values}


def distribution_from(spec: Any) -> Any:
    """Rebuild what :func:`describe_distribution` returned; a distribution stays.

    Parameters are in float64 and not validated.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(spec, list):
        return [distribution_from(each) for each in spec]
    if not isinstance(spec, Mapping):
        return spec
    name = spec.get("name")
    if name == "_InverseTransform":
        return distribution_from(spec["base"]).inv
    for kind, keys in _WHOLES.items():
        if name == kind.__name__:
            unchecked = {"validate_args": False}
            options = unchecked if issubclass(kind, Distribution) else {}
            return kind(*(distribution_from(spec[key]) for key in keys), **options)
    kind: Any = getattr(distributions, str(name), None)
    is_law = isinstance(kind, type) and issubclass(kind, Distribution)
    if not is_law and name not in _TRANSFORMS:
        raise ValueError(f"no distribution or transform {name!r} is known here.")
    values = {
        key: value if key == "event_dim" else torch.tensor(value, dtype=torch.float64)
        for key, value in spec.items()
        if key != "name"
    }
    options = {"validate_args": False} if is_law else {}
    return kind(**values, **options)  # pyright: ignore
