r"""What the signals are like, and what resampling does to the noise.

Paper: fig. 2, fig. 3, sec. 5.1.1.

Question: Do the signals have the separations and signal-to-noise ratios that the paper
states, and is the noise as loud as its label says?

Protocol: Signals of `paper`. Separations are between components that are neighbours in
the parameter at hand; SNR = 10 log10(sum A^2 / 2 sigma^2). The noise of both kinds,
white and resampled (drawn once on a fine grid and interpolated, as the paper's training
data), is divided by its sigma and its standard deviation measured on either record,
and its correlation between neighbouring samples.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from sbi_slotflow import problems
from sbi_slotflow.plots.style import DATA, POSTERIOR, TRUTH, dress
from sbi_slotflow.seeding import generator_for

from ..experiment import Budget, Claim
from ..intervals import mean_interval, share_interval

LEAST = 0.01  # Hz
NOISES = ("white", "resampled")


@dataclass(frozen=True)
class Size:
    """Signals for the separations, and for the noise."""

    num_signals: int
    num_noise: int


BUDGETS = {
    "smoke": Size(300, 20),
    "quick": Size(10_000, 400),
    "full": Size(100_000, 4_000),
}


def run(budget: Budget, seed: int) -> xr.Dataset:
    size = BUDGETS[budget]
    problem = problems.sinusoids("paper")
    layout = problem.layout
    theta = problem.prior.sample((size.num_signals,), generator_for(seed, 0))
    parts = layout.unpack(theta)
    pair = parts.mask[:, 1:]
    amplitude, phase, frequency = parts.components.double().unbind(-1)
    gap_f = (frequency[:, 1:] - frequency[:, :-1])[pair]
    ascending = torch.where(parts.mask, amplitude, torch.inf).sort(-1).values
    gap_a, lower = (ascending[:, 1:] - ascending[:, :-1])[pair], ascending[:, :-1][pair]
    turns = (phase[:, 1:] - phase[:, :-1])[pair].abs()
    gap_phase = torch.minimum(turns, 2 * torch.pi - turns)
    power = amplitude.square().sum(-1) / 2
    snr = 10 * (power / parts.shared[:, 0].double().square()).log10()
    data = {
        "gap_frequency": ("pair", _thin(gap_f)),
        "gap_amplitude": ("pair", _thin(gap_a)),
        "lower_amplitude": ("pair", _thin(lower)),
        "gap_phase": ("pair", _thin(gap_phase)),
        "snr": ("signal", _thin(snr)),
        "num_pairs": len(gap_f),
        "close": int((gap_f < 1.5 * LEAST).sum()),
        "near": int((gap_f < 3 * LEAST).sum()),
        "similar": int((gap_a < 0.2 * lower).sum()),
        "least_gap": float(gap_f.min()),
        "phase_p_value": stats.kstest(gap_phase.numpy() / np.pi, "uniform").pvalue,
    }
    for kind in NOISES:
        deviation, correlation = _noise(kind, size.num_noise, seed)
        data[f"deviation_{kind}"] = (("noise", "stream"), deviation)
        data[f"correlation_{kind}"] = (("noise", "stream"), correlation)
    return xr.Dataset(data, {"stream": ["300 s at 10 Hz", "10 s at 512 Hz"]})


def _noise(kind: str, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation over sigma, and lag-1 correlation, (num, stream)."""
    assert kind in ("white", "resampled")
    problem = problems.sinusoids("paper", noise=kind)
    sigma = torch.ones(num, 1)
    silence = torch.zeros(num, problem.num_data)
    noise = problem.simulator.noise.sample(silence, sigma, generator_for(seed, 1))
    lengths = [grid.num_samples for grid in problem.grids]
    streams = noise.double().split(lengths, dim=-1)
    deviation = torch.stack([s.square().mean(-1).sqrt() for s in streams], -1)
    lag = [(s[:, 1:] * s[:, :-1]).mean(-1) / s.square().mean(-1) for s in streams]
    return deviation.numpy().astype("f4"), torch.stack(lag, -1).numpy().astype("f4")


def _thin(values: Tensor, most: int = 5_000) -> np.ndarray:
    return values[:most].numpy().astype("f4")


def plot(dataset: xr.Dataset) -> Figure:
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    gap_a = dataset.gap_amplitude.values
    panels[0].hist(np.log10(gap_a[gap_a > 0]), 60, density=True, color=POSTERIOR)
    dress(panels[0], "log10 amplitude gap", "density", "amplitudes")
    panels[1].hist(
        dataset.gap_frequency.values * 1e3, 80, density=True, color=POSTERIOR
    )
    panels[1].axvline(LEAST * 1e3, color=TRUTH)
    panels[1].set_xlim(0, 150)
    dress(panels[1], "frequency gap (mHz)", "density", "frequencies (line: least)")
    panels[2].hist(dataset.gap_phase.values, 40, density=True, color=POSTERIOR)
    panels[2].axhline(1 / np.pi, color=TRUTH)
    dress(panels[2], "phase gap (rad)", "density", "phases (line: flat)")
    panels[3].hist(dataset.snr.values.clip(-20, 70), 80, density=True, color=POSTERIOR)
    dress(panels[3], "SNR (dB)", "density", "signal-to-noise ratio")
    for axes, name, label in (
        (panels[4], "deviation", "standard deviation / sigma"),
        (panels[5], "correlation", "correlation of neighbouring samples"),
    ):
        for kind, colour in zip(NOISES, (POSTERIOR, DATA), strict=True):
            values = dataset[f"{name}_{kind}"].values
            for stream, style in zip(values.T, ("-", "--"), strict=True):
                axes.ecdf(stream, color=colour, linestyle=style)
        dress(axes, label, "share of signals", "white: blue, resampled: grey")
    panels[4].axvline(1.0, color=TRUTH, linewidth=0.8)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    num = int(dataset.num_pairs)
    gaps = dataset.gap_amplitude.values.astype(float)
    found = [
        _share("neighbours in frequency within 15 mHz, %", dataset["close"], num, 31),
        _share("neighbours in frequency within 30 mHz, %", dataset["near"], num, 73),
        _share(
            "neighbours in amplitude that differ by less than 20 %, %",
            dataset["similar"],
            num,
            48,
        ),
        Claim(
            "geometric mean of amplitude gaps",
            float(np.exp(np.log(gaps[gaps > 0]).mean())),
            paper=0.11,
            source="fig. 2a",
        ),
        Claim(
            "least frequency gap, mHz",
            1e3 * float(dataset.least_gap),
            paper=10.0,
            source="fig. 2b",
            target=">= 9.999",
            note="K is never reduced to make the components fit.",
        ),
        Claim(
            "p-value of uniform phase gaps",
            float(dataset.phase_p_value),
            paper=0.82,
            source="fig. 2c",
            target="> 0.001",
        ),
        Claim(
            "most frequent SNR, dB",
            _mode(dataset.snr.values),
            paper=8.0,
            source="fig. 3",
        ),
    ]
    for kind in NOISES:
        for i, stream in enumerate(dataset.stream.values):
            deviation = dataset[f"deviation_{kind}"].values[:, i]
            mine = kind == "white"
            found.append(
                Claim(
                    f"true noise deviation / sigma, {kind}, {stream}",
                    float(deviation.mean()),
                    mean_interval(deviation),
                    target="within 0.5 % of 1" if mine else None,
                    met=bool(abs(deviation.mean() - 1) < 0.005) if mine else None,
                    note=""
                    if mine
                    else "The paper's training data, as its authors' "
                    "code makes them; their labels say 1.",
                )
            )
    return found


def _share(quantity: str, hits: xr.DataArray, num: int, paper: float) -> Claim:
    low, high = share_interval(int(hits), num)
    return Claim(
        quantity, 100 * int(hits) / num, (100 * low, 100 * high), paper, "fig. 2"
    )


def _mode(values: np.ndarray) -> float:
    grid = np.linspace(-10, 40, 501)
    return float(grid[stats.gaussian_kde(values.astype(float))(grid).argmax()])
