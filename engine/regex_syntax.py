"""Patterns of `stop_regex`, from their text to the states of an automaton (Thompson 1968).

The syntax is that of Python's `re`, less what an automaton cannot follow: look-around, references,
atomic groups and conditions are refused by name. What a single character may be is left to `re`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from backend.interface import RequestRefused

MAX_PATTERN_LENGTH = 256  # characters
MAX_STATES = 1024  # of all patterns of a request: each character visits every state at most once
MAX_DEPTH = 32  # of groups within groups

Build: TypeAlias = Callable[[int], int]  # adds states that lead to a state; returns their first

# What holds between two characters, "" standing for the ends of the text so far.
CONDITIONS: Mapping[str, Callable[[str, str], bool]] = {
    "^": lambda before, after: not before,
    "$": lambda before, after: not after,
    r"\A": lambda before, after: not before,
    r"\Z": lambda before, after: not after,
    r"\b": lambda before, after: is_word(before) != is_word(after),
    r"\B": lambda before, after: is_word(before) == is_word(after),
}
REFUSED_GROUPS: Mapping[str, str] = {
    "(?=": "look-ahead",
    "(?!": "look-ahead",
    "(?<=": "look-behind",
    "(?<!": "look-behind",
    "(?P=": "a reference to a group",
    "(?>": "an atomic group",
    "(?(": "a condition",
    "(?#": "a comment",
}
GROUP = re.compile(r"\((?:\?:|\?P<\w+>)?(?!\?)")
FLAGS = re.compile(r"\(\?([is]+)\)")
QUANTIFIER = re.compile(r"([*+?])|\{(?!\})(\d*)(?:(,)(\d*))?\}")
RANGES = {"*": (0, None), "+": (1, None), "?": (0, 1)}
ESCAPE = re.compile(r"\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|N\{[^}]*\}|.)", re.DOTALL)
CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def is_word(character: str) -> bool:
    """Whether `re` takes it for a part of a word."""
    return character.isalnum() or character == "_"


@dataclass(slots=True)
class State:
    """A place in an automaton. Where `accepts` is given it takes a character to go on."""

    then: tuple[int, ...] = ()
    accepts: Callable[[str], object] | None = None
    holds: Callable[[str, str], bool] | None = None  # between the characters on both sides
    pattern: int | None = None  # this one is complete here


class Parser:
    """Adds the states of one pattern to those of the others. Used once."""

    def __init__(self, pattern: str, states: list[State]) -> None:
        self._text = pattern
        self._states = states
        self._at = 0
        self._depth = 0
        self._flags = 0

    def add(self, end: int) -> int:
        """The first state of the pattern; its last leads to `end`. Raises RequestRefused."""
        if len(self._text) > MAX_PATTERN_LENGTH:
            raise self._refused(f"it has more than {MAX_PATTERN_LENGTH} characters")
        if flags := FLAGS.match(self._text):
            self._at = flags.end()
            self._flags = sum({re.I if flag == "i" else re.S for flag in flags[1]})
        try:
            re.compile(self._text)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused(str(error)) from None
        return self._alternatives()(end)

    def _refused(self, why: str) -> RequestRefused:
        return RequestRefused(f"stop_regex {self._text!r:.80}: {why}", "stop_regex")

    def _state(self, state: State) -> int:
        if len(self._states) >= MAX_STATES:
            raise self._refused(f"it is too large: {MAX_STATES:,} states are allowed in all")
        self._states.append(state)
        return len(self._states) - 1

    def _alternatives(self) -> Build:
        """Up to the end of the group."""
        ways = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            ways.append(self._sequence())
        return lambda then: self._state(State(tuple(way(then) for way in ways)))

    def _sequence(self) -> Build:
        parts: list[Build] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return lambda then: _chain(parts, then)

    def _repeated(self, part: Build) -> Build:
        """The part with the quantifier that may follow it. The answer ends with the first match to
        be complete, so a lazy one does what a greedy one does.
        """
        found = QUANTIFIER.match(self._text, self._at)
        if found is None:
            return part
        self._at = found.end()
        if self._text.startswith("+", self._at):
            raise self._refused("possessive quantifiers are not supported")
        if self._text.startswith("?", self._at):
            self._at += 1
        least, most = _range(found)
        if max(least, most or 0) > MAX_STATES:  # it would be one state at least each time
            raise self._refused(f"{found[0]} is more than {MAX_STATES:,} times")
        return lambda then: self._repeat(part, least, most, then)

    def _repeat(self, part: Build, least: int, most: int | None, then: int) -> int:
        if most is None:
            first = self._state(State())
            self._states[first].then = (part(first), then)
        else:
            first = then
            for _ in range(most - least):
                first = self._state(State((part(first), then)))
        return _chain([part] * least, first)

    def _atom(self) -> Build:
        character = self._text[self._at]
        if character == "(":
            return self._group()
        if character in "^$":
            return self._condition(character)
        if character == "[":
            return self._taking(self._read(CLASS))
        if character == "\\":
            return self._escape(self._read(ESCAPE))
        self._at += 1
        return self._taking("." if character == "." else re.escape(character))

    def _read(self, form: re.Pattern[str]) -> str:
        found = form.match(self._text, self._at)
        if found is None:
            raise self._refused(f"{self._text[self._at :]!r:.20} is not understood")
        self._at = found.end()
        return found[0]

    def _group(self) -> Build:
        for opening, name in REFUSED_GROUPS.items():
            if self._text.startswith(opening, self._at):
                raise self._refused(f"{name} is not supported")
        if GROUP.match(self._text, self._at) is None:
            raise self._refused("of flags only (?i) and (?s) are supported, at the very beginning")
        self._read(GROUP)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(f"more than {MAX_DEPTH} groups lie within each other")
        inside = self._alternatives()
        self._depth -= 1
        self._at += 1
        return inside

    def _escape(self, source: str) -> Build:
        if source in CONDITIONS:
            self._at -= len(source)
            return self._condition(source)
        if source[1].isdecimal():
            raise self._refused(f"{source}: references and octal numbers are not supported")
        return self._taking(source)

    def _condition(self, name: str) -> Build:
        self._at += len(name)
        holds = CONDITIONS[name]
        return lambda then: self._state(State((then,), holds=holds))

    def _taking(self, source: str) -> Build:
        accepts = re.compile(source, self._flags).fullmatch
        return lambda then: self._state(State((then,), accepts=accepts))


def _chain(parts: Sequence[Build], then: int) -> int:
    for part in reversed(parts):
        then = part(then)
    return then


def _range(quantifier: re.Match[str]) -> tuple[int, int | None]:
    """How often at least and at most; None: without bound."""
    sign, least, comma, most = quantifier.groups()
    if sign:
        return RANGES[sign]
    low = int(least or 0)
    if not comma:
        return low, low
    return low, int(most) if most else None
