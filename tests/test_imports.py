"""The rooms of the library and the arrows between them: imports point down, and never in a circle.

Imports inside functions and under ``TYPE_CHECKING`` count, too: an annotation needs the name it mentions. Test modules
never import one another; what they share is in ``cases`` modules and in ``tests/support``.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"gradsel": ROOT / "python" / "gradsel", "gradsel_kernels": ROOT / "gradsel_kernels"}

#: The rooms of ``gradsel`` from the top floor to the ground. A room may import those on the floors below it.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"demo", "experiments", "integrations"},
    {"training"},
    {"papers", "methods"},
    {"delta", "optim", "peft"},
    {"nn"},
    {"ranking"},
    {"selection"},
    {"parameters"},
    {"attached"},
    {"quantised", "sharding"},
    {"masks"},
    {"sealed"},
    {"files", "tensor_files"},
    {"dtypes", "errors", "interrupts", "tables", "views"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    folder = PACKAGES[package]
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The known modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
    return found & known


def arrows(package: str) -> dict[str, set[str]]:
    found = modules(package)
    return {name: imports(path, set(found)) - {name} for name, path in found.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules("gradsel") if name != "gradsel"}
    assert rooms == set(FLOOR)


def test_arrows_between_rooms_point_down():
    for name, targets in arrows("gradsel").items():
        if name == "gradsel":
            continue
        assert "gradsel" not in targets or room(name) == "demo", f"{name} imports the table of contents"
        for target in targets - {"gradsel"}:
            here, there = room(name), room(target)
            assert here == there or FLOOR[here] < FLOOR[there], f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_in_a_circle(package):
    TopologicalSorter(arrows(package)).prepare()  # raises CycleError, which names the circle


def test_kernels_know_nothing_of_the_library_above():
    known = set(modules("gradsel"))
    for name, path in modules("gradsel_kernels").items():
        assert not imports(path, known), f"{name} imports gradsel"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_need_nothing_that_only_the_repository_has(package):
    """Also not by name, which imports that the tree shows would miss."""
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for each in named:
                assert each.partition(".")[0] not in ("benchmarks", "tests"), f"{name}: {each}"


def test_no_test_module_imports_another():
    """What several of them need has a place of its own, so that each can be read, moved and run alone."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "tests").rglob("*.py")}
    known = {name for name in files if name.rpartition(".")[2].startswith("test_")}
    for name, path in files.items():
        assert not imports(path, known), f"{name} imports {imports(path, known)}; move what they share to tests/support"
