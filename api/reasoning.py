"""Thoughts before an answer: <think>...</think>, told apart from it and counted.

The prompt may have opened them already, or closed them (templates do, when a model shall not
think); else an answer opens them where it begins, or has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from api.speech import PlainReader, Reader, Saying
from api.tool_text import AnswerText, Marks, Waiting

BEGIN, END = MARKS = ("<think>", "</think>")
TAIL = 32  # tokens of a prompt that say whether thoughts are open

Thoughts = Literal["none", "possible", "open"]  # what an answer begins with


def thoughts_after(prompt: str) -> Thoughts:
    """What an answer may begin with, by the end of its prompt."""
    last = max(re.finditer(f"{BEGIN}|{END}", prompt), key=re.Match.start, default=None)
    if last is None or prompt[last.end() :].strip():
        return "possible"
    return "open" if last[0] == BEGIN else "none"


class ThinkReader:
    """Reads thoughts, and hands what comes after them to another reader."""

    def __init__(self, inner: Reader, thoughts: Thoughts, separate: bool = True) -> None:
        """`separate` False: thoughts and their marks are words like any other."""
        self.thought = thoughts == "open"  # there are thoughts, or there were
        self.thinking = True  # they go on, or it is not known yet whether there are any
        self._going = True  # the inner reader's part has not begun
        self._inner = inner
        self._separate = separate
        self._text = AnswerText()
        self._script = self._read()

    def feed(self, text: str) -> Sequence[Saying]:
        """What more text says."""
        if not self._going:
            return self._inner.feed(text)
        self._text.add(text)
        return self._run()

    def end(self) -> Sequence[Saying]:
        """What was held back."""
        self._text.end()
        return [*(self._run() if self._going else ()), *self._inner.end()]

    def _run(self) -> list[Saying]:
        next(self._script, None)
        said = self._text.take_said()
        return said if self._going else [*said, *self._inner.feed(self._text.take_rest())]

    def _read(self) -> Waiting[None]:
        text = self._text
        if not self.thought:
            yield from text.skip_space()
            self.thought = yield from text.follows(BEGIN)
            if not self.thought:
                text.read_anew()
        if self.thought:
            yield from self._read_thoughts()
        self.thinking = self._going = False

    def _read_thoughts(self) -> Waiting[None]:
        text = self._text
        if self._separate:
            yield from text.skip_space()
            text.settle()
        else:
            text.read_anew()
        yield from text.words_until(Marks((END,)), thought=self._separate)
        self.thinking = False
        if not self._separate:
            text.give_back()
            return
        text.settle()
        yield from text.skip_space()
        text.settle()


class ThoughtCounter:
    """How many tokens an answer's thoughts took, their marks included.

    Token by token, whatever the pieces were: bytes stand for characters, and the marks are ASCII.
    """

    def __init__(self, table: Sequence[bytes], thoughts: Thoughts) -> None:
        """`table`: what each token stands for, special ones too."""
        self._table = table
        self._reader = ThinkReader(PlainReader(), thoughts)
        self._tokens = 0

    def count(self, tokens: Sequence[int]) -> int:
        """The answer goes on with `tokens`: how many of all so far are of its thoughts."""
        for token in tokens:
            if not self._reader.thinking:
                break
            self._reader.feed(self._table[token].decode("latin-1"))
            self._tokens += 1
        return self._tokens if self._reader.thought else 0
