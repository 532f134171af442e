"""The real server and its real engine process over a double of SGLang."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from backend.sglang import custody
from tests.backend.sglang.opened import write_folder
from tests.conformance.cases import save_tiny_tokenizer
from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, eventually, serving

# Python runs it first in every process that has its folder on the path.
STAND_IN = """
from pathlib import Path
if "engine.worker" in Path("/proc/self/cmdline").read_text().replace(chr(0), " "):
    import pytest
    from tests.backend.sglang.engine_double import stand_in
    stand_in(pytest.MonkeyPatch(), step_s=0.02)
"""


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """It serves; no request goes on."""
    home = tmp_path_factory.mktemp("server")
    (home / "sitecustomize.py").write_text(STAND_IN)
    folder = write_folder(home / "model", max_position_embeddings=512)
    save_tiny_tokenizer(folder)
    with serving(
        home / "log",
        BACKEND_IMPL="sglang",
        LOAD_FORMAT="dummy",
        MODEL_LOCAL_DIR=folder,
        MAX_RUNNING=4,
        PYTHONPATH=os.pathsep.join((str(home), str(root))),
    ) as server:
        server.ready()
        yield server


def runtime(server: ServerProcess) -> list[psutil.Process]:
    """SGLang's processes, as our engine sees them."""
    marked = [each for each in server.children() if custody.MARK in each.environ()]
    return sorted(marked, key=lambda each: each.pid)


def body(tokens: int, stream: bool) -> dict[str, object]:
    return {"prompt": "hello", "max_new_tokens": tokens, "ignore_eos": True, "stream": stream}


def test_a_stream_is_the_whole_answer_in_pieces(server: ServerProcess) -> None:
    with httpx.stream(
        "POST", f"{server.url}/generate", json=body(20, stream=True), timeout=PATIENCE_S
    ) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    whole = httpx.post(f"{server.url}/generate", json=body(20, stream=False)).json()
    assert "".join(line.get("text_delta", "") for line in lines) == whole["text"]
    assert len(lines) > 10
    assert lines[-1]["finish_reason"] == whole["finish_reason"] == "length"


def test_a_field_that_is_not_honoured_is_a_400_that_names_it(server: ServerProcess) -> None:
    for name, value in (("seed", 3), ("presence_penalty", 1), ("regex", "a+")):
        asked = {**body(2, stream=False), name: value}
        answer = httpx.post(f"{server.url}/generate", json=asked)
        assert answer.status_code == 400, name
        assert "sglang" in answer.json()["error"]["message"]


def test_a_client_that_leaves_ends_the_work(server: ServerProcess) -> None:
    with httpx.stream(
        "POST", f"{server.url}/generate", json=body(400, stream=True), timeout=PATIENCE_S
    ) as response:
        next(response.iter_lines())
    eventually(
        lambda: (
            'minisgl_requests_running{replica="0"} 0' in metrics(server)
            or "minisgl_requests_running 0" in metrics(server)
        ),
        "the end of the work",
    )


def metrics(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_a_process_that_dies_ends_its_answers_with_the_cause_and_another_serves(
    server: ServerProcess,
) -> None:
    before = runtime(server)
    with httpx.stream(
        "POST", f"{server.url}/generate", json=body(400, stream=True), timeout=PATIENCE_S
    ) as response:
        lines = response.iter_lines()
        next(lines)
        before[0].kill()
        last = json.loads(list(lines)[-1])
    assert last["event"] == "error"
    assert "SGLang is lost: its process" in last["error"]["message"]
    pids = [each.pid for each in before]
    eventually(lambda: not any(map(psutil.pid_exists, pids)), "the end of the others")
    server.ready()
    again = httpx.post(f"{server.url}/generate", json=body(20, stream=False), timeout=PATIENCE_S)
    assert again.json()["finish_reason"] == "length"
    assert not set(pids) & {each.pid for each in runtime(server)}


def test_the_end_of_the_server_is_the_end_of_all(server: ServerProcess) -> None:
    """The last of it."""
    assert len(runtime(server)) >= 2
    server.stop()  # waits until no process of its family is left
    assert "Traceback" not in server.text
