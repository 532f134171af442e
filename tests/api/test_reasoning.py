"""Thoughts before an answer: told apart from it wherever it was cut, and counted in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from api.reasoning import ThinkReader, ThoughtCounter, Thoughts
from api.speech import CallStart, PlainReader, Words
from api.tool_calls import CallReader
from api.tool_formats import FORMATS


def read(pieces: list[str], thoughts: Thoughts, separate: bool = True) -> tuple[str, str, int]:
    """Thoughts, answer and the number of calls."""
    calls = CallReader(FORMATS["hermes"], {"f": {}})
    reader = ThinkReader(calls, thoughts, separate)
    said = [each for piece in pieces for each in reader.feed(piece)] + [*reader.end()]
    words = [each for each in said if isinstance(each, Words)]
    return (
        "".join(each.text for each in words if each.thought),
        "".join(each.text for each in words if not each.thought),
        sum(isinstance(each, CallStart) for each in said),
    )


CALL = '<tool_call>{"name": "f"}</tool_call>'
CASES: list[tuple[Thoughts, str, tuple[str, str, int]]] = [
    ("possible", "<think>\nHm, <b>\n</think>\n\nYes", ("Hm, <b>", "Yes", 0)),
    ("possible", "\n<think>a</think>b</think>", ("a", "b</think>", 0)),
    ("possible", " No <think>a</think>", ("", " No <think>a</think>", 0)),
    ("possible", "<thin", ("", "<thin", 0)),
    ("open", f"Hm {CALL}\n</think>\n\n{CALL}", (f"Hm {CALL}", "", 1)),
    ("open", "cut off </thi", ("cut off </thi", "", 0)),
    ("open", "</think>Yes", ("", "Yes", 0)),
    ("possible", "", ("", "", 0)),
]


@pytest.mark.parametrize(("thoughts", "text", "expected"), CASES)
def test_thoughts_are_told_apart_wherever_the_text_is_cut(
    thoughts: Thoughts, text: str, expected: tuple[str, str, int]
) -> None:
    assert read([text], thoughts) == expected
    assert read(list(text), thoughts) == expected
    for place in range(len(text)):
        assert read([text[:place], text[place:]], thoughts) == expected


@pytest.mark.parametrize(("thoughts", "text", "expected"), CASES[:2])
def test_thoughts_that_are_not_separated_stay_in_the_text_as_they_are(
    thoughts: Thoughts, text: str, expected: object
) -> None:
    assert read(list(text), thoughts, separate=False) == ("", text, 0)


def test_calls_are_read_after_thoughts_alone_also_where_these_stay_in_the_text() -> None:
    text = f"{CALL}\n</think>\n"
    assert read([text, CALL], "open", separate=False) == ("", text.rstrip(), 1)


TABLE = [b"<think>", b"</think>", b"a", b"\n", b"<", b"/", b"think", b">x", b"\xc3", b"\xa9", b""]


def thought_tokens(ids: list[int], thoughts: Thoughts) -> int:
    """By looking at the answer so far as a whole, after each token."""
    start = b"" if thoughts == "open" else b"<think>"
    for count in range(1, len(ids) + 1):
        text = b"".join(TABLE[id] for id in ids[:count]).lstrip()
        if text[: len(start)] != start[: len(text)]:
            return 0
        if text.startswith(start) and b"</think>" in text[len(start) :]:
            return count
    return len(ids) if b"".join(TABLE[id] for id in ids).lstrip().startswith(start) else 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, len(TABLE) - 1), max_size=12),
    st.sampled_from(["open", "possible"]),
    st.integers(1, 12),
)
def test_tokens_of_thoughts_are_counted_one_by_one_however_they_arrive(
    ids: list[int], thoughts: Thoughts, size: int
) -> None:
    counter = ThoughtCounter(TABLE, thoughts)
    found = 0
    for start in range(0, len(ids), size):
        found = counter.count(ids[start : start + size])
    assert found == thought_tokens(ids, thoughts)


def test_a_reader_of_words_sees_what_follows() -> None:
    reader = ThinkReader(PlainReader(), "open")
    assert [*reader.feed("so"), *reader.feed("</think>it is")] == [
        Words("so", thought=True),
        Words("it is"),
    ]
    assert reader.feed(" fine") == [Words(" fine")]
