"""Patterns that end an answer: found where `re` finds them first, however the text is cut."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import Finish, RequestRefused
from engine.stop_regex import MAX_HELD, Found, RegexWatch, automaton_of, stop_patterns
from engine.text import TextStream

ATOMS = ("a", "b", "[ab]", "[^a]", ".", r"\w", r"\s", "-", " ", r"\x61", r"\.")
QUANTIFIERS = ("", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?")
TEXTS = st.text("ab- .\n", max_size=24)


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger patterns of smaller ones."""
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:%s|%s)".__mod__),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda two: f"({two[0]}){two[1]}"),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), grown, max_leaves=6).filter(
    lambda pattern: not re.search(pattern, "")  # which is refused
)
ANCHORED = st.tuples(
    st.sampled_from(("", "", "^", r"\b")), PATTERNS, st.sampled_from(("", "", "$", r"\Z"))
).map("".join)


def first_match(pattern: str, text: str) -> tuple[int, int] | None:
    """Where the match begins and ends that `re` finds in the shortest beginning of `text`."""
    for end in range(len(text) + 1):
        found = re.search(pattern, text[:end])
        if found is not None:
            return found.start(), end
    return None


class Ascii:
    """Token i is the character i."""

    table = tuple(bytes([code]) for code in range(128))
    visible = table
    strips_leading_space = False


def streamed(parts: Sequence[str], patterns: tuple[str, ...], **more: bool) -> tuple[str, object]:
    """The text of an answer whose tokens come in `parts`, and what ended it."""
    stream = TextStream(Ascii(), ("b.",), patterns, **more)
    pieces = [stream.feed(part.encode()) for part in parts]
    pieces.append(stream.feed(b"", Finish("length")))
    assert stream.finish is not None
    return "".join(piece.text for piece in pieces), (stream.finish.matched, stream.tokens)


@settings(max_examples=300, deadline=None)
@given(ANCHORED, TEXTS)
def test_a_pattern_ends_a_text_where_re_finds_it_first(pattern: str, text: str) -> None:
    found = RegexWatch((pattern,)).feed(text)
    assert (found and (found.start, found.end)) == first_match(pattern, text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(PATTERNS, min_size=1, max_size=3),
    st.lists(TEXTS, max_size=5),
    st.booleans(),
)
def test_the_stream_is_the_same_for_every_cut(
    patterns: list[str], parts: list[str], keep: bool
) -> None:
    whole = "".join(parts)
    told = streamed(parts, tuple(patterns), keep_stop=keep)
    assert told == streamed([whole], tuple(patterns), keep_stop=keep)
    assert told == streamed(list(whole), tuple(patterns), keep_stop=keep)


def test_a_boundary_that_only_the_next_character_shows_ends_the_text_before_it() -> None:
    assert RegexWatch((r"-\b",)).feed("x--a") == Found(4, 2, 3, r"-\b")


def test_the_end_of_the_text_is_where_it_has_come_to() -> None:
    assert RegexWatch((r"[.!?]\s*$",)).feed("Yes. No.") == Found(4, 3, 4, r"[.!?]\s*$")


def test_of_several_patterns_the_first_to_be_complete_is_the_one_that_matched() -> None:
    assert RegexWatch(("ab+c", "bb", "b+")).feed("xabb") == Found(3, 2, 3, "b+")


def test_flags_at_the_beginning_hold_for_the_pattern_that_has_them() -> None:
    assert RegexWatch(("(?i)end", "stop")).feed("STOP The EnD") == Found(12, 9, 12, "(?i)end")
    assert RegexWatch(("(?s)a.b",)).feed("a\nb") == Found(3, 0, 3, "(?s)a.b")
    assert RegexWatch(("a.b",)).feed("a\nb") is None


def test_no_more_is_held_back_than_a_match_may_be_long() -> None:
    watch = RegexWatch(("a.*z",))
    assert watch.feed("ba" + "b" * 5000) is None
    assert watch.held == MAX_HELD
    assert watch.feed("z") == Found(1, 1 - MAX_HELD, 1, "a.*z")


def test_what_cannot_begin_a_match_is_not_held_back() -> None:
    watch = RegexWatch(("and|or",))
    watch.feed("the end of an")
    assert watch.held == 2
    watch.feed("t")
    assert watch.held == 0


def test_a_text_made_to_backtrack_costs_no_more_than_another() -> None:
    assert RegexWatch(("(a+)+$b|(a*)*c|(a|aa)+d",)).feed("a" * 20000) is None


def test_answers_with_the_same_patterns_share_an_automaton() -> None:
    assert automaton_of(("and|or",)) is automaton_of(("and|or",))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?=a)b", "look-ahead"),
        ("(?!a)b", "look-ahead"),
        ("(?<=a)b", "look-behind"),
        ("(?<!a)b", "look-behind"),
        (r"(a)\1", "references"),
        (r"(?P<x>a)(?P=x)", "reference"),
        (r"(a)?(?(1)b|c)", "condition"),
        ("a(?#x)", "comment"),
        ("(?m)a$", "flags"),
        ("(?i:a)", "flags"),
        ("(a", "unterminated"),
        ("[a", "unterminated"),
        ("*a", "nothing to repeat"),
        ("a*", "empty"),
        ("", "empty"),
        (r"\b", "empty"),
        ("x" * 257, "256 characters"),
        ("((a{99}){99}){99}", "too large"),
        ("((()" + "{999}" + "){999}){999}a", "too large"),
        ("(" * 40 + "a" + ")" * 40, "groups"),
    ],
)
def test_what_an_automaton_cannot_do_is_refused_by_name(pattern: str, why: str) -> None:
    with pytest.raises(RequestRefused, match=why) as refusal:
        stop_patterns(pattern)
    assert refusal.value.param == "stop_regex"


def test_more_patterns_than_are_allowed_are_refused() -> None:
    with pytest.raises(RequestRefused, match="33 patterns"):
        stop_patterns(["a"] * 33)


@pytest.mark.parametrize("pattern", ["a{4000000000}", "a{0,4000000000}", "(?:b|){4000000000}c"])
def test_a_count_that_no_memory_holds_is_refused(pattern: str) -> None:
    with pytest.raises(RequestRefused, match="stop_regex"):
        stop_patterns(pattern)
