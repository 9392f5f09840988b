r"""Two sources that interfere, far outside the training data.

Paper: fig. 10, sec. 5.1.6.

Question: How large are the errors for two components at the least separation, weaker
than any in training; how large would the exact posterior's be; and is the user warned?

Protocol: Two components at 2.60 and 2.61 Hz, phases 0 and pi/2, amplitudes uniform in
0.05-1.5 (the `paper` prior ends at 0.5), sigma uniform in 0-1.5. Draws given K = 2; the
error of a draw is its distance from the truth in canonical order, averaged over draws
and components. Ours are the `paper` weights (out of distribution) and the `crowded`
ones, whose prior holds these amplitudes. The exact posterior (`rjmcmc.fixed_k`) has the
amplitudes' true distribution as its prior, on some of the signals. A signal counts as
warned if its training reference gives p < 0.001, as `posterior.sample` would.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sbi.utils import BoxUniform
from tqdm.auto import tqdm

from sbi_slotflow import SlotPosterior, VariableKPrior, rjmcmc
from sbi_slotflow.calibration import TrainingReference
from sbi_slotflow.plots.style import FONT, SMALL, TRUTH, dress
from sbi_slotflow.problems import Sinusoids
from sbi_slotflow.seeding import generator_for

from ..common import ready
from ..experiment import Budget, Claim
from ..intervals import median_interval
from ..store import Cache

PARAMETERS = ("relative amplitude", "phase", "frequency")
UNITS = ("%", "rad", "mHz")
SCALE = np.array([100.0, 1.0, 1e3])
WARNED = 1e-3
_FREQUENCIES, _PHASES = (2.60, 2.61), (0.0, math.pi / 2)


@dataclass(frozen=True)
class Size:
    """Signals, those with the exact posterior and the crowded weights, and draws."""

    num_signals: int
    num_exact: int
    num_crowded: int
    num_draws: int


BUDGETS: dict[Budget, Size] = {
    "smoke": Size(60, 3, 1, 50),
    "quick": Size(600, 80, 40, 200),
    "full": Size(20_000, 2_000, 2_000, 200),
}
WEIGHTS = ("paper", "crowded")


def run(budget: Budget, seed: int) -> xr.Dataset:
    size, cache = BUDGETS[budget], Cache("interference", budget, seed)
    problem, posterior = ready("paper")
    generator = generator_for(seed, 10)
    num = size.num_signals
    amplitude = 0.05 + 1.45 * torch.rand(num, 2, generator=generator)
    sigma = 1.5 * torch.rand(num, 1, generator=generator)
    truth = torch.zeros(num, problem.layout.max_cardinality, 3)
    truth[:, :2, 0] = amplitude
    truth[:, :2, 1] = torch.tensor(_PHASES)
    truth[:, :2, 2] = torch.tensor(_FREQUENCIES)
    theta = problem.layout.pack(torch.full((num,), 2), truth, sigma)
    x = problem.simulator(theta, generator)
    reference = posterior.training_reference
    assert isinstance(reference, TrainingReference)
    p_values = torch.cat([torch.as_tensor(reference.p_values(b)) for b in x.split(200)])
    ours = cache.get(
        "paper", lambda: _amortized(posterior, truth, x, size.num_draws, seed)
    )
    crowded = cache.get(
        "crowded",
        lambda: _amortized(
            ready("crowded")[1],
            truth[: size.num_crowded],
            x[: size.num_crowded],
            size.num_draws,
            seed,
        ),
    )
    wide = _wide(problem)
    exact = [
        cache.get(f"exact-{i}", lambda i=i: _exact(wide, truth[i], x[i], i))
        for i in tqdm(range(size.num_exact), desc="exact", leave=False)
    ]
    return xr.merge(
        [
            xr.Dataset(
                {
                    "amplitude": (("signal", "component"), amplitude.numpy()),
                    "sigma": ("signal", sigma[:, 0].numpy()),
                    "p_value": ("signal", p_values.numpy().astype("f4")),
                },
                {"parameter": list(PARAMETERS)},
            ),
            ours.rename(error="error_paper", p_two="p_two_paper"),
            crowded.rename(
                error="error_crowded", p_two="p_two_crowded", signal="signal_crowded"
            ),
            xr.concat(exact, "signal_exact").rename(error="error_exact"),
        ]
    )


def _amortized(
    posterior: SlotPosterior, truth: torch.Tensor, x: torch.Tensor, num: int, seed: int
) -> xr.Dataset:
    errors, probs = [], []
    step = 50
    for start in tqdm(range(0, len(x), step), desc="draws", leave=False):
        rows = posterior.sample_batched(
            (num,), x[start : start + step], k=2, generator=generator_for(seed, start)
        )
        drawn = posterior.prior.layout.unpack(rows).components[..., :2, :]
        errors.append(_error(drawn, truth[start : start + step]))
        found = torch.atleast_2d(posterior.cardinality(x[start : start + step]).probs)
        probs.append(found[:, 2])
    return xr.Dataset(
        {
            "error": (("signal", "component", "parameter"), np.concatenate(errors)),
            "p_two": ("signal", torch.cat(probs).numpy()),
        }
    )


def _exact(problem: Sinusoids, truth: torch.Tensor, x: torch.Tensor, i: int):
    try:
        found = rjmcmc.fixed_k(problem, x, 2, num_samples=4_000, seed=i)
        error = np.full((2, 3), np.nan, dtype="f4")
        if found.is_reliable:
            rows = found.sample((1_000,), generator=generator_for(i))
            drawn = problem.layout.unpack(rows).components[:, None, :2].float()
            error = _error(drawn, truth[None])[0]
    except ValueError:  # the fit lies outside the prior
        error = np.full((2, 3), np.nan, dtype="f4")
    return xr.Dataset({"error": (("component", "parameter"), error)})


def _error(drawn: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Mean absolute errors (B, 2, 3) of draws (S, B, 2, 3)."""
    gap = (drawn - truth[:, :2]).double()
    gap[..., 1] = torch.atan2(gap[..., 1].sin(), gap[..., 1].cos())
    error = gap.abs().mean(0)
    error[..., 0] = error[..., 0] / truth[:, :2, 0]
    return (error.numpy() * SCALE).astype("f4")


def _wide(problem: Sinusoids) -> Sinusoids:
    """The problem with the amplitudes' true distribution."""
    low, high = torch.tensor([0.05, 0.0, 2.5]), torch.tensor([1.5, math.tau, 3.0])
    old = problem.prior
    prior = VariableKPrior(
        BoxUniform(low, high),
        old.cardinality_probs,
        shared=old.shared,
        min_separation=None,
        order_by=2,
        component_names=old.layout.component_names,
        shared_names=old.layout.shared_names,
        periods={"phase": math.tau},
    )
    return replace(problem, prior=prior)


def snr(dataset: xr.Dataset) -> np.ndarray:
    """Each component's SNR against noise and the other one, dB, (signal, 2)."""
    power = dataset.amplitude.values**2 / 2
    other = power[:, ::-1] + dataset.sigma.values[:, None] ** 2
    return 10 * np.log10(power / other)


def plot(dataset: xr.Dataset) -> Figure:
    ratio = snr(dataset)
    error = dataset.error_paper.mean("component").values
    warned = dataset.p_value.values < WARNED
    figure = Figure(figsize=(10.4, 6.4), layout="constrained")
    panels = figure.subplots(2, 3)
    for j, (name, unit) in enumerate(zip(PARAMETERS, UNITS, strict=True)):
        axes = panels[0, j]
        values = np.log10(error[:, j])
        shown = axes.scatter(*ratio.T, c=values, s=9, cmap="viridis", linewidths=0)
        axes.plot(
            *ratio[warned].T, "o", ms=5, mfc="none", mec=TRUTH, mew=0.5, label="warned"
        )
        bar = figure.colorbar(shown, ax=axes, shrink=0.9)
        bar.set_label(f"log10 error ({unit})", fontsize=SMALL)
        dress(axes, "SNR of source 1 (dB)", "SNR of source 2 (dB)", f"{name}, ours")
        axes = panels[1, j]
        exact = dataset.error_exact.values[..., j]
        mine = dataset.error_paper.values[: len(exact), :, j]
        crowded = dataset.error_crowded.values[..., j]
        least = dataset.amplitude.values[: len(exact)].min(1) >= 0.5
        num = min(len(crowded), len(exact))
        for values, style, label in (
            (mine[~least], {"color": "#0072b2", "marker": "."}, "paper, weak source"),
            (mine[least], {"color": "#56b4e9", "marker": "x"}, "paper, inside prior"),
        ):
            rows = ~least if label.endswith("weak source") else least
            axes.scatter(exact[rows], values, s=12, label=label, **style)
        axes.scatter(
            exact[:num], crowded[:num], s=12, color="#e69f00", marker="+",
            label="crowded weights",
        )  # fmt: skip
        ends = np.nanmin(exact), np.nanmax(exact)
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        dress(axes, f"exact error ({unit})", f"our error ({unit})", name)
    panels[0, 0].legend(fontsize=SMALL, frameon=False)
    panels[1, 0].legend(fontsize=FONT - 2, frameon=False)
    return figure


def claims(dataset: xr.Dataset) -> list[Claim]:
    ratio = snr(dataset)
    balanced = (ratio > -10).all(1)
    outside = (dataset.amplitude < 0.5).any("component").values
    warned = dataset.p_value.values < WARNED
    error = dataset.error_paper.mean("component").values
    exact = dataset.error_exact.mean("component").values
    crowded = dataset.error_crowded.mean("component").values
    num = len(exact)
    papers = ("below 10", "0.1-1", "0.1-10")
    found = []
    for j, (name, unit) in enumerate(zip(PARAMETERS, UNITS, strict=True)):
        here = balanced & np.isfinite(error[:, j])
        some = here[:num] & np.isfinite(exact[:, j])
        both = here[: len(crowded)]
        found.append(
            Claim(
                f"error of {name} where both SNR > -10 dB, median, {unit}",
                float(np.median(error[here, j])),
                median_interval(error[here, j]),
                paper=papers[j],
                source="fig. 10",
                rivals={
                    "exact": float(np.median(exact[some, j])) if some.any() else None,
                    "ours, crowded weights": float(np.median(crowded[both, j]))
                    if both.any()
                    else None,
                },
            )
        )
        for label, rows in (("inside", ~outside), ("outside", outside)):
            rows = rows[:num] & np.isfinite(exact[:, j])
            if rows.sum() > 2:
                ratios = error[:num][rows, j] / exact[rows, j]
                found.append(
                    Claim(
                        f"our error over the exact one, {name}, amplitudes {label} the "
                        "prior, median",
                        float(np.median(ratios)),
                        median_interval(ratios),
                        target="<= 1.1" if label == "inside" else None,
                        note="Outside its prior the network cannot be right: it holds "
                        "that each amplitude is above 0.5.",
                    )
                )
    for label, rows in (("inside", ~outside), ("outside", outside)):
        if rows.any():
            found.append(
                Claim(
                    f"signals warned of, amplitudes {label} the prior, %",
                    100 * float(warned[rows].mean()),
                    note="The check looks at the data's distribution; a weak source in "
                    "loud noise looks like training data.",
                )
            )
    return found
