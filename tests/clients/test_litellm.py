"""LiteLLM: the same call for every provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="litellm is in requirements-clients.txt")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def target(base_url: str, model: str) -> dict[str, Any]:
    """Arguments that lead to the server."""
    return {"model": f"hosted_vllm/{model}", "api_base": base_url, "api_key": "none"}


def test_a_chat_is_answered(target: dict[str, Any]) -> None:
    answer = litellm.completion(messages=QUESTION, temperature=0, max_tokens=16, **target)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_a_streamed_chat_is_the_whole_one(target: dict[str, Any]) -> None:
    asked = {"messages": QUESTION, "temperature": 0, "max_tokens": 16, **target}
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)
    ]
    assert "".join(pieces) == litellm.completion(**asked).choices[0].message.content


def test_a_required_tool_is_called_with_arguments_of_its_schema(target: dict[str, Any]) -> None:
    answer = litellm.completion(
        messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=64, **target
    )
    (call, *_) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_text_completion_is_answered(base_url: str, model: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt="The capital of France is",
        api_base=base_url,
        api_key="none",
        temperature=0,
        max_tokens=4,
    )
    assert "Paris" in answer.choices[0].text


def test_anthropics_route_is_reached(server: str, model: str) -> None:
    answer = litellm.completion(
        model=f"anthropic/{model}",
        messages=QUESTION,
        api_base=server,
        api_key="none",
        temperature=0,
        max_tokens=16,
    )
    assert "Paris" in answer.choices[0].message.content
