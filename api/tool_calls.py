"""What every format of calls shares: the value that describes one, and the reader that runs it.

A format says by which marks its calls begin, how they are read, and how they are written when one
is required. `api/tool_formats.py` has the table of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from api.lark import Lark
from api.speech import CallArguments, CallStart, Saying
from api.tool_text import AnswerText, Marks, NotACall, Waiting

Schema: TypeAlias = Mapping[str, Any]


def new_call_id() -> str:
    """As OpenAI's clients expect it."""
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """The calls of one answer, for the scripts that read them."""

    def __init__(
        self, text: AnswerText, tools: Mapping[str, Schema], new_id: Callable[[], str]
    ) -> None:
        self.text = text
        self.tools = tools  # parameters, by name
        self._new_id = new_id
        self._last = -1

    def begin(self, name: str, id: str | None = None) -> None:
        """A call of `name`. Raises NotACall when there is no such tool."""
        if name not in self.tools:
            raise NotACall
        self._last += 1
        self.text.say(CallStart(self._last, id or self._new_id(), name))

    def piece(self, json: str) -> CallArguments:
        """A piece of the arguments of the call that was begun last."""
        return CallArguments(self._last, json)

    def arguments(self, json: str) -> None:
        """Say a piece of the arguments."""
        self.text.say(self.piece(json))


# After a begin mark ("": an answer that starts with `opening`): reads the calls that it begins.
Script: TypeAlias = Callable[[Calls, str], Waiting[None]]


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """How required calls are written: `before` calls, `between` two of them, `after`."""

    before: str
    between: str
    after: str
    calls: Sequence[str]  # one for each tool


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way in which models write calls."""

    hints: Sequence[str]  # in a chat template: its model writes calls so
    marks: Sequence[str]  # that begin calls, anywhere in an answer
    read: Script
    write: Callable[[Lark, Mapping[str, Schema]], CallGrammar]  # raises CannotBind
    opening: str = ""  # a character that begins calls where an answer begins
    new_id: Callable[[], str] = new_call_id


class CallReader:
    """Reads one answer in a format."""

    def __init__(self, format: ToolFormat, tools: Mapping[str, Schema]) -> None:
        self._format = format
        self._text = AnswerText()
        self._calls = Calls(self._text, tools, format.new_id)
        self._script = self._read()

    def feed(self, text: str) -> Sequence[Saying]:
        """What more text says."""
        self._text.add(text)
        next(self._script, None)
        return self._text.take_said()

    def end(self) -> Sequence[Saying]:
        """What was held back."""
        self._text.end()
        next(self._script, None)
        return self._text.take_said()

    def _read(self) -> Waiting[None]:
        text, opening, called = self._text, self._format.opening, False
        marks = Marks(self._format.marks)
        if opening and (yield from text.skip_space()) == opening:
            called = yield from self._attempt("")
        else:
            text.read_anew()
        while True:
            if called:
                yield from text.skip_space()
                text.settle()
            mark = yield from text.words_until(marks)
            if not mark:
                return
            called = yield from self._attempt(mark)

    def _attempt(self, mark: str) -> Waiting[bool]:
        """Whether what begins here are calls to the end; what is none is given back."""
        try:
            yield from self._format.read(self._calls, mark)
        except NotACall:
            self._text.give_back()
            return False
        self._text.settle()
        return True
