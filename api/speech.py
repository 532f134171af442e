"""What the text of an answer says: words, thoughts, and calls of tools.

A reader takes the text of one answer piece by piece, however it was cut, and says what it means in
order. Streamed and whole answers go through the same reader: the whole is the fold of what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Words:
    """Text for the reader of the answer; `thought`: of the model's reasoning before it."""

    text: str
    thought: bool = False


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called. Its arguments follow, piece by piece."""

    index: int  # of the call in this answer
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments: together they are a JSON object."""

    index: int
    json: str


Saying: TypeAlias = Words | CallStart | CallArguments


class Reader(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> Sequence[Saying]:
        """What more text says. May hold text back that could be the beginning of a mark."""

    def end(self) -> Sequence[Saying]:
        """What was held back, when no more text comes. Called once."""


OpenReader: TypeAlias = Callable[[], Reader]  # for each answer one of its own


class PlainReader:
    """Everything is words."""

    def feed(self, text: str) -> Sequence[Saying]:
        return [Words(text)] if text else []

    def end(self) -> Sequence[Saying]:
        return []
