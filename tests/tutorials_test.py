"""Every tutorial runs from start to end, and its two files hold the same."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
MOST_BYTES = 600_000


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem, name="source")
def _source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_each_has_a_number_of_its_own() -> None:
    numbers = [path.name[:2] for path in SOURCES]
    assert numbers
    assert len(set(numbers)) == len(numbers)


def test_text_and_notebook_agree(source: Path) -> None:
    text = jupytext.read(source)
    saved = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    kinds = [(cell.cell_type, cell.source) for cell in text.cells]
    assert kinds == [(cell.cell_type, cell.source) for cell in saved.cells]


def test_the_notebook_holds_a_full_run(source: Path) -> None:
    path = source.with_suffix(".ipynb")
    saved = nbformat.read(path, as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    outputs = [out for cell in code for out in cell.outputs]
    counts = [cell.execution_count for cell in code if cell.source.strip()]
    assert None not in counts
    assert counts == sorted(set(counts))  # in order
    assert not [out for out in outputs if out.output_type == "error"]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert path.stat().st_size < MOST_BYTES


def test_it_begins_with_what_is_learnt_and_ends_with_what_is_next(source: Path) -> None:
    cells = jupytext.read(source).cells
    assert "**You will learn**" in cells[0].source
    _, _, next_ones = cells[-1].source.partition("## What to read next")
    named = {word.strip("`:,.") for word in next_ones.split() if "_" in word}
    assert named
    assert named <= {path.stem for path in SOURCES}


def test_it_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTFLOW_TUTORIALS_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = str(FOLDER.parent)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    )
    notebook = jupytext.read(source)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
