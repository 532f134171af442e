"""`/v1/responses`: what is refused, by which name, and what is only warned of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.in_process import refusal
from tests.api.responses_bench import WEATHER, post

CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def message(**more: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "hi", **more}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "input.0"),
        ({"input": ["hi"]}, "input.0"),
        (message(role="tool"), "input.0.role"),
        (message(content=[{"type": "input_image", "image_url": "x"}]), "input.0.content.0.type"),
        (message(content=[]), "input.0.content"),
        (message(content=None), "input.0.content"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input.0.arguments"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input.0.arguments"),
        ({"input": [{**CALL, "namespace": "n"}]}, "input.0.namespace"),
        ({"input": [{"type": "item_reference", "id": "nobody"}]}, "input.0.id"),
        ({"input": [{"id": "nobody"}]}, "input.0.id"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input.0.encrypted_content",
        ),
        ({"previous_response_id": "nobody"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": 1 << 40}, "max_output_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0.type"),
        ({"tools": [{**WEATHER, "name": "no spaces"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "async": True}]}, "tools.0.async"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "f"}],
                },
            },
            "tool_choice.tools.0.name",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"stream_options": {}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"key": 1}}, "metadata.key"),
        ({"metadata": {"key": "x" * 513}}, "metadata.key"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(body: dict[str, Any], param: str) -> None:
    assert refusal(post({"input": "hi", **body})) == (400, param)


def test_a_model_that_is_not_served_is_a_404() -> None:
    assert refusal(post({"input": "hi", "model": "gpt"})) == (404, "model")


UNKNOWN: dict[str, Any] = {
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi", "odd": 1}]}],
    "max_output_tokens": 1,
    "text": {"format": {"type": "text", "odd": 1}, "odd": 1},
    "tools": [{**WEATHER, "odd": 1}],
    "reasoning": {"odd": 1},
    "odd": 1,
}


def test_a_field_that_nothing_knows_is_a_warning() -> None:
    warned = post(UNKNOWN).json()["warnings"]
    assert sorted(warning.split(" ")[0] for warning in warned) == [
        "input.0.content.0.odd",
        "odd",
        "reasoning.odd",
        "text.format.odd",
        "text.odd",
        "tools.0.odd",
    ]


def test_where_it_is_strict_such_a_field_is_a_400() -> None:
    assert refusal(post(UNKNOWN, {"x-strict": "1"})) == (400, "input.0.content.0.odd")
