"""Answers under any schedule: whatever comes when, a client is told the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from random import Random

from hypothesis import given, strategies as st

from api.answers import Answers, Piece, Whole
from backend.interface import Finish, TokenLogprob
from tests.api.hand_fed import (
    LENGTH,
    PROMPT_SCORES,
    SCORED,
    HandFedPool,
    ask,
    opened,
    scores,
)


@dataclass(frozen=True)
class Script:
    """What the engine says in one answer, and the lengths of the deltas in which it comes."""

    text: str
    stop: tuple[str, ...]
    lengths: list[int]
    last_words: bool  # the finish comes with the last tokens, not after them


@dataclass
class Told:
    """What the client has of one answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, news: Piece | Whole) -> None:
        assert self.finish is None, "news came after the last"
        self.text += news.text
        self.tokens += news.token_ids
        self.logprobs += news.logprobs
        self.prompt_logprobs += news.prompt_logprobs
        self.finish = news.finish


def expected(script: Script) -> Told:
    """Character by character: the first that completes a stop string ends it, the longest such."""
    text = script.text
    for end in range(len(text) + 1):
        complete = [string for string in script.stop if text[:end].endswith(string)]
        if complete:
            matched = max(complete, key=len)
            tokens, finish = list(text[:end].encode()), Finish("stop", matched=matched)
            kept = text[: end - len(matched)]
            return Told(kept, tokens, scores(tokens), PROMPT_SCORES, finish)
    tokens = list(text.encode())
    return Told(text, tokens, scores(tokens), PROMPT_SCORES, LENGTH)


Delta = tuple[int, list[int], Finish | None, list[TokenLogprob], list[TokenLogprob]]


def deltas(index: int, script: Script) -> list[Delta]:
    """One answer as `HandFedPool.feed` takes it. The first delta has the scores of the prompt."""
    tokens = list(script.text.encode())
    logprobs = scores(tokens)
    found: list[Delta] = []
    start = 0
    for length in [*script.lengths, len(tokens)]:
        part = slice(start, start + length)
        found.append((index, tokens[part], None, logprobs[part], []))
        start += length
    if not script.last_words:
        found.append((index, [], None, [], []))
    found[-1] = (*found[-1][:2], LENGTH, *found[-1][3:])
    found[0] = (*found[0][:4], PROMPT_SCORES)
    return found


def mixed(scripts: Sequence[Script], random: Random) -> list[Delta]:
    """The deltas of all answers in some order; those of one answer in theirs."""
    queues = [deltas(index, script) for index, script in enumerate(scripts)]
    found = []
    while going := [queue for queue in queues if queue]:
        found.append(random.choice(going).pop(0))
    return found


def opened_for(pool: HandFedPool, scripts: Sequence[Script]) -> Answers:
    """An answer for each script. Neighbours with the same stop strings share a prompt."""
    prompts = [
        replace(ask(*stop, n=len(list(those))), wants=SCORED)
        for stop, those in groupby(scripts, key=lambda script: script.stop)
    ]
    return opened(pool, *prompts)


async def streamed(scripts: Sequence[Script], random: Random, reads: float) -> list[Told]:
    """What a client has who reads after a delta with probability `reads`, and in the end."""
    pool = HandFedPool()
    answers = opened_for(pool, scripts)
    told = [Told() for _ in scripts]

    async def read() -> None:
        for answer, piece in await answers.pieces():
            told[answer.index].add(piece)
            if piece.finish is not None:
                assert answer.completion_tokens == len(told[answer.index].tokens)

    unread = False
    for delta in mixed(scripts, random):
        unread |= pool.feed(*delta)
        if unread and random.random() < reads:
            await read()
            unread = False
    if unread:
        await read()
    assert await answers.pieces() == []
    assert all(finish.reason == "stop" for _, finish in pool.ended)
    return told


async def at_once(scripts: Sequence[Script], random: Random) -> list[Told]:
    """What a client has who asked for whole answers."""
    pool = HandFedPool()
    answers = opened_for(pool, scripts)
    for delta in mixed(scripts, random):
        pool.feed(*delta)
    told = [Told() for _ in scripts]
    for whole in await answers.whole():
        told[whole.answer.index].add(whole)
    return told


SCRIPTS = st.builds(
    Script,
    text=st.text(st.sampled_from("ab é好🙂\n"), max_size=10),
    stop=st.lists(st.text(st.sampled_from("abé好"), min_size=1, max_size=3), max_size=2).map(tuple),
    lengths=st.lists(st.integers(0, 4), max_size=6),
    last_words=st.booleans(),
)


@given(
    scripts=st.lists(SCRIPTS, min_size=1, max_size=4),
    random=st.randoms(use_true_random=False),
    reads=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_answers_are_the_same_streamed_and_whole_however_their_tokens_come(
    scripts: list[Script], random: Random, reads: float
) -> None:
    wanted = [expected(script) for script in scripts]
    assert asyncio.run(streamed(scripts, random, reads)) == wanted
    assert asyncio.run(at_once(scripts, random)) == wanted
