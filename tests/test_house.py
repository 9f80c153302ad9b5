"""The picture of the house in docs/architecture.md against the imports of the code, and what every room must say."""

import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
ENTRIES = {"__main__"}  # starts `cli` and is drawn nowhere


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """(room, room) wherever a module of the first imports one of the second."""
    graph = grimp.build_graph("pipeline", "kernels", cache_dir=None)

    def room(module: str) -> str:
        package, _, rest = module.partition(".")
        return package if package == "kernels" else rest.partition(".")[0]

    pairs = {(room(a), room(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    return {(a, b) for a, b in pairs if a != b and a and b and a not in ENTRIES}


def implied(edge: tuple[str, str], edges: set[tuple[str, str]]) -> bool:
    """Whether a longer way leads to the same room."""
    reached, waiting = set(), [b for a, b in edges if a == edge[0] and b != edge[1]]
    while waiting:
        room = waiting.pop()
        reached.add(room)
        waiting += [b for a, b in edges if a == room and b not in reached]
    return edge[1] in reached


def test_the_picture_shows_every_import_that_no_other_implies_and_no_more(imports):
    (picture,) = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    drawn = set(re.findall(r"(\w+)(?:\[.*?\])? --> (\w+)", picture))
    assert drawn == {edge for edge in imports if not implied(edge, imports)}


def test_every_room_says_what_happens_in_it():
    for package in sorted((ROOT / "pipeline").glob("*/__init__.py")):
        text = package.read_text()
        assert text.startswith('"""'), package
        assert "othing" in text.split('"""')[1], f"{package.parent.name}: what may not happen there?"


def test_the_top_of_the_package_holds_no_module_but_these():
    modules = {path.name for path in (ROOT / "pipeline").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "cli.py", "demo.py", "errors.py", "files.py"}


def test_every_command_of_the_folder_is_reached_from_the_command_line():
    from pipeline.cli import COMMANDS

    modules = {path.stem for path in (ROOT / "pipeline" / "commands").glob("*.py")}
    assert set(COMMANDS) == modules - {"__init__", "arguments", "imports", "signals", "streams"}
