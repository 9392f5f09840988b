"""A report as one self-contained web page."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from .check import Check

if TYPE_CHECKING:
    from .report import Report

__all__ = ["page"]

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


def page(report: "Report") -> str:
    """Return the page's HTML, figures embedded."""
    settings = report.settings
    head = (
        f"{settings['n']:,} simulated pairs of {settings['problem']}, "
        f"{settings['num_draws']} draws each, seed {settings['seed']}"
    )
    rows = "".join(
        f'<tr><td><a href="#{_anchor(name)}">{escape(check.title)}</a>'
        f"{_suffix(name, check)}</td><td>{_verdict(check.passed)}</td>"
        f'<td class="number">{check.p_value:.3g}</td></tr>'
        for name, check in report.checks.items()
    )
    rows += "".join(
        f"<tr><td>{escape(name)}</td><td>not checked</td><td>{escape(why)}</td></tr>"
        for name, why in report.skipped.items()
    )
    sections = "".join(_section(name, check) for name, check in report.checks.items())
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="generator" content="sbi_slotflow.CalibrationReport">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Calibration of {escape(settings['posterior'])}</title>"
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>Calibration of {escape(settings['posterior'])}: "
        f"{_verdict(report.passed)}</h1>"
        f"<p>{escape(head)}. An exact posterior fails with a probability of at most "
        f"{report.false_alarm_rate:g}. p-values are corrected for the number of "
        "quantities within a check, not for the number of checks: a check fails at "
        f"p &le; {next(iter(report.checks.values())).false_alarm_rate:.2g}.</p>"
        "<table><tr><th>check</th><th>verdict</th><th>p</th></tr>"
        f"{rows}</table>{sections}"
        f'<p class="note">{escape(versions)}</p></body></html>\n'
    )


def _section(name: str, check: Check) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{_verdict(p > check.level)}</td>"
        f'<td class="number">{p:.3g}</td></tr>'
        for key, p in check.p_values.items()
    )
    return (
        f'<h2 id="{_anchor(name)}">{escape(check.title)}{_suffix(name, check)}: '
        f"{_verdict(check.passed)}</h2><p>{escape(check.explanation)}</p>"
        f'<img alt="{escape(check.title)}" src="{_image(check.plot())}">'
        f"<table><tr><th>quantity</th><th>verdict</th><th>p</th></tr>{rows}</table>"
        f'<p class="note">A quantity fails at p &le; {check.level:.2g}.</p>'
    )


def _suffix(name: str, check: Check) -> str:
    """Tells two checks of one title apart."""
    return " under another prior" if name.endswith("another prior") else ""


def _anchor(name: str) -> str:
    return escape(name.replace(" ", "-"))


def _verdict(passed: bool) -> str:
    word = "passed" if passed else "failed"
    return f'<span class="{word}">{word}</span>'


def _image(figure: Figure) -> str:
    file = io.BytesIO()
    # Without metadata the bytes depend on the figure alone.
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
