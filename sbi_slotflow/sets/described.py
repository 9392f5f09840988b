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

# Other names of parameters that are described already.
_REDUNDANT = {"probs", "covariance_matrix", "precision_matrix"}
# Each with the attributes that its constructor takes by the same names.
_TRANSFORMS = {
    "AffineTransform": ("loc", "scale", "event_dim"),
    "ExpTransform": (),
    "PowerTransform": ("exponent",),
    "SigmoidTransform": (),
    "SoftplusTransform": (),
    "TanhTransform": (),
}


def describe_distribution(distribution: Distribution) -> dict[str, Any]:
    """Return the JSON description of a distribution of torch or sbi.

    Raises:
        ValueError: If it, or a part of it, is of another class: a user's own, say.
    """
    name = type(distribution).__name__
    if isinstance(distribution, BoxUniform):
        # An Independent of a Uniform, whatever sbi adds to it.
        return _independent(distribution)
    if type(distribution) is Independent:
        return _independent(distribution)
    if type(distribution) is MultipleIndependent:
        parts = [describe_distribution(part) for part in distribution.dists]
        return {"name": name, "parts": parts}
    if type(distribution) is MixtureSameFamily:
        return {
            "name": name,
            "weights": describe_distribution(distribution.mixture_distribution),
            "components": describe_distribution(distribution.component_distribution),
        }
    if type(distribution) is TransformedDistribution:
        return {
            "name": name,
            "base": describe_distribution(distribution.base_dist),
            "transforms": [_describe_transform(t) for t in distribution.transforms],
        }
    if type(distribution) is not getattr(distributions, name, None):
        raise _unknown("distribution", distribution)
    keys = [key for key in distribution.arg_constraints if key not in _REDUNDANT]
    if hasattr(distribution, "temperature"):
        keys.append("temperature")
    return {"name": name, **{key: _plain(getattr(distribution, key)) for key in keys}}


def distribution_from(spec: Mapping[str, Any]) -> Distribution:
    """Rebuild a distribution, with float64 parameters that are not validated.

    Args:
        spec: What :func:`describe_distribution` returned.

    Raises:
        ValueError: If the name is unknown.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name == "Independent":
        base = distribution_from(options["base"])
        return Independent(base, options["ndims"], validate_args=False)
    if name == "MultipleIndependent":
        parts = [distribution_from(part) for part in options["parts"]]
        return MultipleIndependent(parts, validate_args=False)
    if name == "MixtureSameFamily":
        weights = distribution_from(options["weights"])
        components = distribution_from(options["components"])
        return MixtureSameFamily(weights, components, validate_args=False)  # pyright: ignore
    if name == "TransformedDistribution":
        base = distribution_from(options["base"])
        steps = [_transform_from(step) for step in options["transforms"]]
        return TransformedDistribution(base, steps, validate_args=False)
    kind = getattr(distributions, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Distribution)):
        raise ValueError(f"torch has no distribution {name!r}.")
    values = {key: _tensor(value) for key, value in options.items()}
    return kind(**values, validate_args=False)  # pyright: ignore


def _independent(distribution: Independent) -> dict[str, Any]:
    base = describe_distribution(distribution.base_dist)
    ndims = distribution.reinterpreted_batch_ndims
    return {"name": "Independent", "base": base, "ndims": ndims}


def _describe_transform(transform: Transform) -> dict[str, Any]:
    name = type(transform).__name__
    if isinstance(transform, ComposeTransform):
        parts = [_describe_transform(part) for part in transform.parts]
        return {"name": name, "parts": parts}
    if isinstance(transform, IndependentTransform):
        base = _describe_transform(transform.base_transform)
        ndims = transform.reinterpreted_batch_ndims
        return {"name": name, "base": base, "ndims": ndims}
    if name == "_InverseTransform":
        return {"name": name, "base": _describe_transform(transform.inv)}
    if name not in _TRANSFORMS or type(transform) is not getattr(distributions, name):
        raise _unknown("transform", transform)
    values = {key: getattr(transform, key) for key in _TRANSFORMS[name]}
    return {"name": name, **{key: _plain(value) for key, value in values.items()}}


def _transform_from(spec: Mapping[str, Any]) -> Transform:
    options = dict(spec)
    name = options.pop("name", None)
    if name == "ComposeTransform":
        return ComposeTransform([_transform_from(part) for part in options["parts"]])
    if name == "IndependentTransform":
        return IndependentTransform(_transform_from(options["base"]), options["ndims"])
    if name == "_InverseTransform":
        return _transform_from(options["base"]).inv
    if name not in _TRANSFORMS:
        raise ValueError(f"no transform {name!r} is known here.")
    event_dim = (
        {"event_dim": options.pop("event_dim")} if "event_dim" in options else {}
    )
    values = {key: _tensor(value) for key, value in options.items()}
    return getattr(distributions, name)(**values, **event_dim)


def _plain(value: Tensor | float) -> Any:
    return value.detach().double().tolist() if isinstance(value, Tensor) else value


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _unknown(kind: str, part: object) -> ValueError:
    return ValueError(
        f"a file cannot describe the {kind} {type(part).__name__}, which is none of "
        "torch's that are known here. Build the prior of torch's own, or give it anew "
        "when the file is loaded."
    )
