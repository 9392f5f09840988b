"""Are the tests able to fail? ``python tests/faults.py --number 60 --seed 0 --jobs 2``.

Plants random faults of one token in copies of the package, one at a time, and runs the
tests: those of the module first, then those of its folder, then all others, the quick
ones before the slow ones, until one fails. A fault that no test notices has survived,
and is printed. A run that hangs, or that cannot even import the package, has noticed.
The tests of a module are those of its name, and those that import it.

Faults are drawn with equal probability from all places where one can be: arithmetic,
comparisons, ``and`` and ``or``, numbers, ``True`` and ``False``, ``min`` and ``max``, a
``not``, ``-`` or ``~`` that is dropped, ``-1`` that becomes 0. Left alone are imports,
annotations, strings, what is raised, and what the type checker alone reads. Some
faults change nothing that a user can see (a larger chunk of memory): survivors are for
a reader to judge.

The tests run once without a fault, to see how long each takes and which fail anyway;
these are left out. Reports of such runs serve as well::

    pytest -n 2 --junitxml report.xml -o junit_family=xunit1
    python tests/faults.py --number 60 --baseline report.xml --quick 15

With ``--quick`` a fault meets only a part of the tests: the quickest of its module, of
its folder, and of the whole library's contract, so many seconds of each. What survives
that may still be caught by the rest. With ``--out`` what is known is kept, and taken up
again.
"""

import argparse
import ast
import difflib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PACKAGE = "sbi_slotflow"
# Files of tests that run every part of the library together.
CROSS = (
    "tests/contract/contract_test.py",
    "tests/posterior/contract_test.py",
    "tests/sbi_conformity_test.py",
    "tests/training/online_test.py",
)

# What stands for each token. Of several, one is drawn.
PAIRS = "+ -|* /|+= -=|*= /=|== !=|and or|True False|min max|minimum maximum|amin amax"
SWAPS: dict[str, list[str]] = {
    token: [other]
    for pair in map(str.split, PAIRS.split("|"))
    for token, other in (pair, pair[::-1])
}
SWAPS |= {"<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"]}
SWAPS |= {"is": ["is not"], "is not": ["is"], "in": ["not in"], "not in": ["in"]}
SWAPS |= {"//": ["*"], "**": ["*"], "|": ["&"], "&": ["|"]}
SWAPS |= {"not ": [""], "~": [""], "-1": ["0"]}
GENERIC = {"Annotated", "Callable", "ClassVar", "Literal", "dict", "list", "tuple"}


@dataclass(frozen=True)
class Fault:
    """A token at a place, and what stands there instead."""

    path: str
    start: int
    old: str
    new: str

    def plant(self, source: str) -> str:
        end = self.start + len(self.old)
        assert source[self.start : end] == self.old
        return source[: self.start] + self.new + source[end:]

    @property
    def name(self) -> str:
        return f"{self.path}:{self.start}:{self.old}>{self.new}"


class Places(ast.NodeVisitor):
    """Where a token can be exchanged: (start, token) in characters of the source."""

    def __init__(self, source: str) -> None:
        self._source = source
        lines = source.splitlines(keepends=True)
        self._lines = [line.encode() for line in lines]
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self.found: list[tuple[int, str]] = []
        self.visit(ast.parse(source))

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._at(node.lineno, node.col_offset)

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._at(node.end_lineno, node.end_col_offset)

    def _between(self, left: ast.expr, right: ast.expr) -> None:
        if any(isinstance(side, ast.JoinedStr) for side in (left, right)):
            return
        start, end = self._end(left), self._start(right)
        text = re.sub(
            r"#.*", lambda comment: " " * len(comment[0]), self._source[start:end]
        )
        token = text.strip("() \n\t\\")
        if token in SWAPS:  # a word in two parts may stand on two lines
            self.found.append((start + text.index(token), token))

    def visit(self, node: ast.AST) -> None:
        skipped = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)
        if isinstance(node, skipped) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            return
        super().visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        """An argument is its annotation."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        node.returns = None
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not (isinstance(node.value, ast.Name) and node.value.id in GENERIC):
            self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._between(node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._between(node.target, node.value)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip(
            [node.left, *node.comparators], node.comparators, strict=False
        ):
            self._between(left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        text = self._source[self._start(node) : self._end(node)]
        if text == "-1":
            self.found.append((self._start(node), text))
            return
        token = {ast.Not: "not ", ast.USub: "-", ast.Invert: "~"}.get(type(node.op))
        if token:
            self.found.append((self._start(node), token))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool | int | float):
            start = self._start(node)
            self.found.append((start, self._source[start : self._end(node)]))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in SWAPS:
            self.found.append((self._start(node), node.id))

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg in SWAPS:
            self.found.append((self._at(node.lineno, node.col_offset), node.arg))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in SWAPS:
            self.found.append((self._end(node) - len(node.attr), node.attr))
        self.generic_visit(node)


def exchanged(token: str, rng: random.Random) -> str:
    """Return what stands instead of a token."""
    if token in SWAPS:
        return rng.choice(SWAPS[token])
    number = ast.literal_eval(token)
    choices = (number + 1, number - 1, 2 * number)
    return repr(rng.choice([choice for choice in choices if choice != number]))


def draw(folder: Path, number: int, seed: int) -> list[Fault]:
    """Draw faults of the package in a folder, without replacement."""
    rng = random.Random(seed)
    places = [
        (str(path.relative_to(folder)), start, token)
        for path in sorted((folder / PACKAGE).rglob("*.py"))
        for start, token in sorted(set(Places(path.read_text()).found))
    ]
    print(f"{number} of {len(places)} places")
    return [
        Fault(path, start, token, exchanged(token, rng))
        for path, start, token in rng.sample(places, number)
    ]


def copy_tree(target: Path) -> Path:
    """Copy what the repository holds, and what is new."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def pytest(folder: Path, arguments: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run tests in a copy: ``passed``, ``failed`` or ``hung``, and the output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its children end with it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "hung", process.communicate()[0]
    # 5: none was collected. All else, a module that cannot be imported too, is noticed.
    return ("passed" if process.returncode in (0, 5) else "failed"), output


@dataclass(frozen=True)
class Baseline:
    """The tests without a fault: seconds of each, and those that fail."""

    seconds: dict[str, float]
    failing: list[str]

    @cached_property
    def files(self) -> dict[str, float]:
        """Seconds of each file, the quickest first."""
        seconds: dict[str, float] = {}
        for test, time_ in self.seconds.items():
            seconds[_file(test)] = seconds.get(_file(test), 0.0) + time_
        return dict(sorted(seconds.items(), key=lambda entry: entry[1]))

    def run(self, folder: Path, tests: Sequence[str]) -> tuple[str, str]:
        """Run files of tests, or tests, in this order until one fails."""
        if not tests:
            return "passed", ""
        known = {**self.seconds, **self.files}
        allowed = 120 + 5 * sum(known[test] for test in tests)
        left_out = [f"--deselect={test}" for test in self.failing]
        return pytest(folder, ["-x", *left_out, *tests], allowed)

    def stages(self, folder: Path, module: str) -> list[list[str]]:
        """The files of tests for a fault in a module, the nearest first."""
        path = Path("tests", *Path(module).parts[1:])
        mirror = str(path.with_name(f"{path.stem}_test.py"))
        name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        named = re.compile(rf"(from|import) {re.escape(name)}\b(?!\.)")
        first = [
            file
            for file in self.files
            if file == mirror or named.search((folder / file).read_text())
        ]
        inner = path.parent != Path("tests")
        near = [
            file
            for file in self.files
            if inner and file.startswith(f"{path.parent}/") and file not in first
        ]
        rest = [file for file in self.files if file not in (*first, *near)]
        return [first, near, rest]

    def quick(self, folder: Path, module: str, seconds: float) -> list[list[str]]:
        """Tests for a fault in a module: the quickest of its stages, all as one."""
        first, near, rest = self.stages(folder, module)
        cross = [file for file in rest if file in CROSS]
        tests = []
        for files in (first, near, cross):
            those = [t for t in self.seconds if _file(t) in files]
            spent, chosen = 0.0, []
            for test in sorted(those, key=self.seconds.__getitem__):
                spent += self.seconds[test]
                if spent <= seconds and test not in self.failing:
                    chosen.append(test)
            tests += sorted(chosen, key=lambda test: files.index(_file(test)))
        return [tests]


def _file(test: str) -> str:
    return test.split("::")[0]


def measure(folder: Path, tests: str, jobs: int, reports: Sequence[Path]) -> Baseline:
    """Run the tests without a fault, or read the reports of such runs."""
    if not reports:
        reports = [folder / "baseline.xml"]
        options = ["-n", str(jobs), "--junitxml", str(reports[0])]
        options += ["-o", "junit_family=xunit1"]
        pytest(folder, [*options, tests], seconds=7_200)
    known = set(pytest(folder, ["--collect-only", tests], seconds=600)[1].splitlines())
    seconds: dict[str, float] = {}
    failing = []
    trees = [ElementTree.parse(report) for report in reports]
    for case in (case for tree in trees for case in tree.iter("testcase")):
        test = f"{case.attrib['file']}::{case.attrib['name']}"
        if test not in known:
            continue
        seconds[test] = seconds.get(test, 0.0) + float(case.attrib["time"])
        if case.find("failure") is not None or case.find("error") is not None:
            failing.append(test)
    print(f"{sum(seconds.values()):.0f} s of tests without a fault; failing: {failing}")
    return Baseline(seconds, failing)


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    fault: Fault
    survived: bool
    by: str
    seconds: float

    def describe(self, folder: Path) -> str:
        """Say what happened, with the change itself if nobody noticed."""
        verdict = "SURVIVED" if self.survived else f"caught by {self.by}"
        before = (folder / self.fault.path).read_text()
        line = before.count("\n", 0, self.fault.start) + 1
        change = f"{self.fault.old.strip()} -> {self.fault.new or 'nothing'}"
        text = f"{self.fault.path}:{line}  {change}  {verdict} ({self.seconds:.0f} s)"
        if not self.survived:
            return text
        after = self.fault.plant(before)
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), self.fault.path, lineterm="", n=2
        )
        return "\n".join([text, *lines])


def judge(
    fault: Fault, folder: Path, baseline: Baseline, quick: float | None
) -> Outcome:
    """Plant a fault in a copy, run the tests, and take it out again."""
    path = folder / fault.path
    sound = path.read_text()
    start = time.monotonic()
    _write(path, fault.plant(sound))
    try:
        stages = baseline.stages(folder, fault.path)
        if quick is not None:
            stages = baseline.quick(folder, fault.path, quick)
        for tests in stages:
            verdict, output = baseline.run(folder, tests)
            if verdict != "passed":
                named = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                by = "a run that hung" if verdict == "hung" else "a run that broke off"
                by = named[1] if named else by
                return Outcome(fault, False, by, time.monotonic() - start)
        return Outcome(fault, True, "", time.monotonic() - start)
    finally:
        _write(path, sound)


def _write(path: Path, source: str) -> None:
    path.write_text(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def main() -> int:
    """Plant faults, and say which survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=60, help="faults to plant (60)")
    parser.add_argument("--seed", type=int, default=0, help="which faults (0)")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (2)")
    parser.add_argument("--tests", default="tests", help="file or folder of tests")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", help="reports of runs without faults"
    )
    parser.add_argument(
        "--quick", type=float, help="seconds of tests of each stage (all tests)"
    )
    parser.add_argument("--out", type=Path, help="file of results, to take up again")
    args = parser.parse_args()

    kept = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        sound = copy_tree(Path(temporary, "sound"))
        faults = draw(sound, args.number, args.seed)
        folders: queue.Queue[Path] = queue.Queue()
        for i in range(args.jobs):
            folders.put(Path(shutil.copytree(sound, Path(temporary, str(i)))))
        if "baseline" not in kept:
            kept["baseline"] = asdict(
                measure(sound, args.tests, args.jobs, args.baseline or ())
            )
            _keep(args.out, kept)
        baseline = Baseline(**kept["baseline"])

        def outcome(fault: Fault) -> Outcome:
            if fault.name not in kept:
                folder = folders.get()
                try:
                    found = judge(fault, folder, baseline, args.quick)
                finally:
                    folders.put(folder)
                kept[fault.name] = [found.survived, found.by, found.seconds]
                _keep(args.out, kept)
            return Outcome(fault, *kept[fault.name])

        survivors = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for found in pool.map(outcome, faults):
                print(found.describe(sound), flush=True)
                survivors += [found] if found.survived else []
    caught = len(faults) - len(survivors)
    print(f"\ncaught {caught} of {len(faults)} ({caught / len(faults):.0%})")
    if args.quick is not None:
        print(
            f"Survivors met only the quickest tests, {args.quick:g} s each of their "
            f"module's, of their folder's and of {', '.join(CROSS)}: the rest of the "
            "suite may catch them."
        )
    return 0


def _keep(path: Path | None, kept: dict) -> None:
    if path:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=1))
        part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
