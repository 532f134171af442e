"""Log-probabilities in both of OpenAI's shapes, beside those that the engine's model says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI

from api.answers import Answer, Answers, Whole
from api.openai_logprobs import LEAST, ChatShape, CompletionShape, Offsets, Scores, Spelling
from api.replies import SLICE
from backend.interface import Finish, TokenLogprob
from backend.tokenizer import ByteTokenizer
from tests.api.hand_fed import SCORED, HandFedPool, ask, opened
from tests.api.in_process import MODEL, Server
from tests.api.openai_bench import chunks, post, run

Json = dict[str, Any]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story"}]
BYTES = ByteTokenizer()


def expected(context: Sequence[int], token: int, top: int) -> TokenLogprob:
    """What the model thinks of `token` after `context`."""
    return MODEL.logprob(token, MODEL.after(context), top)


def text(token: int) -> str:
    return BYTES.table[token].decode(errors="replace")


# Completions


@pytest.mark.parametrize("top", [0, 1, 3])
def test_a_completion_has_four_lists_side_by_side(top: int) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.completions.create(
            model="fake", prompt="Once", max_tokens=8, seed=3, logprobs=top
        )
        (live,) = server.pool.submitted
        scores = [
            expected([*live.submission.prompt, *live.received[:place]], token, top)
            for place, token in enumerate(live.received)
        ]
        (choice,) = answer.choices
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == [text(token) for token in live.received]
        assert choice.logprobs.token_logprobs == [each.logprob for each in scores]
        assert choice.logprobs.top_logprobs == [
            {text(id): value for id, value in (*each.top, (each.token, each.logprob))}
            for each in scores
        ]
        assert choice.logprobs.text_offset == list(range(8))
        assert len(choice.text) == 8

    run(check)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Once", ["Once", "upon a"], [79, 110], [[79], [110, 99, 101]]])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_evaluation_reads_the_log_probabilities_of_its_prompts(
    prompt: Any, max_tokens: int, stream: bool
) -> None:
    """What lm-eval's local-completions sends, and how it reads the answer."""

    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
        response = await server.client.post(
            COMPLETIONS, json={**body, "temperature": 0, "stream": stream}
        )
        replies = chunks(response) if stream else [response.json()]
        for index, live in enumerate(server.pool.submitted):
            context = [*live.submission.prompt, *live.received]
            parts = [c for each in replies for c in each["choices"] if c["index"] == index]
            assert "".join(part["text"] for part in parts) == "".join(
                BYTES.visible[id].decode() for id in context
            )
            lists = [part["logprobs"] for part in parts if part["logprobs"]]
            values = [value for each in lists for value in each["token_logprobs"]]
            tops = [value for each in lists for value in each["top_logprobs"]]
            offsets = [value for each in lists for value in each["text_offset"]]
            scores = [
                expected(context[:place], context[place], 1) for place in range(1, len(context))
            ]
            assert values == [None, *(each.logprob for each in scores)]
            assert tops[0] is None
            greedy = [
                value == max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True)
            ]
            assert greedy == [each.logprob >= each.top[0][1] for each in scores]
            shown = [len(BYTES.visible[id]) for id in context]
            assert offsets == [sum(shown[:place]) for place in range(len(context))]

    run(check)


def test_an_echo_without_log_probabilities_asks_for_none() -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": "Once", "max_tokens": 2, "echo": True, "n": 2}
        answer = (await server.client.post(COMPLETIONS, json=body)).json()
        assert all(each["text"].startswith("Once") for each in answer["choices"])
        assert all(each["logprobs"] is None for each in answer["choices"])
        wanted = {live.submission.wants.prompt_logprobs_from for live in server.pool.submitted}
        assert wanted == {None}

    run(check)


def test_a_character_of_several_tokens_begins_where_its_first_token_does() -> None:
    offsets = Offsets(BYTES, True, echoed=0)
    assert [offsets.next(token) for token in "aéb".encode()] == [0, 1, 1, 2]


def test_the_answer_of_an_echo_begins_behind_whatever_ended_the_prompt() -> None:
    half, other = "é".encode()
    offsets = Offsets(BYTES, True, echoed=2)
    assert [offsets.next(token) for token in (97, half, other, 98)] == [0, 1, 2, 3]


# Chat


def test_a_chat_has_an_object_for_each_token() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=8,
            seed=3,
            logprobs=True,
            top_logprobs=2,
        )
        (live,) = server.pool.submitted
        (choice,) = answer.choices
        assert choice.logprobs is not None
        assert choice.logprobs.refusal is None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 8
        for place, entry in enumerate(choice.logprobs.content):
            context = [*live.submission.prompt, *live.received[:place]]
            score = expected(context, live.received[place], 2)
            assert (entry.token, entry.logprob) == (text(score.token), score.logprob)
            assert bytes(entry.bytes or ()) == BYTES.table[score.token]
            top = [(each.token, each.logprob) for each in entry.top_logprobs]
            assert top == [(text(id), value) for id, value in score.top]

    run(check)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_tokens_are_called_by_their_ids_where_that_is_wanted(path: str) -> None:
    asked: Json = {"max_tokens": 2, "logit_bias": {"233": 100}, "return_tokens_as_token_ids": True}
    if path == CHAT:
        answer = post(path, {**asked, "messages": MESSAGES, "logprobs": True, "top_logprobs": 1})
        content = answer.json()["choices"][0]["logprobs"]["content"]
        assert [each["token"] for each in content] == ["token_id:233"] * 2
        assert [each["bytes"] for each in content] == [[233]] * 2
    else:
        answer = post(path, {**asked, "prompt": "a", "logprobs": 0})
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["token_id:233"] * 2
        assert [list(each) for each in logprobs["top_logprobs"]] == [["token_id:233"]] * 2


def test_half_a_character_is_spelled_by_its_bytes() -> None:
    spelling = Spelling(BYTES)
    assert (spelling.text(0xC3), spelling.key(0xC3)) == ("\ufffd", "bytes:\\xc3")
    assert (spelling.text(97), spelling.key(97)) == ("a", "a")


def test_what_cannot_be_drawn_is_a_number_all_the_same() -> None:
    score = TokenLogprob(97, float("-inf"), ((98, 0.0), (97, float("-inf"))))
    (entry,) = ChatShape(Spelling(BYTES)).lists([(97, score)])["content"]
    assert entry["logprob"] == LEAST
    shape = CompletionShape(Spelling(BYTES), Offsets(BYTES, True, 0))
    assert shape.lists([(97, score)])["top_logprobs"] == [{"b": 0.0, "a": LEAST}]


# Long ones


def scored_answers(tokens: int) -> tuple[HandFedPool, Answers]:
    """An answer under way whose prompt of three tokens has been scored very often."""
    pool = HandFedPool()
    answers = opened(pool, replace(ask(), wants=SCORED))
    pool.feed(0, prompt_logprobs=[TokenLogprob(97, -1.0)] * tokens)
    return pool, answers


def test_a_long_prompts_scores_come_in_bounded_pieces_and_the_answer_behind_them() -> None:
    pool, answers = scored_answers(1000)
    pool.feed(0, b"end", Finish("length"), logprobs=[TokenLogprob(token, 0.0) for token in b"end"])

    async def pieces() -> list[tuple[int, str]]:
        seen = []
        while news := await answers.pieces():
            seen += [(len(piece.prompt_logprobs), piece.text) for _, piece in news]
        return seen

    seen = asyncio.run(pieces())
    assert sum(count for count, _ in seen) == 1000
    assert max(count for count, _ in seen) <= 256
    assert [piece for _, piece in seen] == [""] * (len(seen) - 1) + ["end"]


def test_a_large_body_lets_others_work_between_slices() -> None:
    _, answers = scored_answers(0)
    (answer,) = answers.all
    assert isinstance(answer, Answer)
    logprobs = [TokenLogprob(97, -1.0)] * (SLICE * 10)
    whole = Whole(answer, "", [], Finish("length"), logprobs, [])
    turns = []

    async def others() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def scenario() -> dict[str, Any]:
        task = asyncio.create_task(others())
        written = await Scores(ChatShape(Spelling(BYTES)), answer).whole(whole)
        task.cancel()
        return written

    assert asyncio.run(scenario())["refusal"] is None
    assert len(turns) >= 10
