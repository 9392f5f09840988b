"""Execute the tutorials and save their outputs: ``python tutorials/build.py [NN ...]``.

Every ``NN_name.py`` (jupytext's percent format) is run in full, and ``NN_name.ipynb``
is written with what it printed and drew. Edit the ``.py`` file; the notebook is made.
``--text`` runs nothing: it brings changes of the text into the saved notebooks.
"""

import argparse
import base64
import io
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
# Where packages and cells are on the machine that ran them.
_FOLDERS = re.compile(r"/\S*/(?:site-packages|ipykernel_\d+)/")


def sources(prefixes: list[str] | None = None) -> list[Path]:
    """The tutorials' percent files, all or those that start with a prefix."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if path.name.startswith(tuple(prefixes or [""]))]


def execute(path: Path, folder: Path | None = None) -> Any:
    """Run a percent file and return the notebook.

    Args:
        path: The percent file.
        folder: Where it runs; a new one, which is removed afterwards, if None. In a
            folder that is kept, trainings that were cut off go on.
    """
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as temporary:
        resources = {"metadata": {"path": str(folder or temporary)}}
        NotebookClient(notebook, timeout=3_600, resources=resources).execute()
    return notebook


def tidy(notebook: Any) -> Any:
    """Keep what a reader wants: no progress bars, no times, small pictures."""
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [out for out in cell.outputs if not _is_progress(out)]
        for out in cell.outputs:
            if "text" in out:
                out.text = _FOLDERS.sub("", out.text)
            if "image/png" in out.get("data", {}):
                out.data["image/png"] = _small(out.data["image/png"])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def retold(path: Path) -> Any:
    """Return a saved notebook with the present text of its percent file.

    Raises:
        ValueError: If the code has changed since it was run.
    """
    notebook = jupytext.read(path)
    saved = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    new, old = (
        [cell for cell in each.cells if cell.cell_type == "code"]
        for each in (notebook, saved)
    )
    if [cell.source for cell in new] != [cell.source for cell in old]:
        raise ValueError(f"{path.name} has other code than its notebook: run it.")
    for cell, run in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
    return notebook


def _is_progress(output: Any) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    bar = output.get("name") == "stderr" and "it/s]" in output.get("text", "")
    return widget or bar


def _small(png: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="*", help="which, 03 say; all if none")
    parser.add_argument(
        "--text", action="store_true", help="update the text, run nothing"
    )
    parser.add_argument("--folder", type=Path, help="working folder that is kept")
    arguments = parser.parse_args()
    for path in sources(arguments.prefix):
        started = time.monotonic()
        notebook = tidy(
            retold(path) if arguments.text else execute(path, arguments.folder)
        )
        target = path.with_suffix(".ipynb")
        nbformat.write(nbformat.from_dict(notebook), target)
        size = target.stat().st_size / 1e3
        print(f"{target.name}: {time.monotonic() - started:.0f} s, {size:.0f} kB")
