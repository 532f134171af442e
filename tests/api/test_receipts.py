"""A receipt says what is known, and null for the rest."""

from __future__ import annotations

from typing import Any

import pytest

from api.answers import Answer
from api.receipts import receipt
from backend.interface import Finish, SamplingParams, Submission, Work
from backend.tokenizer import ByteTokenizer
from engine.live_request import LiveRequest
from engine.text import TextStream


def answered(**known: Any) -> dict[str, Any]:
    """The receipt of an answer to ten tokens that arrived at 100 s; `known` is what came of it."""
    submission = Submission("a", (1,) * 10, SamplingParams(), seed=0, arrival=100.0)
    live = LiveRequest(submission, "a", "", lambda _: None)
    for name, value in known.items():
        setattr(live, name, value)
    return receipt(Answer(0, live, TextStream(ByteTokenizer())))


DONE = {"placed": 101.0, "first_token": 103.0, "ended": 107.0, "replica": 1, "cached": 4}


def test_an_answer_that_came_to_its_end_has_all_of_it() -> None:
    assert answered(**DONE, work=Work(steps=4, rows=10, yields=1, computed=9)) == {
        "queue_s": 1.0,
        "prefill_s": 2.0,
        "decode_s": 4.0,
        "cached_tokens": 4,
        "computed_tokens": 9,
        "steps": 4,
        "mean_batch": 2.5,
        "yields": 1,
        "replica": 1,
    }


def test_without_the_engines_count_a_plain_run_is_assumed() -> None:
    found = answered(**DONE)
    assert found["computed_tokens"] == 6
    assert (found["steps"], found["mean_batch"], found["yields"]) == (None, None, None)


@pytest.mark.parametrize(
    ("known", "times"),
    [
        ({"ended": 105.0}, (5.0, None, None)),  # while it waited
        ({"placed": 101.0, "ended": 105.0}, (1.0, 4.0, None)),  # in its prompt, or no token asked
        ({"placed": 101.0, "first_token": 102.0, "ended": 105.0}, (1.0, 1.0, 3.0)),
    ],
)
def test_an_answer_that_was_aborted_has_what_it_came_to(
    known: dict[str, Any], times: tuple[float | None, ...]
) -> None:
    found = answered(finish=Finish("abort"), work=Work(0, 0, 0, 0), **known)
    assert (found["queue_s"], found["prefill_s"], found["decode_s"]) == times
    assert (found["steps"], found["mean_batch"]) == (0, None)
