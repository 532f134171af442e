"""`POST /generate`: which form a body is in, and that no body does any harm."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from api.generate import router
from tests.api.in_process import post, refusal, serve

NDJSON = "application/x-ndjson"
SHORT: dict[str, Any] = {"max_new_tokens": 2}


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        ({"prompt": "a", **SHORT}, NDJSON),
        ({"prompt": "a", "stream": True, **SHORT}, NDJSON),
        ({"prompt": "a", "stream": False, **SHORT}, "application/json"),
        ({"text": "a", "sampling_params": SHORT}, "application/json"),
        ({"text": "a", "sampling_params": SHORT, "stream": True}, "text/event-stream"),
        ({"input_ids": [97], "sampling_params": SHORT, "stream": False}, "application/json"),
        ({"text": "a", "prompt": None, "seed": None, "sampling_params": SHORT}, "application/json"),
    ],
)
def test_the_fields_of_a_body_say_its_form(body: dict[str, Any], media_type: str) -> None:
    response = post(router, "/generate", body)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type


@pytest.mark.parametrize(
    ("body", "ours", "theirs"),
    [
        ({"prompt": "a", "text": "b"}, "prompt", "text"),
        ({"prompt": "a", "input_ids": [1]}, "prompt", "input_ids"),
        ({"prompt": "a", "sampling_params": {}}, "prompt", "sampling_params"),
        ({"prompt": "a", "rid": "x"}, "prompt", "rid"),
        ({"prompt": "a", "image_data": "x"}, "prompt", "image_data"),
        ({"text": "a", "temperature": 1}, "temperature", "text"),
        ({"text": "a", "max_new_tokens": 5, "seed": 1}, "max_new_tokens, seed", "text"),
    ],
)
def test_a_body_of_both_forms_is_told_which_field_belongs_to_which(
    body: dict[str, Any], ours: str, theirs: str
) -> None:
    response = post(router, "/generate", body)
    assert refusal(response) == (400, theirs)
    message = response.json()["error"]["message"]
    assert f"{ours} of ours" in message
    assert f"{theirs} of SGLang's" in message


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"max_new_tokens": 1}, {"prompt": None}])
def test_a_body_of_neither_form_is_told_what_to_give(body: dict[str, Any]) -> None:
    response = post(router, "/generate", body)
    assert refusal(response) == (400, "prompt")
    assert "text or input_ids" in response.json()["error"]["message"]


HUGE = 10**30
DEEP = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"

# bodies that are no JSON object at all
NO_OBJECT = [
    b"",
    b"{",
    b"null",
    b"5",
    b'"prompt"',
    b'["prompt"]',
    b"prompt=a",
    b'{"prompt": "a"',
    b'{"prompt": "a"}}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    DEEP,
    b"\x00" * 100,
]

OURS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": [[97]]}, "prompt.0"),
    ({"prompt": ["a"] * 2049}, "prompt"),
    ({"prompt": "a" * 10_000_000}, "prompt"),
    ({"prompt": ["a", "b" * 10_000_000]}, "prompt"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ({"max_new_tokens": "5"}, "max_new_tokens"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"max_new_tokens": HUGE}, "max_new_tokens"),
    ({"max_new_tokens": 8192}, "max_new_tokens"),
    ({"min_new_tokens": -1}, "min_new_tokens"),
    ({"min_new_tokens": 3, "max_new_tokens": 2}, "min_new_tokens"),
    ({"stream": 1}, "stream"),
    ({"stream": "false"}, "stream"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": HUGE**20}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": -1}, "seed"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": HUGE}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"n": True}, "n"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", None]}, "stop.1"),
    ({"stop": ["a"] * 100}, "stop"),
    ({"stop_token_ids": [260]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
    ({"stop_token_ids": [True]}, "stop_token_ids.0"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"frequency_penalty": 9}, "frequency_penalty"),
    ({"presence_penalty": -9}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "a"}}, "logit_bias.5"),
    ({"logit_bias": {"5": 1000}}, "logit_bias"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"skip_special_tokens": 0}, "skip_special_tokens"),
    ({"model": 5}, "model"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"Prompt": "a"}, "Prompt"),
    ({"": 1}, ""),
]

SGLANGS: list[tuple[dict[str, Any], str]] = [
    ({"text": 5}, "text"),
    ({"text": []}, "text"),
    ({"text": ["a", 5]}, "text.1"),
    ({"text": "a" * 10_000_000}, "text"),
    ({"text": "a", "input_ids": [1]}, "input_ids"),
    ({"text": None, "input_ids": []}, "input_ids"),
    ({"text": None, "input_ids": [[]]}, "input_ids"),
    ({"text": None, "input_ids": [260]}, "input_ids"),
    ({"text": None, "input_ids": [-1]}, "input_ids"),
    ({"text": None, "input_ids": [HUGE]}, "input_ids"),
    ({"text": None, "input_ids": [True]}, "input_ids.0"),
    ({"text": None, "input_ids": ["a"]}, "input_ids.0"),
    ({"text": None, "input_ids": [1, [2]]}, "input_ids.1"),
    ({"text": None, "input_ids": [1] * 9000}, "input_ids"),
    ({"text": None, "input_ids": "a"}, "input_ids"),
    ({"sampling_params": 5}, "sampling_params"),
    ({"sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a"] * 100, "sampling_params": {"n": 100}}, "sampling_params.n"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"n": 0}]}, "sampling_params.1.n"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 0}]}, "sampling_params.1.top_p"),
    ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"sampling_params": {"temperature": float("nan")}}, "sampling_params.temperature"),
    ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": HUGE}}, "sampling_params.max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": 9000}}, "sampling_params.max_new_tokens"),
    ({"sampling_params": {"sampling_seed": -1}}, "sampling_params.sampling_seed"),
    ({"sampling_params": {"stop": ""}}, "sampling_params.stop"),
    ({"sampling_params": {"stop_token_ids": [-1]}}, "sampling_params.stop_token_ids"),
    ({"sampling_params": {"logit_bias": {"999": 1}}}, "sampling_params.logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"rid": 5}, "rid"),
    ({"rid": ""}, "rid"),
    ({"rid": "x" * 257}, "rid"),
    ({"rid": ["x"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ({"return_logprob": 1}, "return_logprob"),
    ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": [0]}, "logprob_start_len"),
    ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
    ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize("body", NO_OBJECT)
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    assert refusal(post(router, "/generate", body))[0] == 400


@pytest.mark.parametrize(("fields", "param"), OURS)
def test_a_wrong_field_of_our_form_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/generate", {"prompt": "a", **fields})) == (400, param)


@pytest.mark.parametrize(("fields", "param"), SGLANGS)
def test_a_wrong_field_of_sglangs_form_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(post(router, "/generate", {"text": "a", **fields})) == (400, param)


def test_nothing_is_submitted_when_one_of_many_prompts_is_wrong() -> None:
    async def check() -> None:
        async with serve(router, MAX_MODEL_LEN=16) as server:
            body = {"prompt": ["a", "b" * 20], "max_new_tokens": 2}
            assert refusal(await server.client.post("/generate", json=body)) == (400, "prompt")
            assert server.pool.submitted == []

    asyncio.run(check())


@pytest.mark.parametrize("form", ["prompt", "text"])
def test_another_model_is_a_404_and_the_served_name_is_not(form: str) -> None:
    assert refusal(post(router, "/generate", {form: "a", "model": "gpt"})) == (404, "model")
    for name in ("fake", "shown"):
        response = post(router, "/generate", {form: "a", "model": name}, MODEL_ALIAS="shown")
        assert response.status_code == 200


@pytest.mark.parametrize("form", ["prompt", "text"])
def test_a_server_that_drains_says_so(form: str) -> None:
    async def check() -> None:
        async with serve(router) as server:
            server.pool.drain()
            response = await server.client.post("/generate", json={form: "a"})
            assert response.status_code == 503
            assert "Retry-After" in response.headers

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a"}, "prompt"),
        ({"input_ids": [1], "sampling_params": {"stop": "a"}}, "sampling_params.stop"),
    ],
)
def test_a_model_without_a_tokenizer_says_that_text_is_not_served(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 16}')
    response = post(router, "/generate", body, MODEL_LOCAL_DIR=tmp_path)
    assert response.json()["error"]["param"] == param
    assert response.status_code == 400
    assert "no tokenizer.json" in response.json()["error"]["message"]


def test_of_a_field_that_comes_twice_the_last_counts() -> None:
    body = b'{"prompt": "a", "stream": false, "max_new_tokens": 5, "max_new_tokens": 1}'
    assert post(router, "/generate", body).json()["usage"]["completion_tokens"] == 1


def test_the_route_and_both_forms_are_in_the_openapi_document() -> None:
    async def check() -> None:
        async with serve(router) as server:
            document = (await server.client.get("/openapi.json")).json()
        body = document["paths"]["/generate"]["post"]["requestBody"]
        ours, sglangs = body["content"]["application/json"]["schema"]["anyOf"]
        assert {"prompt", "max_new_tokens", "temperature", "stream"} <= ours["properties"].keys()
        assert {"text", "input_ids", "sampling_params"} <= sglangs["properties"].keys()

    asyncio.run(check())
