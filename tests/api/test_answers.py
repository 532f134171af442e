"""The answers of one request: from the tokens that a pool brings to pieces and wholes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from api.answers import ABANDONED, Answers, Piece, Whole
from backend.interface import (
    BackendFailed,
    Finish,
    NeverFits,
    Overloaded,
    RequestRefused,
    TokenLogprob,
    TooLong,
    Unavailable,
)
from backend.tokenizer import ByteTokenizer
from engine.multi_device import EnginePool
from tests.api.hand_fed import (
    BROKEN,
    LENGTH,
    PROMPT,
    PROMPT_SCORES,
    SCORED,
    HandFedPool,
    ask,
    opened,
    scores,
)


def take(answers: Answers) -> list[tuple[int, Piece]]:
    """The next pieces, each with the index of its answer."""
    pieces = asyncio.run(asyncio.wait_for(answers.pieces(), 5))
    return [(answer.index, piece) for answer, piece in pieces]


def only(answers: Answers) -> Piece:
    """The next piece, of the only answer that has news."""
    [(_, piece)] = take(answers)
    return piece


def wholes(answers: Answers) -> list[Whole]:
    return asyncio.run(asyncio.wait_for(answers.whole(), 5))


# Pieces


def test_a_late_reader_gets_all_that_has_come_in_one_piece() -> None:
    pool = HandFedPool()
    answers = opened(pool, replace(ask(), wants=SCORED))
    for place, token in enumerate(b"late"):
        pool.feed(0, [token], logprobs=[scores(b"late")[place]])
    piece = only(answers)
    assert (piece.text, list(piece.token_ids)) == ("late", list(b"late"))
    assert piece.logprobs == scores(b"late")


def test_pieces_come_in_the_order_of_their_arrival() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask(n=2), ask())
    for index, text in ((2, b"a"), (0, b"b"), (2, b"c")):
        pool.feed(index, text)
    assert [(index, piece.text) for index, piece in take(answers)] == [(2, "ac"), (0, "b")]


def test_half_a_character_waits_for_the_other_half_and_not_beyond_the_end() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask())
    first, second = "é".encode()
    texts = []
    for tokens, finish in (([first], None), ([second, first], None), ([], LENGTH)):
        pool.feed(0, tokens, finish)
        texts.append(only(answers).text)
    assert texts == ["", "é", "\ufffd"]


# Where an answer ends


def test_what_comes_after_a_stop_string_is_not_told_and_the_pool_hears_of_the_stop() -> None:
    pool = HandFedPool()
    answers = opened(pool, replace(ask("ST"), wants=SCORED))
    pool.feed(0, b"goS", logprobs=scores(b"goS"))
    assert only(answers).text == "go"
    pool.feed(0, b"Tmore", logprobs=scores(b"Tmore"))
    piece = only(answers)
    assert (piece.text, list(piece.token_ids)) == ("", list(b"T"))
    assert piece.logprobs == scores(b"T")
    assert piece.finish == Finish("stop", matched="ST")
    assert pool.ended == [(0, piece.finish)]
    assert answers.all[0].completion_tokens == 4
    answers.close()
    assert len(pool.ended) == 1


def test_a_stop_string_that_comes_with_the_engines_finish_is_the_finish() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask("ST"))
    pool.feed(0, b"goSTop", LENGTH)
    [whole] = wholes(answers)
    assert (whole.text, whole.finish) == ("go", Finish("stop", matched="ST"))
    assert pool.ended == []  # it had ended


def test_news_after_the_end_are_nobodys() -> None:
    """Who reads goes on waiting for a sibling, whatever is still said of the one that ended."""
    pool = HandFedPool()
    answers = opened(pool, ask("ST", n=2))
    pool.feed(0, b"ST")
    assert only(answers).finish == Finish("stop", matched="ST")

    async def scenario() -> list[tuple[int, str]]:
        reader = asyncio.create_task(answers.pieces())
        for _ in range(2):
            pool.requests[0].notify(pool.requests[0])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not reader.done()
        pool.requests[0].notify(pool.requests[0])
        pool.feed(1, b"on")
        return [(answer.index, piece.text) for answer, piece in await reader]

    assert asyncio.run(scenario()) == [(1, "on")]


def test_a_stop_token_counts_and_has_text_only_where_it_is_kept() -> None:
    stop = Finish("stop", matched=ord("."))
    for keep, text in ((False, "end"), (True, "end.")):
        pool = HandFedPool()
        answers = opened(pool, replace(ask(), keep_stop=keep))
        pool.feed(0, b"end.", stop)
        [whole] = wholes(answers)
        assert (whole.text, whole.finish, whole.token_ids) == (text, stop, list(b"end."))
        assert whole.answer.completion_tokens == 4


def test_special_tokens_have_text_only_where_they_are_not_skipped() -> None:
    for skip, text in ((True, "a"), (False, "a<|im_end|>")):
        pool = HandFedPool()
        answers = opened(pool, replace(ask(), skip_special_tokens=skip))
        pool.feed(0, [97, 259], LENGTH)
        assert only(answers).text == text


def test_an_aborted_answer_ends_with_what_it_had() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask("never"))
    aborted = Finish("abort", message="aborted")
    pool.feed(0, b"so far, nev", aborted)
    assert wholes(answers)[0].text == "so far, nev"
    assert answers.all[0].live.finish == aborted


# Log-probabilities of the prompt


@pytest.mark.parametrize(
    "deltas",
    [
        [(b"a", None, PROMPT_SCORES), (b"b", LENGTH, [])],
        [(b"", None, []), (b"a", LENGTH, PROMPT_SCORES)],
        [(b"", None, PROMPT_SCORES), (b"", None, []), (b"a", LENGTH, [])],
        [(b"a", None, []), (b"b", LENGTH, PROMPT_SCORES)],
        [(b"", None, PROMPT_SCORES[:1]), (b"a", LENGTH, PROMPT_SCORES[1:])],
        [(b"", LENGTH, PROMPT_SCORES)],
    ],
    ids=["first", "late", "before", "after", "in parts", "no tokens"],
)
@pytest.mark.parametrize("eager", [True, False])
def test_the_prompts_log_probabilities_come_exactly_once(
    deltas: list[tuple[bytes, Finish | None, list[TokenLogprob]]], eager: bool
) -> None:
    pool = HandFedPool()
    answers = opened(pool, replace(ask(), wants=SCORED))
    pieces = []
    for tokens, finish, prompt_logprobs in deltas:
        pool.feed(0, tokens, finish, prompt_logprobs=prompt_logprobs)
        if eager or finish is not None:
            pieces.append(only(answers))
    assert [each for piece in pieces for each in piece.prompt_logprobs] == PROMPT_SCORES
    assert pieces[-1].finish == LENGTH


def test_a_piece_stays_as_it_was_taken() -> None:
    pool = HandFedPool()
    answers = opened(pool, replace(ask(), wants=SCORED))
    pool.feed(0, b"a", None, scores(b"a"), PROMPT_SCORES)
    piece = only(answers)
    pool.feed(0, b"b", LENGTH, scores(b"b"), PROMPT_SCORES)
    assert (piece.token_ids, piece.logprobs) == ([97], scores(b"a"))
    assert piece.prompt_logprobs == PROMPT_SCORES


# What is submitted


def test_each_prompt_is_submitted_n_times_under_one_request_id() -> None:
    pool = HandFedPool()
    answers = opened(pool, replace(ask(n=3, seed=7), wants=SCORED), ask(seed=7))
    submissions = [request.submission for request in pool.requests]
    assert [answer.live for answer in answers.all] == pool.requests
    assert [answer.index for answer in answers.all] == [0, 1, 2, 3]
    assert [each.seed for each in submissions] == [7, 8, 9, 7]
    assert len({each.id for each in submissions}) == 4
    assert {request.request_id for request in pool.requests} == {"gen-1"}
    assert {request.owner for request in pool.requests} == {"somebody"}
    assert {each.prompt for each in submissions} == {PROMPT}
    assert [each.wants == SCORED for each in submissions] == [True, True, True, False]
    assert {each.max_new_tokens for each in submissions} == {40}
    assert answers.all[0].prompt_tokens == len(PROMPT)


def test_only_the_answers_of_one_prompt_are_a_group() -> None:
    pool = HandFedPool()
    opened(pool, ask(n=2), ask(), ask(n=2))
    groups = [request.submission.group for request in pool.requests]
    assert groups[0] == groups[1] is not None
    assert groups[2] is None
    assert groups[3] == groups[4] is not None
    assert groups[0] != groups[3]


def test_a_seed_that_nobody_gave_is_drawn_for_each_prompt() -> None:
    pool = HandFedPool()
    opened(pool, ask(n=2), ask(n=2))
    first, second, third, fourth = (request.submission.seed for request in pool.requests)
    assert (second, fourth) == (first + 1, third + 1)
    assert first != third


def test_a_default_length_is_clamped_to_the_room_and_an_explicit_one_is_refused() -> None:
    pool = HandFedPool()
    long = tuple([97] * 60)  # of 64
    opened(pool, ask(max_new_tokens=None), replace(ask(max_new_tokens=None), prompt=long))
    assert [request.submission.max_new_tokens for request in pool.requests] == [16, 4]
    with pytest.raises(TooLong):
        opened(pool, replace(ask(max_new_tokens=5), prompt=long))
    with pytest.raises(RequestRefused, match="seed"):
        opened(pool, ask(n=2, seed=2**63 - 1))


@pytest.mark.parametrize(
    "refusal",
    [
        RequestRefused("no", "rid"),
        NeverFits("no", "prompt"),
        Overloaded("no", 3, 1.0, 2.0),
        Unavailable("no"),
    ],
)
def test_answers_that_were_refused_leave_nothing_to_end(refusal: Exception) -> None:
    pool = HandFedPool(refusal=refusal)
    answers = Answers("gen-1", cast(EnginePool, pool))
    with pytest.raises(type(refusal)):
        answers.open([ask(n=2)], ByteTokenizer(), owner="", default_length=16)
    assert take(answers) == []
    answers.close()
    assert (pool.requests, pool.ended) == ([], [])


def test_warnings_of_the_pool_follow_those_of_the_request() -> None:
    pool = HandFedPool(warnings=["lowered"])
    answers = Answers("gen-1", cast(EnginePool, pool), ["unknown"])
    answers.open([ask()], ByteTokenizer(), owner="", default_length=16)
    assert answers.warnings == ["unknown", "lowered"]


def test_no_prompts_have_no_answers() -> None:
    assert wholes(opened(HandFedPool())) == []


# How it fails, and how it is given up


def test_an_engine_that_fails_one_answer_fails_the_whole_and_closing_ends_the_others() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask(n=3))
    pool.feed(0, b"done", LENGTH)
    pool.feed(1, b"some", BROKEN)
    with pytest.raises(BackendFailed, match="out of luck"):
        wholes(answers)
    assert pool.ended == []
    answers.close()
    assert pool.ended == [(2, ABANDONED)]


def test_a_failure_without_words_is_told_in_ours() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask())
    pool.feed(0, finish=Finish("error"))
    with pytest.raises(BackendFailed, match="the engine failed"):
        wholes(answers)


def test_what_had_come_before_a_failure_is_in_the_last_piece() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask("never"))
    pool.feed(0, b"so far, nev", BROKEN)
    piece = only(answers)
    assert (piece.text, piece.finish) == ("so far, nev", BROKEN)


def test_closing_ends_what_goes_on_and_nothing_else_and_only_once() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask("ST", n=2), ask(n=2))
    pool.feed(0, b"ST")
    pool.feed(2, b"x", LENGTH)
    take(answers)
    for _ in range(2):
        answers.close()
        assert pool.ended == [(0, Finish("stop", matched="ST")), (1, ABANDONED), (3, ABANDONED)]
    assert take(answers) == []


def test_a_finish_that_nobody_has_read_stays_the_finish() -> None:
    pool = HandFedPool()
    answers = opened(pool, ask())
    pool.feed(0, b"x", LENGTH)
    answers.close()
    assert (pool.requests[0].finish, pool.ended) == (LENGTH, [])
    assert take(answers) == []
