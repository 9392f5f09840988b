"""Bumps and wiggles in one trace: classes of other sizes, linear in their heights."""

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor
from torch.distributions import Normal

from sbi_slotflow import AdditiveSimulator, VariableKPrior, WhiteNoise
from sbi_slotflow.problems import Classes, Trace
from sbi_slotflow.problems.base import uniform

TIMES = (torch.arange(64, dtype=torch.float64) + 0.5) / 64


def bump(components: Tensor) -> Tensor:
    """A pulse of known width: components (time, height)."""
    time, height = components.unsqueeze(-1).unbind(-2)
    return height * torch.exp(-0.5 * ((TIMES.to(time) - time) / 0.03) ** 2)


def wiggle(components: Tensor) -> Tensor:
    """A few periods: components (height, time, rate), ordered by time."""
    height, time, rate = components.unsqueeze(-1).unbind(-2)
    away = TIMES.to(time) - time
    return height * torch.exp(-0.5 * (away / 0.1) ** 2) * torch.cos(rate * away)


def problem_of(
    sigma: float,
    bumps: list[float],
    wiggles: list[float],
    *,
    linear: bool = True,
    rates: tuple[float, float] = (10.0, 60.0),
) -> Classes:
    """Bumps and wiggles of normal heights, N(.5, 1) and N(1, 1/4)."""
    high = Normal(torch.tensor([0.5]), torch.tensor([1.0]))
    height = Normal(torch.tensor([1.0]), torch.tensor([0.5]))
    priors = {
        "bump": VariableKPrior(
            MultipleIndependent([uniform(0, 1), high], validate_args=False),
            bumps,
            component_names=("time", "height"),
        ),
        "wiggle": VariableKPrior(
            MultipleIndependent(
                [height, uniform(0, 1), uniform(*rates)], validate_args=False
            ),
            wiggles,
            component_names=("height", "time", "rate"),
            order_by="time",
        ),
    }
    noise = WhiteNoise(sigma)
    members = {}
    for name, signal in (("bump", bump), ("wiggle", wiggle)):
        simulator = AdditiveSimulator(signal, noise, priors[name].layout)
        names = ("height",) if linear else ()
        members[name] = Trace(name, priors[name], simulator, 32, linear=names)
    return Classes("bumps and wiggles", members)
