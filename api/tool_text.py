"""The text of one answer, read from its front by generators that wait for more.

A reader of a format is a generator: it asks for characters, pauses when there are none, and says
what it understood. So it is written as if the whole text were there, and where the stream was cut
cannot matter. What was read and not yet said is given back when it turns out to be no call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from api.speech import Saying, Words

T = TypeVar("T")
Waiting: TypeAlias = Generator[None, None, T]  # pauses for more text, then returns a T

SPACE = re.compile(r"\s*")


class NotACall(Exception):
    """What follows a mark is no call after all."""


class AnswerText:
    """Owned by one reader.

    said already | read: text[:at] | to be read
                 ^ a failure gives back from here on
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark = 0  # the length of the mark that `text` begins with, space before it included
        self._ended = False
        self._said: list[Saying] = []
        self._speak: Callable[[str], Saying] | None = None  # says what is read, as it is read

    def add(self, text: str) -> None:
        """More of the answer."""
        self._text += text

    def end(self) -> None:
        """No more comes."""
        self._ended = True

    def take_said(self) -> list[Saying]:
        """What was said since the last time."""
        said, self._said = self._said, []
        return said

    def take_rest(self) -> str:
        """What was not read, for another reader."""
        rest, self._text, self._at = self._text[self._at :], "", 0
        return rest

    def say(self, saying: Saying) -> None:
        """What the text that was read means."""
        self._said.append(saying)
        self.settle()

    def settle(self) -> None:
        """What was read is not given back any more."""
        self._text, self._at, self._mark = self._text[self._at :], 0, 0

    def read_anew(self) -> None:
        """Go back to what was said last."""
        self._at = 0

    def give_back(self) -> None:
        """Go back, and say that the mark, if nothing was said since, is words."""
        self._at = self._mark
        if self._at:
            self.say(Words(self._text[: self._at]))

    @contextmanager
    def spoken(self, speak: Callable[[str], Saying]) -> Iterator[None]:
        """Everything read in here is said at once, as `speak` puts it."""
        self._speak = speak
        try:
            yield
        finally:
            self._flush()
            self._speak = None

    def _flush(self) -> None:
        if self._speak is not None and self._at:
            self.say(self._speak(self._text[: self._at]))

    def peek(self) -> Waiting[str]:
        """The next character; "" when the answer has ended."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            self._flush()
            yield
        return self._text[self._at]

    def advance(self) -> None:
        """Read the character that `peek` saw."""
        self._at += 1

    def run(self, characters: re.Pattern[str]) -> Waiting[str]:
        """The longest run of `characters`, which is a class with a star."""
        found = ""
        while True:
            match = characters.match(self._text, self._at)
            assert match is not None
            found += match[0]
            self._at = match.end()
            if self._at < len(self._text) or not (yield from self.peek()):
                return found

    def read(self, scan: Callable[[AnswerText], Waiting[None]]) -> Waiting[str]:
        """What `scan` reads."""
        start = self._at
        yield from scan(self)
        return self._text[start : self._at]

    def skip_space(self) -> Waiting[str]:
        """The character after it, not yet read; "" when the answer has ended."""
        yield from self.run(SPACE)
        return (yield from self.peek())

    def expect(self, wanted: str) -> Waiting[None]:
        """Read `wanted`. Raises NotACall when something else is there."""
        for character in wanted:
            if (yield from self.peek()) != character:
                raise NotACall
            self.advance()

    def follows(self, wanted: str) -> Waiting[bool]:
        """Whether `wanted` is next; then it is read, else nothing is."""
        while len(self._text) - self._at < len(wanted):
            if self._ended or not wanted.startswith(self._text[self._at :]):
                return False
            yield
        found = self._text.startswith(wanted, self._at)
        self._at += len(wanted) if found else 0
        return found

    def close(self, mark: str) -> Waiting[None]:
        """Read the mark that ends a call, space before it included; of an answer that was cut off
        in it what there is. Where something else follows, nothing is read.
        """
        yield from self.skip_space()
        found = yield from self.follows(mark)
        if not found and self._ended and mark.startswith(self._text[self._at :]):
            self._at = len(self._text)

    def until(self, end: str) -> Waiting[str]:
        """The text before `end`; both are read. Raises NotACall when it does not come."""
        searched = self._at
        while (place := self._text.find(end, searched)) < 0:
            if self._ended:
                raise NotACall
            searched = max(self._at, len(self._text) - len(end) + 1)
            yield
        found = self._text[self._at : place]
        self._at = place + len(end)
        return found

    def words_until(self, marks: Marks, *, thought: bool = False) -> Waiting[str]:
        """Say words until a mark comes, and read it; "" when the answer has ended.

        Space before a mark belongs to it: it is held back until what follows is known.
        """
        while (found := marks.search(self._text)) is None:
            keep = len(self._text) if self._ended else marks.certain(self._text)
            self._words(keep, thought)
            if self._ended:
                return ""
            yield
        self._words(len(self._text[: found.start()].rstrip()), thought)
        found = marks.search(self._text)
        assert found is not None
        self._at = self._mark = found.end()
        return found[0]

    def _words(self, length: int, thought: bool) -> None:
        if length:
            self._at = length
            self.say(Words(self._text[:length], thought))


class Marks:
    """Texts that begin something."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._beginnings = {mark[:length] for mark in marks for length in range(1, len(mark))}
        self._longest = max(map(len, marks), default=1) - 1  # of the beginnings
        self.search = re.compile("|".join(map(re.escape, marks)) or r"(?!)").search

    def certain(self, text: str) -> int:
        """How much of `text`, which holds no mark, is words whatever comes: the rest is space and
        what may be the beginning of a mark.
        """
        if not self._beginnings:
            return len(text)
        place = max(0, len(text) - self._longest)
        while place < len(text) and text[place:] not in self._beginnings:
            place += 1
        return len(text[:place].rstrip())
