"""What the pages say about the tree is true of the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGES = [
    "README.md",
    "docs/add-a-backend.md",
    "docs/add-a-model.md",
    "docs/anthropic.md",
    "docs/api.md",
    "docs/architecture.md",
    "docs/backends.md",
    "docs/batch.md",
    "docs/benchmarks.md",
    "docs/cache_explain.md",
    "docs/configuration.md",
    "docs/clients.md",
    "docs/embeddings_and_scores.md",
    "docs/generate.md",
    "docs/openai.md",
    "docs/operations.md",
    "docs/page.md",
    "docs/receipts_and_waiting.md",
    "docs/responses.md",
    "docs/structured_output.md",
    "docs/tools_and_reasoning.md",
]
BUILT = ("models/", ".venv")  # made by make, not by us


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_page_is_checked_here(root: Path) -> None:
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    assert sorted(str(page.relative_to(root)) for page in pages) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, root: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (root / page).read_text()):
        assert (root / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_is_named_is_there(page: str, root: Path) -> None:
    named = re.findall(r"`([\w.]+(?:/[\w.]+)*(?:/|\.py|\.toml|\.txt))`", (root / page).read_text())
    missing = [name for name in named if not name.startswith(BUILT) and not (root / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_named_can_be_run(page: str, root: Path) -> None:
    text = (root / page).read_text()
    for script in re.findall(r"python (\w+\.py)", text):
        assert (root / script).is_file(), script
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module) is not None, module


def test_the_readme_names_every_make_target_and_no_other(root: Path) -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    rows = re.findall(r"^\| `make ([\w-]+)` \|", (root / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(phony.split())


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, root: Path) -> None:
    for example in code_blocks((root / page).read_text(), "python"):
        subprocess.run(
            [sys.executable, "-c", example],
            check=True,
            cwd=root,
            env={**os.environ, "BACKEND_IMPL": "fake"},
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
