"""How a conversation's answer is heard: what constrains it, and what its text says.

    fields of a surface -> Wish -> listen(...) -> Hearing -> one Ear for each answer

Surfaces (OpenAI's chat and responses, Anthropic's messages) say what they want as a `Wish` and
render what an `Ear` heard. They know no format of calls and no mark of thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from api.answers import Piece
from api.service import Service
from api.speech import CallStart, PlainReader, Reader, Saying
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


@dataclass(slots=True)
class Ear:
    """Hears one answer, piece by piece. Streamed and whole answers are heard alike."""

    reader: Reader
    calls: int = 0  # of tools so far
    reasoning_tokens: int = 0  # so far

    def hear(self, piece: Piece) -> list[Saying]:
        """What a piece says. The one with a finish says all that was held back."""
        said = list(self.reader.feed(piece.text))
        if piece.finish is not None:
            said += self.reader.end()
        self.calls += sum(isinstance(each, CallStart) for each in said)
        return said


@dataclass(frozen=True, slots=True)
class Hearing:
    """How the answers to one prompt are generated and heard."""

    grammar: Grammar | None = None  # for `SamplingParams`
    plain: bool = True  # everything is words: `open_ear` need not be asked
    skip_special_tokens: bool = True  # False: marks are special tokens, and must be seen
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def open_ear(self) -> Ear:
        """For each answer one of its own."""
        return Ear(PlainReader())


def listen(service: Service, prompt: Sequence[int], wish: Wish) -> Hearing:
    """How to hear the answers to `prompt`, which was rendered with the tools of `wish`.

    Raises ApiError or RequestRefused for what this model cannot do.
    """
    return Hearing(grammar=wish.grammar)
