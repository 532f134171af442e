"""One response, told piece by piece: whatever was heard, and wherever its pieces were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from hypothesis import given, settings, strategies as st

from api.answers import Answer, Piece
from api.errors import ApiError
from api.hearing import Ear
from api.responses_telling import ResponseTelling, Told
from api.speech import CallArguments, CallStart, Saying, Words
from backend.interface import Finish, TokenLogprob
from backend.tokenizer import ByteTokenizer
from tests.api.hand_fed import HandFedPool, ask, opened
from tests.api.responses_bench import events_of, nameless

STOP = Finish("stop", matched=257)
HEAD = {
    "id": "resp_scripted",
    "object": "response",
    "created_at": 0,
    "model": "fake",
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}


class Spelled:
    """Reads letters: a thought, words, the beginning of a call, its arguments."""

    def __init__(self) -> None:
        self._calls = 0
        self._calling = False

    def feed(self, text: str) -> Sequence[Saying]:
        return [saying for letter in text for saying in self._letter(letter)]

    def end(self) -> Sequence[Saying]:
        return []

    def _letter(self, letter: str) -> list[Saying]:
        if letter == "a":
            return [CallArguments(self._calls - 1, letter)] if self._calling else []
        self._calling = letter == "("
        if not self._calling:
            return [Words(letter, thought=letter == "t")]
        self._calls += 1
        return [CallStart(self._calls - 1, f"call_{self._calls}", "weather")]


def telling(ended: list[dict[str, Any]] | None = None) -> ResponseTelling:
    told = Told("scripted", HEAD, ByteTokenizer(), False, ([] if ended is None else ended).append)
    return ResponseTelling(told, Ear(Spelled()))


def an_answer() -> Answer:
    return opened(HandFedPool(), ask()).all[0]


def read(told: ResponseTelling) -> Any:
    """The response so far, as clients get it."""
    return orjson.loads(orjson.dumps(told.response))


def heard(response: Any) -> list[tuple[str, str]]:
    """The items of a response: their type, and what they say."""
    return [
        (
            item["type"],
            item["arguments"] if "arguments" in item else item["content"][0]["text"],
        )
        for item in response["output"]
    ]


def simply(text: str) -> list[tuple[str, str]]:
    """The same, made from the letters alone."""
    kinds = {"t": "reasoning", "w": "message", "a": "function_call"}
    items: list[tuple[str, str]] = []
    for letter in text:
        kind, said = items[-1] if items else ("", "")
        if letter == "(":
            items.append(("function_call", ""))
        elif kind == kinds[letter]:
            items[-1] = (kind, said + letter)
        elif letter != "a":
            items.append((kinds[letter], letter))
    return items or [("message", "")]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("tw(a", max_size=4), min_size=1, max_size=8))
def test_what_is_told_depends_on_the_text_and_not_on_its_pieces(texts: list[str]) -> None:
    answer, whole, streamed = an_answer(), telling(), telling()
    whole.frame(answer, Piece("".join(texts), [], STOP))
    pieces = [Piece(text, [], None) for text in texts] + [Piece("", [], STOP)]
    stream = b"".join(streamed.frame(answer, piece) for piece in pieces).decode()
    assert nameless(read(streamed)) == nameless(read(whole))
    assert heard(read(whole)) == simply("".join(texts))
    events = events_of(stream)
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"] == read(streamed)
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == read(streamed)["output"]
    deltas = dict.fromkeys(range(len(done)), "")
    for each in events:
        if each["type"].endswith(".delta"):
            deltas[each["output_index"]] += each["delta"]
            assert each["item_id"] == done[each["output_index"]]["id"]
    assert list(deltas.values()) == [text for _, text in heard(read(streamed))]


def test_log_probabilities_wait_for_the_text_of_their_tokens() -> None:
    answer, scored = an_answer(), telling()
    stream = scored.frame(answer, Piece("", [116], None, [TokenLogprob(116, -1.0)]))
    stream += scored.frame(answer, Piece("w", [119], None, [TokenLogprob(119, -2.0)]))
    stream += scored.frame(answer, Piece("", [119, 257], STOP, [TokenLogprob(119, -3.0)] * 2))
    deltas = [
        (each["delta"], [one["logprob"] for one in each["logprobs"]])
        for each in events_of(stream.decode())
        if each["type"] == "response.output_text.delta"
    ]
    assert deltas == [("w", [-1.0, -2.0]), ("", [-3.0])]  # and none of the end token


def test_only_a_response_that_came_to_its_end_is_handed_on() -> None:
    finished: list[dict[str, Any]] = []
    answer, fine, failed = an_answer(), telling(finished), telling(finished)
    fine.frame(answer, Piece("w", [], None))
    assert finished == []
    fine.frame(answer, Piece("", [], STOP))
    assert finished == [fine.response]
    failed.frame(answer, Piece("w", [], None))
    failed.failure(answer, ApiError(503, "the engine died"))
    assert finished == [fine.response]


def test_an_aborted_response_is_cancelled() -> None:
    aborted = telling()
    stream = aborted.frame(an_answer(), Piece("w", [], Finish("abort")))
    events = events_of(stream.decode())
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "cancelled"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
