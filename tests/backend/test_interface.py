"""What is refused at the door, and by which field."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from backend.interface import (
    MAX_TOP_LOGPROBS,
    BackendSpec,
    Grammar,
    NeverFits,
    RequestRefused,
    SamplingParams,
    Submission,
    TooLong,
    Wants,
    with_default_length,
)
from tests.engine.scheduler_bench import ask

SPEC = BackendSpec(
    name="paper",
    model="paper",
    folder=None,
    vocabulary=100,
    max_model_len=2000,
    stop_ids=(3,),
    page_tokens=16,
    pages=100,  # 1600 tokens: fewer than the context
    max_running=4,
    max_step_tokens=64,
    depth=1,
    device="cpu",
    dtype="float32",
    attention="none",
)
ROOMY = replace(SPEC, pages=1000)


def refusal(spec: BackendSpec, submission: Submission) -> RequestRefused:
    with pytest.raises(RequestRefused) as refused:
        spec.check(submission)
    assert "\n" not in str(refused.value)
    return refused.value


# BackendSpec.check


@pytest.mark.parametrize(
    ("prompt", "new", "param"), [(1500, 501, "max_new_tokens"), (2000, 1, "prompt")]
)
def test_too_long_names_both_numbers_and_the_context(prompt: int, new: int, param: str) -> None:
    error = refusal(ROOMY, ask("a", [5] * prompt, new))
    assert isinstance(error, TooLong)
    assert f"prompt {prompt:,} + max_new_tokens {new:,}" in str(error)
    assert "2,000" in str(error)
    assert error.param == param


@pytest.mark.parametrize(
    ("prompt", "new", "param"), [(1000, 601, "max_new_tokens"), (1601, 1, "prompt")]
)
def test_never_fits_names_both_numbers_and_the_pages(prompt: int, new: int, param: str) -> None:
    error = refusal(SPEC, ask("a", [5] * prompt, new))
    assert isinstance(error, NeverFits)
    assert f"prompt {prompt:,} + max_new_tokens {new:,}" in str(error)
    assert "101 pages of 16 tokens" in str(error)
    assert "100: " in str(error)
    assert "PAGE_TOKEN_BUDGET" in str(error)
    assert error.param == param


def test_what_just_fits_is_taken() -> None:
    ROOMY.check(ask("a", [5] * 1500, 500))
    ROOMY.check(ask("a", [5] * 2000, 0))
    SPEC.check(ask("a", [5] * 1000, 600))


def test_an_empty_prompt_is_refused() -> None:
    error = refusal(SPEC, ask("a", ()))
    assert error.param == "prompt"
    assert "empty" in str(error)


@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
@pytest.mark.parametrize("param", ["prompt", "received", "stop_token_ids", "logit_bias"])
def test_an_id_out_of_the_vocabulary_is_refused_wherever_it_stands(param: str, wrong: int) -> None:
    ids = (99, wrong, 0)
    plain = ask("a")
    submission = {
        "prompt": replace(plain, prompt=ids),
        "received": replace(plain, received=ids),
        "stop_token_ids": replace(plain, sampling=replace(plain.sampling, stop_token_ids=ids)),
        "logit_bias": replace(
            plain, sampling=replace(plain.sampling, logit_bias=tuple((id, 1.0) for id in ids))
        ),
    }[param]
    error = refusal(SPEC, submission)
    assert error.param == param
    assert f"token id {wrong}," in str(error)
    assert "vocabulary of 100" in str(error)


@pytest.mark.parametrize("wrong", [1.5, math.nan, True, "5", None])
def test_what_is_no_token_id_is_refused_as_such(wrong: Any) -> None:
    error = refusal(SPEC, ask("a", (5, wrong)))
    assert error.param == "prompt"
    assert f"holds {wrong!r}" in str(error)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_device_can_hold_is_refused(seed: int) -> None:
    error = refusal(SPEC, replace(ask("a"), seed=seed))
    assert error.param == "seed"
    assert str(seed) in str(error)
    SPEC.check(replace(ask("a"), seed=2**63 - 1))


def test_scores_must_begin_within_the_prompt() -> None:
    error = refusal(SPEC, ask("a", (1, 2, 3), wants=Wants(prompt_logprobs_from=3)))
    assert error.param == "prompt_logprobs_from"
    assert "from 3 " in str(error)
    assert "3 tokens" in str(error)
    SPEC.check(ask("a", (1, 2, 3), wants=Wants(prompt_logprobs_from=2)))


# Lengths


def unsettled(prompt: int, **sampling: Any) -> Submission:
    return Submission("a", (5,) * prompt, SamplingParams(**sampling), seed=0)


@pytest.mark.parametrize(
    ("spec", "prompt", "default", "length"),
    [
        (ROOMY, 10, 512, 512),
        (ROOMY, 1900, 512, 100),  # what the context leaves
        (SPEC, 1500, 512, 100),  # what the pages leave
        (ROOMY, 2000, 512, 1),  # and then it is the prompt that is too long
        (ROOMY, 5000, 512, 1),
    ],
)
def test_the_default_length_is_clamped_to_the_room_left(
    spec: BackendSpec, prompt: int, default: int, length: int
) -> None:
    settled = with_default_length(unsettled(prompt), spec, default)
    assert settled.max_new_tokens == length
    assert settled.prompt == (5,) * prompt


def test_a_prompt_without_room_is_refused_by_its_own_name() -> None:
    assert refusal(ROOMY, with_default_length(unsettled(2000), ROOMY, 512)).param == "prompt"


@pytest.mark.parametrize("length", [0, 1, 10**6])
def test_an_explicit_length_stays(length: int) -> None:
    submission = unsettled(10, max_new_tokens=length)
    assert with_default_length(submission, SPEC, 512) == submission


def test_the_default_length_reaches_what_the_least_length_asks_for() -> None:
    assert with_default_length(unsettled(10, min_new_tokens=700), SPEC, 512).max_new_tokens == 700


@given(st.integers(1, 1999), st.integers(1, 4000))
def test_with_a_default_length_no_prompt_that_fits_is_refused(prompt: int, default: int) -> None:
    ROOMY.check(with_default_length(unsettled(prompt), ROOMY, default))


def test_a_length_that_was_never_settled_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="submission a has no length"):
        _ = unsettled(10).max_new_tokens


@given(st.integers(0, 10_000), st.integers(1, 256))
def test_pages_hold_the_positions_asked_for_and_not_a_page_more(tokens: int, size: int) -> None:
    pages = replace(SPEC, page_tokens=size).pages_for(tokens)
    assert (pages - 1) * size < tokens <= pages * size or tokens == pages == 0


# Fields and their bounds: good values, then bad ones

INF, NAN = math.inf, math.nan
NO_NUMBERS = [NAN, INF, -INF, True, "1"]
NO_COUNTS = [-1, 2.5, *NO_NUMBERS]

SAMPLING_BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 1e-9, 100], [-1e-9, 100.1, 10**400, *NO_NUMBERS]),
    "top_p": ([1e-9, 1], [0, -0.1, 1.1, *NO_NUMBERS]),
    "top_k": ([0, 1, 10**12], NO_COUNTS),
    "min_p": ([0, 1], [-0.1, 1.1, *NO_NUMBERS]),
    "frequency_penalty": ([-2, 0, 2], [-2.1, 2.1, *NO_NUMBERS]),
    "presence_penalty": ([-2, 0, 2], [-2.1, 2.1, *NO_NUMBERS]),
    "repetition_penalty": ([1e-9, 1, 1e9], [0, -1, *NO_NUMBERS]),
    "logit_bias": (
        [(), ((5, -100), (6, 100))],
        [((5, 0), (6, bias)) for bias in (-100.1, 100.1, *NO_NUMBERS)],
    ),
    "max_new_tokens": ([None, 0, 1, 10**9], NO_COUNTS),
    "min_new_tokens": ([0, 1, 10**9], NO_COUNTS),
    "stop_token_ids": ([(), (1, 2)], []),  # ids are checked against the vocabulary
    "ignore_eos": ([False, True], []),
    "grammar": ([None, Grammar("regex", "a")], ["a", {"kind": "regex", "text": "a"}]),
}
WANTS_BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "logprobs": ([False, True], []),
    "prompt_logprobs_from": ([None, 0, 10**9], NO_COUNTS),
    "top": ([0], [1, MAX_TOP_LOGPROBS + 1, *NO_COUNTS]),  # alone there is nothing to be on top of
    "pooling": ([None, "mean", "last"], ["first", "", 1]),
    "progress": ([False, True], []),
}
PUBLIC_NAMES = {"top": "top_logprobs"}  # what clients call it


@pytest.mark.parametrize(
    ("kind", "bounds"), [(SamplingParams, SAMPLING_BOUNDS), (Wants, WANTS_BOUNDS)]
)
def test_every_field_has_its_bounds_tested(
    kind: type[Any], bounds: dict[str, tuple[list[Any], list[Any]]]
) -> None:
    assert [field.name for field in fields(kind)] == list(bounds)


def cases(which: int) -> list[Any]:
    return [
        pytest.param(kind, name, value, id=f"{name}={value!s:.20}")
        for kind, bounds in ((SamplingParams, SAMPLING_BOUNDS), (Wants, WANTS_BOUNDS))
        for name, values in bounds.items()
        for value in values[which]
    ]


@pytest.mark.parametrize(("kind", "name", "value"), cases(0))
def test_a_value_within_its_bounds_is_taken(kind: type[Any], name: str, value: Any) -> None:
    assert getattr(kind(**{name: value}), name) == value


@pytest.mark.parametrize(("kind", "name", "value"), cases(1))
def test_a_value_out_of_its_bounds_is_refused_by_name(
    kind: type[Any], name: str, value: Any
) -> None:
    with pytest.raises(RequestRefused) as refused:
        kind(**{name: value})
    param = PUBLIC_NAMES.get(name, name)
    assert refused.value.param == param
    assert str(refused.value).startswith(f"{param} must be ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("asked", [{"logprobs": True}, {"prompt_logprobs_from": 0}])
def test_with_log_probabilities_come_as_many_others_as_the_bound_allows(
    asked: dict[str, Any],
) -> None:
    assert Wants(top=MAX_TOP_LOGPROBS, **asked).top == MAX_TOP_LOGPROBS
    with pytest.raises(RequestRefused, match=f"between 0 and {MAX_TOP_LOGPROBS}"):
        Wants(top=MAX_TOP_LOGPROBS + 1, **asked)


def test_the_least_length_is_at_most_the_length_and_the_refusal_names_both() -> None:
    SamplingParams(max_new_tokens=5, min_new_tokens=5)
    with pytest.raises(RequestRefused, match=r"max_new_tokens \(5\), got 6") as refused:
        SamplingParams(max_new_tokens=5, min_new_tokens=6)
    assert refused.value.param == "min_new_tokens"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_a_penalty_that_is_not_neutral_is_seen(name: str) -> None:
    assert not SamplingParams(temperature=1.0, logit_bias=((1, 1.0),)).penalised
    assert SamplingParams(**{name: 0.5}).penalised  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text"), [("xml", "a"), ("regex", ""), ("regex", "a" * (1 << 18) + "b"), ("lark", 3)]
)
def test_a_grammar_of_no_kind_or_of_no_bounded_text_is_refused(kind: Any, text: Any) -> None:
    with pytest.raises(RequestRefused) as refused:
        Grammar(kind, text)
    assert str(refused.value).startswith("grammar must be ")
    assert len(str(refused.value)) < 100
