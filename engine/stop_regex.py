"""Patterns that end an answer, searched for as its text grows. Used by the text stream.

An answer ends at the first character with which `re.search` would find one of them in the text so
far, so `$` is where that text ends. All of them run at once, one state of an automaton beside the
other, each with the place where its match began: a character costs no more than the patterns have
states, whatever the text is, and the steps that were taken before are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from backend.interface import RequestRefused
from engine.regex_syntax import Parser, State, is_word

MAX_PATTERNS = 32
MAX_HELD = 1024  # characters: of a longer match the beginning has left already
MAX_REMEMBERED = 1 << 16  # states in the steps that one automaton remembers

Row: TypeAlias = tuple[int, ...]  # states, those whose match began first at the front


class Found(NamedTuple):
    """What ends a text. Places are counted from the beginning of the news, and so may be negative.
    The least of several counts.
    """

    seen: int  # characters that had to be read
    start: int
    end: int
    matched: str


class Step(NamedTuple):
    """What a character does to a row. Sources are places in the row, one beyond it the new match
    that begins with the character.
    """

    row: Row
    sources: tuple[int, ...]  # parallel to `row`
    before: tuple[int, int] | None  # source and pattern of a match complete before the character
    after: tuple[int, int] | None  # with the character


def stop_patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The patterns of a request in any of the forms that clients use.

    Raises RequestRefused naming `stop_regex`.
    """
    patterns = (given,) if isinstance(given, str) else tuple(given or ())
    if len(patterns) > MAX_PATTERNS:
        raise RequestRefused(
            f"stop_regex has {len(patterns)} patterns, {MAX_PATTERNS} are allowed", "stop_regex"
        )
    automaton_of(patterns)
    return patterns


class Automaton:
    """All patterns of a request as one automaton. Knows no text."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """Raises RequestRefused."""
        self.patterns = patterns
        self._states: list[State] = []
        self._steps: dict[tuple[Row, str, str], Step] = {}
        self._remembered = 0  # states in them
        firsts = []
        for number, pattern in enumerate(patterns):
            self._states.append(State(pattern=number))
            firsts.append(Parser(pattern, self._states).add(len(self._states) - 1))
        self._states.append(State(tuple(firsts)))
        self._first = len(self._states) - 1
        self._refuse_the_empty()

    def _refuse_the_empty(self) -> None:
        """Raise RequestRefused for a pattern that no character is needed for."""
        reached, todo = set(), [self._first]
        while todo:
            id = todo.pop()
            state = self._states[id]
            if state.pattern is not None:
                raise RequestRefused(
                    f"stop_regex {self.patterns[state.pattern]!r:.80} matches the empty text",
                    "stop_regex",
                )
            if id not in reached and state.accepts is None:
                reached.add(id)
                todo += state.then

    def step(self, row: Row, before: str, character: str) -> Step:
        """What `character`, which follows `before`, does to `row`."""
        # of the character before, conditions ask no more than this
        kind = before and ("a" if is_word(before) else "-")
        key = (row, kind, character)
        found = self._steps.get(key)
        if found is None:
            found = self._step(row, kind, character)
            self._remember(key, found)
        return found

    def _remember(self, key: tuple[Row, str, str], step: Step) -> None:
        if self._remembered > MAX_REMEMBERED:
            self._steps.clear()
            self._remembered = 0
        self._steps[key] = step
        self._remembered += len(step.row) + 8  # what is around them takes as much as so many

    def _step(self, row: Row, before: str, character: str) -> Step:
        taking, complete = self._spread((*row, self._first), before, character)
        sources: dict[int, int] = {}
        for id, source in taking:
            state = self._states[id]
            if state.accepts is not None and state.accepts(character):
                sources.setdefault(state.then[0], source)
        ages = tuple(sources.values())
        ends = [(ages[place], it) for place, it in self._spread(tuple(sources), character, "")[1]]
        return Step(tuple(sources), ages, min(complete, default=None), min(ends, default=None))

    def _spread(
        self, row: Row, before: str, after: str
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The states that would take a character now, each with its source, oldest first; and for
        each pattern that is complete here its source and its number.
        """
        seen: set[int] = set()
        taking: list[tuple[int, int]] = []
        complete: list[tuple[int, int]] = []
        for source, first in enumerate(row):
            todo = [first]
            while todo:
                id = todo.pop()
                state = self._states[id]
                if id in seen or not (state.holds is None or state.holds(before, after)):
                    continue
                seen.add(id)
                if state.accepts is not None:
                    taking.append((id, source))
                    continue
                if state.pattern is not None:
                    complete.append((source, state.pattern))
                todo += state.then
        return taking, complete


@lru_cache(maxsize=64)
def automaton_of(patterns: tuple[str, ...]) -> Automaton:
    """Shared by the answers that ask for the same. Raises RequestRefused."""
    return Automaton(patterns)


class RegexWatch:
    """Watches one text for patterns. Owned by its stream."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """`patterns` as `stop_patterns` returns them."""
        self._automaton = automaton_of(patterns)
        self._row: Row = ()
        self._starts: list[int] = []  # parallel to the row
        self._before = ""
        self._read = 0  # characters

    @property
    def held(self) -> int:
        """How many of the last characters may be the beginning of a match."""
        return min(self._read - self._starts[0], MAX_HELD) if self._starts else 0

    def feed(self, fresh: str) -> Found | None:
        """Read on. What is found ends the text: nothing more is fed then."""
        begun = self._read
        for character in fresh:
            step = self._automaton.step(self._row, self._before, character)
            starts = [*self._starts, self._read]
            self._read += 1
            for complete, end in ((step.before, self._read - 1), (step.after, self._read)):
                if complete is not None:
                    source, pattern = complete
                    start = max(starts[source], self._read - MAX_HELD)
                    matched = self._automaton.patterns[pattern]
                    return Found(self._read - begun, start - begun, end - begun, matched)
            self._row, self._before = step.row, character
            self._starts = [starts[source] for source in step.sources]
        return None
