"""Tokens to text, and where the text ends. Used by whoever answers a request, streaming or not: the
whole answer is the fold of the stream.

    ids -> bytes -> characters (one may span tokens) -> held back while what ends the text may be
    beginning -> text for the client

Stop strings and patterns are defined on characters: the one that is complete first ends the answer
(of several complete at once the longest), wherever the borders of tokens and deltas fall.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from backend.interface import Finish, RequestRefused
from engine.stop_regex import Found, RegexWatch

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters


class Bytes(Protocol):
    """The half of a tokenizer that turns ids into text."""

    @property
    def table(self) -> Sequence[bytes]:
        """Bytes by token id."""

    @property
    def visible(self) -> Sequence[bytes]:
        """The same, special tokens empty."""

    @property
    def strips_leading_space(self) -> bool:
        """Whether a text loses the space that it begins with."""


@dataclass(slots=True)
class TextPiece:
    """News of one answer's text. The piece with a finish is the last; those after it are empty."""

    text: str = ""
    finish: Finish | None = None


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a request in any of the forms that clients use.

    Raises RequestRefused naming `stop`.
    """
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(found) > MAX_STOP_STRINGS:
        raise RequestRefused(
            f"stop has {len(found)} strings, {MAX_STOP_STRINGS} are allowed", "stop"
        )
    for string in found:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise RequestRefused(
                f"stop must hold strings of 1 to {MAX_STOP_LENGTH} characters, got {string!r:.80}",
                "stop",
            )
    return found


class Watch(Protocol):
    """Looks for what ends a text while it grows."""

    @property
    def held(self) -> int:
        """How many of the last characters may be the beginning of it."""

    def feed(self, fresh: str) -> Found | None:
        """Read on. Nothing more is fed once something was found."""


class StringWatch:
    """Watches one text for stop strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` as `stop_strings` returns it."""
        self._stop = stop
        self._first = {string[0] for string in stop}
        self._beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        self._longest = max(map(len, stop)) - 1  # of the beginnings
        self._begun = ""  # the longest end of the text so far that is one of the beginnings

    @property
    def held(self) -> int:
        return len(self._begun)

    def feed(self, fresh: str) -> Found | None:
        if not self._begun and self._first.isdisjoint(fresh):
            return None
        text, before = self._begun + fresh, len(self._begun)
        places = [(text.find(string), string) for string in self._stop]
        ends = [
            (at + len(string) - before, at - before, string) for at, string in places if at >= 0
        ]
        matches = [Found(end, start, end, string) for end, start, string in ends]
        if matches:
            return min(matches)
        kept = max(0, len(text) - self._longest)
        while kept < len(text) and text[kept:] not in self._beginnings:
            kept += 1
        self._begun = text[kept:]
        return None


class TextStream:
    """The text of one answer, delta by delta. Owned by its request's handler.

    The first of stop string, pattern and engine finish ends it: later deltas are dropped and not
    counted, and when `finish` came from the text it is the caller who cancels.
    """

    def __init__(
        self,
        tokenizer: Bytes,
        stop: Sequence[str] = (),
        stop_regex: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ) -> None:
        """`stop` as `stop_strings` returns it, `stop_regex` as `stop_patterns` does. `keep_stop`:
        what ended the answer, be it a token, has its text in it.
        """
        self.tokens = 0  # of the answer: up to and including the one that ended it
        self.finish: Finish | None = None
        self._bytes = tokenizer.visible if skip_special_tokens else tokenizer.table
        self._at_start = tokenizer.strips_leading_space
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._keep_stop = keep_stop
        self._watches: list[Watch] = []
        if stop:
            self._watches.append(StringWatch(stop))
        if stop_regex:
            self._watches.append(RegexWatch(stop_regex))
        self._held = ""  # the end of the text so far that may not leave yet

    def feed(self, tokens: Sequence[int], finish: Finish | None = None) -> TextPiece:
        """The text that `tokens` add. A stop token comes last, in the delta of its finish."""
        if self.finish is not None:
            return TextPiece()
        shown = tokens
        if finish is not None and self._drops_last(tokens, finish):
            shown = tokens[:-1]
        if self._watches:
            text = self._search(shown)
        else:
            text = self._text(b"".join([self._bytes[token] for token in shown]))
        if self.finish is None:
            self.tokens += len(tokens)
            if finish is not None:
                text += self._end(finish)
        return TextPiece(text, self.finish)

    def _drops_last(self, tokens: Sequence[int], finish: Finish) -> bool:
        """Whether the last of `tokens` is the stop token, and its text is not wanted."""
        stopped = bool(tokens) and finish.reason == "stop" and finish.matched == tokens[-1]
        return stopped and not self._keep_stop

    def _text(self, data: bytes) -> str:
        """The characters that `data` completes."""
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decode(data)

    def _search(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` up to what ends it, token by token: the one that completes that is
        the last to be counted.
        """
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self._release(self._text(self._bytes[token]))
            if self.finish is not None:
                self.tokens += count
                break
        return text

    def _release(self, fresh: str) -> str:
        """What may go to the client now that `fresh` was added. Sets `finish` at its end."""
        found = [each for watch in self._watches if (each := watch.feed(fresh)) is not None]
        text, before = self._held + fresh, len(self._held)
        if found:
            first = min(found)
            self.finish = Finish("stop", matched=first.matched)
            return text[: before + (first.end if self._keep_stop else first.start)]
        kept = len(text) - max((watch.held for watch in self._watches), default=0)
        self._held = text[kept:]
        return text[:kept]

    def _end(self, finish: Finish) -> str:
        """What was still waiting for more. Half a character becomes U+FFFD."""
        text = self._release(self._decode(b"", True))
        if self.finish is None:
            self.finish = finish
            text += self._held
        return text


def decode(tokenizer: Bytes, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of a whole answer: the fold of its stream."""
    stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
    return stream.feed(ids, Finish("length")).text
