r"""Torch distributions as plain JSON, and back.

A distribution of torch or sbi is its class name with its parameters as lists; the
distributions inside another are described likewise. Nothing is unpickled.

Example:
    >>> from torch.distributions import Gamma
    >>> spec = describe_distribution(Gamma(torch.tensor([2.0]), torch.tensor([0.5])))
    >>> spec
    {'name': 'Gamma', 'concentration': [2.0], 'rate': [0.5]}
    >>> distribution_from(spec).mean
    tensor([4.], dtype=torch.float64)
"""

from collections.abc import Mapping
from typing import Any

import torch
from sbi.utils import BoxUniform, MultipleIndependent
from torch import Tensor, distributions
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
)
from torch.distributions.transforms import IndependentTransform

__all__ = ["describe_distribution", "distribution_from"]

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


def describe_distribution(distribution: Distribution) -> dict[str, Any]:
    """Return the JSON description of a distribution of torch or sbi.

    Raises:
        ValueError: If it, or a part of it, is of another class: a user's own, say.
    """
    return _described(distribution)


def distribution_from(spec: Mapping[str, Any] | Distribution) -> Distribution:
    """Rebuild a distribution, with float64 parameters that are not validated.

    Args:
        spec: What :func:`describe_distribution` returned; a distribution stays.

    Raises:
        ValueError: If the name is unknown.
    """
    return _rebuilt(spec)


def _described(part: Any) -> Any:
    """A distribution, a transform, a list of either, a tensor or a number."""
    if isinstance(part, list | tuple):
        return [_described(each) for each in part]
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
    values = {key: _described(getattr(part, name)) for key, name in keys.items()}
    return {"name": name, **values}


def _rebuilt(spec: Any) -> Any:
    """Inverse of :func:`_described`, but for numbers, which stay as they are."""
    if isinstance(spec, list):
        return [_rebuilt(each) for each in spec]
    if not isinstance(spec, Mapping):
        return spec
    name = spec.get("name")
    if name == "_InverseTransform":
        return _rebuilt(spec["base"]).inv
    for kind, keys in _WHOLES.items():
        if name == kind.__name__:
            unchecked = {"validate_args": False}
            options = unchecked if issubclass(kind, Distribution) else {}
            return kind(*(_rebuilt(spec[key]) for key in keys), **options)
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
