"""The server with the small real model, asked by real clients."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from backend.interface import SamplingParams
from config import BackendSettings, ModelSettings, Settings
from engine.llm import LLM
from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, serving

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = {"BACKEND_IMPL": "hf", "DTYPE": "float32", "PAGE_TOKEN_BUDGET": 8192}
    with serving(log, MODEL_LOCAL_DIR=small_model, MODEL_ALIAS="small", **flags) as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def expected(small_model: Path) -> tuple[str, str]:
    """What the same model says in this process: a continuation, and an answer."""
    model = ModelSettings(local_dir=str(small_model), dtype="float32")
    with LLM(Settings(backend=BackendSettings(impl="hf", model=model))) as llm:
        (text,) = llm.generate(PROMPT, SamplingParams(max_new_tokens=24))
        return text.text, llm.chat(QUESTION, SamplingParams(max_new_tokens=24)).text


def test_curl_gets_a_stream_of_lines_that_says_what_the_engine_says(
    server: ServerProcess, expected: tuple[str, str]
) -> None:
    content = json.dumps({"prompt": PROMPT, "stream": True, "max_new_tokens": 24})
    curl = ["curl", "--silent", "--no-buffer", "-X", "POST", f"{server.url}/generate"]
    curl += ["-H", "Content-Type: application/json", "-d", content]
    done = subprocess.run(curl, capture_output=True, check=True, text=True, timeout=PATIENCE_S)
    *news, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(line["text_delta"] for line in news) == expected[0]
    assert len(news) > 5
    assert end["event"] == "done"
    assert end["finish_reason"] == "length"
    assert end["usage"]["completion_tokens"] == 24
    assert {line["id"] for line in news} == {end["id"]}


def test_both_forms_and_both_routes_of_openai_agree(
    server: ServerProcess, expected: tuple[str, str]
) -> None:
    params = {"max_new_tokens": 24, "temperature": 0}
    whole: dict[str, Any] = {"prompt": PROMPT, "stream": False, "max_new_tokens": 24}
    ours = httpx.post(f"{server.url}/generate", json=whole, timeout=PATIENCE_S).json()
    native = {"text": PROMPT, "sampling_params": params, "return_logprob": True}
    theirs = httpx.post(f"{server.url}/generate", json=native, timeout=PATIENCE_S).json()
    assert ours["text"] == theirs["text"] == expected[0]
    assert len(theirs["meta_info"]["output_token_logprobs"]) == 24
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        completion = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=24, temperature=0
        )
        assert completion.choices[0].text == expected[0]
        messages: Any = QUESTION
        stream = client.chat.completions.create(
            model="small", messages=messages, max_tokens=24, temperature=0, stream=True
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said == expected[1]
        assert "Paris" in said


def test_a_stop_string_ends_the_answer_before_it(server: ServerProcess) -> None:
    whole = {"prompt": PROMPT, "stream": False, "max_new_tokens": 24, "stop": ["Paris"]}
    answer = httpx.post(f"{server.url}/generate", json=whole, timeout=PATIENCE_S).json()
    assert (answer["finish_reason"], answer["matched"]) == ("stop", "Paris")
    assert "Paris" not in answer["text"]


def test_anthropics_client_gets_the_same_answer_whole_and_streamed(
    server: ServerProcess, expected: tuple[str, str]
) -> None:
    greedy = {"temperature": 0}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": "small", "max_tokens": 24, "messages": QUESTION}
        whole = client.messages.create(**asked, extra_body=greedy)
        with client.messages.stream(**asked, extra_body=greedy) as stream:
            pieces = list(stream.text_stream)
            told = stream.get_final_message()
        assert "".join(pieces) == expected[1]
        assert [block.to_dict() for block in told.content] == [
            {"type": "text", "text": expected[1]}
        ]
        assert [block.to_dict() for block in whole.content] == [
            block.to_dict() for block in told.content
        ]
        assert told.stop_reason == whole.stop_reason
        count = client.messages.count_tokens(model="small", messages=asked["messages"])
        cached = whole.usage.cache_read_input_tokens or 0
        assert count.input_tokens == whole.usage.input_tokens + cached


def test_anthropics_client_has_a_tool_called_that_it_asks_for(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        asked: Any = {
            "model": "small",
            "max_tokens": 64,
            "messages": QUESTION,
            "tools": [{"name": "weather", "input_schema": schema}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        }
        with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
            message = stream.get_final_message()
    (call,) = message.content
    assert isinstance(call, anthropic.types.ToolUseBlock)
    assert message.stop_reason == "tool_use"
    assert call.name == "weather"
    assert call.input["city"] in ("Paris", "Rome")
