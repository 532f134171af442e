"""The pages for those who choose or add a backend or a model. Each name that a guide mentions is
defined in a file that it names; each table says what the code says.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from torch import Tensor

from backend import fake
from backend.hf.loading.dummy import DummyWeights
from backend.hf.models.decoder import Decoder, DecoderShape, Placing
from backend.hf.models.torch_blocks import TorchBlocks
from backend.hf.precision import PRECISIONS
from backend.interface import SamplingParams, Unsupported, Wants
from backend.mlx import opening as mlx
from backend.sglang import fields as sglang
from config import read_settings
from engine.opening import BACKENDS
from engine.scheduler import Scheduler

MODEL_GUIDE = "docs/add-a-model.md"
GUIDES = ["docs/add-a-backend.md", MODEL_GUIDE]
BACKENDS_PAGE = "docs/backends.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(
    r"([A-Za-z_]\w*(?:\.\w+)?)(?:\(.*\))?"
)  # `Choice`, `Choice.opener`, `tiny("Llama")`
PATH = re.compile(r"[\w./-]+(?:/|\.(?:md|py|toml))")
PLACED = re.compile(r"`([^`]+)`(?: of| in)? \(?`([\w/]+\.py)`")  # a name, and its own file
TENSOR = re.compile(r"(?:model|lm_head)(?:\.\w+)*")  # how a checkpoint names its modules


def prose(page: Path) -> str:
    """The text of a page, code blocks left out."""
    return BLOCK.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands in backticks in the text of a page."""
    return re.findall(r"`([^`]+)`", prose(page))


def names(page: Path) -> set[str]:
    """What a page says in backticks that is a name in the code."""
    others = (PATH, TENSOR)
    found = [span for span in spans(page) if not any(kind.fullmatch(span) for kind in others)]
    return {match[1] for span in found if (match := NAME.fullmatch(span))}


def modules(page: Path, root: Path) -> list[ast.Module]:
    """The Python files that a page names, parsed."""
    return [ast.parse((root / span).read_text()) for span in spans(page) if span.endswith(".py")]


def defined(tree: ast.Module) -> Iterator[str]:
    """What a module defines: its own names, and the members of its classes as `Class.member`."""
    for node in tree.body:
        yield from bound(node)
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for inner in node.body for name in bound(inner))


def bound(node: ast.stmt) -> Iterator[str]:
    """The names that one statement defines; an import defines none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("guide", GUIDES)
def test_a_name_in_a_guide_is_defined_in_a_file_that_the_guide_names(
    guide: str, root: Path
) -> None:
    known = {name for tree in modules(root / guide, root) for name in defined(tree)}
    assert len(names(root / guide)) > 20, "the guide's names are not found"
    assert sorted(names(root / guide) - known) == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_name_beside_a_file_is_defined_in_that_one(guide: str, root: Path) -> None:
    placed = PLACED.findall(prose(root / guide))
    assert len(placed) > 10, "the guide's places are not found"
    for name, path in placed:
        assert name in set(defined(ast.parse((root / path).read_text()))), f"{name} in {path}"


@pytest.mark.parametrize("guide", GUIDES)
def test_a_path_in_a_guide_is_there(guide: str, root: Path) -> None:
    paths = [span for span in spans(root / guide) if PATH.fullmatch(span)]
    assert [path for path in paths if not (root / path).exists()] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_text_in_a_guide_stands_in_a_file_that_the_guide_names(guide: str, root: Path) -> None:
    texts = {
        node.value
        for tree in modules(root / guide, root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = {span[1:-1] for span in spans(root / guide) if span.startswith('"')}
    assert sorted(quoted - texts) == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_flag_in_a_guide_is_one(guide: str, root: Path, flags: dict[str, object]) -> None:
    settings = {span.split("=")[0] for span in spans(root / guide) if re.match(r"[A-Z_]+=", span)}
    assert sorted(settings - flags.keys()) == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_ends_in_the_test_that_must_pass(guide: str, root: Path) -> None:
    text = (root / guide).read_text()
    *_, (language, command) = BLOCK.findall(text)
    assert text.rstrip().endswith(f"{command}```")
    assert language == "bash"
    assert command.startswith("python -m pytest ")


@pytest.mark.parametrize("guide", GUIDES)
def test_a_path_in_a_command_of_a_guide_is_there(guide: str, root: Path) -> None:
    commands = [
        block for kind, block in BLOCK.findall((root / guide).read_text()) if kind == "bash"
    ]
    paths = [word for block in commands for word in block.split() if re.match(r"\w+/", word)]
    assert paths
    assert [path for path in paths if not (root / path).exists()] == []


class NamedWeights(DummyWeights):
    """Remembers what a model asked for."""

    def __init__(self) -> None:
        super().__init__({})
        self.names: set[str] = set()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.names.add(name)
        return super().read(name, shape)


def test_the_guide_names_the_modules_whose_weights_the_decoder_reads(root: Path) -> None:
    shape = DecoderShape(
        layers=1, hidden=8, intermediate=8, heads=2, kv_heads=1, head_dim=4, vocabulary=8,
        epsilon=1e-6, tied=False, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
    )  # fmt: skip
    precision = PRECISIONS["float32"]
    weights = NamedWeights()
    with weights:
        Decoder(shape, {}, weights, TorchBlocks(precision, "cpu"), Placing("cpu", precision, 8))
    read = {name.rpartition(".")[0] for name in weights.names}
    assert {span for span in spans(root / MODEL_GUIDE) if TENSOR.fullmatch(span)} == read


# The page of backends

LACKS: dict[str, tuple[str, ...]] = {  # the columns of the table of fields
    "`hf`": (),
    "`sglang`": sglang.lacks(deterministic=False),
    "`sglang`, `DETERMINISTIC=1`": sglang.lacks(deterministic=True),
    "`mlx`": mlx.LACKS,
    "`fake`": fake.LACKS,
}
ANOTHER = {  # values that a backend which has no such flag must refuse
    "ATTN_IMPL": "sdpa",
    "COMPILE_MODEL": "1",
    "DETERMINISTIC": "1",
    "TENSOR_PARALLEL_SIZE": "2",
}


def table(root: Path, first: str) -> dict[str, dict[str, str]]:
    """The cells of the table whose first column is called `first`, by row and column."""
    text = (root / BACKENDS_PAGE).read_text().split(f"| {first} |")[1].split("\n\n")[0]
    lines = [line.strip("| ").split("|") for line in text.strip().split("\n")]
    columns, _, *cells = [[cell.strip() for cell in line] for line in lines]
    return {name.strip("`"): dict(zip(columns, values, strict=True)) for name, *values in cells}


def test_the_page_says_of_every_field_whether_a_backend_refuses_it(root: Path) -> None:
    names = [field.name for kind in (SamplingParams, Wants) for field in fields(kind)] + ["seed"]
    assert not set().union(*LACKS.values()) - set(names), "a backend lacks what is no field"
    assert table(root, "field") == {
        name: {column: "refused" if name in lacks else "yes" for column, lacks in LACKS.items()}
        for name in names
    }


def test_both_tables_have_every_backend(root: Path) -> None:
    names = [f"`{name}`" for name in BACKENDS]
    assert list(dict.fromkeys(column.split(",")[0] for column in LACKS)) == names
    assert all(list(row) == names for row in table(root, "flag").values())


def test_the_native_backend_lacks_nothing(root: Path) -> None:
    trees = [ast.parse(path.read_text()) for path in (root / "backend" / "hf").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert not [node for node in nodes if isinstance(node, ast.keyword) and node.arg == "lacks"]


def test_the_flags_of_the_page_are_flags(root: Path, flags: dict[str, object]) -> None:
    assert sorted(table(root, "flag").keys() - flags.keys()) == []


@pytest.mark.parametrize("name", BACKENDS)
def test_a_flag_that_the_page_calls_refused_ends_the_start_by_name(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, opener = BACKENDS[name].opener.split(":")
    for flag, row in table(root, "flag").items():
        if row[f"`{name}`"].startswith("refused"):
            with monkeypatch.context() as patch:
                patch.setenv(flag, ANOTHER[flag])
                settings = read_settings().backend
            with pytest.raises(Unsupported, match=f"^{flag}={ANOTHER[flag]}"):
                getattr(import_module(module), opener)(settings, Scheduler)


def test_what_a_backend_lacks_is_known_without_its_package(root: Path) -> None:
    program = (
        "import sys\n"
        f"sys.modules |= dict.fromkeys({[each.package for each in BACKENDS.values()]})\n"
        f"import {fake.__name__}, {mlx.__name__}, {sglang.__name__}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
