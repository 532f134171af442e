"""`LLM`: the whole engine in one process, for scripts, tests and library users.

    with LLM() as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_new_tokens=8))[0].text)

One thread. Streams may be interleaved: whoever asks for the next piece drives the engine for all.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from types import TracebackType
from typing import Any, TypeAlias, cast

from rich.progress import track

from backend.interface import (
    NOTHING_MORE,
    BackendSpec,
    Delta,
    EngineError,
    Finish,
    Overloaded,
    RequestRefused,
    SamplingParams,
    Submission,
    TokenLogprob,
    Wants,
    settled_seed,
    with_default_length,
)
from backend.tokenizer import open_tokenizer
from config import Settings, read_settings
from engine.engine import Engine
from engine.interrupts import interrupts_held
from engine.opening import open_backend
from engine.text import TextStream, stop_strings

Prompt: TypeAlias = str | Sequence[int]

GREEDY = SamplingParams()
REST_S = 0.01  # at most, where all wait for what other threads make ready


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer."""

    text: str
    token_ids: list[int]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int  # of the prompt, answered by the cache
    logprobs: list[TokenLogprob]  # parallel to token_ids when asked for
    prompt_logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a streamed answer. The last one has the finish."""

    text: str
    token_ids: list[int]
    finish: Finish | None
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Stream:
    """A submission under way: what makes pieces of its deltas, and those nobody has taken."""

    submission: Submission
    text: TextStream
    cached: int = 0
    pieces: deque[TextDelta] = field(default_factory=deque)

    def feed(self, delta: Delta) -> None:
        """Turn a delta into a piece. What comes after a stop string ended the text is dropped."""
        before = self.text.tokens
        piece = self.text.feed(delta.tokens, delta.finish)
        count = self.text.tokens - before
        self.cached = self.cached if delta.cached is None else delta.cached
        self.pieces.append(
            TextDelta(
                piece.text,
                list(delta.tokens[:count]),
                piece.finish,
                len(self.submission.prompt),
                self.cached,
                list(delta.logprobs[:count]),
                list(delta.prompt_logprobs),
            )
        )


class LLM:
    """A model that answers. Opened by the constructor, closed by `close` or the end of a `with`."""

    def __init__(self, settings: Settings | None = None) -> None:
        """`settings` None: read from the environment. Raises ConfigError, StartFailed."""
        settings = settings or read_settings()
        self._default_length = settings.generation.max_new_tokens
        self._streams: dict[str, Stream] = {}  # those that go on, by submission id
        self._ids = itertools.count()
        self.engine = Engine(open_backend(settings.backend), settings.queue)
        try:
            self.tokenizer = open_tokenizer(self.spec.folder, self.spec.vocabulary)
        except EngineError:
            self.close()
            raise

    @property
    def spec(self) -> BackendSpec:
        """What was decided at start-up."""
        return self.engine.spec

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        n: int = 1,
        wants: Wants = NOTHING_MORE,
        progress: bool = False,
    ) -> list[Answer]:
        """Answer one prompt or many, text or token ids; batched, in the order of the prompts.

        `n` answers a prompt stand side by side. Answer i of a prompt draws from `seed` + i; without
        a seed, from a random one. `progress` shows a bar. Raises RequestRefused or
        BackendFailed, and then nothing goes on; a backend that fails later ends its answers with
        finish "error". Ctrl-C takes effect between two steps.
        """
        many = _as_prompts(prompts)
        each = [sampling] * len(many) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(many):
            raise ValueError(f"{len(many)} prompts and {len(each)} sampling parameters")
        if n < 1:
            raise RequestRefused(f"n must be 1 or more, got {n}", "n")
        streams: list[Stream] = []
        try:
            for prompt, params in zip(many, each, strict=True):
                streams += self._open(prompt, params, stop, seed, n, wants)
            for stream in track(streams, "answers", transient=True, disable=not progress):
                self._finish(stream)
        finally:
            self._abandon(streams)
        return [_fold(stream) for stream in streams]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams = GREEDY,
        *,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        wants: Wants = NOTHING_MORE,
    ) -> Generator[TextDelta, None, None]:
        """Answer one prompt piece by piece. Closing the generator cancels the answer."""
        (stream,) = self._open(prompt, sampling, stop, seed, 1, wants)
        pieces = self._pieces(stream)
        next(pieces)  # into its `try`: a generator that never started would not cancel when closed
        return pieces

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams = GREEDY,
        *,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        wants: Wants = NOTHING_MORE,
    ) -> Answer:
        """Answer a conversation, each message a `role` and a `content`."""
        prompt = self.encode_chat(messages)
        return self.generate(prompt, sampling, stop=stop, seed=seed, wants=wants)[0]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """The prompt ids of a conversation, by the model's own chat template.

        A prompt like any other: for `generate` with `n`, or with other conversations, or `stream`.
        """
        text = self.tokenizer.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _open(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        stop: str | Sequence[str],
        seed: int | None,
        n: int,
        wants: Wants,
    ) -> list[Stream]:
        """Submit the `n` answers of one prompt. All of them, or none."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        number = next(self._ids)
        first = Submission(
            id=f"{number}-0",
            prompt=tuple(ids),
            sampling=sampling,
            seed=settled_seed(seed, self.spec),
            wants=wants,
            group=f"{number}" if n > 1 else None,
            arrival=time.monotonic(),
        )
        first = with_default_length(first, self.spec, self._default_length)
        strings = stop_strings(stop)
        streams: list[Stream] = []
        try:
            for index in range(n):
                submission = replace(first, id=f"{number}-{index}", seed=first.seed + index)
                self._submit(submission)
                streams.append(Stream(submission, TextStream(self.tokenizer, strings)))
                self._streams[submission.id] = streams[-1]
        except EngineError:
            self._abandon(streams)
            raise
        return streams

    def _submit(self, submission: Submission) -> None:
        """Hand over a submission. A full queue is worked off first: here nobody else would."""
        while True:
            try:
                return self.engine.submit(submission)
            except Overloaded:
                self._step()

    def _pieces(self, stream: Stream) -> Generator[TextDelta, None, None]:
        """The pieces of a stream, after an empty one that is not for the caller."""
        piece = TextDelta("", [], None, 0, 0)
        try:
            yield piece
            while piece.finish is None:
                while not stream.pieces:
                    self._step()
                piece = stream.pieces.popleft()
                yield piece
        finally:
            self._abandon([stream])

    def _finish(self, stream: Stream) -> None:
        """Drive the engine until `stream` is finished."""
        while stream.text.finish is None:
            self._step()

    def _step(self) -> None:
        """Drive the engine, and hand each delta to its stream."""
        with interrupts_held():
            for delta in self.engine.step(REST_S).deltas:
                stream = self._streams.get(delta.id)
                if stream is not None:  # else a stop string ended it, or it was given up
                    self._feed(stream, delta)

    def _feed(self, stream: Stream, delta: Delta) -> None:
        stream.feed(delta)
        if stream.text.finish is not None:
            self._abandon([stream])

    def _abandon(self, streams: Sequence[Stream]) -> None:
        """Forget streams, and end those that the engine still works on."""
        for stream in streams:
            if self._streams.pop(stream.submission.id, None) is not None:
                self.engine.cancel(stream.submission.id)

    def prepare(self) -> None:
        """Do now what a server does in idle moments, such as capturing CUDA graphs."""
        while self.engine.prepare():
            continue

    def close(self) -> None:
        """Give back the device."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list: a text, or ids, is one."""
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(each, Integral) for each in many):
        return [[int(each) for each in cast("list[int]", many)]]  # numpy's integers, too
    return cast("list[Prompt]", many)


def _fold(stream: Stream) -> Answer:
    """The whole answer of a finished stream."""
    pieces = list(stream.pieces)
    last = pieces[-1]
    assert last.finish is not None
    return Answer(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish=last.finish,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        logprobs=[each for piece in pieces for each in piece.logprobs],
        prompt_logprobs=[each for piece in pieces for each in piece.prompt_logprobs],
    )
