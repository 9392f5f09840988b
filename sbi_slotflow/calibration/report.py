"""All checks at once, as an object, a web page and a JSON file."""

import base64
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..problems.base import Problem
from ..sets.checks import as_count, as_observation, simulate
from ..sets.multi_class import MultiClassPrior
from ..storage import write_atomically
from .cardinality import cardinality_reliability
from .check import Check, check_rate
from .coverage import coverage
from .draws import (
    BatchedPosterior,
    CalibrationDraws,
    cardinality_probs,
    draw,
    in_parallel,
)
from .local_c2st import local_c2st
from .misspecification import TrainingReference
from .residuals import residuals
from .sbc import FEWEST_RANKS, sbc, sbc_components
from .tarp import tarp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "report"]

_FORMAT = "sbi_slotflow.CalibrationReport"  # the mark of a report's files
_STYLE = """
body { font: 15px/1.45 sans-serif; color: #222; max-width: 860px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: 0.6em 0; font-size: 0.92em; }
th, td { text-align: left; padding: 0.25em 1em 0.25em 0;
         border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #0072b2; } .failed { color: #b34a00; font-weight: bold; }
img { max-width: 100%; } .note { color: #666; font-size: 0.92em; }
"""
_DPI = 110
_FEWEST_NULL = 99
_NUM_REFERENCE = 2_000


@dataclass(frozen=True, eq=False)
class Report:
    """Verdicts of all checks.

    Attributes:
        checks: The checks by name.
        skipped: Why other checks were not made, by name.
        false_alarm_rate: Probability that an exact posterior fails any check, at most
            (each of the checks has an equal share of it).
        settings: What was checked, and with which numbers.
    """

    checks: Mapping[str, Check]
    skipped: Mapping[str, str]
    false_alarm_rate: float
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks.values())

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(name for name, check in self.checks.items() if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return verdicts and numbers, ready for JSON."""
        return {
            "passed": self.passed,
            "false_alarm_rate": self.false_alarm_rate,
            "settings": dict(self.settings),
            "checks": {name: check.to_dict() for name, check in self.checks.items()},
            "skipped": dict(self.skipped),
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write verdicts and numbers to a file, the same for the same seed."""
        text = json.dumps({"format": _FORMAT, **self.to_dict()}, indent=1) + "\n"
        write_atomically(path, text.encode(), _FORMAT, _is_report)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with all figures."""
        write_atomically(path, _page(self).encode(), _FORMAT, _is_report)

    def __str__(self) -> str:
        lines = [f"{name}: {check.verdict}" for name, check in self.checks.items()]
        lines += [f"{name}: not checked, {why}" for name, why in self.skipped.items()]
        word, rate = "passed" if self.passed else "FAILED", self.false_alarm_rate
        return "\n".join([*lines, f"{word} (family-wise false-alarm rate {rate})"])


def report(
    posterior: BatchedPosterior,
    problem: Problem,
    n: int = 1_000,
    *,
    x: Tensor | None = None,
    seed: int = 0,
    num_draws: int = 200,
    cardinality_weights: Sequence[float] | Tensor | None = None,
    false_alarm_rate: float = 0.05,
    num_workers: int = 1,
    show_progress: bool = True,
) -> Report:
    """Check a posterior in every way.

    The result depends on the seed, not on the number of workers.

    Args:
        posterior: The posterior. Local C2ST and the comparison with the training data
            concern ``x``; a training reference attached to the posterior is used.
        problem: The problem that it claims to solve.
        n: Number of simulated pairs. At the default a posterior 20 % too narrow, or
            shifted by half a standard deviation, is found nearly always. The error
            names the least that a problem needs.
        x: The observation that matters, shape ``(T,)`` or ``(1, T)``; the first
            simulated one if None.
        seed: Seed of everything.
        num_draws: Posterior draws for each pair.
        cardinality_weights: Another prior of K to score ``with_cardinality_prior``
            under; the problem's divided by K + 1 if None.
        false_alarm_rate: Probability that an exact posterior fails, at most.
        num_workers: Processes of joblib; -1 for one a core. Use 1 on a GPU.
        show_progress: Whether to show a progress bar.

    Raises:
        TypeError: If the posterior lacks a method.
        ValueError: If a number or a shape is wrong.
    """
    check_rate(false_alarm_rate)
    if x is not None:
        x = as_observation(x, problem.num_data).reshape(1, *problem.event_shape)
    least = _least_pairs(posterior, problem, cardinality_weights)
    if as_count(n, "n") < least:
        raise ValueError(
            f"n must be at least {least} here, got {n}: of fewer pairs not enough are "
            "left that hold a component, or have another prior of K."
        )
    given = {"num_draws": num_draws, "seed": seed}
    shown = {"num_workers": num_workers, "show_progress": show_progress}
    draws = draw(posterior, problem, n, **given, **shown)
    jobs, skipped = _jobs(posterior, problem, draws, x, cardinality_weights)
    rate = false_alarm_rate / len(jobs)
    ready = [partial(job, false_alarm_rate=rate) for job in jobs.values()]
    checks = in_parallel(ready, num_workers, "checks", show_progress)
    settings = {
        "problem": problem.name,
        "posterior": type(posterior).__name__,
        "n": n,
        **given,
        "observation": "given" if x is not None else "first simulated pair",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "sbi", "numpy", "scipy")},
        },
    }
    found = dict(zip(jobs, checks, strict=True))
    return Report(found, skipped, false_alarm_rate, settings)


def _least_pairs(
    posterior: BatchedPosterior,
    problem: Problem,
    weights: Sequence[float] | Tensor | None,
) -> int:
    """Pairs of which the checks find enough, in 999 of 1,000 reports."""
    probs = problem.prior.cardinality_probs.double().cpu()
    shares = [1 - float(probs[0])]
    if hasattr(posterior, "with_cardinality_prior"):
        other = _other_weights(problem, weights)
        if other.shape == probs.shape and other.sum() > 0:
            ratio = torch.where(probs > 0, other / probs, 0.0)
            shares.append(float(probs @ (ratio / ratio.max())))
    share, num = max(min(shares), 1e-3), FEWEST_RANKS
    while num * share - 3.1 * math.sqrt(num * share * (1 - share)) < FEWEST_RANKS:
        num += 1
    return num


def _other_weights(
    problem: Problem, weights: Sequence[float] | Tensor | None
) -> Tensor:
    """Weights of the other prior of K, float64, shape ``(Kmax + 1,)``."""
    if weights is None:
        k = torch.arange(problem.prior.max_cardinality + 1)
        weights = problem.prior.cardinality_probs.cpu() / (k + 1)
    return torch.as_tensor(weights, dtype=torch.float64)


Job = Callable[..., Check]


def _jobs(
    posterior: BatchedPosterior,
    problem: Problem,
    draws: CalibrationDraws,
    x: Tensor | None,
    weights: Sequence[float] | Tensor | None,
) -> tuple[dict[str, Job], dict[str, str]]:
    """The checks to make, and why others are not made."""
    skipped: dict[str, str] = {}
    log_likelihood = problem.log_likelihood
    try:
        log_likelihood(draws.theta[:1].unsqueeze(0), draws.x[:1])
    except NotImplementedError:
        log_likelihood = None
    jobs: dict[str, Job] = {
        "sets": partial(sbc, draws, log_likelihood=log_likelihood),
        "components": partial(sbc_components, draws),
        "coverage": partial(coverage, draws),
        "cardinality": partial(cardinality_reliability, draws),
    }
    prior = problem.prior
    if isinstance(prior, MultiClassPrior):
        # Of each class, as components of two classes are no matter of matching.
        del jobs["components"], jobs["coverage"]
        jobs |= _class_jobs(posterior, prior, draws)
    if hasattr(posterior, "with_cardinality_prior"):
        weights = _other_weights(problem, weights)
        other: Any = posterior
        probs = cardinality_probs(other.with_cardinality_prior(weights), draws.x)
        jobs["cardinality under another prior"] = partial(
            cardinality_reliability, draws, probs=probs, weights=weights
        )
    else:
        why = "the posterior has no with_cardinality_prior"
        skipped["cardinality under another prior"] = why
    jobs["tarp"] = partial(tarp, draws, prior)
    observed = draws.x[:1] if x is None else x
    jobs["local C2ST"] = partial(_local, posterior, observed, draws)
    if hasattr(problem.simulator, "signal") and hasattr(problem.simulator, "noise"):
        jobs["residuals"] = partial(
            residuals, draws.draws[0], draws.x, problem, seed=draws.seed
        )
    else:
        skipped["residuals"] = "the simulator has no signal and noise"
    reference = getattr(posterior, "training_reference", None)
    if x is None and not isinstance(reference, TrainingReference):
        why = "neither x nor a training reference of the posterior was given"
        skipped["misspecification"] = why
    else:
        jobs["misspecification"] = partial(
            _misspecification, reference, problem, draws, x
        )
    return jobs, skipped


def _class_jobs(
    posterior: BatchedPosterior, prior: MultiClassPrior, draws: CalibrationDraws
) -> dict[str, Job]:
    """Checks of each class alone."""
    jobs: dict[str, Job] = {}
    for name, member in prior.classes.items():
        counted = cardinality_probs(posterior, draws.x, of=name)
        probs = member.cardinality_probs.double().cpu()
        own = draws.of_class(name, probs, counted)
        jobs[f"components of {name}"] = partial(sbc_components, own)
        jobs[f"coverage of {name}"] = partial(coverage, own)
        jobs[f"cardinality of {name}"] = partial(cardinality_reliability, own)
    return jobs


def _page(report: Report) -> str:
    """Return the page's HTML, figures embedded."""
    settings = report.settings
    title = f"Calibration of {escape(settings['posterior'])}"
    head = (
        f"{settings['n']:,} simulated pairs of {settings['problem']}, "
        f"{settings['num_draws']} draws each, seed {settings['seed']}"
    )
    links = {
        f'<a href="#{_anchor(name)}">{_title(name, check)}</a>': check
        for name, check in report.checks.items()
    }
    rows = [(link, _verdict(c.passed), f"{c.p_value:.3g}") for link, c in links.items()]
    rows += [(escape(n), "not checked", escape(w)) for n, w in report.skipped.items()]
    sections = "".join(_section(name, check) for name, check in report.checks.items())
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{_FORMAT}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{title}: {_verdict(report.passed)}</h1>"
        f"<p>{escape(head)}. An exact posterior fails with a probability of at most "
        f"{report.false_alarm_rate:g}. p-values are corrected for the number of "
        "quantities within a check, not for the number of checks: a check fails at "
        f"p &le; {next(iter(report.checks.values())).false_alarm_rate:.2g}.</p>"
        f"{_table('check', rows)}{sections}"
        f'<p class="note">{escape(versions)}</p></body></html>\n'
    )


def _section(name: str, check: Check) -> str:
    rows = [
        (escape(key), _verdict(p > check.level), f"{p:.3g}")
        for key, p in check.p_values.items()
    ]
    return (
        f'<h2 id="{_anchor(name)}">{_title(name, check)}: {_verdict(check.passed)}</h2>'
        f"<p>{escape(check.explanation)}</p>"
        f'<img alt="{escape(check.title)}" src="{_image(check.plot())}">'
        f"{_table('quantity', rows)}"
        f'<p class="note">A quantity fails at p &le; {check.level:.2g}.</p>'
    )


def _table(head: str, rows: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f'<tr><td>{name}</td><td>{verdict}</td><td class="number">{p}</td></tr>'
        for name, verdict, p in rows
    )
    return f"<table><tr><th>{head}</th><th>verdict</th><th>p</th></tr>{cells}</table>"


def _title(name: str, check: Check) -> str:
    """A check's title, which tells two checks of one kind apart."""
    another = " under another prior" if name.endswith("another prior") else ""
    _, of, cls = name.partition(" of ")
    return escape(check.title + another + of + cls)


def _anchor(name: str) -> str:
    return escape(name.replace(" ", "-"))


def _verdict(passed: bool) -> str:
    word = "passed" if passed else "failed"
    return f'<span class="{word}">{word}</span>'


def _image(figure: "Figure") -> str:
    file = io.BytesIO()
    # Without metadata the bytes depend on the figure alone.
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _is_report(path: Path) -> bool:
    return path.is_file() and _FORMAT.encode() in path.open("rb").read(1_000)


def _local(*given: Any, false_alarm_rate: float) -> Check:
    num_null = max(_FEWEST_NULL, math.ceil(2 / false_alarm_rate) - 1)
    return local_c2st(*given, num_null=num_null, false_alarm_rate=false_alarm_rate)


def _misspecification(
    reference: TrainingReference | None,
    problem: Problem,
    draws: CalibrationDraws,
    x: Tensor | None,
    false_alarm_rate: float,
) -> Check:
    """The observation if there is one, else whether the problem is the trained one."""
    if not isinstance(reference, TrainingReference):
        generator = draws.generator(8)
        theta = problem.prior.sample((_NUM_REFERENCE,), generator).cpu()
        data = simulate(problem.simulator, theta, generator)
        lengths = [stream.num_samples for stream in problem.streams]
        reference = TrainingReference.fit(data.flatten(1), streams=lengths)
    observed = draws.x if x is None else x
    return reference.check(observed, false_alarm_rate=false_alarm_rate)
