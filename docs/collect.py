"""Pages of the documentation that are kept elsewhere: tutorials and benchmark report.

They are copied to ``docs/tutorials/`` and ``docs/report/``, which are made anew at
every build, so that the site builds with as many of them as there are.
"""

import shutil
from pathlib import Path

__all__ = ["collect"]

_TUTORIALS = """\
# Tutorials

Notebooks that run from start to end in a few minutes on a laptop. Their sources are in
the folder `tutorials/` of the repository.

"""
_NO_TUTORIALS = "This copy of the documentation was built without them.\n"
_REPORT = """\
# Benchmarks

The report on the paper's experiments and its rivals is written by
`python -m benchmarks report`; this copy of the documentation was built without one.
What was measured of the shipped weights is in the README, and printed by
`sbi-slotflow info MODEL`.
"""


def collect(repository: Path, docs: Path) -> None:
    """Copy tutorials and report.

    Args:
        repository: Root of the repository.
        docs: Folder of the documentation's sources.
    """
    _tutorials(repository / "tutorials", _empty(docs / "tutorials"))
    _report(repository / "benchmarks", _empty(docs / "report"))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _tutorials(source: Path, target: Path) -> None:
    notebooks = sorted(source.glob("[0-9]*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, target)
    names = "\n".join(notebook.stem for notebook in notebooks)
    listed = f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    text = _TUTORIALS + (listed if notebooks else _NO_TUTORIALS)
    (target / "index.md").write_text(text)


def _report(source: Path, target: Path) -> None:
    report = source / "REPORT.md"
    if not report.is_file():
        (target / "index.md").write_text(_REPORT)
        return
    shutil.copy(report, target / "index.md")
