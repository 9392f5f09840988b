"""What the demo prints of a signal."""
# ruff: noqa: T201

import math
import sys

import torch
from torch import Tensor

from ..problems import Sinusoids
from ..sets.circular import unwrap

__all__ = [
    "PERIODS",
    "UNITS",
    "print_accuracy",
    "print_cardinality",
    "print_reconstruction",
    "print_table",
    "warn_if_foreign",
]

UNITS = {"phase": "rad", "frequency": "Hz"}
PERIODS = {"phase": 2 * math.pi}


def warn_if_foreign(x: Tensor, signals: Tensor) -> None:
    """Warn where a signal is far louder or quieter than what was trained on."""
    rms, usual = _rms(x), signals.square().mean(-1).sqrt()
    if not usual.min() <= rms <= usual.max():
        print(
            f"warning: your signal's RMS is {rms:.3g}, that of {len(signals):,} "
            f"simulated ones {usual.min():.2g} to {usual.max():.2g}. The network never "
            "saw its like; do not trust what follows.",
            file=sys.stderr,
        )


def print_cardinality(probs: Tensor, true: int | None = None) -> None:
    """Print p(K | x) with the true K marked."""
    print("\np(K | x)")
    for k, p in enumerate(probs.tolist()):
        bar, mark = "#" * round(30 * p), "  truth" if k == true else ""
        print(f"  K = {k}  {p:.3f}  {bar}{mark}".rstrip())


def print_table(
    draws: Tensor, theta: Tensor | None, problem: Sinusoids, k: int
) -> None:
    """Print medians and 90 % intervals given K, beside the truth."""
    layout = problem.layout
    true = None if theta is None else layout.unpack(theta[0])
    same = true is not None and int(true.cardinality) == k
    parts = layout.unpack(draws)
    columns = [
        (name, parts.shared[:, i], None if true is None else true.shared[i])
        for i, name in enumerate(layout.shared_names)
    ]
    columns += [
        (
            f"{name} {slot + 1}",
            parts.components[:, slot, i],
            true.components[slot, i] if true is not None and same else None,
        )
        for slot in range(k)
        for i, name in enumerate(layout.component_names)
    ]
    print(f"\nPosterior given K = {k}")
    print(f"  {'parameter':<18}{'median':>9}{'90 % interval':>20}{'truth':>10}")
    for label, values, truth in columns:
        name = label.split()[0]
        low, median, high, truth = _summary(values, truth, PERIODS.get(name))
        unit = f" ({UNITS[name]})" if name in UNITS else ""
        # As many digits as the interval's width is worth, three at least.
        digits = min(6, max(3, 2 - math.floor(math.log10(max(high - low, 1e-9)))))
        shown = "" if truth is None else f"{truth:10.{digits}f}"
        interval = f"[{low:7.{digits}f}, {high:7.{digits}f}]"
        print(f"  {label + unit:<18}{median:9.{digits}f}  {interval}{shown}")
    if k:
        print("  phases are shifted by whole turns to lie around their circular mean")
    if true is not None and not same:
        print("  true components, not matched with these because K differs:")
        for row in true.components[true.mask].tolist():
            named = zip(layout.component_names, row, strict=True)
            print("    " + ", ".join(f"{name} {value:.3f}" for name, value in named))


def _summary(
    values: Tensor, truth: Tensor | None, period: float | None
) -> tuple[float, float, float, float | None]:
    """5 %, 50 % and 95 % quantile, and the truth on the same turn of the circle."""
    if period is not None:
        values = unwrap(values, period)
    quantiles = values.double().quantile(
        torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    )
    low, median, high = quantiles.tolist()
    true = None if truth is None else float(truth)
    if true is not None and period is not None:
        true += round((median - true) / period) * period
    return low, median, high, true


def print_reconstruction(
    mean: Tensor, x: Tensor, theta: Tensor | None, draws: Tensor, problem: Sinusoids
) -> None:
    """Print how far the posterior mean of the signal is from the truth, or from x."""
    if theta is None:
        sigma = _sigma(problem, draws).median()
        print(
            f"\nRMS residual of the reconstruction: {_rms(x - mean):.3f} "
            f"(the posterior median of sigma is {sigma:.3f})"
        )
        return
    signal = problem.simulator.signal(theta)
    sigma = _sigma(problem, theta).item()
    error, size = _rms(mean - signal), _rms(signal)
    relative = "the true signal is zero"
    if size > 0:
        relative = f"{100 * error / size:.1f} % of the true signal's RMS"
    print(f"\nRMS error of the reconstruction: {error / sigma:.3f} sigma ({relative})")


def print_accuracy(probs: Tensor, theta: Tensor, problem: Sinusoids) -> None:
    """Print how often the most probable K is the true one."""
    correct = probs.argmax(-1) == problem.layout.cardinality(theta)
    print(
        f"\nK accuracy on {len(theta):,} fresh signals: {correct.float().mean():.3f} "
        "(the most probable K against the true one)"
    )


def _sigma(problem: Sinusoids, theta: Tensor) -> Tensor:
    index = problem.shared_names.index("sigma")
    return problem.layout.unpack(theta).shared[:, index]


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
