"""The codec: what arrives is what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import (
    BackendSpec,
    Delta,
    Finish,
    Load,
    SamplingParams,
    StepOutput,
    Submission,
    TokenLogprob,
    Wants,
    Work,
)
from ipc.messages import (
    Cancel,
    EngineMessage,
    Failed,
    Flush,
    Flushed,
    FrontMessage,
    Phase,
    Ready,
    Step,
    Submit,
    decode_from_engine,
    decode_from_front,
    encode,
)

LOAD = Load(1, 2, 3, 4, 5, 6, 7, 8)
PLAIN = Submission("a", (1, 2), SamplingParams(), seed=0)
FULL = Submission(
    id="b",
    prompt=tuple(range(300)),
    sampling=SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        logit_bias=((3, -100.0), (4, 0.5)),
        max_new_tokens=7,
        stop_token_ids=(9, 10),
        ignore_eos=True,
    ),
    seed=(1 << 63) - 1,
    wants=Wants(logprobs=True, prompt_logprobs_from=0, top=3, pooling="last", progress=True),
    namespace="tenant ünï",
    group="g",
    priority=-3,
    arrival=12.5,
    deadline=99.25,
    received=(5, 6),
)
SPEC = BackendSpec(
    name="fake",
    model="m",
    folder=None,
    vocabulary=10,
    max_model_len=20,
    stop_ids=(1, 2),
    page_tokens=16,
    pages=3,
    max_running=4,
    max_step_tokens=5,
    depth=1,
    device="cpu",
    dtype="none",
    attention="none",
)


@pytest.mark.parametrize("message", [Submit(PLAIN), Submit(FULL), Cancel("a"), Flush(3)])
def test_what_the_front_says_arrives(message: FrontMessage) -> None:
    assert decode_from_front(encode(message)) == message


@pytest.mark.parametrize(
    "message", [Phase("backend", 1.5), Ready(SPEC), Failed("no\nmodel"), Flushed(3, 40)]
)
def test_what_an_engine_says_arrives(message: EngineMessage) -> None:
    assert decode_from_engine(encode(message)) == message


ids = st.integers(0, 1 << 31)
logprobs = st.builds(
    TokenLogprob,
    token=ids,
    logprob=st.floats(-99, 0),
    top=st.lists(st.tuples(ids, st.floats(-99, 0)), max_size=2).map(tuple),
)
finishes = st.builds(
    Finish,
    reason=st.sampled_from(["stop", "length", "abort", "error"]),
    matched=st.none() | ids | st.text(max_size=3),
    message=st.none() | st.text(max_size=3),
)


def deltas_of(tokens: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[Delta]]:
    delta = st.builds(
        Delta,
        id=st.text(max_size=3),
        tokens=tokens,
        finish=st.none() | finishes,
        cached=st.none() | ids,
        logprobs=st.lists(logprobs, max_size=2),
        prompt_logprobs=st.lists(logprobs, max_size=2),
        pooled=st.lists(st.floats(-9, 9), max_size=2),
        work=st.none() | st.builds(Work, ids, ids, ids, ids),
        prefilled=st.none() | ids,
    )
    return st.lists(delta.map(as_it_may_be), max_size=5)


def as_it_may_be(delta: Delta) -> Delta:
    """A vector and work come with a finish only, and news of a prompt without a token."""
    if delta.finish is None:
        delta = replace(delta, pooled=[], work=None)
    return replace(delta, prefilled=None) if delta.tokens else delta


def with_lists(delta: Delta) -> Delta:
    """To compare by value, whatever kind of sequence holds the tokens."""
    return replace(
        delta,
        tokens=list(delta.tokens),
        logprobs=list(delta.logprobs),
        prompt_logprobs=list(delta.prompt_logprobs),
        pooled=list(delta.pooled),
    )


@settings(max_examples=60, deadline=None)
@given(
    deltas_of(st.lists(ids, min_size=1, max_size=1)) | deltas_of(st.lists(ids, max_size=3)),
    st.lists(ids, max_size=3),
    st.lists(ids, max_size=3),
)
def test_a_step_arrives_with_every_delta(
    deltas: Sequence[Delta], entered: list[int], evicted: list[int]
) -> None:
    output = StepOutput(list(deltas), 5, 0.25, entered, evicted)
    step = decode_from_engine(encode(Step.of(output, LOAD)))
    assert isinstance(step, Step)
    assert list(map(with_lists, step.deltas())) == list(map(with_lists, deltas))
    assert (step.entered, step.evicted, step.load) == (entered, evicted, LOAD)
    assert (step.step_tokens, step.step_seconds) == (5, 0.25)


def test_a_plain_step_of_many_sequences_is_little_more_than_its_ids_and_tokens() -> None:
    deltas = [Delta(f"{index:032x}", (50_000 + index,)) for index in range(256)]
    size = len(encode(Step.of(StepOutput(deltas), LOAD)))
    assert size < 256 * (32 + 2 + 5) + 64


@pytest.mark.parametrize("wrong", [b"", b"\xc1", encode(Flushed(1, 2)), encode(("submit", 1))])
def test_what_is_no_message_is_refused(wrong: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_from_front(wrong)
