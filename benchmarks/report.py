"""``benchmarks/REPORT.md``: a table for each question, with the figure and command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .experiment import Budget, Claim, discover, load
from .store import RESULTS, Result

__all__ = ["write_report"]

_PLACE = Path(__file__).parent / "REPORT.md"
_HEAD = """# Benchmark report

Written by `python -m benchmarks report`; edit the experiments, not this file. Each
section answers one question, with the command that made its numbers. *Paper* is the
number that Houba, Giarda and Speri (2025) print, at the figure or table named; brackets
hold 95 % intervals; *target* is what this package wants to reach. A dash means that
there is no such number. Losses are listed first. `python -m benchmarks figures NAME`
draws a section's figure into `benchmarks/figures/` from the numbers that are kept.
"""


def write_report(budget: Budget = "quick", folder: Path | None = None) -> Path:
    """Write the report of what was run at a budget.

    Claims are made anew from the datasets that are kept, so that they follow the code
    as it is.

    Args:
        budget: Which results.
        folder: Folder of the results, and then of the report; else the usual ones.

    Returns:
        The report's path.
    """
    place = _PLACE if folder is None else folder / _PLACE.name
    losses: list[str] = []
    sections: list[str] = []
    missing: list[str] = []
    for name in discover():
        result = Result(load(name), budget, folder)
        if not result.path.exists():
            missing.append(name)
            continue
        if result.is_current():  # what it then measured may be less than now
            result.conclude()
        claims = result.claims()
        if lost := _losses(claims):
            why = result.experiment.about("Losses")
            losses += [f"**[{name}](#{name})**: {why}", "", *lost, ""]
        sections.append(_section(result, claims))
    parts = [_HEAD]
    parts.append(
        "## Where we lose or miss a target\n\n"
        + "\n".join(losses or ["Nowhere."])
        + "\n"
    )
    parts += sections
    if folder is None:
        parts.append(_scripts())
    if missing:
        parts.append(f"## Not run at this budget\n\n{', '.join(missing)}\n")
    place.write_text("\n".join(parts))
    return place


def _section(result: Result, claims: list[Claim]) -> str:
    experiment, facts = result.experiment, result.facts()
    rivals = list(dict.fromkeys(name for claim in claims for name in claim.rivals))
    heads = ["quantity", "paper", *rivals, "ours", "target", "met"]
    lines = [
        f"## {experiment.name}",
        "",
        f"**{experiment.title}.** {experiment.about('Question')}",
        "",
        f"Paper: {experiment.about('Paper')}",
        "",
        f"Protocol: {experiment.about('Protocol')}",
        "",
        _row(heads),
        _row(["---"] * len(heads)),
    ]
    notes: list[str] = []
    for claim in claims:
        mark = ""
        if claim.note:
            if claim.note not in notes:
                notes.append(claim.note)
            mark = f" ({notes.index(claim.note) + 1})"
        paper = _number(claim.paper)
        if claim.source:
            paper += f" ({claim.source})"
        met = {True: "yes", False: "**no**", None: "-"}[claim.met]
        others = [_number(claim.rivals.get(name)) for name in rivals]
        ours = _number(claim.ours) + _interval(claim.interval)
        cells = [claim.quantity + mark, paper, *others, ours, claim.target or "-", met]
        lines.append(_row(cells))
    lines.append("")
    if not result.is_of_shipped_weights():
        lines += ["Measured with earlier weights than those that are shipped now.", ""]
    elif not result.is_current():
        lines += ["Measured by an earlier protocol than that above.", ""]
    lines += [f"({i}) {note}  " for i, note in enumerate(notes, 1)]
    machine = facts["machine"]
    lines += [
        "",
        f"`{facts['command']}` ({_budget(facts['budget means'])}; "
        f"{machine['processor']}, {machine['threads used by torch']} thread)",
        "",
    ]
    return "\n".join(lines)


# What stands among the rivals of a claim and is none.
_OURS = ("ours, shipped", "refined", "second run of the reference")


def _scripts() -> str:
    """What the single scripts measured, from their JSON files."""
    lines = [
        "## Single scripts",
        "",
        "What was measured outside the suite: means with their standard errors.",
        "",
    ]
    for path in sorted(RESULTS.glob("*/*.json")):
        rows = list(_flat("", json.loads(path.read_text())))
        command = f"python -m benchmarks.{path.parent.name} {path.stem}"
        lines += [
            f"<details><summary>{command}</summary>",
            "",
            _row(["quantity", "value"]),
            _row(["---", "---"]),
            *(_row(list(row)) for row in rows),
            "",
            "</details>",
            "",
        ]
    return "\n".join(lines)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and {"mean", "error", "n"} <= set(value):
        text = _number(value["mean"])
        if value["error"] is not None:
            text += f" ± {_number(value['error'])}"
        yield name, f"{text} (median {_number(value['median'])}, n = {value['n']})"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}: {key}" if name else key, inner)
    elif isinstance(value, list):
        yield name, ", ".join(_number(v) for v in value if not isinstance(v, dict))
    else:
        yield name, _number(value)


def _losses(claims: list[Claim]) -> list[str]:
    texts = []
    for claim in claims:
        better = [name for name in claim.worse_than() if name not in _OURS]
        if claim.met is False or better:
            text = f"{claim.quantity}: {_number(claim.ours)}"
            if claim.met is False:
                text += f", target {claim.target}"
            others = {"paper": claim.paper, **claim.rivals}
            text += "".join(f"; {name} {_number(others[name])}" for name in better)
            texts.append(f"- {text}")
    return texts


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if 1_000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    plain = value == 0 or 1e-3 <= abs(value) < 1_000
    return f"{value:.4g}" if plain else f"{value:.2e}"


def _interval(interval: tuple[float, float] | None) -> str:
    return (
        "" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]"
    )


def _budget(means: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in means.items())
