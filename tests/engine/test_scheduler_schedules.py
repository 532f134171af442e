"""The scheduler under random schedules: the answers are those of one by one, come what may."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import given, settings, strategies as st

from backend.interface import BackendSpec, RequestRefused, SamplingParams, Submission, Wants
from tests.conformance.driver import Answer
from tests.engine.scheduler_bench import Bench, alone
from tests.engine.test_constraints import TEXT, bound, compiled, text


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


def play(bench: Bench, accepted: list[Event]) -> None:
    """Let everybody come, and some go, until nobody is left."""
    for step in range(24):  # the last arrival, and the last cancel behind it
        for event in accepted:
            if event.arrival == step:
                bench.submit(event.submission)
            if event.cancel_after is not None and event.arrival + event.cancel_after == step:
                cancel(bench, event.submission.id)
        bench.advance()
    bench.drain(limit=24 + 4 * sum(positions(event.submission) for event in accepted))


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
        play(bench, accepted)
    assert bench.step_tokens == sum(plan.tokens for plan in bench.recorder.plans)
    for event in accepted:
        holds(bench, event)


BOUND = bound("b", new=12)
WHOLE = Bench().run(BOUND)[0].tokens  # depends on nothing but the prompt: it is greedy


@st.composite
def bound_events(draw: st.DrawFn) -> Event:
    """A bound answer, from its beginning or further on, cut short or not."""
    received = draw(st.integers(0, len(WHOLE) - 1))
    new = draw(st.integers(max(1, received), 12))
    id = f"bound {draw(st.integers(0, 1 << 20))}"
    submission = bound(id, BOUND.prompt, new=new, received=tuple(WHOLE[:received]))
    return Event(submission, draw(st.integers(0, 10)), draw(st.none() | st.integers(0, 12)))


@settings(max_examples=60, deadline=None)
@given(
    bench=BENCHES,
    free=events(),
    bounds=st.lists(bound_events(), min_size=1, max_size=3, unique_by=lambda e: e.submission.id),
    headroom=st.sampled_from([0, 64]),
)
def test_bound_rows_keep_to_their_grammar_in_any_schedule_and_change_nobody_else(
    bench: Bench, free: list[Event], bounds: list[Event], headroom: int
) -> None:
    compiled(bench, BOUND).result(10)  # steps are counted below: none waits for it
    accepted = [event for event in [*bounds, *free] if fits(bench.spec, event.submission)]
    with patch("engine.scheduler.HEADROOM_TOKENS", headroom):
        play(bench, accepted)
    for event in accepted:
        if event in free:
            holds(bench, event)
        else:
            keeps_to_its_grammar(bench, event)
    assert not bench.backend.load().running
    bench.advance()
    assert not bench.backend._constraints  # type: ignore[attr-defined]
    bench.backend.close()


def keeps_to_its_grammar(bench: Bench, event: Event) -> None:
    got, asked = bench.answers[event.submission.id], event.submission
    tokens = [*asked.received, *got.tokens]
    (finish,) = got.finishes
    assert tokens == WHOLE[: len(tokens)]
    if finish.reason == "stop":
        assert tokens == WHOLE
        assert TEXT.fullmatch(text(Answer(tokens)))
    elif finish.reason == "length":
        assert len(tokens) == asked.max_new_tokens < len(WHOLE)
    else:
        assert finish.reason == "abort"
        assert event.cancel_after is not None


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
