"""Which fields of Anthropic's routes are honoured, refused, or answered with a warning."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic import AsyncAnthropic

from api.anthropic_form import MessagesFields
from api.bodies import parse_value
from api.hearing import Named
from tests.api.anthropic_bench import BODY, COUNT, MESSAGES, PATH, post, refusal, run
from tests.api.in_process import Server

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "sum", "description": "adds", "input_schema": SCHEMA}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
DOCUMENT = {"type": "document", "source": {"type": "text", "data": "x", "media_type": "text/plain"}}


def parsed(**more: Any) -> MessagesFields:
    return parse_value({**BODY, **more}, MessagesFields)


def said(*blocks: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (said(), "messages.0.content"),
    (said({"type": "text"}), "messages.0.content.0.text"),
    (said({"type": "text", "text": 1}), "messages.0.content.0.text"),
    (said({"text": "x"}), "messages.0.content.0"),
    (said("x"), "messages.0.content.0"),
    (said(IMAGE), "'image'"),
    (said({"type": "text", "text": "x"}, DOCUMENT), "'document'"),
    (said({"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}), "'image'"),
    (said({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "come from assistant"),
    (said({"type": "text", "text": "x", "citations": [{}]}), "messages.0.content.0.citations"),
    (said({"type": "text", "text": "x", "cache_control": {"type": "for ever"}}), "cache_control"),
    ({"system": [IMAGE]}, "'image'"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 2}, "n"),
    ({"stop": "x"}, "stop"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
    ({"tools": [{"name": "sum"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
    ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "tools.0.input_schema"),
    ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools.0.input_examples"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "sum"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "sum"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 24}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 8}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"container": "abc"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"metadata": {"user_id": 7}}, "metadata.user_id"),
]


@pytest.mark.parametrize(("more", "named"), REFUSED, ids=[str(each)[:60] for each, _ in REFUSED])
def test_a_wrong_field_is_refused_by_name(more: dict[str, Any], named: str) -> None:
    status, message = refusal(post({**BODY, **more}))
    assert status == 400
    assert named in message


HARMLESS: list[dict[str, Any]] = [
    {"cache_control": {"type": "ephemeral"}},
    {
        "system": [
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        ]
    },
    said({"type": "text", "text": "x", "citations": None}),
    {"metadata": {"user_id": "somebody"}, "service_tier": "auto"},
    {"thinking": {"type": "disabled"}},
    {"thinking": {"type": "adaptive", "display": "summarized"}},
    {"tools": [], "tool_choice": {"type": "auto"}},
    {"output_config": {"effort": "high"}},
    {"mcp_servers": [], "container": None, "context_management": {"edits": []}},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7},
]


@pytest.mark.parametrize("more", HARMLESS, ids=[str(each)[:60] for each in HARMLESS])
def test_what_asks_for_nothing_more_is_served_without_a_warning(more: dict[str, Any]) -> None:
    answer = post({**BODY, **more}, STRICT_FIELDS=1)
    assert answer.status_code == 200, answer.text
    assert "warnings" not in answer.json()


def test_an_unknown_field_is_named_wherever_it_stands() -> None:
    content = [{"type": "text", "text": "x", "b": 1}]
    more = {"a": 1, "messages": [{"role": "user", "content": content, "c": 1}]}
    answer = post({**BODY, **more}).json()
    names = ["a", "messages.0.c", "messages.0.content.0.b"]
    assert answer["warnings"] == [
        f"{name} is not a field of this request and was ignored" for name in names
    ]


def test_a_budget_for_thoughts_is_answered_with_a_warning_since_nobody_keeps_it() -> None:
    more = {"thinking": {"type": "enabled", "budget_tokens": 8}}
    (warning,) = post({**BODY, **more}).json()["warnings"]
    assert "thinking.budget_tokens" in warning


def test_a_warning_reaches_who_reads_a_stream_by_the_client() -> None:
    async def check(_: Server, client: AsyncAnthropic) -> None:
        async with client.messages.stream(**BODY, extra_body={"a": 1}) as stream:
            message = await stream.get_final_message()
        assert message.model_extra is not None
        assert message.model_extra["warnings"] == [
            "a is not a field of this request and was ignored"
        ]

    run(check)


def test_what_is_wished_of_the_answer_follows_from_the_fields() -> None:
    plain = parsed().wish()
    assert (plain.tools, plain.choice, plain.parallel, plain.thinking) == ([], "auto", True, False)
    more: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}
    wish = parsed(tools=[TOOL], tool_choice=more, thinking={"type": "adaptive"}).wish()
    (tool,) = wish.tools
    assert (tool.name, tool.description, tool.parameters) == ("sum", "adds", SCHEMA)
    assert (wish.choice, wish.parallel, wish.thinking) == ("required", False, None)
    named = parsed(tools=[TOOL], tool_choice={"type": "tool", "name": "sum"}).wish()
    assert named.choice == Named("sum")
    assert parsed(tools=[TOOL], tool_choice={"type": "none"}).wish().choice == "none"
    thinking = {"type": "enabled", "budget_tokens": 8}
    assert parsed(thinking=thinking).wish().thinking is True


@pytest.mark.parametrize(
    "more",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
    ],
)
def test_a_schema_binds_the_answer_under_either_name(more: dict[str, Any]) -> None:
    grammar = parsed(**more).wish().grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    assert '"integer"' in grammar.text


def test_sampling_fields_reach_the_engine() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        more: dict[str, Any] = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125}
        more |= {"seed": 11, "cache_salt": "a", "priority": 3}
        await client.messages.create(**BODY, extra_body=more)
        submission = server.pool.submitted[0].submission
        sampling = submission.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)
        assert (sampling.min_p, sampling.max_new_tokens) == (0.125, BODY["max_tokens"])
        assert (submission.seed, submission.priority, submission.namespace) == (11, 3, "a")

    run(check)


def test_the_counting_route_needs_no_length_and_refuses_what_the_other_does() -> None:
    body = {"model": "fake", "messages": MESSAGES}
    assert post(body, COUNT).json().keys() == {"input_tokens"}
    assert refusal(post({**body, **said(IMAGE)}, COUNT))[0] == 400
    assert refusal(post(body, PATH)) == (400, "max_tokens: Field required")
