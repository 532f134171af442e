"""Conversion happens once, whole or not at all, whoever else converts at the same time."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backend.hf.loading import gguf_folder
from backend.hf.loading.convert import cached_conversion, convert
from backend.hf.loading.folder import is_complete
from backend.interface import ModelBroken, StartFailed

ROOT = Path(__file__).parents[4]


@pytest.fixture
def source(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    path: Path = tiny("llama").write(tmp_path / "m.gguf")
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders written from here on; each writer takes its time."""
    written: list[Path] = []
    real = gguf_folder.write_folder

    def write(source: Path, folder: Path) -> None:
        written.append(folder)
        time.sleep(0.1)
        real(source, folder)

    monkeypatch.setattr(gguf_folder, "write_folder", write)
    return written


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_complete_target_is_left_alone(source: Path, tmp_path: Path, counted: list[Path]) -> None:
    convert(source, tmp_path / "t")
    convert(tmp_path / "gone.gguf", tmp_path / "t")
    assert len(counted) == 1


def test_threads_that_convert_at_once_convert_once(
    source: Path, tmp_path: Path, counted: list[Path]
) -> None:
    threads = [threading.Thread(target=convert, args=(source, tmp_path / "t")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
    assert is_complete(tmp_path / "t")
    assert _left(tmp_path) == {"m.gguf", "t"}


def test_processes_that_convert_at_once_all_succeed_and_leave_one_whole_folder(
    tiny: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "backend.hf.loading.convert", str(source)]
    runs = [
        subprocess.Popen(
            [*command, str(tmp_path / "t")], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    logs = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], logs
    assert sum("converting" in log for log in logs) == 1
    found = load_file(tmp_path / "t" / "model.safetensors")
    assert all(torch.equal(found[n].float(), t) for n, t in tiny("llama").weights().items())
    assert _left(tmp_path) == {"m.gguf", "t"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_succeeds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(gguf_folder, "write_folder", fail)
        with pytest.raises((KeyboardInterrupt, StartFailed)) as caught:
            convert(source, tmp_path / "t")
    assert "No space" in str(caught.value) or isinstance(caught.value, KeyboardInterrupt)
    assert _left(tmp_path) == {"m.gguf"}
    convert(source, tmp_path / "t")
    assert is_complete(tmp_path / "t")


def test_what_a_killed_converter_left_is_no_hindrance(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".t.partial").mkdir()
    (tmp_path / ".t.partial" / "model-00001-of-00009.safetensors").write_text("half")
    convert(source, tmp_path / "t")
    assert sorted(_left(tmp_path / "t")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_folder_with_something_else_in_it_is_never_overwritten(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelBroken, match="no complete conversion"):
        convert(source, tmp_path / "t")
    assert (tmp_path / "t" / "thesis.txt").read_text() == "years of work"


def test_the_cache_is_used_again_until_the_file_changes(
    source: Path,
    tmp_path: Path,
    counted: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO):
        first = cached_conversion(source)
    assert any("converting" in message for message in caplog.messages)
    assert first.parent == tmp_path / "cache" / "mini-sglang" / "converted"
    assert first.name.startswith("m-")
    assert cached_conversion(source) == first
    assert len(counted) == 1
    os.utime(source, (1, 1))
    assert cached_conversion(source) != first
    assert len(counted) == 2


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.03, 0.05, 0.08, 0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, part: float
) -> None:
    whole = source.read_bytes()
    source.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ModelBroken, match=r"m\.gguf") as caught:
        convert(source, tmp_path / "t")
    assert "\n" not in str(caught.value)
    assert _left(tmp_path) == {"m.gguf"}


def test_a_garbled_count_is_not_counted_to(source: Path, tmp_path: Path) -> None:
    content = bytearray(source.read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 8  # behind the types of the value and of its items
    content[at : at + 8] = (3_000_000).to_bytes(8, "little")
    source.write_bytes(content)
    with pytest.raises(ModelBroken, match=r"it ends at byte [\d,]+ and goes on"):
        convert(source, tmp_path / "t")


@pytest.mark.parametrize("seed", range(40))
def test_a_garbled_header_is_one_line_or_harmless(source: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(source.read_bytes())
    header = len(content) // 12  # metadata and tensor entries, and a little of what follows
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(header)] = draw.randrange(256)
    source.write_bytes(content)
    message = ""
    try:
        convert(source, tmp_path / "t")
    except StartFailed as error:  # any other error fails the test
        message = str(error)
    assert "\n" not in message
    assert (tmp_path / "t").exists() == (not message)


@pytest.mark.parametrize(
    ("content", "says"), [("<html>404</html>", "is no GGUF"), (None, "does not exist")]
)
def test_the_command_line_ends_with_one_line_and_code_1_for_what_is_no_gguf(
    tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "m.gguf").write_text(content)
    run = subprocess.run(
        [sys.executable, "-m", "backend.hf.loading.convert", tmp_path / "m.gguf", tmp_path / "t"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'm.gguf'} {says}")
    assert not list(tmp_path.glob(".*.lock"))
