"""Anthropic's messages: the stream, as the official client folds it, is the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import (
    Message,
    RawMessageStreamEvent,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter

from api.answers import Answers, Piece
from api.anthropic_answers import Reply, ReplyFrames, input_of
from api.errors import ApiError
from backend.interface import Finish
from tests.api.anthropic_bench import events
from tests.api.asgi_client import play
from tests.api.babble import BabbleEar, BabbleReader
from tests.api.hand_fed import PROMPT, HandFedPool, ask, opened

EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
FINISHES = [
    Finish("length"),
    Finish("stop", matched=257),
    Finish("stop", matched="halt"),
    Finish("stop"),
]
TEXTS = st.text("tael k", max_size=24)


def reply_to(answers: Answers, *, shows: bool = True, receipt: bool = False) -> Reply:
    return Reply(answers, BabbleEar(BabbleReader(True, True)), "babble", shows, receipt)


def strict_fold(found: Sequence[dict[str, Any]]) -> Message:
    """What the client makes of events, each of which must be as its types say."""
    message: Any = None
    buffers: dict[int, bytes] = {}
    for each in found:
        event = EVENT.validate_python(each)
        message = accumulate_event(event=event, current_snapshot=message, json_bufs=buffers)
    return Message.model_validate(message.model_dump())


def streamed(pieces: Sequence[Piece], answers: Answers, **options: bool) -> list[dict[str, Any]]:
    """The events that tell `pieces`."""
    frames = ReplyFrames(reply_to(answers, **options), "req_1")
    (answer,) = answers.all
    return events(b"".join([frames.frame(answer, piece) for piece in pieces]).decode())


def pieces_of(text: str, cuts: Sequence[int], finish: Finish) -> list[Piece]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[start:end] for start, end in pairwise(places)]
    return [*(Piece(part, part.encode(), None) for part in parts), Piece("", [], finish)]


def whole_of(text: str, finish: Finish, **options: bool) -> dict[str, Any]:
    """The message that answers a request without `stream`."""
    found: list[dict[str, Any]] = []

    async def scenario() -> None:
        pool = HandFedPool()
        answers = opened(pool, ask())
        pool.feed(0, text.encode(), finish)
        [whole] = await answers.whole()
        found.append(reply_to(answers, **options).whole(whole))

    play(scenario())
    return found[0]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 24), max_size=8), st.sampled_from(FINISHES), st.booleans())
def test_however_a_stream_is_cut_its_fold_is_the_whole(
    text: str, cuts: list[int], finish: Finish, shows: bool
) -> None:
    answers = opened(HandFedPool(), ask())
    answers.all[0].stream.feed(text.encode(), finish)  # so that tokens are counted
    told = strict_fold(streamed(pieces_of(text, cuts, finish), answers, shows=shows))
    whole = Message.model_validate(whole_of(text, finish, shows=shows))
    assert told.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 24), max_size=8))
def test_blocks_are_opened_and_closed_one_after_another(text: str, cuts: list[int]) -> None:
    found = streamed(pieces_of(text, cuts, FINISHES[0]), opened(HandFedPool(), ask()))
    assert [each["type"] for each in found[:1]] == ["message_start"]
    assert [each["type"] for each in found[-2:]] == ["message_delta", "message_stop"]
    at, is_open = -1, False
    for each in found[1:-2]:
        if each["type"] == "content_block_start":
            assert not is_open
            at, is_open = at + 1, True
        else:
            assert is_open
            is_open = each["type"] != "content_block_stop"
        assert each["index"] == at
    assert not is_open


def test_thoughts_words_and_calls_are_blocks_in_their_order() -> None:
    message = Message.model_validate(whole_of("kee le tlea ketk", Finish("stop", matched=257)))
    thought, words, first, more, last = message.content
    assert isinstance(thought, ThinkingBlock)
    assert (thought.thinking, bool(thought.signature)) == ("kee ", True)
    assert isinstance(words, TextBlock)
    assert words.text == "le "
    assert isinstance(first, ToolUseBlock)
    assert (first.id, first.name, first.input) == ("call_0", "tell", {"said": "le"})
    assert isinstance(more, TextBlock)
    assert isinstance(last, ToolUseBlock)
    assert last.input == {}  # its one argument was not complete
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 4


def test_thoughts_that_are_not_to_be_shown_leave_an_empty_block() -> None:
    (thought, words) = whole_of("kee le", Finish("length"), shows=False)["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "")
    assert words == {"type": "text", "text": "le"}


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("k k", Finish("length"), ("max_tokens", None)),
        ("k ta", Finish("length"), ("max_tokens", None)),
        ("k k", Finish("stop"), ("end_turn", None)),
        ("k k", Finish("stop", matched=257), ("end_turn", None)),
        ("k ta", Finish("stop", matched=257), ("tool_use", None)),
        ("k ta", Finish("stop"), ("tool_use", None)),
        ("k k", Finish("stop", matched="halt"), ("stop_sequence", "halt")),
    ],
)
def test_a_message_says_why_it_ended(
    text: str, finish: Finish, expected: tuple[str, str | None]
) -> None:
    whole = whole_of(text, finish)
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert whole["stop_reason"] in get_args(StopReason)


def test_what_the_cache_had_is_not_among_the_input_tokens() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask())
    pool.requests[0].cached = 2
    usage = reply_to(answers).usage()
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(PROMPT)
    assert usage["cache_read_input_tokens"] == 2
    assert usage["cache_creation_input_tokens"] == 0


def test_an_answer_without_text_has_no_block() -> None:
    assert whole_of("", Finish("stop", matched=257))["content"] == []


def test_an_aborted_answer_is_an_error_that_clients_do_not_try_again() -> None:
    finish = Finish("abort", message="by the operator")
    with pytest.raises(ApiError) as caught:
        whole_of("k k", finish)
    assert caught.value.headers["x-should-retry"] == "false"
    *told, last = streamed([Piece("k k", b"k k", finish)], opened(HandFedPool(), ask()))
    assert "message_stop" not in [each["type"] for each in told]
    error = {"type": "api_error", "message": "by the operator"}
    assert last == {"type": "error", "error": error, "request_id": "req_1"}


def test_a_failure_within_a_stream_is_an_error_event() -> None:
    answers = opened(HandFedPool(), ask())
    frames = ReplyFrames(reply_to(answers), "req_1")
    failure = frames.failure(answers.all[0], ApiError(503, "it died", "engine_error"))
    error = {"type": "api_error", "message": "it died"}
    assert events(failure.decode()) == [{"type": "error", "error": error, "request_id": "req_1"}]


def test_a_receipt_comes_with_the_end_where_it_is_asked_for() -> None:
    finish = Finish("length")
    assert "receipt" not in whole_of("k", finish)
    assert "cached_tokens" in whole_of("k", finish, receipt=True)["receipt"]
    found = streamed([Piece("k", b"k", finish)], opened(HandFedPool(), ask()), receipt=True)
    assert "cached_tokens" in found[-2]["receipt"]


@pytest.mark.parametrize("arguments", ['{"a": [1, 2]}', '{"a": [1, 2', '{"a"', "{", "", "[1]", "}"])
def test_arguments_are_always_an_object(arguments: str) -> None:
    found = input_of(arguments)
    assert isinstance(found, dict)
    if arguments.endswith("}") and len(arguments) > 1:
        assert found == json.loads(arguments)
