"""Every Python block of the README runs alone, as it is printed."""

import re
import time
from pathlib import Path

import matplotlib as mpl
import pytest

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Of processor time on one core, as the README promises.
MOST_SECONDS = 60


def blocks(text: str) -> list[str]:
    """Blocks of Python, each at the lines where it stands, for tracebacks."""
    return [
        "\n" * text.count("\n", 0, found.start(1)) + found[1]
        for found in FENCE.finditer(text)
    ]


def title(block: str) -> str:
    return f"line_{len(block) - len(block.lstrip()) + 1}"


BLOCKS = blocks(README.read_text())


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")


def test_no_block_of_python_is_overlooked() -> None:
    assert len(BLOCKS) == README.read_text().count("```py") > 0


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_the_block_runs_alone(block: str) -> None:
    start = time.process_time()
    exec(compile(block, README, "exec"), {"__name__": "__main__"})
    assert time.process_time() - start < MOST_SECONDS
