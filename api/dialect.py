"""How one model writes calls of tools and thoughts: by its chat template, or as a flag says.

Known once for each model. It makes the readers of answers, and the grammars that answers are bound
by where thoughts or calls have a part in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from api.errors import refused
from api.lark import CannotBind, Lark
from api.reasoning import BEGIN, END, TAIL, Thoughts, thoughts_after
from api.tool_calls import Schema, ToolFormat
from api.tool_formats import FORMATS, format_of
from api.tool_prompt import Message, in_words
from backend.interface import Grammar, RequestRefused
from backend.json_schema import read_schema
from backend.tokenizer import Tokenizer
from config import DialectSettings

MAX_SCHEMA = 1 << 18  # bytes of a tool's parameters, where an answer is bound to them


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an answer must be."""

    calls: Mapping[str, Schema] = field(default_factory=dict)  # of these tools, if any
    may_speak: bool = False  # words before calls, or no call at all
    several: bool = True  # calls
    grammar: Grammar | None = None  # or this


@dataclass(frozen=True, slots=True)
class Dialect:
    """Of one model."""

    tokenizer: Tokenizer
    format: ToolFormat | None  # None: calls are not read
    thinks: bool
    knows_tools: bool  # its template does

    @staticmethod
    def of(tokenizer: Tokenizer, settings: DialectSettings) -> Dialect:
        """What the flags say, and where they leave it open, the template."""
        template = tokenizer.template_text
        name = format_of(template) if settings.tool_parser == "auto" else settings.tool_parser
        reasons = settings.reasoning_parser
        return Dialect(
            tokenizer,
            None if name == "none" else FORMATS[name],
            END in template if reasons == "auto" else reasons == "think",
            re.search(r"\btools\b", template) is not None,
        )

    def worded(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools as the template can show them."""
        return (messages, tools) if self.knows_tools else (in_words(messages, tools), None)

    def thoughts(self, prompt: Sequence[int]) -> Thoughts:
        """What an answer to `prompt` begins with."""
        if not self.thinks:
            return "none"
        table = self.tokenizer.table
        tail = b"".join(table[token] for token in prompt[-TAIL:])
        return thoughts_after(tail.decode(errors="replace"))

    def token_of(self, mark: str) -> int | None:
        """The id of the one token that a mark is."""
        ids = self.tokenizer.encode(mark, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def has_token(self, mark: str) -> bool:
        """Whether a mark is one token."""
        return self.token_of(mark) is not None

    def shows(self, marks: Sequence[str]) -> bool:
        """Whether these marks are seen in a text without special tokens."""
        return self.tokenizer.special_ids.isdisjoint(map(self.token_of, marks))

    def grammar(self, bounds: Bounds, thoughts: Thoughts) -> Grammar | None:
        """What an answer is bound by. Raises ApiError 400 for what cannot be bound."""
        _check(bounds.calls)
        if not bounds.calls and (bounds.grammar is None or thoughts == "none"):
            return bounds.grammar
        lark = Lark(self.token_of, self.tokenizer.special_ids)
        try:
            answer = self._answer(lark, bounds)
        except CannotBind as error:
            field = "tools" if bounds.grammar is None else "response_format"
            raise refused(f"{field}: {error}", field) from None
        if thoughts == "none":
            return lark.grammar(answer)
        line = lark.rule(r"/\s{0,4}/")
        after = f"{lark.until(END)} {line}"
        before = after if thoughts == "open" else f"({lark.mark(BEGIN)} {after})?"
        return lark.grammar(f"{before} {answer}")

    def _answer(self, lark: Lark, bounds: Bounds) -> str:
        """What comes after the thoughts. Raises CannotBind."""
        alternatives = [] if bounds.grammar is None else [lark.bound(bounds.grammar)]
        if bounds.calls:
            assert self.format is not None
            calls = self.format.write(lark, bounds.calls)
            one = lark.either(calls.calls)
            more = f"({calls.between} {one})*" if bounds.several else ""
            alternatives.append(f"{calls.before} {one} {more} {calls.after}")
        answer = lark.either(alternatives)
        if not bounds.may_speak:
            return answer
        assert self.format is not None
        return f"{lark.free(self.format.marks[0])} {answer}?"


def _check(tools: Mapping[str, Schema]) -> None:
    """Raise ApiError 400 for parameters that no answer can be bound to."""
    for name, schema in tools.items():
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise refused(f"tools: parameters of {name!r} exceed {MAX_SCHEMA:,} bytes", "tools")
        try:
            read_schema(text)
        except RequestRefused as error:
            raise refused(f"tools: parameters of {name!r}: {error}", "tools") from None
