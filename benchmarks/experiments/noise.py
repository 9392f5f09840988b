r"""Noise that is not what was trained.

Paper: none; its noise is white and Gaussian in training and test.

Question: What does p(K | x) do where the noise is coloured, heavy-tailed or of two
levels, is the user warned, and does `refine` with the right likelihood mend it?

Protocol: Signals from the prior, with other noise of the same variance: AR(1) with
correlation rho from sample to sample, Student's t, a second record or second half of
each record with r times the standard deviation of the first; the same signals in each.
False sources: by how many K exceeds the truth, the mean under q(K | x). Warned: the
training reference gives p < 0.001, the level at which `sample` warns, on at most 0.24 %
of usual data (its stated bound). Refined: by importance weights, with the likelihood of
that noise and sigma unknown, the first signals of `tiny` in each noise, of `crowded` in
three. "Reliable" is a k-hat below 0.7 and at least 100 effective draws; a K that no
draw has counts as one draw. Something else in white noise, sizes in units of its sigma:
a tone at 0.4 times the band's lowest or 1.5 times its highest frequency, an offset, a
trend from -a to a, a step at 0.6 of each record, one wrong sample.

Losses: The network knows white noise only, and one record of 300 samples hides much of
what its noise is. Where the network is sure of a wrong K, no weights on its draws mend
it; k-hat says so. The reliable ones are the easier ones: compare them with the network
on the same signals, not with all.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy.signal import lfilter
from torch import Tensor
from torch.distributions import StudentT

from sbi_slotflow import AdditiveSimulator, SlotPosterior
from sbi_slotflow.calibration import TrainingReference
from sbi_slotflow.plots.style import DATA, POSTERIOR, SMALL, TRUTH, dress
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.problems.simulator import NoiseModel, WhiteNoise, white_log_prob
from sbi_slotflow.seeding import generator_for

from ..common import TEST, one, ready
from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval
from ..store import Cache

WEIGHTS = ("tiny", "crowded")
WARNED = 1e-3


@dataclass(frozen=True)
class Size:
    """Signals of each noise, those that are refined, and draws of each of these."""

    num_tiny: int
    num_crowded: int
    num_refined_tiny: int
    num_refined_crowded: int
    num_draws_tiny: int
    num_draws_crowded: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(4, 1, 1, 0, 50, 0),
    "quick": Size(1_000, 150, 40, 6, 2_000, 2_000),
    "full": Size(10_000, 2_000, 300, 60, 10_000, 10_000),
}
# Refining `crowded` takes seconds a signal.
REFINED = ("white", "rho = 0.2", "record x 2")


@dataclass(frozen=True)
class Coloured:
    """AR(1) noise of standard deviation sigma and correlation rho, record by record."""

    rho: float
    lengths: tuple[int, ...]

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal``."""
        steps = torch.empty_like(signal).normal_(generator=generator)
        records = []
        for part in steps.split(self.lengths, -1):
            part = part * math.sqrt(1 - self.rho**2)
            part[..., 0] /= math.sqrt(1 - self.rho**2)
            series = lfilter([1.0], [1.0, -self.rho], part.numpy(), axis=-1)
            records.append(torch.as_tensor(series).to(signal))
        return torch.cat(records, -1) * shared[..., :1]

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals ``(..., T)``."""
        sigma, root = shared[..., 0], math.sqrt(1 - self.rho**2)
        value = torch.zeros_like(sigma)
        for part in residual.split(self.lengths, -1):
            steps = part[..., 1:] - self.rho * part[..., :-1]
            value = value + white_log_prob(part[..., :1], sigma)
            value = value + white_log_prob(steps, sigma * root)
        return value


@dataclass(frozen=True)
class HeavyTailed:
    """Student's t noise of standard deviation sigma."""

    degrees: int

    @property
    def unit(self) -> float:
        """Scale of the distribution over its standard deviation."""
        return math.sqrt((self.degrees - 2) / self.degrees)

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal``."""
        shape = (self.degrees + 1, *signal.shape)
        normal = torch.randn(shape, generator=generator, dtype=signal.dtype)
        spread = normal[1:].square().mean(0).sqrt()
        return normal[0] / spread * self.unit * shared[..., :1]

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals ``(..., T)``."""
        scale = (shared[..., :1] * self.unit).expand_as(residual)
        return StudentT(float(self.degrees), 0.0, scale).log_prob(residual).sum(-1)


@dataclass(frozen=True, eq=False)
class Levels:
    """White noise of standard deviation sigma times a factor of each sample."""

    factors: Tensor

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal``."""
        white = WhiteNoise().sample(signal, shared, generator)
        return white * self.factors.to(white)

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Log density of residuals ``(..., T)``."""
        factors = self.factors.to(residual)
        value = white_log_prob(residual / factors, shared[..., 0])
        return value - factors.log().sum()


def _levels(lengths: tuple[int, ...], ratio: float, part: str) -> Levels:
    loud = [torch.arange(n) >= (n // 2) for n in lengths]
    if part == "record":
        loud = [torch.full((n,), i > 0) for i, n in enumerate(lengths)]
    factors = torch.where(torch.cat(loud), ratio, 1.0).double()
    return Levels(factors / factors.square().mean().sqrt())


Make = Callable[[tuple[int, ...]], NoiseModel]
NOISES: dict[str, Make] = {
    "white": lambda lengths: WhiteNoise(),
    "rho = 0.2": lambda lengths: Coloured(0.2, lengths),
    "rho = 0.5": lambda lengths: Coloured(0.5, lengths),
    "rho = 0.8": lambda lengths: Coloured(0.8, lengths),
    "t, 5 degrees": lambda lengths: HeavyTailed(5),
    "t, 3 degrees": lambda lengths: HeavyTailed(3),
    "record x 2": lambda lengths: _levels(lengths, 2.0, "record"),
    "record x 4": lambda lengths: _levels(lengths, 4.0, "record"),
    "half x 2": lambda lengths: _levels(lengths, 2.0, "half"),
    "half x 4": lambda lengths: _levels(lengths, 4.0, "half"),
}


Event = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]


def _wave(size: float, end: int, factor: float) -> Event:
    return lambda t, u, band: size * torch.cos(math.tau * factor * band[end] * t + 1)


EVENTS: dict[str, Event] = {
    **{f"a tone of {a:g} below the band": _wave(a, 0, 0.4) for a in (0.5, 1, 3)},
    **{f"a tone of {a:g} above the band": _wave(a, 1, 1.5) for a in (0.5, 1, 3)},
    **{
        f"an offset of {a:g}": lambda t, u, band, a=a: torch.full_like(t, a)
        for a in (0.2, 0.5, 1.0)
    },
    **{
        f"a trend of {a:g}": lambda t, u, band, a=a: a * (2 * u - 1)
        for a in (0.5, 1, 2)
    },
    **{f"a step of {a:g}": lambda t, u, band, a=a: a * (u > 0.6) for a in (0.5, 1, 2)},
    **{
        f"a sample off by {a:g}": lambda t, u, band, a=a: (
            a * (torch.arange(len(t)) == len(t) // 3)
        )
        for a in (5, 10, 100)
    },
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("noise", budget, seed)
    parts = []
    for preset in WEIGHTS:
        trained = ready(preset)
        rows = [
            cache.get(
                f"{preset}-{i}", lambda t=trained, n=name: _measure(*t, n, size, seed)
            )
            for i, name in enumerate(NOISES)
        ]
        joined = xr.concat(rows, "noise")
        reference = trained[1].training_reference
        assert isinstance(reference, TrainingReference)
        num = size.num_tiny if preset == "tiny" else size.num_crowded
        joined["event_p"] = _event_p_values(trained[0], reference, min(num, 200), seed)
        parts.append(
            joined.rename(
                {
                    n: f"{n}_{preset}"
                    for n in (*joined.data_vars, "signal", "refined", "seen")
                }
            )
        )
    # To six digits.
    joined = xr.merge(parts).astype("f4")
    return joined.assign_coords(noise=list(NOISES), event=list(EVENTS))


def _event_p_values(
    problem: Sinusoids, reference: TrainingReference, num: int, seed: int
) -> xr.DataArray:
    """p-values of signals in white noise that hold something else, (event, seen)."""
    theta = problem.prior.sample((num,), generator_for(seed, TEST, 0))
    x = problem.simulator(theta, generator_for(seed, TEST, 1))
    sigma = problem.layout.unpack(theta).shared[:, :1]
    times = torch.cat([grid.times for grid in problem.grids])
    place = torch.cat([torch.linspace(0, 1, g.num_samples) for g in problem.grids])
    found = [
        reference.p_values(x + sigma * make(times, place, problem.band).float())
        for make in EVENTS.values()
    ]
    return xr.DataArray(torch.stack(found).numpy(), dims=("event", "seen"))


def _measure(
    problem: Sinusoids, posterior: SlotPosterior, name: str, size: Size, seed: int
) -> xr.Dataset:
    reference = posterior.training_reference
    assert isinstance(reference, TrainingReference)
    tiny = problem.name == "sinusoids-tiny"
    lengths = tuple(stream.num_samples for stream in problem.streams)
    simulator = AdditiveSimulator(
        problem.simulator.component_signal, NOISES[name](lengths), problem.layout
    )
    # The same signals in each noise.
    num = size.num_tiny if tiny else size.num_crowded
    theta = problem.prior.sample((num,), generator_for(seed, TEST, 0))
    x = simulator(theta, generator_for(seed, TEST, 1))
    truth = problem.layout.cardinality(theta)
    logs = torch.cat([_log_probs(posterior, part) for part in x.split(50)])
    count = size.num_refined_tiny if tiny else size.num_refined_crowded
    draws = size.num_draws_tiny if tiny else size.num_draws_crowded
    wanted = tiny or name in REFINED
    mended = [
        _mended(posterior, simulator, x[i], int(truth[i]), draws, (seed, i))
        if wanted
        else dict.fromkeys(_KEYS, math.nan)
        for i in range(count)
    ]
    beyond = torch.arange(logs.shape[-1]) - truth[:, None]
    return xr.Dataset(
        {
            "false": ("signal", (logs.exp() * beyond.clamp(min=0)).sum(-1).numpy()),
            "loss": ("signal", -logs.gather(-1, truth[:, None])[:, 0].numpy()),
            "right": ("signal", (logs.argmax(-1) == truth).numpy()),
            "p_value": ("signal", reference.p_values(x).numpy().astype("f4")),
            **{
                f"mended_{key}": ("refined", [row[key] for row in mended])
                for key in _KEYS
            },
        }
    )


def _log_probs(posterior: SlotPosterior, x: Tensor) -> Tensor:
    return posterior.cardinality(x).logits.double().log_softmax(-1)


_KEYS = ("loss", "right", "khat", "ess", "reliable")


def _mended(
    posterior: SlotPosterior,
    simulator: AdditiveSimulator,
    x: Tensor,
    truth: int,
    num_draws: int,
    seed: tuple[int, int],
) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it is reliable is recorded
        refined = one(
            posterior.refine(
                simulator.log_likelihood,
                x,
                num_samples=num_draws,
                generator=generator_for(*seed),
            )
        )
    logs = refined.cardinality().logits.double().log_softmax(-1)
    return {
        "loss": min(-float(logs[truth]), math.log(num_draws)),
        "right": float(int(logs.argmax()) == truth),
        "khat": refined.pareto_k,
        "ess": refined.ess,
        "reliable": float(refined.is_reliable),
    }


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, squeeze=False)
    at = np.arange(len(dataset.noise))
    for row, preset in zip(panels, WEIGHTS, strict=True):
        loss = dataset[f"loss_{preset}"].mean(f"signal_{preset}")
        mended = dataset[f"mended_loss_{preset}"].mean(f"refined_{preset}")
        row[0].plot(at, loss, "o", color=POSTERIOR, label="network")
        row[0].plot(at, mended, "x", color=TRUTH, label="refined")
        row[0].legend(fontsize=SMALL, frameon=False)
        dress(row[0], "", "mean -log q(true K)", preset)
        false = dataset[f"false_{preset}"].mean(f"signal_{preset}")
        row[1].plot(at, false, "o", color=POSTERIOR)
        dress(row[1], "", "false sources a signal", preset)
        warned = (dataset[f"p_value_{preset}"] < WARNED).mean(f"signal_{preset}")
        row[2].plot(at, warned, "o", color=DATA)
        dress(row[2], "", "share warned of", preset)
    for axes in panels[-1]:
        names = [str(name) for name in dataset.noise.values]
        axes.set_xticks(at, names, rotation=60, ha="right", fontsize=SMALL)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    found = []
    for preset in WEIGHTS:
        for name in dataset.noise.values:
            here = dataset.sel(noise=name)
            found += _claims(f"{preset}, {name}", here, preset, str(name) == "white")
        for name in dataset.event.values:
            warned = dataset[f"event_p_{preset}"].sel(event=name).values < WARNED
            found.append(
                Claim(
                    f"{preset}, {name}: warned of",
                    float(warned.mean()),
                    share_interval(int(warned.sum()), len(warned)),
                )
            )
    return found


def _claims(label: str, here: xr.Dataset, preset: str, usual: bool) -> list[Claim]:
    def values(name: str) -> np.ndarray:
        return here[f"{name}_{preset}"].values

    def share(quantity: str, hits: np.ndarray, **more: Any) -> Claim:
        hits = hits.astype(bool)
        interval = share_interval(int(hits.sum()), len(hits))
        return Claim(f"{label}: {quantity}", float(hits.mean()), interval, **more)

    def mean(quantity: str, numbers: np.ndarray, **more: Any) -> Claim:
        interval = mean_interval(numbers)
        return Claim(f"{label}: {quantity}", float(numbers.mean()), interval, **more)

    found = [
        mean("false sources a signal", values("false")),
        mean("-log q(true K)", values("loss")),
        share("K right", values("right")),
        share(
            "warned of",
            values("p_value") < WARNED,
            target="<= 0.0024" if usual else None,
        ),
    ]
    mended = values("mended_loss")
    if not len(mended) or np.isnan(mended).any():
        return found
    reliable = values("mended_reliable").astype(bool)
    khat = np.median(values("mended_khat"))
    note = f"Median k-hat {khat:.2f}, of {len(mended)} signals."
    found.append(share("refined reliably", reliable, note=note))
    for which, rows in (("all", reliable | True), ("those reliable", reliable)):
        if rows.any():
            network = values("loss")[: len(mended)][rows].mean()
            right = values("right")[: len(mended)][rows].mean()
            found += [
                mean(
                    f"-log p(true K), refined, {which}",
                    mended[rows],
                    rivals={"network": float(network)},
                ),
                share(
                    f"K right, refined, {which}",
                    values("mended_right")[rows],
                    rivals={"network": float(right)},
                ),
            ]
    return found
