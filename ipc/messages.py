"""What the front process and an engine process say to each other, and its one codec.

    front -> engine   Submit | Cancel | Flush | Pause
    engine -> front   Phase ... Ready | Failed, then Step | Flushed | Paused

One message a step, however many sequences it brought news of: parallel lists, with what is rare
(a finish, the cached count, log-probabilities) beside them by index. MessagePack by msgspec.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from backend.interface import (
    BackendSpec,
    Delta,
    Finish,
    Load,
    StepOutput,
    Submission,
    TokenLogprob,
    Work,
)


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """Take over a submission, which passed `spec.check`."""

    submission: Submission


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """End a submission early. Unknown and ended ids are ignored."""

    id: str


class Flush(msgspec.Struct, tag="flush", array_like=True, frozen=True):
    """Give up every cached prefix that is not in use. Answered by `Flushed` with its number."""

    number: int


class Pause(msgspec.Struct, tag="pause", array_like=True, frozen=True):
    """Do no step until told to go on (`paused` false). Answered by `Paused` with its number."""

    number: int
    paused: bool


class Phase(msgspec.Struct, tag="phase", array_like=True, frozen=True):
    """A phase of the start has ended."""

    name: str
    seconds: float


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The engine serves."""

    spec: BackendSpec


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """The engine ends: one line with the root cause. Sent before or after `Ready`."""

    message: str


class Flushed(msgspec.Struct, tag="flushed", array_like=True, frozen=True):
    """The pages that a `Flush` freed."""

    number: int
    pages: int


class Paused(msgspec.Struct, tag="paused", array_like=True, frozen=True):
    """What a `Pause` asked for is so: every step that was done has been told."""

    number: int


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """What one step brought, or what was decided between two steps."""

    ids: Sequence[str]  # one for each delta
    counts: Sequence[int]  # tokens of each delta; empty: one each
    tokens: Sequence[int]  # of all deltas, in order
    finishes: Sequence[tuple[int, Finish]]  # (index of the delta, ...), as are the next six
    work: Sequence[tuple[int, Work]]
    pooled: Sequence[tuple[int, Sequence[float]]]
    prefilled: Sequence[tuple[int, int]]
    cached: Sequence[tuple[int, int]]
    logprobs: Sequence[tuple[int, Sequence[TokenLogprob]]]
    prompt_logprobs: Sequence[tuple[int, Sequence[TokenLogprob]]]
    entered: Sequence[int]
    evicted: Sequence[int]
    step_tokens: int
    step_seconds: float
    load: Load

    @staticmethod
    def of(output: StepOutput, load: Load) -> Step:
        """The wire form of a step's output."""
        deltas = output.deltas
        counts = [len(delta.tokens) for delta in deltas]
        plain = all(count == 1 for count in counts)
        ends = [(i, each) for i, each in enumerate(deltas) if each.finish]
        return Step(
            ids=[delta.id for delta in deltas],
            counts=[] if plain else counts,
            tokens=[token for delta in deltas for token in delta.tokens],
            finishes=[(i, each.finish) for i, each in ends if each.finish],
            work=[(i, each.work) for i, each in ends if each.work],
            pooled=[(i, each.pooled) for i, each in ends if each.pooled],
            prefilled=[] if plain else _prefilled(deltas),
            cached=[(i, each.cached) for i, each in enumerate(deltas) if each.cached is not None],
            logprobs=[(i, each.logprobs) for i, each in enumerate(deltas) if each.logprobs],
            prompt_logprobs=[
                (i, each.prompt_logprobs) for i, each in enumerate(deltas) if each.prompt_logprobs
            ],
            entered=output.entered,
            evicted=output.evicted,
            step_tokens=output.step_tokens,
            step_seconds=output.step_seconds,
            load=load,
        )

    def deltas(self) -> list[Delta]:
        """The deltas that `of` was given."""
        deltas = [Delta(id, tokens) for id, tokens in zip(self.ids, self._tokens(), strict=True)]
        for index, finish in self.finishes:
            deltas[index].finish = finish
        for index, work in self.work:
            deltas[index].work = work
        for index, pooled in self.pooled:
            deltas[index].pooled = pooled
        for index, positions in self.prefilled:
            deltas[index].prefilled = positions
        for index, count in self.cached:
            deltas[index].cached = count
        for index, logprobs in self.logprobs:
            deltas[index].logprobs = logprobs
        for index, logprobs in self.prompt_logprobs:
            deltas[index].prompt_logprobs = logprobs
        return deltas

    def _tokens(self) -> Iterator[Sequence[int]]:
        if not self.counts:
            yield from ((token,) for token in self.tokens)
            return
        start = 0
        for count in self.counts:
            yield self.tokens[start : start + count]
            start += count


def _prefilled(deltas: Sequence[Delta]) -> list[tuple[int, int]]:
    """Of prompts that go on: news without a token, so there are none in a step of decodes."""
    return [(i, each.prefilled) for i, each in enumerate(deltas) if each.prefilled is not None]


FrontMessage: TypeAlias = Submit | Cancel | Flush | Pause
EngineMessage: TypeAlias = Phase | Ready | Failed | Step | Flushed | Paused

encode = msgspec.msgpack.Encoder().encode
decode_from_front = msgspec.msgpack.Decoder(FrontMessage).decode
decode_from_engine = msgspec.msgpack.Decoder(EngineMessage).decode
