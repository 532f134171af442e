"""From the bytes of a stream to a record, by a clock that the test turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, strategies as st

from bench.answer_stream import ENDPOINTS, AnswerReader
from bench.asks import Ask
from bench.summary import Record
from tests.bench.scripted_server import chat, completion, events, lines, native, usage

GOOD: dict[str, Callable[[Sequence[str], int], list[bytes]]] = {
    "generate": native,
    "chat": chat,
    "completions": completion,
}
TEXTS = ["Once", ' "event": "done"', "\n\ndata: [DONE]", "é", " upon"]


def read(endpoint: str, pieces: Sequence[bytes], status: int = 200) -> Record:
    """The record of an answer whose pieces are read a second apart, the first at 0."""
    record = Record(prompt_tokens=0, submitted=0.0)
    reader = AnswerReader(ENDPOINTS[endpoint], record)
    reader.begin(status)
    for second, piece in enumerate(pieces):
        reader.feed(piece, float(second))
    reader.end()
    return record


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_good_stream_is_a_record_with_the_time_of_each_frame_with_text(endpoint: str) -> None:
    pieces = GOOD[endpoint](TEXTS, 9)
    record = read(endpoint, pieces)
    first = 1 if endpoint == "chat" else 0  # the role is no token
    assert record.arrivals == [(first + number, 1) for number in range(len(TEXTS))]
    assert record.ended == len(pieces) - 1
    assert (record.prompt_tokens, record.output_tokens) == (5, 9)
    assert not record.failed


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@given(cuts=st.lists(st.integers(min_value=0, max_value=2000)))
def test_it_does_not_matter_where_the_network_cuts_a_stream(endpoint: str, cuts: list[int]) -> None:
    whole = b"".join(GOOD[endpoint](TEXTS, 9))
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    record = read(endpoint, [whole[start:end] for start, end in pairwise(edges)])
    assert sum(frames for _, frames in record.arrivals) == len(TEXTS)
    assert record.output_tokens == 9
    assert not record.failed


def test_frames_that_arrive_together_are_one_arrival_of_several() -> None:
    pieces = native(TEXTS, 5)
    record = read("generate", [pieces[0], b"".join(pieces[1:4]), b"".join(pieces[4:])])
    assert record.arrivals == [(0, 1), (1, 3), (2, 1)]


def test_pieces_that_were_read_at_once_arrived_together() -> None:
    record = Record(prompt_tokens=0, submitted=0.0)
    reader = AnswerReader(ENDPOINTS["generate"], record)
    reader.begin(200)
    for piece, now in zip(native(["a", "b", "c", "d"], 4), (1.0, 2.0, 2.0, 2.0, 3.0), strict=True):
        reader.feed(piece, now)
    assert record.arrivals == [(1.0, 1), (2.0, 3)]
    assert record.ended == 3.0


def test_carriage_returns_comments_and_other_fields_are_no_frames() -> None:
    quiet = b": ping\r\n\r\nevent: message\r\nid: 4\r\n"
    pieces = [quiet, *(piece.replace(b"\n", b"\r\n") for piece in completion(["a", "b"], 2))]
    record = read("completions", pieces)
    assert [frames for _, frames in record.arrivals] == [1, 1]
    assert not record.failed


def test_the_thinking_of_a_model_counts_as_text() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}
    record = read("chat", [*events(thought)[:1], *chat(["yes"], 2)])
    assert [frames for _, frames in record.arrivals] == [1, 1]


def test_cached_tokens_are_read_in_both_forms() -> None:
    ours = {"event": "done", "usage": {**usage(5, 1), "cached_tokens": 4}}
    assert read("generate", lines(ours)).cached_tokens == 4
    theirs = {
        "choices": [],
        "usage": {**usage(5, 1), "prompt_tokens_details": {"cached_tokens": 3}},
    }
    assert read("chat", events(theirs)).cached_tokens == 3


ERROR = {"error": {"message": "the engine died", "type": "engine_error", "code": "engine_failed"}}
ABORTED = {"event": "done", "finish_reason": "abort", "usage": usage(5, 1)}


@pytest.mark.parametrize(
    ("endpoint", "status", "pieces", "failure"),
    [
        (
            "generate",
            200,
            [*native(["a"], 1)[:1], *lines({"event": "error", **ERROR})],
            "error event engine_failed: the engine died",
        ),
        ("chat", 200, events(ERROR), "error event engine_failed: the engine died"),
        (
            "chat",
            200,
            chat(["a"], 1)[:-1],
            "cut short: the stream ended without its last frame",
        ),
        (
            "generate",
            200,
            native(["a"], 1)[:-1],
            "cut short: the stream ended without its last frame",
        ),
        ("generate", 200, [], "cut short: the stream ended without its last frame"),
        ("generate", 200, lines(ABORTED), "finish abort: the server gave the answer up"),
        ("chat", 200, events(), "no token counts: the stream ended without a usage"),
        ("generate", 200, [b'{"text_delta": \n'], 'broken frame: {"text_delta":'),
        ("generate", 200, [b"[1]\n"], "broken frame: [1]"),
        ("chat", 200, [b'data: {"choices": ["a"]}\n\n'], 'broken frame: {"choices": ["a"]}'),
        (
            "chat",
            429,
            [b'{"error": {"message": "the queue', b' is full", "code": "queue_full"}}'],
            "HTTP 429 queue_full: the queue is full",
        ),
        ("chat", 400, [b'{"error": {"message": "no", "type": "x"}}'], "HTTP 400 x: no"),
        ("chat", 502, [b"<html>\nBad Gateway"], "HTTP 502: <html> Bad Gateway"),
        ("chat", 500, [], "HTTP 500: an empty body"),
    ],
)
def test_whatever_is_wrong_is_a_failure_with_its_cause(
    endpoint: str, status: int, pieces: list[bytes], failure: str
) -> None:
    record = read(endpoint, pieces, status)
    assert record.failure == failure
    assert record.failed
    assert record.ended is not None


def test_what_the_server_said_comes_before_what_the_network_did() -> None:
    record = Record(prompt_tokens=0, submitted=0.0)
    reader = AnswerReader(ENDPOINTS["generate"], record)
    reader.begin(200)
    reader.feed(lines({"event": "error", **ERROR})[0], 1.0)
    reader.end("connection failed: cut")
    assert record.failure == "error event engine_failed: the engine died"


def test_every_endpoint_is_asked_in_its_own_words() -> None:
    ask = Ask("hello", 8, 0.5, 3, ignore_eos=True)
    shared = {"temperature": 0.5, "seed": 3, "ignore_eos": True, "stream": True}
    compatible = {"max_tokens": 8, "model": "m", "stream_options": {"include_usage": True}}
    wanted = {
        "generate": {"prompt": "hello", "max_new_tokens": 8},
        "chat": {"messages": [{"role": "user", "content": "hello"}], **compatible},
        "completions": {"prompt": "hello", **compatible},
    }
    for name, fields in wanted.items():
        assert orjson.loads(ENDPOINTS[name].body(ask, "m")) == {**fields, **shared}


def test_token_ids_are_sent_as_they_are_and_ends_count_unless_told() -> None:
    body = json.loads(ENDPOINTS["completions"].body(Ask((1, 2), 8, 0.0, 0, False), "m"))
    assert body["prompt"] == [1, 2]
    assert "ignore_eos" not in body
