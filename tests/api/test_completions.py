"""`/v1/completions`: what OpenAI's client sends and reads, and the bytes between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import APIError, AsyncOpenAI, InternalServerError

from backend.interface import Finish, SamplingParams
from tests.api.in_process import Server
from tests.api.openai_bench import chunks, lose_the_device, post, refusal, run, text_of

PATH = "/v1/completions"
PROMPT = "Once upon a time"
GREEDY: Mapping[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}


def ids(text: str) -> list[int]:
    """Of the built-in tokenizer, as a prompt has them."""
    return [256, *text.encode()]


# The answer, whole


def test_the_official_client_reads_a_whole_answer() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.completions.create(model="fake", prompt=PROMPT, max_tokens=9, seed=3)
        assert answer.id.startswith("cmpl-")
        assert (answer.object, answer.model) == ("text_completion", "fake")
        (choice,) = answer.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert choice.text == text_of(server)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids(PROMPT))
        assert answer.usage.completion_tokens == 9
        assert answer.usage.total_tokens == len(ids(PROMPT)) + 9

    run(check)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("ab", [ids("ab")]),
        (["ab", "", "ünï"], [ids("ab"), ids(""), ids("ünï")]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
)
def test_a_prompt_has_one_of_four_forms(prompt: Any, asked: list[list[int]]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=2)
        assert [list(live.submission.prompt) for live in server.pool.submitted] == asked
        assert [choice.index for choice in answer.choices] == list(range(len(asked)))
        assert [choice.text for choice in answer.choices] == [
            text_of(server, index) for index in range(len(asked))
        ]

    run(check)


def test_n_answers_of_each_prompt_stand_side_by_side_and_share_its_tokens() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.completions.create(
            model="fake", prompt=["one", "two and more"], n=3, seed=7, max_tokens=8
        )
        asked = [live.submission for live in server.pool.submitted]
        assert [list(each.prompt) for each in asked] == [ids("one")] * 3 + [ids("two and more")] * 3
        assert [each.seed for each in asked] == [7, 8, 9] * 2
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == [text_of(server, i) for i in range(6)]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids("one")) + len(ids("two and more"))
        assert answer.usage.completion_tokens == sum(
            len(live.received) for live in server.pool.submitted
        )

    run(check)


def test_a_prompt_answered_by_the_cache_is_counted_as_such() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        cached = []
        for _ in range(2):
            answer = await client.completions.create(
                model="fake", prompt=[7] * 40, n=2, max_tokens=2
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert cached == [0, 32]  # whole pages of 16

    run(check)


# The answer, streamed


@pytest.mark.parametrize(
    "more",
    [{}, {"n": 3}, {"stop": "e"}, {"stop": ["no such text"], "n": 2}, {"prompt": ["a", "b", "c"]}],
)
def test_a_stream_says_what_the_whole_answer_says(more: dict[str, Any]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body = {"model": "fake", "prompt": PROMPT, "seed": 5, "max_tokens": 60, **more}
        whole = await client.completions.create(**body)
        stream = await client.completions.create(
            **body, stream=True, stream_options={"include_usage": True}
        )
        seen = [chunk async for chunk in stream]
        assert len({(each.id, each.created, each.model, each.object) for each in seen}) == 1
        assert all(each.usage is None for each in seen[:-1])
        assert seen[-1].choices == []
        assert seen[-1].usage is not None
        assert whole.usage is not None
        assert seen[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert seen[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        for choice in whole.choices:
            pieces = [
                piece for each in seen for piece in each.choices if piece.index == choice.index
            ]
            assert "".join(piece.text for piece in pieces) == choice.text
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            assert pieces[-1].finish_reason == choice.finish_reason

    run(check)


def test_the_bytes_of_a_stream_are_those_of_openai() -> None:
    body = {"prompt": [34, 10, 92], "max_tokens": 2, "temperature": 0, "logit_bias": {"34": 100}}
    response = post(PATH, {**body, "stream": True})
    head = {key: chunks(response)[0][key] for key in ("id", "object", "created", "model")}
    assert head["object"] == "text_completion"

    def event(text: str, finish: Mapping[str, object]) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, **finish}
        return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"

    going = {"finish_reason": None}
    ended = {"finish_reason": "length", "matched_stop": None}
    texts = event('"', going) * 2 + event("", ended)
    assert response.content == texts + b"data: [DONE]\n\n"


def test_counts_come_only_when_asked_for() -> None:
    for options in (None, {}, {"include_usage": None}, {"include_usage": False}):
        seen = chunks(post(PATH, {**GREEDY, "stream": True, "stream_options": options}))
        assert all("usage" not in each and each["choices"] for each in seen)


def test_characters_of_several_tokens_are_never_cut() -> None:
    bias = {str(byte): 100 for byte in "é".encode()}
    body = {"prompt": "x", "max_tokens": 40, "seed": 1, "logit_bias": bias}
    seen = chunks(post(PATH, {**body, "stream": True}))
    text = "".join(choice["text"] for each in seen for choice in each["choices"])
    assert text == post(PATH, body).json()["choices"][0]["text"]
    assert "é" in text


# How it ends


def test_a_stop_string_ends_the_answer_and_is_named() -> None:
    text = post(PATH, GREEDY).json()["choices"][0]["text"]
    stop = text[10:13]
    answer = post(PATH, {**GREEDY, "stop": [stop, "never said"]}).json()
    (choice,) = answer["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", stop)
    assert answer["usage"]["completion_tokens"] == text.index(stop) + len(stop)


def test_a_stop_token_ends_the_answer_and_is_named() -> None:
    text = post(PATH, GREEDY).json()["choices"][0]["text"]
    (choice,) = post(PATH, {**GREEDY, "stop_token_ids": [ord(text[5])]}).json()["choices"]
    assert choice["text"] == text[: text.index(text[5])]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", ord(text[5]))


def test_an_answer_of_no_tokens_is_one() -> None:
    for stream in (False, True):
        response = post(PATH, {**GREEDY, "max_tokens": 0, "stream": stream})
        answers = chunks(response) if stream else [response.json()]
        (choice,) = answers[0]["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        assert len(answers) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_answer_says_so(stream: bool) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 4000, "stream": stream}
        task = asyncio.create_task(server.client.post(PATH, json=body))
        while not (server.pool.submitted and server.pool.submitted[0].received):
            await asyncio.sleep(0)
        assert server.pool.abort() == 1
        response = await task
        last = chunks(response)[-1] if stream else response.json()
        assert last["choices"][0]["finish_reason"] == "abort"

    run(check)


def test_an_engine_that_fails_before_the_first_byte_is_a_503() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        lose_the_device(server, after=1)
        for stream in (False, True):
            with pytest.raises(InternalServerError, match="the device is lost") as error:
                await client.completions.create(model="fake", prompt="a", stream=stream)
            assert error.value.status_code == 503

    run(check)


def test_an_engine_that_fails_later_ends_the_stream_with_the_error() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        lose_the_device(server, after=9)
        body = {"prompt": "a", "ignore_eos": True, "max_tokens": 50, "stream": True}
        response = await server.client.post(PATH, json=body)
        *texts, last = chunks(response)
        assert response.status_code == 200
        assert texts
        assert all(each["choices"][0]["finish_reason"] is None for each in texts)
        assert last["error"].keys() == {"message", "type", "param", "code"}
        assert last["error"]["message"] == "the device is lost"
        stream = await client.completions.create(
            model="fake", prompt="a", max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(APIError, match="the device is lost"):
            [chunk async for chunk in stream]

    run(check)


def test_an_answer_that_fails_leaves_the_others_of_its_stream() -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": ["a", "b"], "ignore_eos": True, "max_tokens": 40, "stream": True}
        task = asyncio.create_task(server.client.post(PATH, json=body))
        while not (server.pool.submitted and len(server.pool.submitted[0].received) > 5):
            await asyncio.sleep(0)
        live = server.pool.submitted[0]
        server.pool.end(live, Finish("error", message="the device is lost"))
        live.notify(live)
        seen = chunks(await task)
        assert [each["error"]["message"] for each in seen if "error" in each] == [
            "the device is lost"
        ]
        ends = [each["choices"][0] for each in seen if "choices" in each]
        reasons = [(each["index"], each["finish_reason"]) for each in ends if each["finish_reason"]]
        assert reasons == [(1, "length")]

    run(check)


def test_a_server_that_drains_refuses_with_503() -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        server.pool.drain()
        response = await server.client.post(PATH, json=GREEDY)
        assert refusal(response) == (503, None)
        assert "retry-after" in response.headers

    run(check)


# What is asked of the engine


def test_every_sampling_field_reaches_the_engine() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        await client.completions.create(
            model="fake",
            prompt="a",
            max_tokens=6,
            temperature=0.5,
            top_p=0.25,
            frequency_penalty=-1.5,
            presence_penalty=2,
            logit_bias={"65": -100, "66": 5},
            seed=11,
            user="somebody",
            extra_body={
                "top_k": 4,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "min_tokens": 3,
                "ignore_eos": True,
                "stop_token_ids": [1, 2],
            },
        )
        (live,) = server.pool.submitted
        assert live.submission.seed == 11
        assert live.submission.sampling == SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            frequency_penalty=-1.5,
            presence_penalty=2,
            repetition_penalty=1.5,
            logit_bias=((65, -100), (66, 5)),
            max_new_tokens=6,
            min_new_tokens=3,
            stop_token_ids=(1, 2),
            ignore_eos=True,
        )

    run(check)


@pytest.mark.parametrize("nothing", [{}, dict.fromkeys(SamplingParams.__slots__)])
def test_who_asks_for_nothing_gets_the_defaults(nothing: dict[str, None]) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": "a", "stop": "e"} | nothing
        for prompt in ("a", "b" * 8000):
            assert (await server.client.post(PATH, json={**body, "prompt": prompt})).is_success
        short, long = (live.submission.sampling for live in server.pool.submitted)
        assert short == SamplingParams(temperature=1.0, max_new_tokens=300)
        room = server.pool.spec.max_model_len - len(ids("b" * 8000))
        assert long == SamplingParams(temperature=1.0, max_new_tokens=room)

    for name in ("max_new_tokens", "min_new_tokens"):
        nothing.pop(name, None)  # not the names of this route
    run(check, MAX_NEW_TOKENS_DEFAULT=300)


def test_the_defaults_are_those_of_the_model(small_model: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(small_model / file)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.8}')

    async def check(server: Server, _: AsyncOpenAI) -> None:
        for more in ({}, {"top_p": 1}):
            body = {"prompt": "a", "max_tokens": 1, **more}
            assert (await server.client.post(PATH, json=body)).is_success
        first, second = (live.submission.sampling for live in server.pool.submitted)
        assert (first.temperature, first.top_p) == (0.7, 0.8)
        assert (second.temperature, second.top_p) == (0.7, 1)

    run(check, MODEL_LOCAL_DIR=tmp_path)


def test_special_tokens_are_shown_where_they_are_wanted() -> None:
    body = {"prompt": "a", "max_tokens": 2, "temperature": 0, "logit_bias": {"258": 100}}
    for skip, text in ((None, ""), (True, ""), (False, "<|im_start|>" * 2)):
        (choice,) = post(PATH, {**body, "skip_special_tokens": skip}).json()["choices"]
        assert choice["text"] == text


@pytest.mark.parametrize(
    ("name", "status"), [(None, 200), ("mine", 200), ("fake", 200), ("gpt-4", 404), ("", 404)]
)
def test_the_model_goes_by_its_names_only(name: str | None, status: int) -> None:
    response = post(PATH, {**GREEDY, "model": name}, MODEL_ALIAS="mine")
    assert response.status_code == status
    if status == 200:
        assert response.json()["model"] == "mine"
    else:
        assert response.json()["error"]["code"] == "model_not_found"


def test_a_model_without_a_tokenizer_refuses_text_routes(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(small_model / "config.json")
    for prompt in ("a", [1, 2]):
        response = post(PATH, {"prompt": prompt}, MODEL_LOCAL_DIR=tmp_path)
        assert refusal(response) == (400, "prompt")
        assert "/generate" in response.json()["error"]["message"]


def test_the_description_of_the_api_names_every_field() -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        routes = (await server.client.get("/openapi.json")).json()["paths"]
        body = routes[PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"prompt", "max_tokens", "stop", "top_k"} <= body["properties"].keys()

    run(check)
