"""The server with the small real model over mlx-lm. The native backend is the oracle. On a CPU
mlx-lm computes a few tokens a second: prompts and answers are short.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from backend.interface import SamplingParams
from config import BackendSettings, ModelSettings, Settings
from engine.llm import LLM
from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, serving

pytest.importorskip("mlx_lm", reason="mlx-lm wants Python 3.11, on Linux or macOS")

PROMPTS = ("The capital of France is", "Once upon a time")
LENGTHS = (20, 8)  # of their answers


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = {"BACKEND_IMPL": "mlx", "DTYPE": "float32", "PAGE_TOKEN_BUDGET": 2048}
    with serving(log, MODEL_LOCAL_DIR=small_model, **flags) as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[str]:
    """What the native backend says."""
    model = ModelSettings(local_dir=str(small_model), dtype="float32")
    asked = [SamplingParams(max_new_tokens=length) for length in LENGTHS]
    with LLM(Settings(backend=BackendSettings(impl="hf", model=model))) as llm:
        return [answer.text for answer in llm.generate(PROMPTS, asked)]


def test_an_answer_is_streamed_and_says_what_the_native_backend_says(
    server: ServerProcess, expected: list[str]
) -> None:
    body = {"prompt": PROMPTS[0], "stream": True, "max_new_tokens": LENGTHS[0]}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=PATIENCE_S) as answer:
        *news, end = [json.loads(line) for line in answer.iter_lines()]
    assert "".join(line["text_delta"] for line in news) == expected[0]
    assert "Paris" in expected[0]
    assert len(news) > 10
    assert (end["finish_reason"], end["usage"]["completion_tokens"]) == ("length", LENGTHS[0])


def test_two_requests_are_answered_together_as_they_are_alone(
    server: ServerProcess, expected: list[str]
) -> None:
    def ask(prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "stream": False, "max_new_tokens": LENGTHS[1], "receipt": True}
        response = httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_S)
        found: dict[str, Any] = response.json()
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = list(clients.map(ask, PROMPTS))
    for answer, whole in zip(answers, expected, strict=True):
        assert whole.startswith(answer["text"])
        assert answer["usage"]["completion_tokens"] == LENGTHS[1]
        assert answer["receipt"]["mean_batch"] > 1.5
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'minisgl_kv_pages_total{replica="0"} 128.0' in metrics
    assert 'minisgl_kv_pages_leased{replica="0"} 0.0' in metrics
