"""The `llm` command, with the server among its models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llm", reason="llm is in requirements-clients.txt")


@pytest.fixture
def home(tmp_path: Path, base_url: str, model: str) -> Path:
    """A folder of settings that names the server."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {model}\n  api_base: {base_url}\n"
    )
    return tmp_path


def ask(home: Path, *arguments: str) -> str:
    """What `llm -m ours` prints."""
    command = [sys.executable, "-m", "llm", "-m", "ours", "--key", "none", *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(home)}
    run = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("more", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_a_prompt_is_answered(home: Path, more: tuple[str, ...]) -> None:
    options = ("-o", "temperature", "0", "-o", "max_tokens", "16")
    assert "Paris" in ask(home, *options, *more, "What is the capital of France?")
