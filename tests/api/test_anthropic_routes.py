"""Anthropic's routes, asked by the official client, over the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic, beta_async_tool
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock
from pydantic import BaseModel

from api import anthropic_routes
from api.hearing import Hearing, Wish
from api.service import Service
from backend.interface import Overloaded
from tests.api.anthropic_bench import BODY, COUNT, MESSAGES, PATH, events, post, refusal, run
from tests.api.babble import BabbleHearing, as_hearing
from tests.api.in_process import Server
from tests.api.openai_bench import lose_the_device, text_of

TOOL: Any = {"name": "tell", "input_schema": {"type": "object", "properties": {}}}
Ask = Callable[[AsyncAnthropic], Awaitable[Message]]


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[Wish]:
    """Answers have thoughts and calls; what was wished of them is kept here."""
    kept: list[Wish] = []

    async def listen(_: Service, __: object, wish: Wish) -> Hearing:
        kept.append(wish)
        return as_hearing(BabbleHearing(wish.thinking is True, bool(wish.tools)))

    monkeypatch.setattr(anthropic_routes, "listen", listen)
    return kept


def seen_by_the_model(server: Server) -> str:
    table = server.service.model.tokenizer.table
    return b"".join(table[id] for id in server.pool.submitted[-1].submission.prompt).decode()


async def streamed(client: AsyncAnthropic, **more: Any) -> Message:
    """The message that the client's own helper puts together."""
    async with client.messages.stream(**{**BODY, **more}) as stream:
        return await stream.get_final_message()


def without_id(message: Message) -> dict[str, Any]:
    return message.model_dump(exclude={"id", "usage"})


def test_the_official_client_reads_a_whole_answer() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        message = await client.messages.create(**BODY, extra_body={"ignore_eos": True})
        assert message.id.startswith("msg_")
        assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
        (block,) = message.content
        assert isinstance(block, TextBlock)
        assert block.text == text_of(server)
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        assert message.usage.input_tokens == len(server.pool.submitted[0].submission.prompt)
        assert message.usage.output_tokens == BODY["max_tokens"]
        assert message._request_id is not None
        assert message._request_id.startswith("req_")

    run(check)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop_sequences": ["e"]},
        {"tools": [TOOL]},
        {"thinking": {"type": "enabled", "budget_tokens": 8}, "tools": [TOOL], "max_tokens": 90},
        {"thinking": {"type": "enabled", "budget_tokens": 8, "display": "omitted"}},
        {"extra_body": {"temperature": 0}},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(wishes: list[Wish], more: dict[str, Any]) -> None:
    async def check(_: Server, client: AsyncAnthropic) -> None:
        fields = {**BODY, **more}
        fields["extra_body"] = {"seed": 5, **fields.get("extra_body", {})}
        whole = await client.messages.create(**fields)
        told = await streamed(client, **fields)
        assert without_id(told) == without_id(whole) | {"content": told.model_dump()["content"]}
        dumped = [each.model_dump(exclude_none=True) for each in told.content]
        assert dumped == [each.model_dump(exclude_none=True) for each in whole.content]
        assert told.usage.output_tokens == whole.usage.output_tokens

    run(check)
    assert len(wishes) == 2


def test_thoughts_and_calls_are_blocks(wishes: list[Wish]) -> None:
    async def check(_: Server, client: AsyncAnthropic) -> None:
        message = await client.messages.create(
            **{**BODY, "max_tokens": 200},
            tools=[TOOL],
            thinking={"type": "enabled", "budget_tokens": 8},
            extra_body={"seed": 5, "ignore_eos": True},
        )
        kinds = [type(block) for block in message.content]
        assert kinds[0] is ThinkingBlock
        assert {TextBlock, ToolUseBlock} <= set(kinds)
        assert message.usage.output_tokens_details is not None
        assert message.usage.output_tokens_details.thinking_tokens > 0

    run(check)
    assert [tool.name for tool in wishes[0].tools] == ["tell"]


def test_raw_events_come_in_anthropics_order() -> None:
    answer = post({**BODY, "stream": True})
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    assert answer.headers["request-id"].startswith("req_")
    names = [each["type"] for each in events(answer.text)]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


def test_the_clients_tool_runner_calls_and_goes_on_without_a_thread(wishes: list[Wish]) -> None:
    told: list[str] = []

    @beta_async_tool
    async def tell(said: str) -> str:
        """Tell somebody."""
        told.append(said)
        return "told"

    async def check(server: Server, client: AsyncAnthropic) -> None:
        runner = client.beta.messages.tool_runner(
            **{**BODY, "max_tokens": 200},
            tools=[tell],
            max_iterations=2,
            extra_body={"temperature": 0},
        )
        messages = [message async for message in runner]
        assert [message.stop_reason for message in messages][:1] == ["tool_use"]
        assert len(messages) == len(server.pool.submitted) == 2
        assert "told" in seen_by_the_model(server)

    run(check)
    assert told
    assert len(wishes) == 2


def test_the_beta_client_reads_the_same() -> None:
    async def check(_: Server, client: AsyncAnthropic) -> None:
        plain = await client.messages.create(**BODY, extra_body={"seed": 1})
        beta = await client.beta.messages.create(
            **BODY, betas=["interleaved-thinking-2025-05-14"], extra_body={"seed": 1}
        )
        assert beta.content[0].to_dict() == plain.content[0].to_dict()

    run(check)


def test_the_count_is_what_the_answer_says_that_it_took() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        fields: Any = {"model": "fake", "messages": MESSAGES, "system": "Be kind."}
        count = await client.messages.count_tokens(**fields)
        for _ in range(2):  # the second time most of it is in the cache
            usage = (await client.messages.create(**fields, max_tokens=1)).usage
            assert usage.cache_read_input_tokens is not None
            assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens
        assert usage.cache_read_input_tokens > 0
        assert len(server.pool.submitted) == 2

    run(check)


def test_an_answer_goes_on_where_the_assistants_turn_was_left() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        begun: Any = [*MESSAGES, {"role": "assistant", "content": "Once upon a "}]
        fields: Any = {"model": "fake", "messages": begun}
        message = await client.messages.create(**fields, max_tokens=4)
        assert seen_by_the_model(server).endswith("assistant\nOnce upon a ")
        (block,) = message.content
        assert isinstance(block, TextBlock)
        assert block.text == text_of(server)
        count = await client.messages.count_tokens(**fields)
        assert count.input_tokens == message.usage.input_tokens

    run(check)


def test_a_conversation_with_a_schema_is_parsed_by_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Place(BaseModel):
        name: str

    async def unchecked(*_: object) -> None:
        """The fake engine binds nothing."""

    asked: list[Wish] = []

    async def listen(_: Service, __: object, wish: Wish) -> Hearing:
        asked.append(wish)
        return Hearing()

    monkeypatch.setattr(anthropic_routes, "check_grammar", unchecked)
    monkeypatch.setattr(anthropic_routes, "listen", listen)

    async def check(_: Server, client: AsyncAnthropic) -> None:
        await client.messages.create(
            **BODY,
            output_config={"format": {"type": "json_schema", "schema": Place.model_json_schema()}},
        )

    run(check)
    assert asked[0].grammar is not None
    assert '"name"' in asked[0].grammar.text


# Errors


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({**BODY, "model": "claude"}, anthropic.NotFoundError),
        ({**BODY, "max_tokens": -1}, anthropic.BadRequestError),
    ],
)
def test_the_client_raises_what_it_raises_for_anthropics_errors(
    body: dict[str, Any], expected: type[anthropic.APIStatusError]
) -> None:
    async def check(_: Server, client: AsyncAnthropic) -> None:
        with pytest.raises(expected) as caught:
            await client.messages.create(**body)
        assert caught.value.request_id is not None
        assert caught.value.type in ("not_found_error", "invalid_request_error")

    run(check)


def test_an_overloaded_server_says_when_to_try_again() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        def full(_: object) -> list[str]:
            raise Overloaded("2 wait", retry_after_s=2.5, queue_depth=2, est_wait_s=2.5)

        server.pool.submit = full  # type: ignore[method-assign, assignment]
        with pytest.raises(anthropic.RateLimitError) as caught:
            await client.messages.create(**BODY)
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.type == "rate_limit_error"

    run(check)


def test_a_draining_server_says_so() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        server.pool.drain()
        with pytest.raises(anthropic.InternalServerError) as caught:
            await client.messages.create(**BODY)
        assert (caught.value.status_code, caught.value.type) == (503, "overloaded_error")
        assert "retry-after" in caught.value.response.headers

    run(check)


@pytest.mark.parametrize("after", [0, 3])
def test_a_lost_device_is_an_error_before_and_within_a_stream(after: int) -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        lose_the_device(server, after)
        with pytest.raises(anthropic.APIStatusError) as caught:
            await streamed(client)
        assert caught.value.type == "api_error"
        assert caught.value.status_code == (200 if after else 503)

    run(check)


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_a_body_that_is_no_json_is_refused(path: str) -> None:
    assert refusal(post(b"{", path))[0] == 400
    assert refusal(post(b"[]", path))[0] == 400


def test_a_body_that_is_too_large_is_refused() -> None:
    answer = post(b" " * ((16 << 20) + 1))
    assert refusal(answer)[0] == 413
    assert answer.json()["error"]["type"] == "request_too_large"


def test_other_methods_and_routes_below_are_refused_in_the_same_shape() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        answer = await server.client.get(PATH)
        assert refusal(answer)[0] == 405
        assert answer.json()["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.list()

    run(check)


def test_a_client_that_leaves_ends_its_request() -> None:
    async def check(server: Server, client: AsyncAnthropic) -> None:
        task = asyncio.ensure_future(client.messages.create(**{**BODY, "max_tokens": 4000}))
        while not server.pool.submitted:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(check)  # its end finds the engine idle, and every page home
