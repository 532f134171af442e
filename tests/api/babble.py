"""A made-up format of answers, for tests of surfaces: pseudo-words that hold thoughts and calls.

letters up to the first space      thoughts, if `thinks`
t letters a                        a call of "tell" with {"said": letters}
anything else                      words
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from api.answers import Piece
from api.hearing import Ear, Hearing
from api.speech import CallArguments, CallStart, Saying, Words
from backend.interface import Grammar


class BabbleReader:
    """Reads letter by letter, so it cannot matter how a text was cut."""

    def __init__(self, thinks: bool, calls: bool) -> None:
        self._thinks = thinks
        self._may_call = calls
        self._calls = 0
        self._calling = False

    def feed(self, text: str) -> Sequence[Saying]:
        return [said for letter in text for said in self._read(letter)]

    def end(self) -> Sequence[Saying]:
        return []

    def _read(self, letter: str) -> Sequence[Saying]:
        call = self._calls - 1
        if self._thinks:
            self._thinks = letter != " "
            return [Words(letter, thought=True)]
        if self._calling:
            self._calling = letter != "a"
            return [CallArguments(call, letter if self._calling else '"}')]
        if letter == "t" and self._may_call:
            self._calls += 1
            self._calling = True
            start = CallStart(self._calls - 1, f"call_{self._calls - 1}", "tell")
            return [start, CallArguments(self._calls - 1, '{"said": "')]
        return [Words(letter)]


class BabbleEar(Ear):
    """Counts the tokens of thoughts: in these tests a token is a letter."""

    def hear(self, piece: Piece) -> list[Saying]:
        said = super().hear(piece)
        self.reasoning_tokens += sum(isinstance(each, Words) and each.thought for each in said)
        return said


@dataclass(frozen=True)
class BabbleHearing:
    """Stands in for a `Hearing`."""

    thinks: bool = True
    calls: bool = True
    grammar: Grammar | None = None
    plain: bool = False
    skip_special_tokens: bool = True

    def open_ear(self) -> Ear:
        return BabbleEar(BabbleReader(self.thinks, self.calls))


def as_hearing(babble: BabbleHearing) -> Hearing:
    return cast(Hearing, babble)
