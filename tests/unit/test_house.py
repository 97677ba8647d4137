"""The order of the files: no folder is crowded, every room says what it knows, and no files import each other in a circle.

import-linter (pyproject.toml) holds the floors of the packages. It does not see tests and benchmarks.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from graft import __version__
from testbed.shell import REPOSITORY

ROOTS = [
    REPOSITORY / name for name in ("operator", "trainer-image", "server-image", "tests", ".")
]  # of the import path
PACKAGES = ("operator/graft", "trainer-image/graft_trainer", "server-image/graft_server")
MOST_MODULES = 20  # in a folder
LIMITS = re.compile(r"\b(not|no|nothing|neither|only)\b")  # how a room says what it does not know
LONGEST = 400  # lines of a module; a test may be longer


def python_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [path for line in listed.stdout.splitlines() if (path := REPOSITORY / line).exists()]


def module_of(path: Path) -> str:
    """Return the dotted name by which other files import it."""
    root = next(root for root in ROOTS if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted name that a file imports, inside functions and for type checkers, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def circle_in(sources: dict[str, str]) -> list[str] | None:
    """Return a circle of modules, from `sources` (module -> text), or None."""
    graph = {}
    for module, text in sources.items():
        found = {name for name in imported(ast.parse(text)) if name in sources and name != module}
        # `from package import module` names the package, too; only what it takes from the package itself counts.
        graph[module] = {name for name in found if not any(other.startswith(name + ".") for other in found)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle_in({module_of(path): path.read_text() for path in python_files()}) is None


def test_a_circle_that_hides_in_a_function_is_found() -> None:
    hidden = {"a": "import b", "b": "def f():\n    from c.d import x", "c.d": "from a import y", "c": ""}
    assert circle_in(hidden) is not None
    assert circle_in(hidden | {"c.d": ""}) is None


def test_no_folder_is_crowded() -> None:
    files = [path for path in python_files() if path.name != "__init__.py"]
    count = {folder: sum(path.parent == folder for path in files) for folder in {path.parent for path in files}}
    assert {str(folder.relative_to(REPOSITORY)): n for folder, n in count.items() if n > MOST_MODULES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_knows_and_what_it_does_not(package: str) -> None:
    for room in sorted((REPOSITORY / package).rglob("__init__.py")):
        said = ast.get_docstring(ast.parse(room.read_text())) or ""
        assert said.count(".") >= 2 and LIMITS.search(said), f"{room}: {said!r}"


def test_no_module_is_too_long_to_read() -> None:
    read = [path for path in python_files() if not path.name.startswith("test_")]
    long = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in read}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


def test_the_package_and_the_chart_have_one_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((REPOSITORY / "charts/graft/Chart.yaml").read_text())
    assert {project["version"], chart["version"], chart["appVersion"]} == {__version__}
