"""The documentation takes tutorials and report as they are, few or all."""

import runpy
from pathlib import Path

import pytest

collect = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "collect.py"))[
    "collect"
]


@pytest.fixture(name="folders")
def _folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("docs", "tutorials", "benchmarks"):
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
