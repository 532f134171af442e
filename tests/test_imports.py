"""The shape of the house: who may import whom, what loads without torch, how long things may be.

The table of imports is the one in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WITHOUT_TORCH = (
    "config",
    "backend.interface",
    "backend.cache",
    "backend.tokenizer",
    "backend.fake",
    "engine.text",
    "engine.waiting_room",
    "engine.scheduler",
    "engine.engine",
    "engine.opening",
    "engine.llm",
    "engine.multi_device",
    "engine.worker",
    "ipc.messages",
    "ipc.zmq_data",
    "ipc.zmq_control",
    "api.batch",
    "api.server",
    "server_bench",
)
BACKENDS = ("backend.fake", "backend.hf", "backend.sglang", "backend.mlx")
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}

Table = dict[str, set[str]]


def module_name(path: Path) -> str:
    """Of a file given relative to the root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def modules(root: Path, sources: list[Path]) -> dict[str, ast.Module]:
    """Every module of ours that says anything, parsed."""
    texts = {module_name(path): (root / path).read_text() for path in sources}
    return {name: ast.parse(text) for name, text in texts.items() if text}


@pytest.fixture(scope="module")
def table(root: Path) -> Table:
    """Rows `| room | rooms that it imports |` of the architecture's section on imports."""
    text = (root / "docs" / "architecture.md").read_text()
    section = text.split("\n## Imports\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", imported)) for room, imported in rows}


def room_of(module: str, table: Table) -> str:
    """The row that a module belongs to: the longest that it is, or lies in."""
    rooms = [room for room in table if module == room or module.startswith(f"{room}.")]
    assert rooms, f"{module} stands in no row of the import table of docs/architecture.md"
    return max(rooms, key=len)


def imported(tree: ast.Module, ours: set[str]) -> Iterator[str]:
    """Modules of ours that a module names, wherever and for whatever: at the top, in a function,
    for type checking, or as "module:attribute" in a table.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in ours else str(node.module) for name in names)
        elif isinstance(node, ast.Constant):
            yield from re.findall(r"^([\w.]+):\w+$", str(node.value))


def test_no_import_but_those_in_the_table(modules: dict[str, ast.Module], table: Table) -> None:
    found: Table = {room: set() for room in table}
    for module, tree in modules.items():
        room = room_of(module, table)
        found[room] |= {
            room_of(name, table) for name in imported(tree, set(modules)) if name in modules
        }
    for room, rooms in found.items():
        assert rooms - {room} == table[room], room


def test_the_table_keeps_the_rules(table: Table) -> None:
    def all_behind(room: str) -> set[str]:
        behind = {room}
        while more := set().union(*(table[each] for each in behind)) - behind:
            behind |= more
        return behind

    assert not table["config"]
    for room in table:
        if room.startswith("backend"):
            assert all(each.startswith(("backend", "config")) for each in all_behind(room)), room
        if room.startswith("engine"):
            assert all(
                each.startswith(("engine", "backend", "config", "ipc")) for each in all_behind(room)
            ), room
    for one in BACKENDS:
        others = tuple(other for other in BACKENDS if other != one)
        for room in table:
            if room == one or room.startswith(f"{one}."):
                assert not [each for each in all_behind(room) if each.startswith(others)], room


def test_the_front_and_the_scheduler_load_without_torch_and_transformers(root: Path) -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


@pytest.fixture(scope="module")
def texts(root: Path, sources: list[Path]) -> dict[Path, str]:
    """Every Python file, those of the tests included."""
    tests = [path.relative_to(root) for path in root.glob("tests/**/*.py")]
    return {path: (root / path).read_text() for path in [*sources, *tests]}


def test_files_are_under_400_lines(texts: dict[Path, str]) -> None:
    lines = {str(path): len(text.splitlines()) for path, text in texts.items()}
    assert {name: count for name, count in lines.items() if count >= 400} == {}


def test_functions_are_under_50_lines(texts: dict[Path, str]) -> None:
    long = {}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                count = node.end_lineno - node.lineno + 1
                if count >= 50:
                    long[f"{path}:{node.name}"] = count
    assert long == {}


def test_no_file_is_named_for_leftovers(texts: dict[Path, str]) -> None:
    assert [path for path in texts if path.stem in FORBIDDEN_NAMES] == []
