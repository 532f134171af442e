"""The scheduler under random schedules: the answers are those of one by one, come what may."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import given, settings, strategies as st

from backend.interface import BackendSpec, RequestRefused, SamplingParams, Submission, Wants
from tests.engine.scheduler_bench import Bench, alone


@dataclass(frozen=True)
class Event:
    """A submission, when it comes, and how many steps later it is cancelled, if it is."""

    submission: Submission
    arrival: int
    cancel_after: int | None


IDS = st.integers(0, 2)
SAMPLINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.just(1.5),
        "top_k": st.just(3),
        "top_p": st.just(0.8),
        "frequency_penalty": st.just(1.0),
        "repetition_penalty": st.just(1.3),
        "logit_bias": st.just(((1, 30.0), (ord("a"), -3.0))),
        "stop_token_ids": st.just(tuple(b"ae ")),
        "ignore_eos": st.booleans(),
    },
)


@st.composite
def wants(draw: st.DrawFn) -> Wants:
    logprobs, start = draw(st.booleans()), draw(st.none() | st.integers(0, 4))
    asked = logprobs or start is not None
    return Wants(logprobs, start, top=draw(st.sampled_from([0, 0, 1, 6])) if asked else 0)


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    groups: dict[str, tuple[int, ...]] = {}
    result = []
    for number in range(draw(st.integers(1, 7))):
        group = draw(st.sampled_from([None, None, "g", "h"]))
        prompt = tuple(draw(st.lists(IDS, min_size=1, max_size=12)))
        if group is not None:
            prompt = groups.setdefault(group, prompt)
        new = draw(st.integers(0, 12))
        plain = draw(st.booleans())
        sampling = SamplingParams(
            max_new_tokens=new,
            min_new_tokens=draw(st.integers(0, new)),
            **({"ignore_eos": True} if plain else draw(SAMPLINGS)),
        )
        submission = Submission(
            str(number),
            prompt,
            sampling,
            seed=number,
            wants=Wants() if plain else draw(wants()),
            namespace=draw(st.sampled_from(["", "", "salt"])) if group is None else "",
            group=group,
            received=tuple(draw(st.lists(IDS, max_size=min(new, 3)))) if not plain else (),
        )
        cancel_after = draw(st.none() | st.integers(0, 12))
        result.append(Event(submission, draw(st.integers(0, 10)), cancel_after))
    return result


BENCHES: st.SearchStrategy[Bench] = st.builds(
    Bench,
    pages=st.integers(4, 14),
    page_tokens=st.integers(1, 4),
    max_running=st.integers(1, 4),
    max_step_tokens=st.integers(1, 12),
    depth=st.integers(1, 3),
    prefix=st.booleans(),
)


def holds(bench: Bench, event: Event) -> None:
    """Compare an answer with the one that is right."""
    got = bench.answers[event.submission.id]
    right = alone(bench.model, bench.spec, event.submission)
    (finish,) = got.finishes
    (cached,) = got.cached
    placements = bench.recorder.starts.get(event.submission.seed, [0])
    assert cached == min(placements[0], len(event.submission.prompt))
    if finish.reason == "abort":
        assert event.cancel_after is not None
        assert got.tokens == right.tokens[: len(got.tokens)]
        assert got.logprobs == right.logprobs[: len(got.tokens)]
        assert got.prompt_logprobs == (right.prompt_logprobs if got.tokens else [])
    else:
        right.cached = got.cached
        assert got == right


@settings(max_examples=250, deadline=None)
@given(bench=BENCHES, schedule=events(), headroom=st.sampled_from([0, 3, 64]))
def test_any_schedule_answers_as_one_by_one_and_brings_every_page_home(
    bench: Bench, schedule: list[Event], headroom: int
) -> None:
    accepted = [event for event in schedule if fits(bench.spec, event.submission)]
    with patch("engine.scheduler.HEADROOM_TOKENS", headroom):  # 0: whoever can yields
        for step in range(24):  # the last arrival, and the last cancel behind it
            for event in accepted:
                if event.arrival == step:
                    bench.submit(event.submission)
                if event.cancel_after is not None and event.arrival + event.cancel_after == step:
                    cancel(bench, event.submission.id)
            bench.advance()
        bench.drain(limit=24 + 4 * sum(positions(event.submission) for event in accepted))
    assert bench.step_tokens == sum(plan.tokens for plan in bench.recorder.plans)
    for event in accepted:
        holds(bench, event)


def fits(spec: BackendSpec, submission: Submission) -> bool:
    try:
        spec.check(submission)
    except RequestRefused:
        return False
    return True


def positions(submission: Submission) -> int:
    return len(submission.prompt) + submission.max_new_tokens


def cancel(bench: Bench, id: str) -> None:
    """Cancel, and see to it that no token comes after."""
    ended = bool(bench.answers[id].finishes)
    tokens = list(bench.answers[id].tokens)
    bench.backend.cancel(id)
    bench.cache.check()
    if not ended:
        bench.advance()
        assert bench.answers[id].tokens == tokens
        assert len(bench.answers[id].finishes) == 1
