"""How a conversation's answer is heard: what constrains it, and what its text says.

    fields of a surface -> Wish -> listen(...) -> Hearing -> one Ear for each answer

Surfaces (OpenAI's chat and responses, Anthropic's messages) say what they want as a `Wish` and
render what an `Ear` heard. They know no format of calls and no mark of thoughts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from api.answers import Piece
from api.bodies import in_words_of_the_client
from api.dialect import Bounds, Dialect
from api.errors import refused
from api.reasoning import MARKS, ThinkReader, ThoughtCounter, Thoughts
from api.service import Service
from api.speech import CallStart, PlainReader, Reader, Saying
from api.structured import check_grammar
from api.tool_calls import CallReader
from backend.interface import Grammar


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]  # a JSON schema
    strict: bool = False  # arguments must match it also where calling is the model's choice

    def for_template(self) -> dict[str, Any]:
        """As chat templates know tools: in the form of OpenAI's chat."""
        function = {
            "name": self.name,
            "description": self.description or "",
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Named:
    """The one tool that must be called."""

    name: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What a conversation asks of its answer."""

    tools: Sequence[Tool] = ()
    choice: Literal["auto", "none", "required"] | Named = "auto"
    parallel: bool = True  # more than one call in an answer
    grammar: Grammar | None = None  # that the answer must match, after its thoughts
    separate_reasoning: bool = True  # thoughts are told apart from the answer
    thinking: bool | None = None  # what the template is told; None: what it does by itself

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """The tools that the template shows, if any."""
        tools = () if self.choice == "none" else self.tools
        return [tool.for_template() for tool in tools] or None

    @property
    def template_kwargs(self) -> dict[str, bool]:
        """What the template is told of thinking, by the names that templates know."""
        if self.thinking is None:
            return {}
        return {"enable_thinking": self.thinking, "thinking": self.thinking}


@dataclass(slots=True)
class Ear:
    """Hears one answer, piece by piece. Streamed and whole answers are heard alike."""

    reader: Reader
    counter: ThoughtCounter | None = None  # None: there are no thoughts
    calls: int = 0  # of tools so far
    reasoning_tokens: int = 0  # so far, the marks included

    def hear(self, piece: Piece) -> list[Saying]:
        """What a piece says. The one with a finish says all that was held back."""
        if self.counter is not None:
            self.reasoning_tokens = self.counter.count(piece.token_ids)
        said = list(self.reader.feed(piece.text))
        if piece.finish is not None:
            said += self.reader.end()
        self.calls += sum(isinstance(each, CallStart) for each in said)
        return said


def _plain_ear() -> Ear:
    return Ear(PlainReader())


@dataclass(frozen=True, slots=True)
class Hearing:
    """How the answers to one prompt are generated and heard."""

    grammar: Grammar | None = None  # for `SamplingParams`
    plain: bool = True  # everything is words: `open_ear` need not be asked
    skip_special_tokens: bool = True  # False: marks are special tokens, and must be seen
    ears: Callable[[], Ear] = _plain_ear

    def open_ear(self) -> Ear:
        """For each answer one of its own."""
        return self.ears()


async def listen(service: Service, prompt: Sequence[int], wish: Wish) -> Hearing:
    """How to hear the answers to `prompt`, which was rendered with the tools of `wish`. A grammar
    other than that of `wish` has been compiled.

    Raises ApiError or RequestRefused for what this model cannot do.
    """
    dialect = service.model.dialect
    must_call = wish.choice == "required" or isinstance(wish.choice, Named)
    if must_call and dialect.format is None:
        raise refused("tool_choice must be auto or none where TOOL_PARSER is none", "tool_choice")
    thoughts = dialect.thoughts(prompt)
    format = dialect.format if wish.tools and wish.choice != "none" else None
    grammar = await _grammar(dialect, wish, thoughts)
    if format is None and thoughts == "none":
        return Hearing(grammar)
    tools = {tool.name: tool.parameters for tool in wish.tools}

    def open_ear() -> Ear:
        reader = PlainReader() if format is None else CallReader(format, tools)
        if thoughts == "none":
            return Ear(reader)
        counter = ThoughtCounter(dialect.tokenizer.table, thoughts)
        return Ear(ThinkReader(reader, thoughts, wish.separate_reasoning), counter)

    marks = [*(() if format is None else format.marks), *(() if thoughts == "none" else MARKS)]
    return Hearing(grammar, False, dialect.shows(marks), open_ear)


async def _grammar(dialect: Dialect, wish: Wish, thoughts: Thoughts) -> Grammar | None:
    """What an answer is bound by, compiled. Many tools make a long grammar: a thread writes it."""
    bounds = _bounds(dialect, wish)
    if bounds == Bounds():
        return None
    with in_words_of_the_client({"grammar": "tools"}):
        grammar = await asyncio.to_thread(dialect.grammar, bounds, thoughts)
    if grammar is not wish.grammar:
        await check_grammar(grammar, "tools")
    return grammar


def _bounds(dialect: Dialect, wish: Wish) -> Bounds:
    """What an answer must be, and what it may be where that is bound too."""
    tools = {tool.name: tool.parameters for tool in wish.tools}
    if isinstance(wish.choice, Named):
        return Bounds({wish.choice.name: tools[wish.choice.name]}, several=False)
    if wish.choice == "required":
        return Bounds(tools, several=wish.parallel)
    if wish.choice == "none" or dialect.format is None or not tools:
        return Bounds(grammar=wish.grammar)
    if wish.grammar is not None:
        return Bounds(tools, several=wish.parallel, grammar=wish.grammar)
    strict = any(tool.strict for tool in wish.tools) or not wish.parallel
    if strict and not dialect.format.opening and dialect.has_token(dialect.format.marks[0]):
        return Bounds(tools, may_speak=True, several=wish.parallel)
    return Bounds()
