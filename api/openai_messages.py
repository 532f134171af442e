"""What a chat's answer says, as OpenAI's clients read it: words, thoughts and calls of tools, as
one message or as deltas. Thoughts stand under both names that clients look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from api.answers import Piece
from api.hearing import Ear
from api.openai_choices import Part, Phrase
from api.speech import CallArguments, CallStart, Saying, Words


def words(text: str) -> Part:
    """A piece of the answer."""
    return {"delta": {"content": text}}


def thoughts(text: str) -> Part:
    """A piece of the reasoning before it."""
    return {"delta": {"reasoning_content": text, "reasoning": text}}


@dataclass(frozen=True, slots=True)
class Call:
    """The beginning of a call."""

    start: CallStart

    def __call__(self, text: str) -> Part:
        function = {"name": self.start.name, "arguments": text}
        call = {"index": self.start.index, "id": self.start.id, "type": "function"}
        return {"delta": {"tool_calls": [{**call, "function": function}]}}


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments."""

    index: int

    def __call__(self, text: str) -> Part:
        return {"delta": {"tool_calls": [{"index": self.index, "function": {"arguments": text}}]}}


PHRASES: Mapping[type[Saying], Callable[[Any], tuple[Phrase, str]]] = {
    Words: lambda said: (thoughts if said.thought else words, said.text),
    CallStart: lambda said: (Call(said), ""),
    CallArguments: lambda said: (Arguments(said.index), said.json),
}


@dataclass(slots=True)
class ChatSpeech:
    """What one answer says."""

    silence: ClassVar[Part] = {"delta": {}}

    ear: Ear
    streams_thoughts: bool = True  # False: all of them at once
    _held: list[str] = field(default_factory=list)  # thoughts

    @property
    def calls(self) -> int:
        return self.ear.calls

    @property
    def reasoning_tokens(self) -> int:
        return self.ear.reasoning_tokens

    def more(self, piece: Piece) -> Sequence[tuple[Phrase, str]]:
        said = self.ear.hear(piece)
        if not self.streams_thoughts:
            said = self._held_back(said, piece.finish is not None)
        return [PHRASES[type(each)](each) for each in said]

    def _held_back(self, said: Sequence[Saying], ends: bool) -> list[Saying]:
        """What is left of `said` when thoughts wait until something else comes, or the end."""
        told: list[Saying] = []
        for each in said:
            if isinstance(each, Words) and each.thought:
                self._held.append(each.text)
            else:
                told += [*self._release(), each]
        return [*told, *self._release()] if ends else told

    def _release(self) -> list[Saying]:
        held, self._held = "".join(self._held), []
        return [Words(held, thought=True)] if held else []

    def all(self, piece: Piece) -> Part:
        return {"message": message(self.ear.hear(piece))}


def message(said: Sequence[Saying]) -> dict[str, Any]:
    """A whole turn of the assistant. Its content is null where it only calls."""
    texts = [each for each in said if isinstance(each, Words)]
    content = "".join(each.text for each in texts if not each.thought)
    thought = "".join(each.text for each in texts if each.thought)
    calls = _calls(said)
    return {
        "role": "assistant",
        "content": content or (None if calls else ""),
        "refusal": None,
        **({"reasoning_content": thought, "reasoning": thought} if thought else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _calls(said: Sequence[Saying]) -> list[dict[str, Any]]:
    arguments: dict[int, list[str]] = {}
    for each in said:
        if isinstance(each, CallArguments):
            arguments.setdefault(each.index, []).append(each.json)
    return [
        {
            "id": each.id,
            "type": "function",
            "function": {"name": each.name, "arguments": "".join(arguments.get(each.index, ()))},
        }
        for each in said
        if isinstance(each, CallStart)
    ]
