"""`/v1/responses`: what OpenAI's client sends and reads, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI
from starlette.types import Message

from api.responses_form import ResponsesFields
from tests.api.in_process import Server
from tests.api.openai_bench import lose_the_device, text_of
from tests.api.responses_bench import (
    GREEDY,
    PATH,
    SCORED,
    SEEDED,
    WEATHER,
    events_of,
    nameless,
    post,
    run,
)

# Whole


def test_the_official_client_reads_a_whole_answer() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.responses.create(**GREEDY, max_output_tokens=9)
        assert answer.id.startswith("resp_")
        assert (answer.object, answer.model, answer.status) == ("response", "fake", "incomplete")
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output_text == text_of(server)
        (message,) = answer.output
        assert message.type == "message"
        assert (message.role, message.status) == ("assistant", "incomplete")
        assert answer.usage is not None
        read = len(server.pool.submitted[0].submission.prompt)
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (read, 9)
        assert answer.usage.total_tokens == read + 9
        assert answer.usage.output_tokens_details.reasoning_tokens == 0
        again = await client.responses.create(**GREEDY, max_output_tokens=9)
        assert again.output_text == answer.output_text
        assert again.usage is not None
        assert again.usage.input_tokens_details.cached_tokens > 0

    run(check)


def test_an_answer_that_ends_by_itself_is_completed() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.responses.create(**GREEDY, extra_body={"stop": "e"})
        assert (answer.status, answer.incomplete_details) == ("completed", None)
        assert answer.completed_at is not None
        assert "e" not in answer.output_text

    run(check)


def test_an_answer_that_says_nothing_is_an_empty_message() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        first = (await client.responses.create(**GREEDY, max_output_tokens=1)).output_text
        answer = await client.responses.create(**GREEDY, extra_body={"stop": first})
        (message,) = answer.output
        assert message.type == "message"
        assert [part.to_dict()["text"] for part in message.content] == [""]

    run(check)


def test_an_answer_repeats_what_it_was_asked() -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief",
        "max_output_tokens": 2,
        "metadata": {"for": "a test"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "somebody",
        "temperature": 0.5,
        "top_p": 0.75,
        "tools": [WEATHER],
        "tool_choice": "none",
        "truncation": "disabled",
        "user": "me",
    }
    answer = post({"input": "hi", **asked}).json()
    assert {name: answer[name] for name in asked} == asked
    assert "warnings" not in answer


def test_what_is_null_is_as_if_it_were_not_there() -> None:
    names = "instructions tools tool_choice text reasoning stream include metadata store top_p"
    plain = nameless(post({**GREEDY, "max_output_tokens": 3}).json())
    nulls = {**GREEDY, "max_output_tokens": 3} | dict.fromkeys(names.split())
    assert nameless(post(nulls).json()) == plain


def test_log_probabilities_come_with_the_words_that_they_belong_to() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.responses.create(**GREEDY, **SCORED, max_output_tokens=5)
        (part,) = answer.output[0].to_dict()["content"]
        assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
        assert [len(each["top_logprobs"]) for each in part["logprobs"]] == [2] * 5
        assert all(bytes(each["bytes"]).decode() == each["token"] for each in part["logprobs"])

    run(check)


def test_a_receipt_comes_to_who_asks() -> None:
    answer = post({**GREEDY, "max_output_tokens": 2, "receipt": True}).json()
    assert answer["receipt"]["cached_tokens"] == 0


def test_what_is_asked_reaches_the_engine() -> None:
    asked: dict[str, Any] = {
        "max_output_tokens": 3,
        "min_tokens": 2,
        "seed": 7,
        "temperature": 0.5,
        "top_k": 9,
        "cache_salt": "red",
        "priority": 4,
        **SCORED,
    }

    async def check(server: Server, _: AsyncOpenAI) -> None:
        await server.client.post(PATH, json={"input": "hi", **asked})
        submission = server.pool.submitted[0].submission
        sampling = submission.sampling
        assert (submission.seed, submission.namespace, submission.priority) == (7, "red", -4)
        assert (submission.wants.logprobs, submission.wants.top) == (True, 2)
        assert (sampling.max_new_tokens, sampling.min_new_tokens) == (3, 2)
        assert (sampling.temperature, sampling.top_k) == (0.5, 9)

    run(check)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, {}),
        ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"reasoning": {"effort": "none"}},
            {"reasoning_effort": "none", "enable_thinking": False, "thinking": False},
        ),
        (
            {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "x"}},
            {"reasoning_effort": "x"},
        ),
    ],
)
def test_the_effort_of_thinking_is_told_to_the_template(
    asked: dict[str, Any], told: dict[str, Any]
) -> None:
    fields = ResponsesFields.model_validate({"input": "hi", **asked})
    assert fields.template_kwargs(fields.wish()) == told


# Streamed


@pytest.mark.parametrize("asked", [GREEDY, SEEDED])
@pytest.mark.parametrize("more", [{}, {"stop": ["e"]}, {"stop": ["no such text"]}, SCORED])
def test_the_last_event_holds_what_the_whole_answer_says(
    asked: dict[str, Any], more: dict[str, Any]
) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body = {**asked, "max_output_tokens": 40, **more}
        await server.client.post(PATH, json=body)  # so that both find the same in the cache
        whole = (await server.client.post(PATH, json=body)).json()
        streamed = await server.client.post(PATH, json={**body, "stream": True})
        events = events_of(streamed.text)
        assert nameless(events[-1]["response"]) == nameless(whole)
        deltas = [each for each in events if each["type"] == "response.output_text.delta"]
        (part,) = whole["output"][0]["content"]
        assert "".join(each["delta"] for each in deltas) == part["text"]
        assert [each for delta in deltas for each in delta["logprobs"]] == part["logprobs"]

    run(check)


def test_a_stream_is_the_typed_sequence_of_events() -> None:
    stream = post({**GREEDY, "max_output_tokens": 2, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert [event["type"].removeprefix("response.") for event in events_of(stream.text)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]


def test_the_clients_own_accumulation_agrees_with_the_last_event() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body = {**GREEDY, "extra_body": {"stop": "e"}}
        whole = await client.responses.create(**body)
        async with client.responses.stream(**body) as stream:
            said = [event async for event in stream if event.type == "response.output_text.delta"]
            last = await stream.get_final_response()
        assert last.output_text == whole.output_text == "".join(each.delta for each in said)
        assert said[-1].snapshot == whole.output_text

    run(check)


def test_an_engine_that_fails_ends_the_stream_with_an_error() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        lose_the_device(server, after=3)
        streamed = await server.client.post(PATH, json={**GREEDY, "stream": True})
        *_, item, error, failed = events_of(streamed.text)
        assert item["item"]["status"] == "incomplete"
        assert (error["type"], error["code"]) == ("error", "server_error")
        assert "the device is lost" in error["message"]
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"]["message"] == error["message"]
        assert failed["response"]["output"] == [item["item"]]

    run(check)


def test_an_engine_that_fails_the_whole_answer_is_a_503() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        lose_the_device(server, after=3)
        assert (await server.client.post(PATH, json=GREEDY)).status_code == 503

    run(check)


# Thoughts and calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    body = {**GREEDY, "max_output_tokens": 400, "ignore_eos": True, "stream": stream}

    async def check(server: Server, _: AsyncOpenAI) -> None:
        messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": []}
        answer = asyncio.create_task(server.app(scope, receive, send))
        while not server.pool.submitted:
            await asyncio.sleep(0)
        gone.set()
        await answer
        (live,) = server.pool.submitted
        assert live.finish is not None
        assert live.finish.reason == "abort"

    run(check)
