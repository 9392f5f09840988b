"""Pages of the documentation that are kept elsewhere: tutorials, report and reference.

Tutorials and benchmark report are copied to ``docs/tutorials/`` and ``docs/report/``,
and the reference gets a page for each folder of the package, in
``docs/reference/modules/``. All three are made anew at every build, so that the site
builds with what there is.
"""

import ast
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
    """Copy tutorials and report, and list the modules of the package.

    Args:
        repository: Root of the repository.
        docs: Folder of the documentation's sources.
    """
    _tutorials(repository / "tutorials", _empty(docs / "tutorials"))
    _report(repository / "benchmarks", _empty(docs / "report"))
    _reference(repository / "sbi_slotflow", _empty(docs / "reference" / "modules"))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
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


def _reference(package: Path, target: Path) -> None:
    pages: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        module = [part for part in parts if part != "__init__"]
        if not module or module[-1] == "__main__" or not _docstring(path):
            continue
        page = module[0] if len(parts) > 1 else "loose modules"
        name = ".".join(module)
        # What a folder exports is described where it is defined.
        options = "   :no-members:\n" if path.name == "__init__.py" else ""
        pages.setdefault(page, [f"# {page}\n"]).append(
            f"## {name}\n\n```{{eval-rst}}\n"
            f".. automodule:: {package.name}.{name}\n{options}```\n"
        )
    for page, sections in pages.items():
        (target / f"{page.replace(' ', '_')}.md").write_text("\n".join(sections))


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text()))
