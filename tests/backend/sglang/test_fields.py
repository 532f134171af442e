"""What each of our fields is in SGLang's words, and that none is forgotten."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from backend.interface import Finish, SamplingParams, Submission, TokenLogprob, Wants
from backend.sglang.fields import (
    LACKING,
    LACKS,
    LEAST_MIN_P,
    Requests,
    ending,
    finish_of,
    lacks,
    logprobs_of,
    stop_ids,
)

VOCABULARY = 1000
PLAIN = SamplingParams(max_new_tokens=12)
PROMPT = (5, 6, 7)


def asked(
    sampling: SamplingParams = PLAIN, deterministic: bool = False, **more: Any
) -> dict[str, Any]:
    """The request of a submission, for a model that ends with 3."""
    submission = Submission("a", PROMPT, sampling, **{"seed": 9, **more})
    requests = Requests(VOCABULARY, frozenset({3}), deterministic)
    return requests.generate("7/a", submission, stop_ids(sampling, (3,)))


# field -> (a value that asks for something, what SGLang is told then)
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.7, {"temperature": 0.7}),
    "top_p": (0.9, {"top_p": 0.9}),
    "top_k": (20, {"top_k": 20}),
    "min_p": (0.1, {"min_p": 0.1}),
    "logit_bias": (((8, 1.5), (9, -2.0), (8, 1.0)), {"logit_bias": {"8": 2.5, "9": -2.0}}),
    "max_new_tokens": (5, {"max_new_tokens": 5}),
    "stop_token_ids": ((8, 9), {"stop_token_ids": [3, 8, 9], "ignore_eos": False}),
    "ignore_eos": (True, {"stop_token_ids": None, "ignore_eos": True}),
}
WANTS: dict[str, tuple[Wants, dict[str, Any]]] = {
    "logprobs": (Wants(logprobs=True), {"return_logprob": True, "logprob_start_len": -1}),
    "prompt_logprobs_from": (
        Wants(prompt_logprobs_from=1), {"return_logprob": True, "logprob_start_len": 1},
    ),
    "top": (Wants(logprobs=True, top=4), {"top_logprobs_num": 4}),
}  # fmt: skip


def test_every_field_is_told_to_sglang_or_lacks() -> None:
    ours = {field.name for kind in (SamplingParams, Wants) for field in fields(kind)}
    assert SAMPLING.keys() | WANTS.keys() | LACKING.keys() == ours
    assert not (SAMPLING.keys() | WANTS.keys()) & LACKING.keys()


@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampling_field_is_told_in_sglangs_words(name: str) -> None:
    value, told = SAMPLING[name]
    found = asked(replace(PLAIN, **{name: value}))["sampling_params"]
    assert {key: found[key] for key in told} == told
    changed = {key for key in found if found[key] != asked()["sampling_params"][key]}
    assert changed <= told.keys()


@pytest.mark.parametrize("name", WANTS)
def test_a_wish_is_told_in_sglangs_words(name: str) -> None:
    wants, told = WANTS[name]
    found = asked(wants=wants)
    assert {key: found[key] for key in told} == told
    assert found["sampling_params"] == asked()["sampling_params"]


def test_what_asks_for_nothing_is_sglangs_own_nothing() -> None:
    assert asked() == {
        "rid": "7/a",
        "input_ids": [5, 6, 7],
        "stream": True,
        "top_logprobs_num": 0,
        "extra_key": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "sampling_params": {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "logit_bias": None,
            "max_new_tokens": 12,
            "stop_token_ids": [3],
            "ignore_eos": False,
        },
    }


@pytest.mark.parametrize("many", [VOCABULARY, 10**9, 2**53 - 1])
def test_as_many_tokens_as_there_are_is_no_filter(many: int) -> None:
    assert asked(replace(PLAIN, top_k=many))["sampling_params"]["top_k"] == -1


def test_one_filter_follows_the_other_where_both_are_asked_for() -> None:
    both = replace(PLAIN, temperature=1.0, top_k=20, top_p=0.9)
    assert asked(both)["sampling_params"]["min_p"] == LEAST_MIN_P
    assert asked(replace(both, min_p=0.2))["sampling_params"]["min_p"] == 0.2
    assert asked(replace(both, top_p=1.0))["sampling_params"]["min_p"] == 0
    assert asked(replace(both, top_k=0))["sampling_params"]["min_p"] == 0
    # there it would end the scheduler
    assert asked(both, deterministic=True)["sampling_params"]["min_p"] == 0


def test_a_seed_is_told_where_it_is_read() -> None:
    assert "sampling_seed" not in asked()["sampling_params"]
    assert (
        asked(deterministic=True, seed=2**63 - 1)["sampling_params"]["sampling_seed"] == 2**63 - 1
    )
    assert "seed" in lacks(deterministic=False)
    assert "seed" not in lacks(deterministic=True)
    assert "min_p" in lacks(deterministic=True)
    assert "min_p" not in lacks(deterministic=False)
    assert lacks(deterministic=False) == LACKS


def test_a_namespace_is_a_key_of_its_own() -> None:
    assert asked(namespace="salt")["extra_key"] == "salt"


def test_what_was_received_belongs_to_the_prompt_and_its_scores_came_already() -> None:
    wants = Wants(logprobs=True, prompt_logprobs_from=0)
    found = asked(received=(8, 9), wants=wants)
    assert found["input_ids"] == [5, 6, 7, 8, 9]
    assert found["sampling_params"]["max_new_tokens"] == 10
    assert found["logprob_start_len"] == -1
    assert not asked(received=(8,), wants=Wants(prompt_logprobs_from=0))["return_logprob"]


def test_log_probabilities_of_edited_logits_are_not_asked_for() -> None:
    biased = replace(PLAIN, logit_bias=((8, 1.0),))
    assert not asked(biased, wants=Wants(logprobs=True))["return_logprob"]
    prompt_too = asked(biased, wants=Wants(logprobs=True, prompt_logprobs_from=2))
    assert (prompt_too["return_logprob"], prompt_too["logprob_start_len"]) == (True, 2)


def test_scores_are_asked_for_as_those_of_a_prompt() -> None:
    submission = Submission(
        "a", PROMPT, replace(PLAIN, logit_bias=((8, 1.0),)), 0, Wants(logprobs=True, top=2),
        namespace="salt",
    )  # fmt: skip
    found = Requests(VOCABULARY, frozenset(), False).score("8/a", submission, [5, 6, 7, 8, 8], 3)
    assert found["input_ids"] == [5, 6, 7, 8, 8]
    assert found["logprob_start_len"] == 2  # the first told is that of position 3
    assert (found["top_logprobs_num"], found["extra_key"]) == (2, "salt")
    assert found["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("ids", "foreign", "told"),
    [
        ({3, 8}, {3}, (False, [3, 8])),
        ({8}, set(), (False, [8])),
        (set(), set(), (True, None)),
        (set(), {3}, (True, None)),
        ({8}, {3}, (True, None)),  # its own end must not end it, and it is told of both or none
    ],
)
def test_sglang_is_told_of_ends_only_where_it_knows_of_no_others(
    ids: set[int], foreign: set[int], told: tuple[bool, list[int] | None]
) -> None:
    found = ending(frozenset(ids), frozenset(foreign))
    assert (found["ignore_eos"], found["stop_token_ids"]) == told


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ({"type": "stop", "matched": 8}, Finish("stop", matched=8)),
        ({"type": "length", "length": 12}, Finish("length")),
        (
            {"type": "abort", "message": "Aborted", "status_code": None},
            Finish("abort", message="Aborted"),
        ),
        (
            {"type": "abort", "message": "Abort in waiting queue"},
            Finish("abort", message="Abort in waiting queue"),
        ),
        (
            {"type": "abort", "message": "too\n long", "status_code": 400},
            Finish("error", message="SGLang: too long"),
        ),
        (
            {"type": "stop", "matched": "NaN happened"},
            Finish("error", message="SGLang: NaN happened"),
        ),
    ],
)
def test_the_end_of_an_answer_is_told_in_our_words(reason: dict[str, Any], finish: Finish) -> None:
    assert finish_of(reason) == finish


def test_log_probabilities_are_read_with_the_most_probable_ones() -> None:
    told = [(-0.5, 8, None), (-1.5, 9, None)]
    top = [[(-0.5, 8, None), (-0.9, 7, None)], [(-0.7, 5, None), (-1.5, 9, None)]]
    assert logprobs_of((8, 9), told, []) == [TokenLogprob(8, -0.5), TokenLogprob(9, -1.5)]
    assert logprobs_of((8, 9), told, top) == [
        TokenLogprob(8, -0.5, ((8, -0.5), (7, -0.9))),
        TokenLogprob(9, -1.5, ((5, -0.7), (9, -1.5))),
    ]
    assert logprobs_of((8,), told, top) == [TokenLogprob(8, -0.5, ((8, -0.5), (7, -0.9)))]
