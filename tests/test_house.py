"""The one way through the house: which room may import which, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mbperf"
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())

# Room -> what it never imports, by the beginning of the module's name.
FORBIDDEN = {
    "lesson": ["mbperf.ops", "mbperf.plugin", "mbperf.loader"],
    "ops": ["mbperf.lesson", "mbperf.measure", "mbperf.plugin", "mbperf.report", "mbperf.loader"],
    "measure": ["mbperf.plugin", "mbperf.report", "mbperf.loader", "pytest", "pytest_benchmark"],
    "report": ["mbperf.plugin", "mbperf.measure", "mbperf.ops", "torch", "time", "timeit"],
    "loader": ["mbperf.plugin", "mbperf.report"],
}
# Words and arithmetic, without a clock or torch: what shows a run has them from those who made it.
FREE = ("mbperf.measure.rows", "mbperf.measure.statistics")
THE_COMMAND_LINE = ("cli.py", "__main__.py")


def imports(file: Path) -> set[str]:
    """Every module that a file imports at any depth, as written, with the names taken from it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they lead"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, beginning: str) -> bool:
    return module == beginning or module.startswith(f"{beginning}.")


def imports_of_room(room: str) -> set[str]:
    return set().union(*(imports(file) for file in (PACKAGE / room).rglob("*.py")))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_above_it(room):
    upwards = {
        module
        for module in imports_of_room(room)
        for beginning in FORBIDDEN[room]
        if within(module, beginning) and not any(within(module, free) for free in FREE)
    }
    assert not upwards


@pytest.mark.parametrize("module", FREE)
def test_what_every_room_may_import_has_neither_clock_nor_torch(module):
    file = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    assert not {"torch", "time", "mbperf.measure.group"} & imports(file)


def test_the_refusal_above_refuses():
    """The plugin imports what `measure` and `report` may not."""
    modules = imports_of_room("plugin")
    assert any(within(module, "pytest") for module in modules)
    assert any(within(module, "mbperf.measure") for module in modules)


def test_nobody_imports_the_command_line():
    importers = {
        str(file.relative_to(ROOT))
        for file in PACKAGE.rglob("*.py")
        if file.name not in THE_COMMAND_LINE and any(within(name, "mbperf.cli") for name in imports(file))
    }
    assert not importers


def test_no_circle_between_rooms():
    ahead = {
        room: {other for other in ROOMS for name in imports_of_room(room) if within(name, f"mbperf.{other}")}
        - {room}
        for room in ROOMS
    }
    while ahead:
        last = [room for room, needs in ahead.items() if not needs & set(ahead)]
        assert last, f"these rooms import each other in a circle: {sorted(ahead)}"
        for room in last:
            del ahead[room]


def test_no_two_test_files_share_a_name():
    """Pytest imports them by name alone."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names))
