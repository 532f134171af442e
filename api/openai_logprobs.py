"""Log-probabilities as OpenAI's two routes show them: of an answer's tokens, and of those of the
prompt that it echoes. One `Scores` for each answer; what a whole shows is what its stream's chunks
show, put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from api.answers import Answer, Piece, Whole
from api.replies import written
from backend.interface import Finish, TokenLogprob
from backend.tokenizer import Tokenizer
from engine.text import TextStream

LEAST = -9999.0  # what OpenAI says of a token that cannot be drawn: JSON has no infinity

Row: TypeAlias = tuple[int, TokenLogprob | None]  # a token; None: there is nothing ahead of it


@dataclass(frozen=True, slots=True)
class Spelling:
    """What tokens are called."""

    tokenizer: Tokenizer
    by_id: bool = False  # "token_id:17": no two tokens are called the same

    def text(self, token: int) -> str:
        """Its text; what is no whole character is U+FFFD."""
        if self.by_id:
            return f"token_id:{token}"
        return self.tokenizer.table[token].decode(errors="replace")

    def key(self, token: int) -> str:
        """A name in an object of names: what is no whole character is spelled byte by byte."""
        if self.by_id:
            return f"token_id:{token}"
        data = self.tokenizer.table[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + data.decode("ascii", "backslashreplace")


class Offsets:
    """Where each token begins in the text of an answer, in characters. A token that completes a
    character begins where that character does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, echoed: int) -> None:
        """`echoed`: tokens of the prompt that stand before the answer's own."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._echoed = echoed
        self._at = 0
        self._text = self._open()

    def _open(self) -> TextStream:
        return TextStream(self._tokenizer, skip_special_tokens=self._skip)

    def next(self, token: int) -> int:
        """Where the next token begins."""
        if self._echoed and self._text.tokens == self._echoed:
            self._at += len(self._text.feed((), Finish("length")).text)
            self._text, self._echoed = self._open(), 0
        start = self._at
        self._at += len(self._text.feed((token,)).text)
        return start


class Shape(Protocol):
    """How one route shows the log-probabilities of one answer."""

    beside: ClassVar[Mapping[str, Any]]  # what stands beside the lists

    def lists(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """The next tokens, in order. What the next call returns goes behind it, list by list."""


class ChatShape:
    """An object for each token."""

    beside: ClassVar[Mapping[str, Any]] = {"refusal": None}

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._names: dict[int, tuple[str, list[int]]] = {}  # the same few come again and again

    def lists(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        return {"content": [self._content(score) for _, score in rows if score is not None]}

    def _content(self, score: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(*pair) for pair in score.top]
        return {**self._entry(score.token, score.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        named = self._names.get(token)
        if named is None:
            data = self._spelling.tokenizer.table[token]
            named = self._names[token] = self._spelling.text(token), list(data)
        return {"token": named[0], "logprob": max(logprob, LEAST), "bytes": named[1]}


class CompletionShape:
    """Four lists side by side."""

    beside: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, spelling: Spelling, offsets: Offsets) -> None:
        self._spelling = spelling
        self._offsets = offsets

    def lists(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        scores = [score for _, score in rows]
        return {
            "tokens": [self._spelling.key(token) for token, _ in rows],
            "token_logprobs": [
                None if each is None else max(each.logprob, LEAST) for each in scores
            ],
            "top_logprobs": [None if each is None else self._top(each) for each in scores],
            "text_offset": [self._offsets.next(token) for token, _ in rows],
        }

    def _top(self, score: TokenLogprob) -> dict[str, float]:
        """The most probable tokens, and the token itself. Of two with one text the first counts."""
        top: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            top.setdefault(self._spelling.key(token), max(logprob, LEAST))
        return top


class Scores:
    """The log-probabilities of one answer, piece by piece or all at once."""

    def __init__(self, shape: Shape, answer: Answer) -> None:
        submission = answer.live.submission
        self._shape = shape
        self._first: int | None = None  # of an echoed prompt, until it is shown
        if submission.wants.prompt_logprobs_from is not None:
            self._first = submission.prompt[0]

    def _rows(self, news: Piece | Whole) -> list[Row]:
        rows: list[Row] = [] if self._first is None else [(self._first, None)]
        self._first = None
        rows += [(each.token, each) for each in news.prompt_logprobs]
        rows += [(each.token, each) for each in news.logprobs]
        return rows

    def of(self, piece: Piece) -> dict[str, Any] | None:
        """Those that a piece brings, if any."""
        rows = self._rows(piece)
        return {**self._shape.lists(rows), **self._shape.beside} if rows else None

    async def whole(self, whole: Whole) -> dict[str, Any]:
        """All of them."""
        return {**await written(self._rows(whole), self._shape.lists), **self._shape.beside}
