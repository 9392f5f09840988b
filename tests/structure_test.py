"""The package is built as it says: read from the imports, nothing is executed.

An import counts wherever it stands, in a function too; imports for the type checker
alone do not. Circles between modules of one folder are those that loading them meets: a
method may hand its object to a function of a module that builds on it
(``posterior.refine(...)``, ``check.plot()``). ``from package import name`` is an arrow
to the module ``package.name`` if there is one that the package's own names do not hide,
and to the package otherwise.
"""

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sbi_slotflow"
NAME = PACKAGE.name

# May stand beside the folders, at the top of the package.
LOOSE = {"demo", "pretrained", "seeding", "storage"}

# What knows a sinusoid, and the network of the paper, with those who may import them:
# the list of ready problems, the builder, the default encoder of sinusoids, and the
# recipes of the shipped weights.
WINGS = {
    "problems.sinusoids": {"problems", "pretrained"},
    "nn.paper": {"nn.builder", "problems.sinusoids.problem", "pretrained"},
}

# What every problem is made of, and so knows none.
BASE = {
    "base",
    "placed",
    "simulator",
    "noise",
    "noise_shape",
    "counts",
    "white_space",
    "least_squares",
    "linear",
    "coordinates",
    "birth_grid",
    "first_fits",
    "whitening",
    "marginal_likelihood",
    "collapsed",
}

# Tests that are of no one module: of the repository, of sbi's tools, of the frozen
# quantities, of several modules together. The benchmarks have a folder of tests too.
TESTS_OF_NO_MODULE = {
    "calibration.checks",
    "contract.contract",
    "docs",
    "examples",
    "import",
    "posterior.closed_form",
    "posterior.contract",
    "problems.collapsed_classes",
    "problems.own_problem",
    "problems.own_simulator",
    "problems.sinusoids.matching_pursuit",
    "problems.units",
    "readme",
    "rjmcmc.eryn",
    "sbi_conformity",
    "structure",
    "tutorials",
}

# The most that the package may have: what it has, rounded up.
# Aim: 19,000 lines before the rooms of new fields, 110 modules, 10 floors.
MOST_LINES = 37_350
MOST_MODULES = 143
MOST_FLOORS = 10

Arrows = Mapping[str, Set[str]]


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def executed(node: ast.AST, late: bool) -> Iterator[ast.AST]:
    """What runs when a module is loaded and, if ``late``, when it is used."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child) or (isinstance(child, ast.FunctionDef) and not late):
            continue
        yield child
        yield from executed(child, late)


def modules(package: Path) -> dict[str, Path]:
    """Names of modules relative to the package, "" for the package itself."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def package_of(module: str, path: Path) -> list[str]:
    parts = module.split(".") if module else []
    return parts if path.name == "__init__.py" else parts[:-1]


def own_names(tree: ast.Module) -> set[str]:
    """What a package's ``__init__`` takes from deeper modules, and so hides modules."""
    return {
        alias.asname or alias.name
        for node in executed(tree, late=False)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def arrows(package: Path, late: bool = True) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports."""
    paths = modules(package)
    trees = {module: ast.parse(path.read_text()) for module, path in paths.items()}
    hidden = {
        f"{module}.{name}"
        for module, path in paths.items()
        if path.name == "__init__.py"
        for name in own_names(trees[module])
    }
    graph = {}
    for module, path in paths.items():
        found = set()
        for target, name in imports(trees[module], package_of(module, path), late):
            deeper = ".".join([*target, name])
            own = target == package_of(module, path) and path.name == "__init__.py"
            is_module = deeper in paths and (own or deeper not in hidden)
            found.add(deeper if is_module else ".".join(target))
        graph[module] = found - {module}
    return graph


def imports(
    tree: ast.Module, here: list[str], late: bool
) -> Iterator[tuple[list[str], str]]:
    """Package and name of every import from our own package."""
    for node in executed(tree, late):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == NAME:
                    yield parts[1:-1], parts[-1]
        elif isinstance(node, ast.ImportFrom):
            target = node.module.split(".") if node.module else []
            if node.level:
                target = here[: len(here) - node.level + 1] + target
            elif target[:1] == [NAME]:
                target = target[1:]
            else:
                continue
            for alias in node.names:
                yield target, alias.name


def inside(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


def circle(graph: Arrows) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def folders(graph: Arrows) -> dict[str, set[str]]:
    """The arrows between the folders, and the loose modules, at the top."""
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        tops = {target.split(".")[0] for target in targets}
        rooms.setdefault(module.split(".")[0], set()).update(tops)
    return {room: targets - {room} for room, targets in rooms.items()}


def floors(graph: Arrows) -> int:
    """Nodes on the longest chain of imports."""
    height: dict[str, int] = {}
    for module in TopologicalSorter(graph).static_order():
        below = (height[target] for target in graph.get(module, ()))
        height[module] = 1 + max(below, default=0)
    return max(height.values())


def strangers_in(graph: Arrows, wing: str, doors: Set[str]) -> set[tuple[str, str]]:
    return {
        (module, target)
        for module, targets in graph.items()
        for target in targets
        if inside(target, wing) and not inside(module, wing) and module not in doors
    }


def upwards(graph: Arrows) -> set[tuple[str, str]]:
    """Imports of a problem where problems are not known."""
    base = {f"problems.{name}" for name in BASE}
    below = {
        module
        for module in graph
        if inside(module, "sets") or inside(module, "nn") or module in base
    }
    return {
        (module, target)
        for module in below
        for target in graph[module]
        if inside(target, "problems") and (module not in base or target not in base)
    }


@pytest.fixture(name="graph", scope="module")
def _graph() -> dict[str, set[str]]:
    return arrows(PACKAGE)


def test_no_circle_between_modules() -> None:
    assert circle(arrows(PACKAGE, late=False)) == []


def test_no_circle_between_folders(graph: Arrows) -> None:
    assert circle(folders(graph)) == []


def test_sets_networks_and_the_base_of_problems_know_no_problem(graph: Arrows) -> None:
    assert upwards(graph) == set()


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_is_entered_by_its_doors_only(graph: Arrows, wing: str) -> None:
    assert strangers_in(graph, wing, WINGS[wing]) == set()


def test_few_modules_stand_outside_the_folders() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert found <= LOOSE


def test_the_test_tree_mirrors_the_package() -> None:
    tests = Path(__file__).parent
    found = {
        ".".join(path.relative_to(tests).with_suffix("").parts).removesuffix("_test")
        for path in tests.rglob("*_test.py")
        if "benchmarks" not in path.relative_to(tests).parts
    }
    known = set(modules(PACKAGE))
    packages = {f"{folder}.{folder.split('.')[-1]}" for folder in known}
    assert found - known - packages <= TESTS_OF_NO_MODULE


def test_the_package_does_not_grow_beyond_its_limits(graph: Arrows) -> None:
    lines = sum(
        len(path.read_text().splitlines()) for path in modules(PACKAGE).values()
    )
    assert lines <= MOST_LINES
    assert len(graph) <= MOST_MODULES
    assert floors(folders(graph)) <= MOST_FLOORS


def test_planted_imports_are_seen(tmp_path: Path) -> None:
    package = tmp_path / NAME
    sources = {
        "__init__": "",
        "sets/__init__": "",
        "sets/layout": "def late():\n    from ..problems.spikes import Spikes\n",
        "problems/__init__": "from .spikes import spikes\n",
        "problems/spikes": "import sbi_slotflow.sets.layout\n",
        "problems/sinusoids/__init__": "",
        "problems/sinusoids/grid": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..spikes import Spikes\n",
        "nn/__init__": "from ..problems.sinusoids import grid\n",
        "demo": "from .problems import spikes\n",
    }
    for name, source in sources.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = arrows(package)
    assert graph["problems.sinusoids.grid"] == set()
    assert graph["demo"] == {"problems"}  # its name spikes is not the module
    assert set(circle(graph)) == {"sets.layout", "problems.spikes"}
    assert circle(arrows(package, late=False)) == []
    assert set(circle(folders(graph))) == {"sets", "problems"}
    assert upwards(graph) == {
        ("sets.layout", "problems.spikes"),
        ("nn", "problems.sinusoids.grid"),
    }
    assert strangers_in(graph, "problems.sinusoids", {"problems"}) == {
        ("nn", "problems.sinusoids.grid")
    }
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3
