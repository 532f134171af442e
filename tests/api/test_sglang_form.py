"""SGLang's form of `POST /generate`: what its clients send, and what they read."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.generate import router
from api.sglang_form import SAMPLING_UNSERVED, UNSERVED
from backend.fake_model import FakeModel
from backend.interface import SamplingParams, TokenLogprob
from backend.tokenizer import ByteTokenizer
from tests.api.in_process import MODEL, Server, post, refusal, run

GREEDY = {"temperature": 0, "max_new_tokens": 6}
HELLO = [ByteTokenizer.BOS, *b"hello"]


def answer(body: dict[str, Any], **flags: object) -> Any:
    response = post(router, "/generate", body, **flags)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def events(body: dict[str, Any], **flags: object) -> list[dict[str, Any]]:
    return events_of(post(router, "/generate", {"stream": True, **body}, **flags))


def chain(context: list[int], tokens: int) -> list[int]:
    """What the fake model answers at temperature 0, by its definition."""
    context = list(context)
    for _ in range(tokens):
        context.append(MODEL.after(context)[0])
    return context[-tokens:]


def logprobs_of(context: list[int], start: int, top: int) -> list[TokenLogprob]:
    """Of the tokens of `context` from `start` on, each after those ahead of it."""
    return [
        MODEL.logprob(context[end], MODEL.after(context[:end]), top)
        for end in range(start, len(context))
    ]


def test_a_text_is_answered_by_text_ids_and_meta_info() -> None:
    found = answer({"text": "hello", "sampling_params": GREEDY})
    ids = chain(HELLO, 6)
    meta = found.pop("meta_info")
    assert found == {"text": bytes(ids).decode(), "output_ids": ids}
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("id").startswith("gen-")
    assert meta == {
        "finish_reason": {"type": "length", "length": 6},
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "cached_tokens": 0,
    }


def test_ids_are_a_prompt_as_they_are() -> None:
    found = answer({"input_ids": HELLO, "sampling_params": GREEDY})
    assert found["output_ids"] == chain(HELLO, 6)
    plain = answer({"input_ids": HELLO[1:], "sampling_params": GREEDY})
    assert plain["output_ids"] == chain(HELLO[1:], 6)


def test_a_stream_tells_each_time_all_there_is() -> None:
    body = {"text": "hello", "sampling_params": GREEDY, "rid": "me"}
    found = events(body)
    whole = answer(body)
    lengths = [len(event["output_ids"]) for event in found]
    assert lengths == sorted(set(lengths)), "each event is longer than the one before"
    for event in found[:-1]:
        assert whole["text"].startswith(event["text"])
        assert event["output_ids"] == whole["output_ids"][: len(event["output_ids"])]
        assert event["meta_info"]["finish_reason"] is None
        assert event["meta_info"]["completion_tokens"] == len(event["output_ids"])
    for last in (found[-1], whole):
        del last["meta_info"]["e2e_latency"]
    assert found[-1] == whole


def test_nothing_said_is_the_models_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 16, "eos_token_id": 15}')
    said = {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))

    async def check(server: Server) -> None:
        for params in ({}, {"temperature": 0.2}, {"temperature": None}, None):
            body = {"input_ids": [1, 2], "sampling_params": params}
            await server.client.post("/generate", json=body)
        found = [
            replace(each.submission.sampling, max_new_tokens=None) for each in server.pool.submitted
        ]
        usual = SamplingParams(temperature=0.6, top_p=0.9, top_k=7, repetition_penalty=1.1)
        assert found == [usual, replace(usual, temperature=0.2), usual, usual]

    run(router, check, MODEL_LOCAL_DIR=tmp_path, MAX_NEW_TOKENS_DEFAULT=4)


def test_a_model_without_a_generation_config_is_sampled_at_one() -> None:
    async def check(server: Server) -> None:
        await server.client.post("/generate", json={"text": "a"})
        found = server.pool.submitted[0].submission.sampling
        assert found == SamplingParams(temperature=1.0, max_new_tokens=512)

    run(router, check)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    async def check(server: Server) -> None:
        fields = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "frequency_penalty": 0.2,
            "presence_penalty": 0.3,
            "repetition_penalty": 1.1,
            "max_new_tokens": 6,
            "min_new_tokens": 2,
            "ignore_eos": True,
        }
        lists = {"logit_bias": {"5": 1.0}, "stop_token_ids": [9], "sampling_seed": 11}
        ignored = {"spaces_between_special_tokens": False, "stream_interval": 1, "regex": None}
        body = {"text": "a", "sampling_params": {**fields, **lists, **ignored}}
        response = await server.client.post("/generate", json=body)
        assert "warnings" not in response.json()["meta_info"]
        submission = server.pool.submitted[0].submission
        wanted = SamplingParams(**fields, logit_bias=((5, 1.0),), stop_token_ids=(9,))  # type: ignore[arg-type]
        assert (submission.sampling, submission.seed) == (wanted, 11)

    run(router, check)


@pytest.mark.parametrize("prompts", [{"text": ["hello", "wide"]}, {"input_ids": [HELLO, [1, 2]]}])
def test_a_list_of_prompts_is_answered_by_a_list(prompts: dict[str, Any]) -> None:
    (source,) = prompts
    each = [answer({source: prompt, "sampling_params": GREEDY}) for prompt in prompts[source]]
    found = answer({**prompts, "sampling_params": GREEDY, "rid": "me"})
    assert [one["output_ids"] for one in found] == [one["output_ids"] for one in each]
    assert [one["text"] for one in found] == [one["text"] for one in each]
    assert [one["meta_info"]["id"] for one in found] == ["me_0", "me_1"]
    assert not any("index" in one for one in found)


def test_a_list_of_one_prompt_is_answered_by_a_list() -> None:
    assert len(answer({"text": ["a"], "sampling_params": GREEDY})) == 1
    assert len(answer({"input_ids": [[97]], "sampling_params": GREEDY})) == 1


def test_each_prompt_may_have_parameters_of_its_own() -> None:
    params = [{**GREEDY, "max_new_tokens": 2}, {**GREEDY, "max_new_tokens": 5}]
    body = {
        "text": ["hello", "hello"],
        "sampling_params": params,
        "return_logprob": [True, False],
        "top_logprobs_num": [2, 0],
        "logprob_start_len": [0, -1],
    }
    first, second = answer(body)
    assert (len(first["output_ids"]), len(second["output_ids"])) == (2, 5)
    assert len(first["meta_info"]["input_token_logprobs"]) == 6
    assert "output_token_logprobs" not in second["meta_info"]


def test_n_answers_are_a_list_that_draws_from_consecutive_seeds() -> None:
    params = {"temperature": 1.5, "max_new_tokens": 8, "sampling_seed": 3}
    found = answer({"text": ["hello", "wide"], "sampling_params": {**params, "n": 2}})
    for index, one in enumerate(found):
        prompt, seed = ("hello", "wide")[index // 2], 3 + index % 2
        alone = answer({"text": prompt, "sampling_params": {**params, "sampling_seed": seed}})
        assert one["output_ids"] == alone["output_ids"]
    assert len(answer({"text": "a", "sampling_params": {**GREEDY, "n": 2}})) == 2


def test_the_events_of_many_answers_say_their_index() -> None:
    body = {"text": ["hello", "wide"], "sampling_params": {**GREEDY, "n": 2}}
    whole = answer(body)
    last = {event["index"]: event for event in events(body)}
    assert sorted(last) == [0, 1, 2, 3]
    assert [last[index]["text"] for index in range(4)] == [one["text"] for one in whole]
    ends = [event["meta_info"]["finish_reason"] for event in events(body)]
    assert sum(end is not None for end in ends) == 4


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize(("start", "top"), [(-1, 0), (0, 0), (2, 3), (5, 1)])
def test_log_probabilities_are_lists_of_value_id_and_text(
    start: int, top: int, texts: bool
) -> None:
    body = {
        "text": "hello",
        "sampling_params": {**GREEDY, "max_new_tokens": 3},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": top,
        "return_text_in_logprobs": texts,
    }
    context = HELLO + chain(HELLO, 3)

    def entry(token: int, logprob: float | None) -> list[Any]:
        text = ByteTokenizer().table[token].decode() if texts else None
        return [None if logprob is None else pytest.approx(logprob), token, text]

    output = logprobs_of(context, 6, top)
    prompt = [] if start < 0 else logprobs_of(HELLO, start + 1, top)
    first = [] if start < 0 else [entry(HELLO[start], None)]
    for meta in (answer(body)["meta_info"], events(body)[-1]["meta_info"]):
        assert meta["output_token_logprobs"] == [entry(each.token, each.logprob) for each in output]
        assert meta["input_token_logprobs"] == first + [
            entry(each.token, each.logprob) for each in prompt
        ]
        assert ("output_top_logprobs" in meta) == ("input_top_logprobs" in meta) == bool(top)
        if top:
            tops = [[entry(*pair) for pair in each.top] for each in output]
            assert meta["output_top_logprobs"] == tops
            tops = [[entry(*pair) for pair in each.top] for each in prompt]
            assert meta["input_top_logprobs"] == [None] * len(first) + tops


def test_without_return_logprob_there_are_none() -> None:
    body = {"text": "a", "sampling_params": GREEDY, "logprob_start_len": 0, "top_logprobs_num": 2}
    assert not any("logprobs" in name for name in answer(body)["meta_info"])


def test_a_stop_string_and_a_stop_token_are_told_as_what_matched() -> None:
    text = bytes(chain(HELLO, 6)).decode()
    params = {**GREEDY, "stop": [text[2:4]]}
    found = answer({"text": "hello", "sampling_params": params})
    assert found["text"] == text[:2]
    assert found["output_ids"] == list(text[:4].encode()), "the ids are those that were generated"
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[2:4]}
    params = {**GREEDY, "stop_token_ids": [ord(text[2])]}
    found = answer({"text": "hello", "sampling_params": params})
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": ord(text[2])}
    assert found["text"] == text[: text.index(text[2])]


@pytest.mark.parametrize("stream", [True, False])
def test_no_stop_trim_keeps_what_stopped_the_answer(stream: bool) -> None:
    text = bytes(chain(HELLO, 6)).decode()
    for stop in ({"stop": text[2:4]}, {"stop_token_ids": [ord(text[3])]}):
        params = {**GREEDY, **stop, "no_stop_trim": True}
        body = {"text": "hello", "sampling_params": params}
        found = events(body)[-1] if stream else answer(body)
        assert found["text"] == text[:4]


def test_a_request_is_called_what_its_client_calls_it() -> None:
    assert answer({"text": "a", "rid": "me"})["meta_info"]["id"] == "me"
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": {**GREEDY, "n": 2}}
    ids = [one["meta_info"]["id"] for one in answer(body)]
    assert ids == ["x_0", "x_1", "y_0", "y_1"]
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": GREEDY}
    assert [one["meta_info"]["id"] for one in answer(body)] == ["x", "y"]


def test_of_a_list_of_names_each_aborts_its_own_answer() -> None:
    async def check(server: Server) -> None:
        params = {"temperature": 0, "max_new_tokens": 500, "ignore_eos": True}
        body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": params}
        request = asyncio.create_task(server.client.post("/generate", json=body))
        while not (server.pool.submitted and server.pool.submitted[1].received):
            await asyncio.sleep(0)
        assert server.pool.abort(request_id="y") == 1
        first, second = (await request).json()
        assert first["meta_info"]["finish_reason"] == {"type": "length", "length": 500}
        assert second["meta_info"]["finish_reason"] == {"type": "abort", "message": "aborted"}
        assert 0 < second["meta_info"]["completion_tokens"] < 500

    run(router, check)


def test_a_name_in_use_is_refused() -> None:
    async def check(server: Server) -> None:
        params = {"max_new_tokens": 5000, "ignore_eos": True}
        body = {"text": "a", "rid": "me", "sampling_params": params}
        first = asyncio.create_task(server.client.post("/generate", json=body))
        while not server.pool.submitted:
            await asyncio.sleep(0)
        assert refusal(await server.client.post("/generate", json=body)) == (400, "rid")
        assert server.pool.abort(request_id="me") == 1
        assert (await first).status_code == 200
        params["max_new_tokens"] = 1
        assert (await server.client.post("/generate", json=body)).status_code == 200

    run(router, check)


def test_an_engine_that_fails_is_a_503_or_the_last_event() -> None:
    body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 50, "ignore_eos": True}}
    for stream in (True, False):
        response = post(router, "/generate", {**body, "stream": stream}, FAKE_FAIL_AT_STEP=1)
        assert refusal(response) == (503, None)
    assert refusal(post(router, "/generate", body, FAKE_FAIL_AT_STEP=5)) == (503, None)
    found = events(body, FAKE_FAIL_AT_STEP=5)
    errors = [event for event in found if "error" in event]
    assert {event["index"] for event in errors} == {0, 1}
    assert found[-1] in errors
    assert {event["error"]["type"] for event in errors} == {"engine_error"}


def test_unknown_fields_are_warnings() -> None:
    body = {
        "text": "a",
        "colour": "red",
        "sampling_params": {**GREEDY, "beam": 2},
    }
    warnings = answer(body)["meta_info"]["warnings"]
    assert [warning.split()[0] for warning in warnings] == ["colour", "sampling_params.beam"]
    *others, last = events(body)
    assert last["meta_info"]["warnings"] == warnings
    assert not any("warnings" in event["meta_info"] for event in others)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"colour": 1}, "colour"), ({"sampling_params": {"beam": 2}}, "sampling_params.beam")],
)
def test_unknown_fields_are_refused_when_the_server_is_strict(
    fields: dict[str, Any], param: str
) -> None:
    response = post(router, "/generate", {"text": "a", **fields}, STRICT_FIELDS=1)
    assert refusal(response) == (400, param)


def test_what_the_pool_warns_of_is_in_meta_info() -> None:
    async def check(server: Server) -> None:
        server.pool.warnings = ["max_new_tokens was lowered"]
        body = {"text": "a", "sampling_params": GREEDY, "colour": 1}
        meta = (await server.client.post("/generate", json=body)).json()["meta_info"]
        assert len(meta["warnings"]) == 2
        assert meta["warnings"][1] == "max_new_tokens was lowered"

    run(router, check)


@pytest.mark.parametrize("name", [*UNSERVED, *(f"sampling_params.{n}" for n in SAMPLING_UNSERVED)])
def test_a_field_that_is_not_served_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    group, _, inner = name.rpartition(".")
    harmless = SAMPLING_UNSERVED[inner] if group else UNSERVED[inner]

    def body(value: object) -> dict[str, Any]:
        fields = {group: {inner: value}} if group else {inner: value}
        return {"text": "a", "stream": True, **fields}

    async def check(server: Server) -> None:
        for value in (None, harmless):
            response = await server.client.post("/generate", json=body(value))
            assert "warnings" not in events_of(response)[-1]["meta_info"]
        response = await server.client.post("/generate", json=body("something"))
        assert refusal(response) == (400, name)

    run(router, check, MAX_NEW_TOKENS_DEFAULT=1)


def test_a_model_without_a_tokenizer_answers_ids_by_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 16, "eos_token_id": 15}')
    flags = {"MODEL_LOCAL_DIR": tmp_path}
    body = {
        "input_ids": [1, 2, 3],
        "sampling_params": {**GREEDY, "ignore_eos": True},
        "return_logprob": True,
        "return_text_in_logprobs": True,
    }
    found = answer(body, **flags)
    model = FakeModel(16, 15, (range(16), range(16)))
    context = [1, 2, 3]
    while len(context) < 9:
        context.append(model.after(context)[0])
    assert (found["text"], found["output_ids"]) == ("", context[3:])
    assert events(body, **flags)[-1]["output_ids"] == context[3:]
