"""One answer, told as OpenAI's routes tell it: what its text says, and what stands beside it.

A `Teller` is made for each answer by the reply that it belongs to. What it tells of a whole answer
is what it tells piece by piece, put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from api.answers import Answer, Piece, Whole
from api.openai_logprobs import Scores
from api.receipts import receipt
from backend.interface import Finish

Part: TypeAlias = dict[str, Any]  # of a choice
Phrase: TypeAlias = Callable[[str], Part]  # what stands around a text; hashed by value


class Speech(Protocol):
    """What the text of one answer says, in the words of a route."""

    silence: ClassVar[Part]  # where tokens have no text yet

    @property
    def calls(self) -> int:
        """Of tools so far."""

    @property
    def reasoning_tokens(self) -> int:
        """So far."""

    def more(self, piece: Piece) -> Sequence[tuple[Phrase, str]]:
        """What a piece says: texts, and what stands around each."""

    def all(self, piece: Piece) -> Part:
        """What the answer says whose only piece this is."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a client wants to read besides the text of its answers."""

    token_ids: bool = False  # of prompt and answer
    receipt: bool = False
    usage: bool = False  # a stream: the counts in a last chunk
    continuous_usage: bool = False  # a stream: those of its answer in every chunk


@dataclass(slots=True)
class Teller:
    """Tells one answer."""

    answer: Answer
    speech: Speech
    scores: Scores | None  # None: no log-probabilities are wanted
    extras: Extras

    def said(self, piece: Piece) -> tuple[Sequence[tuple[Phrase, str]], Part]:
        """What a piece says, and what stands beside the first of it."""
        beside: Part = {}
        if self.scores is not None and (scores := self.scores.of(piece)) is not None:
            beside["logprobs"] = scores
        if self.extras.token_ids and piece.token_ids:
            beside["token_ids"] = piece.token_ids
        return self.speech.more(piece), beside

    async def whole(self, whole: Whole) -> Part:
        """A finished answer: all of its choice but its place."""
        part = self.speech.all(Piece(whole.text, whole.token_ids, whole.finish))
        part["logprobs"] = None if self.scores is None else await self.scores.whole(whole)
        if self.extras.token_ids:
            part["token_ids"] = whole.token_ids
        return part | self.end(whole.finish)

    def end(self, finish: Finish) -> Part:
        """How the answer ended."""
        called = finish.reason == "stop" and self.speech.calls > 0
        reason = "tool_calls" if called else finish.reason
        return {
            "finish_reason": reason,
            "matched_stop": finish.matched,
            **({"receipt": receipt(self.answer)} if self.extras.receipt else {}),
        }
