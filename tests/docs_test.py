"""The documentation takes tutorials and report as they are, few or all."""

import re
import runpy
from pathlib import Path

import pytest

collect = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "collect.py"))[
    "collect"
]


@pytest.fixture(name="folders")
def _folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("docs", "tutorials", "benchmarks", "sbi_slotflow/sets"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path, tmp_path / "docs"


def test_without_tutorials_and_report_there_are_pages_that_say_so(
    folders: tuple[Path, Path],
) -> None:
    collect(*folders)
    docs = folders[1]
    assert "was built without them" in (docs / "tutorials/index.md").read_text()
    assert "was built without one" in (docs / "report/index.md").read_text()


def test_tutorials_are_copied_and_listed_in_order(folders: tuple[Path, Path]) -> None:
    repository, docs = folders
    for name in ("07_spikes.ipynb", "00_ten_minutes.ipynb", "build.py", "draft.ipynb"):
        (repository / "tutorials" / name).write_text("{}")
    collect(*folders)
    (repository / "tutorials" / "00_ten_minutes.ipynb").unlink()
    names = {path.name for path in (docs / "tutorials").iterdir()}
    assert names == {"index.md", "07_spikes.ipynb", "00_ten_minutes.ipynb"}
    index = (docs / "tutorials/index.md").read_text()
    assert "\n00_ten_minutes\n07_spikes\n" in index
    collect(*folders)  # what is gone is gone
    assert not (docs / "tutorials/00_ten_minutes.ipynb").exists()


def test_the_report_is_copied(folders: tuple[Path, Path]) -> None:
    repository, docs = folders
    text = "# Report\n\n[site](https://example.org) [up](#report)\n"
    (repository / "benchmarks/REPORT.md").write_text(text)
    collect(*folders)
    assert (docs / "report/index.md").read_text() == text


def test_the_reference_has_every_module_that_says_what_it_is(
    folders: tuple[Path, Path],
) -> None:
    repository, docs = folders
    for name in ("__init__", "storage", "sets/__init__", "sets/layout", "sets/prior"):
        (repository / f"sbi_slotflow/{name}.py").write_text('"""What it is."""\n')
    (repository / "sbi_slotflow/sets/silent.py").write_text("")
    collect(*folders)
    pages = {path.stem: path.read_text() for path in (docs / "reference").rglob("*.md")}
    assert set(pages) == {"loose_modules", "sets"}
    assert "automodule:: sbi_slotflow.storage" in pages["loose_modules"]
    found = re.findall(r"automodule:: (\S+)", pages["sets"])
    assert found == [f"sbi_slotflow.sets{end}" for end in ("", ".layout", ".prior")]
