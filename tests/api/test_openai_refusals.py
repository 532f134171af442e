"""What OpenAI's routes refuse, and how they name it; what they do not know, and how they say so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.api.in_process import Server
from tests.api.openai_bench import chunks, post, refusal, run

Body = dict[str, Any]
Wrong = list[tuple[Body, str]]  # what is added to a good body, and the field to be named

COMPLETION: Body = {"prompt": "Once", "max_tokens": 6}
CHAT: Body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 6}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}

on_both_routes = pytest.mark.parametrize("path", ROUTES)


# Malformed bodies

WRONG: Wrong = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": 25}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -0.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [260]}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": 5, "stream": True}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"user": 5}, "user"),
    ({"model": 5}, "model"),
    ({"priority": 1 << 31}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"cache_salt": "a" * 257}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"rid": ""}, "rid"),
    ({"rid": ["a"]}, "rid"),
    ({"request_id": "a" * 257}, "request_id"),
    ({"rid": "a", "request_id": "b"}, "rid"),
    ({"stop_regex": 5}, "stop_regex"),
    ({"stop_regex": "("}, "stop_regex"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"receipt": "yes"}, "receipt"),
    ({"metadata": [1]}, "metadata"),
    (
        {"stream_options": {"continuous_usage_stats": 1}, "stream": True},
        "stream_options.continuous_usage_stats",
    ),
]

WRONG_COMPLETION: Wrong = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt.1"),
    ({"prompt": [1, "a"]}, "prompt.1"),
    ({"prompt": [1, 2.5]}, "prompt.1"),
    ({"prompt": [[1], [2, "a"]]}, "prompt.1.1"),
    ({"prompt": [[1], "a"]}, "prompt.1"),
    ({"prompt": [1, 10**30]}, "prompt"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["a"] * 2049}, "prompt"),
    ({"prompt": "a" * 8192}, "prompt"),
    ({"prompt": [1] * 9000}, "prompt"),
    ({"prompt": "a" * 10_000_000}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
]


def message(**fields: Any) -> Body:
    """A conversation whose second message is `fields`."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "user", **fields}]}


WRONG_CHAT: Wrong = [
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hello"]}, "messages.0"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    (message(role="robot", content="a"), "messages.1.role"),
    (message(role=None, content="a"), "messages.1.role"),
    (message(), "messages.1.content"),
    (message(content=None), "messages.1.content"),
    (message(content=5), "messages.1.content"),
    (message(content={"type": "text", "text": "a"}), "messages.1.content"),
    (message(content=[]), "messages.1.content"),
    (message(content=["a"]), "messages.1.content.0"),
    (message(content=[{"type": "text"}]), "messages.1.content.0.text"),
    (message(content=[{"type": "text", "text": 5}]), "messages.1.content.0.text"),
    (
        message(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
        "messages.1.content.1.type",
    ),
    (message(content=[{"text": "a"}]), "messages.1.content.0.type"),
    (message(content="a", name=5), "messages.1.name"),
    (message(role="assistant", content=None), "messages.1.content"),
    (message(role="assistant", tool_calls=[{"id": "a"}]), "messages.1.tool_calls.0.function"),
    (message(role="assistant", function_call={}, content="a"), "messages.1.function_call"),
    ({"messages": [{"role": "user", "content": "a" * 8192}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 10_000_000}]}, "messages"),
    ({"max_completion_tokens": 7}, "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 9000}, "max_completion_tokens"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs.add_generation_prompt",
    ),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
    ({"add_generation_prompt": 1}, "add_generation_prompt"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "code"}]}, "tools.0.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"reasoning": "much"}, "reasoning"),
    ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        *((path, WRONG) for path in ROUTES),
        ("/v1/completions", WRONG_COMPLETION),
        ("/v1/chat/completions", WRONG_CHAT),
    ],
)
def test_a_malformed_field_is_a_400_that_names_it(path: str, wrong: Wrong) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        for more, name in wrong:
            content = json.dumps({**ROUTES[path], **more})  # which writes NaN and Infinity
            response = await server.client.post(path, content=content)
            assert refusal(response) == (400, name), f"{more!r:.80}: {response.text:.300}"
        assert not server.pool.submitted

    run(check)


@on_both_routes
def test_a_refusal_speaks_of_lengths_as_the_client_does(path: str) -> None:
    for more in ({"max_tokens": 9000}, {"min_tokens": 30}):
        told = post(path, {**ROUTES[path], **more}).json()["error"]["message"]
        assert "max_tokens" in told
        assert "new_tokens" not in told


@on_both_routes
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"null", b'{"prompt": "a"', b'{"prompt": "\xff"}', b"\x00" * 99],
)
def test_a_body_that_is_no_json_object_is_a_400(path: str, body: bytes) -> None:
    assert refusal(post(path, body)) == (400, None)


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")]
)
def test_what_is_to_be_answered_must_be_there(path: str, name: str) -> None:
    assert refusal(post(path, {})) == (400, name)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": "\\ud800"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ],
)
def test_half_a_character_is_a_400(path: str, body: bytes) -> None:
    status, _ = refusal(post(path, body))
    assert status == 400


# Fields that are known and not served

Unserved = list[tuple[str, list[Any], Any]]  # field, what asks for something, what for nothing

UNSERVED: Unserved = [
    ("prompt_logprobs", [0, 1], None),
    ("lora_path", ["a"], ""),
    ("use_beam_search", [True], False),
    ("bad_words", [["a"]], []),
    ("allowed_token_ids", [[1]], None),
    ("store", [True], False),
    ("service_tier", ["flex"], "auto"),
]
UNSERVED_COMPLETION: Unserved = [
    ("best_of", [2, 0, "x"], 1),
    ("suffix", ["end"], ""),
]
UNSERVED_CHAT: Unserved = [
    ("functions", [[{}]], []),
    ("function_call", ["auto"], "none"),
    ("modalities", [["text", "audio"]], ["text"]),
    ("audio", [{}], None),
    ("chat_template", ["{{ 1 }}"], None),
    ("echo", [True], False),
    ("reasoning", [{"exclude": True}], {"exclude": False}),
]


@pytest.mark.parametrize(
    ("path", "unserved"),
    [
        *((path, UNSERVED) for path in ROUTES),
        ("/v1/completions", UNSERVED_COMPLETION),
        ("/v1/chat/completions", UNSERVED_CHAT),
    ],
)
def test_what_is_known_and_not_served_is_refused_by_name(path: str, unserved: Unserved) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        for name, values, _ in unserved:
            for value in values:
                response = await server.client.post(path, json={**ROUTES[path], name: value})
                status, named = refusal(response)
                assert (status, (named or "").split(".")[0]) == (400, name)
        nothing = {name: harmless for name, _, harmless in unserved}
        for body in (nothing, dict.fromkeys(nothing)):
            response = await server.client.post(path, json={**ROUTES[path], **body})
            assert response.is_success, response.text

    run(check, STRICT_FIELDS=1)


@on_both_routes
def test_options_of_streams_that_are_not_served_are_refused(path: str) -> None:
    body, name = {**ROUTES[path], "stream": True}, "include_obfuscation"
    response = post(path, {**body, "stream_options": {name: True}})
    assert refusal(response) == (400, f"stream_options.{name}")
    assert post(path, {**body, "stream_options": {name: False}}, STRICT_FIELDS=1).is_success


# Fields that nothing here knows


@on_both_routes
def test_unknown_fields_and_what_the_pool_says_are_warnings_of_the_answer(path: str) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        server.pool.warnings = ["shortened"]
        body = {**ROUTES[path], "n": 2, "colour": "red", "max_new_tokens": 3}
        whole = (await server.client.post(path, json=body)).json()
        *told, last = whole["warnings"]
        assert last == "shortened"
        assert [warning.split()[0] for warning in told] == ["colour", "max_new_tokens"]
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        *seen, end, usage = chunks(await server.client.post(path, json=body))
        assert end["warnings"] == whole["warnings"]
        assert end["choices"][0]["finish_reason"]
        assert not [each for each in (*seen, usage) if "warnings" in each]

    run(check)


@on_both_routes
def test_who_asks_for_nothing_strange_is_not_warned(path: str) -> None:
    assert "warnings" not in post(path, ROUTES[path]).json()


@pytest.mark.parametrize(
    ("path", "more", "name"),
    [
        *((path, {"colour": "red"}, "colour") for path in ROUTES),
        ("/v1/completions", {"stream_options": {"colour": 1}}, "stream_options.colour"),
        ("/v1/chat/completions", message(content="a", colour=1), "messages.1.colour"),
        (
            "/v1/chat/completions",
            message(content=[{"type": "text", "text": "a", "cache_control": {}}]),
            "messages.1.content.0.cache_control",
        ),
    ],
)
def test_unknown_fields_are_named_and_under_strict_fields_refused(
    path: str, more: Body, name: str
) -> None:
    body = {**ROUTES[path], "stream": True, **more}
    (warning,) = chunks(post(path, body))[-1]["warnings"]
    assert warning.startswith(f"{name} ")
    assert refusal(post(path, body, STRICT_FIELDS=1)) == (400, name)
