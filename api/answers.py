"""The answers of one HTTP request, from tokens to text. Streamed or whole: the whole is the fold.

Owned by the handler. The pool fills each answer's `LiveRequest`; here it becomes pieces of text as
soon as the handler asks. Between two questions tokens gather and then leave together, so a late
event loop makes larger frames, not a longer queue.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from backend.interface import (
    NOTHING_MORE,
    BackendFailed,
    Finish,
    SamplingParams,
    Submission,
    TokenLogprob,
    Wants,
    settled_seed,
    with_default_length,
)
from backend.tokenizer import Tokenizer
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool
from engine.text import TextStream

SCORES_OF_A_PIECE = 256  # log-probabilities of a prompt: to write them takes about 5 ms
ABANDONED = Finish("abort", message="the client has gone")


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and what its `n` answers shall be. Answer i draws from `seed` + i."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stop: Sequence[str] = ()  # as `engine.text.stop_strings` returns it
    seed: int | None = None  # None: drawn
    n: int = 1
    wants: Wants = NOTHING_MORE
    group: str | None = None  # asks of one group wait for the first one's prompt, to share it
    skip_special_tokens: bool = True
    keep_stop: bool = False  # the text ends with what stopped it
    stop_regex: tuple[str, ...] = ()  # as `engine.stop_regex.stop_patterns` returns it
    namespace: str = ""  # prefixes are shared within one namespace only
    priority: int = 0  # higher goes first
    name: str | None = None  # what the client calls its answers; None: as the whole request


@dataclass(slots=True)
class Piece:
    """News of one answer. The one with a finish is its last."""

    text: str
    token_ids: Sequence[int]
    finish: Finish | None
    logprobs: Sequence[TokenLogprob] = ()  # parallel to token_ids, if wanted
    prompt_logprobs: Sequence[TokenLogprob] = ()  # once, as soon as they are there, if wanted

    @property
    def error(self) -> BackendFailed | None:
        """What ended the answer, if its engine failed."""
        if self.finish is None or self.finish.reason != "error":
            return None
        return BackendFailed(self.finish.message or "the engine failed")


@dataclass(slots=True)
class Whole:
    """A finished answer."""

    answer: Answer
    text: str
    token_ids: list[int]
    finish: Finish
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob]


@dataclass(eq=False, slots=True)
class Answer:
    """One answer: its request in the pool, its text, and how much of it the handler has."""

    index: int  # among the answers of its HTTP request: prompt by prompt, n by n
    live: LiveRequest
    stream: TextStream
    scored: int = 0  # tokens of the prompt whose log-probabilities have been taken

    @property
    def prompt_tokens(self) -> int:
        return len(self.live.submission.prompt)

    @property
    def cached_tokens(self) -> int:
        return self.live.cached

    @property
    def completion_tokens(self) -> int:
        """Tokens up to the one that ended it: what comes after a stop string does not count."""
        return self.stream.tokens

    @property
    def has_scores(self) -> bool:
        """Whether log-probabilities of the prompt are there that were not taken."""
        return self.scored < len(self.live.prompt_logprobs)

    def take(self) -> Piece:
        """What has come since the last time. Called until it brings a finish, no more.

        Of a long prompt's log-probabilities it brings some, and nothing of the answer before all.
        """
        live, start, scored = self.live, self.stream.tokens, self.scored
        self.scored = min(scored + SCORES_OF_A_PIECE, len(live.prompt_logprobs))
        if self.has_scores:
            return Piece("", (), None, (), live.prompt_logprobs[scored : self.scored])
        text = self.stream.feed(live.received[start:], live.finish)
        end = self.stream.tokens
        return Piece(
            text.text,
            live.received[start:end],
            text.finish,
            live.logprobs[start:end],
            live.prompt_logprobs[scored:],
        )


@dataclass(eq=False, slots=True)
class Answers:
    """All answers of one HTTP request. Whoever calls `open` calls `close`."""

    id: str  # the client's name for all of it
    pool: EnginePool
    warnings: list[str] = field(default_factory=list)
    progress: bool = False  # the client wants to hear of it before the first piece
    created: int = field(default_factory=lambda: int(time.time()))
    all: list[Answer] = field(default_factory=list)
    _going: dict[LiveRequest, Answer] = field(default_factory=dict)
    _news: dict[LiveRequest, None] = field(default_factory=dict)  # in order of arrival
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def open(
        self, asks: Sequence[Ask], tokenizer: Tokenizer, owner: str, default_length: int
    ) -> None:
        """Submit every answer, or none. Raises RequestRefused, Overloaded or Unavailable."""
        for number, ask in enumerate(asks):
            for live in self._requests(number, ask, owner, default_length):
                stream = TextStream(
                    tokenizer,
                    ask.stop,
                    ask.stop_regex,
                    skip_special_tokens=ask.skip_special_tokens,
                    keep_stop=ask.keep_stop,
                )
                self.all.append(Answer(len(self.all), live, stream))
        self.warnings += self.pool.submit([answer.live for answer in self.all])
        self._going = {answer.live: answer for answer in self.all}

    def _requests(self, number: int, ask: Ask, owner: str, length: int) -> list[LiveRequest]:
        name = f"{secrets.token_hex(8)}-{number}"
        first = Submission(
            id=name,
            prompt=tuple(ask.prompt),
            sampling=ask.sampling,
            seed=settled_seed(ask.seed, self.pool.spec),
            wants=replace(ask.wants, progress=True) if self.progress else ask.wants,
            namespace=ask.namespace,
            group=ask.group or (name if ask.n > 1 else None),
            priority=ask.priority,
            arrival=time.monotonic(),
        )
        first = with_default_length(first, self.pool.spec, length)
        return [
            LiveRequest(
                replace(first, id=f"{name}-{index}", seed=first.seed + index),
                request_id=ask.name or self.id,
                owner=owner,
                notify=self._notify,
            )
            for index in range(ask.n)
        ]

    def _notify(self, live: LiveRequest) -> None:
        self._news[live] = None
        self._wake.set()

    async def pieces(self) -> list[tuple[Answer, Piece]]:
        """The next pieces, in order of arrival. Empty when every answer has ended."""
        while self._going:
            await self._wake.wait()
            self._wake.clear()
            news, self._news = self._news, {}
            pieces = [
                (self._going[live], self._going[live].take())
                for live in news
                if live in self._going
            ]
            for answer, piece in pieces:
                if answer.has_scores:
                    self._notify(answer.live)
                    await asyncio.sleep(0)  # others have their turn, however many there are
                if piece.finish is not None:
                    del self._going[answer.live]
                    self.pool.end(answer.live, piece.finish)  # a stop string is known here alone
            if pieces:
                return pieces
        return []

    async def whole(self) -> list[Whole]:
        """Every answer, in order of index. Raises BackendFailed when an engine failed one."""
        parts: dict[int, list[Piece]] = {answer.index: [] for answer in self.all}
        while pieces := await self.pieces():
            for answer, piece in pieces:
                parts[answer.index].append(piece)
                if piece.error is not None:
                    raise piece.error
        return [_fold(answer, parts[answer.index]) for answer in self.all]

    def close(self) -> None:
        """End what still goes on: nobody waits for it."""
        for live in self._going:
            self.pool.end(live, ABANDONED)
        self._going.clear()


def _fold(answer: Answer, pieces: Sequence[Piece]) -> Whole:
    finish = pieces[-1].finish
    assert finish is not None
    return Whole(
        answer,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        finish,
        [each for piece in pieces for each in piece.logprobs],
        [each for piece in pieces for each in piece.prompt_logprobs],
    )
