"""A package of flame imports only packages on lower floors, and nothing imports a program (AGENTS.md, section 2)."""

import ast
import itertools
from pathlib import Path

import pytest

FLAME = Path(__file__).parent.parent / "flame"
# from the bottom; packages of one floor do not import each other
FLOORS = (
    {"base"},
    {"machine", "config", "models"},
    {"measure", "data", "titan"},
    {"checkpoints"},
    {"run"},
    {"training", "analysis"},
    {"sweeps"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PROGRAMS = {path.stem for path in FLAME.glob("*.py")} - {"__init__"}
FILES = sorted(FLAME.rglob("*.py"))


def imports(file):
    """Dotted names that a file imports, wherever in it; a name from a package counts as that module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file):
    return file.relative_to(FLAME).parts[0].removesuffix(".py")


def test_every_package_has_a_floor():
    packages = {path.parent.name for path in FLAME.glob("*/__init__.py")}
    assert packages == FLOOR.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FLAME)))
def test_imports_point_down(file):
    room = room_of(file)
    floor = FLOOR.get(room, len(FLOORS))
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "torchtitan":
            assert room == "titan", f"{file} imports {name}, which flame/titan/ alone does"
        if parts[0] != "flame" or len(parts) < 2 or parts[1] == room:
            continue
        assert parts[1] not in PROGRAMS, f"{file} imports the program {name}"
        assert FLOOR[parts[1]] < floor, f"{file} imports {name}, which is not below it"


def test_modules_have_no_circle():
    """Within a package, too: the order in which modules are imported never matters."""
    modules = {".".join(("flame", *f.relative_to(FLAME).with_suffix("").parts)): f for f in FILES}
    arrows = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        # what is imported for annotations alone is not imported
        guarded = {
            id(node)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
            for node in ast.walk(branch)
        }
        names = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in guarded
            for alias in node.names
        ]
        arrows[module] = {
            x for name in names for x in (name, name.rpartition(".")[0]) if x in modules
        } - {module}
    while leaves := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        for module in leaves:
            del arrows[module]
    assert not arrows, f"a circle among {', '.join(itertools.islice(arrows, 5))}"
