"""Our own form of `POST /generate`: lines of JSON, or one object that is their fold."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeAlias

import httpx
import pytest

from api.generate import router
from backend.fake_model import BYTE_END
from backend.interface import SamplingParams
from backend.tokenizer import ByteTokenizer
from tests.api.in_process import MODEL, Server, post, run

SPECIAL = 258  # a special token: no text of its own

Line: TypeAlias = dict[str, Any]


def greedy(prompt: str, tokens: int) -> str:
    """What the fake model answers at temperature 0, by its definition."""
    context = [ByteTokenizer.BOS, *prompt.encode()]
    start = len(context)
    while len(context) < start + tokens:
        context.append(MODEL.after(context)[0])
    assert BYTE_END not in context, "choose a prompt whose answer is longer"
    return bytes(context[start:]).decode()


def whole(body: dict[str, Any], **flags: object) -> dict[str, Any]:
    response = post(router, "/generate", {"stream": False, **body}, **flags)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def lines_of(response: httpx.Response) -> list[Line]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def lines(body: dict[str, Any], **flags: object) -> list[Line]:
    return lines_of(post(router, "/generate", body, **flags))


def test_a_stream_is_text_line_by_line_and_then_its_end() -> None:
    *deltas, last = lines({"prompt": "hello", "max_new_tokens": 12})
    assert {tuple(line) for line in deltas} == {("id", "text_delta")}
    assert "".join(line["text_delta"] for line in deltas) == greedy("hello", 12)
    assert last == {
        "event": "done",
        "id": deltas[0]["id"],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 6, "completion_tokens": 12, "cached_tokens": 0},
    }
    assert {line["id"] for line in deltas} == {last["id"]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 1.5, "seed": 7},
        {"logprobs": 2},
        {"stop": "a"},
        {"n": 3, "temperature": 1, "seed": 1},
        {"logit_bias": {str(SPECIAL): 100}},
    ],
)
@pytest.mark.parametrize("prompt", ["hello", ["hello", "wörld"]])
def test_the_whole_answer_is_the_fold_of_the_stream(prompt: Any, more: dict[str, Any]) -> None:
    body = {"prompt": prompt, "max_new_tokens": 12, **more}
    answer = whole(body)
    answers = answer.get("answers", [answer])
    for line in lines(body):
        told = answers[line.get("index", 0)]
        if "event" not in line:
            told["folded"] = told.get("folded", "") + line["text_delta"]
            told["folded_logprobs"] = told.get("folded_logprobs", []) + line.get("logprobs", [])
        else:
            assert told["finish_reason"] == line["finish_reason"]
            assert told["usage"] == line["usage"]
            assert told.get("matched") == line.get("matched")
            assert told["text"] == told.get("folded", "")
            assert told.get("logprobs", []) == told.get("folded_logprobs", [])


def test_nothing_said_is_greedy() -> None:
    async def check(server: Server) -> None:
        body = {"prompt": "a", "max_new_tokens": 4, "temperature": None, "stream": None}
        await server.client.post("/generate", json=body)
        assert server.pool.submitted[0].submission.sampling == SamplingParams(max_new_tokens=4)

    run(router, check)


def test_every_sampling_field_reaches_the_engine() -> None:
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
        lists = {"logit_bias": {"5": 1.0}, "stop_token_ids": [9], "seed": 11}
        await server.client.post("/generate", json={"prompt": "a", **fields, **lists})
        submission = server.pool.submitted[0].submission
        wanted = SamplingParams(**fields, logit_bias=((5, 1.0),), stop_token_ids=(9,))  # type: ignore[arg-type]
        assert (submission.sampling, submission.seed) == (wanted, 11)

    run(router, check)


def test_a_stop_string_ends_the_text_ahead_of_it() -> None:
    text = greedy("hello", 12)
    stop = text[5:7]
    kept = text[: text.index(stop)]
    answer = whole({"prompt": "hello", "max_new_tokens": 12, "stop": stop})
    assert (answer["text"], answer["finish_reason"], answer["matched"]) == (kept, "stop", stop)
    assert answer["usage"]["completion_tokens"] == len(kept) + len(stop)


def test_a_stop_token_ends_the_text_and_is_told_by_its_id() -> None:
    text = greedy("hello", 12)
    token = ord(text[5])
    answer = whole({"prompt": "hello", "max_new_tokens": 12, "stop_token_ids": [token]})
    kept = text[: text.index(text[5])]
    assert (answer["text"], answer["finish_reason"], answer["matched"]) == (kept, "stop", token)


def test_each_of_n_answers_has_its_index_its_seed_and_its_end() -> None:
    body = {"prompt": "a", "max_new_tokens": 8, "n": 3, "temperature": 1.5, "seed": 5}
    found = lines(body)
    texts = ["", "", ""]
    for line in found:
        texts[line["index"]] += line.get("text_delta", "")
    alone = [whole({**body, "n": 1, "seed": 5 + index})["text"] for index in range(3)]
    assert texts == alone
    assert sorted(line["index"] for line in found if "event" in line) == [0, 1, 2]
    assert len({line["id"] for line in found}) == 1


def test_many_prompts_are_answered_by_index_prompt_by_prompt() -> None:
    prompts = ["hello", "wide", "x"]
    answer = whole({"prompt": prompts, "n": 2, "max_new_tokens": 5})
    texts = [greedy(prompt, 5) for prompt in prompts for _ in range(2)]
    assert [each["text"] for each in answer["answers"]] == texts
    assert [each["index"] for each in answer["answers"]] == list(range(6))
    usages = [each["usage"] for each in answer["answers"]]
    assert answer["usage"] == {name: sum(usage[name] for usage in usages) for name in usages[0]}
    assert [usage["prompt_tokens"] for usage in usages] == [6, 6, 5, 5, 2, 2]


def test_a_list_of_one_prompt_is_answered_as_a_list() -> None:
    assert len(whole({"prompt": ["a"], "max_new_tokens": 1})["answers"]) == 1
    assert all(line["index"] == 0 for line in lines({"prompt": ["a"], "max_new_tokens": 1}))


@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_come_with_the_tokens_they_are_of(top: int) -> None:
    *deltas, last = lines({"prompt": "hello", "max_new_tokens": 4, "logprobs": top})
    assert "logprobs" not in last
    context = [ByteTokenizer.BOS, *b"hello"]
    for entry in [entry for line in deltas for entry in line["logprobs"]]:
        candidates = MODEL.after(context)
        right = MODEL.logprob(candidates[0], candidates, top)
        assert (entry["token_id"], entry["token"]) == (right.token, chr(right.token))
        assert entry["logprob"] == pytest.approx(right.logprob)
        assert [each["token_id"] for each in entry["top"]] == [token for token, _ in right.top]
        assert all(each["token"] == chr(each["token_id"]) for each in entry["top"])
        context.append(right.token)
    assert len(context) == 6 + 4


def test_a_token_without_text_has_a_line_when_its_log_probability_is_wanted() -> None:
    silent = {"prompt": "a", "max_new_tokens": 3, "logit_bias": {str(SPECIAL): 100}}
    (last,) = lines(silent)
    assert last["usage"]["completion_tokens"] == 3
    *deltas, _ = lines({**silent, "logprobs": 0})
    entries = [entry for line in deltas for entry in line["logprobs"]]
    assert [entry["token_id"] for entry in entries] == [SPECIAL] * 3
    assert {line["text_delta"] for line in deltas} == {""}
    assert {entry["token"] for entry in entries} == {"<|im_start|>"}


def test_special_tokens_are_text_when_they_are_not_skipped() -> None:
    body = {"prompt": "a", "max_new_tokens": 2, "logit_bias": {str(SPECIAL): 100}}
    assert whole(body)["text"] == ""
    assert whole({**body, "skip_special_tokens": False})["text"] == "<|im_start|>" * 2


def test_half_a_character_is_held_until_its_end_decides() -> None:
    byte = "é".encode()[0]
    *deltas, last = lines({"prompt": "a", "max_new_tokens": 1, "logit_bias": {str(byte): 100}})
    assert [line["text_delta"] for line in deltas] == ["\ufffd"]
    assert last["usage"]["completion_tokens"] == 1


def test_a_prompt_seen_before_is_counted_as_cached() -> None:
    async def check(server: Server) -> None:
        body = {"prompt": "x" * 100, "max_new_tokens": 2, "stream": False}
        first = (await server.client.post("/generate", json=body)).json()
        again = (await server.client.post("/generate", json=body)).json()
        assert (first["usage"]["cached_tokens"], again["usage"]["cached_tokens"]) == (0, 96)
        assert first["text"] == again["text"]

    run(router, check)


def test_warnings_are_in_the_done_line_and_in_the_whole() -> None:
    async def check(server: Server) -> None:
        server.pool.warnings = ["max_new_tokens was lowered"]
        body = {"prompt": "a", "max_new_tokens": 2}
        *deltas, last = lines_of(await server.client.post("/generate", json=body))
        assert last["warnings"] == server.pool.warnings
        assert not any("warnings" in line for line in deltas)
        response = await server.client.post("/generate", json={**body, "stream": False})
        assert response.json()["warnings"] == server.pool.warnings

    run(router, check)


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_before_the_first_token_is_a_503(stream: bool) -> None:
    body = {"prompt": "a", "stream": stream}
    response = post(router, "/generate", body, FAKE_FAIL_AT_STEP=1)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "engine_error"
    assert "FAKE_FAIL_AT_STEP" in response.json()["error"]["message"]


def test_an_engine_that_fails_later_is_the_last_line_of_each_answer() -> None:
    found = lines({"prompt": "a", "n": 2}, FAKE_FAIL_AT_STEP=4)
    events = [line for line in found if "event" in line]
    assert [event["event"] for event in events] == ["error", "error"]
    assert {event["index"] for event in events} == {0, 1}
    assert found[-1] in events
    for event in events:
        assert event["id"] == found[0]["id"]
        assert event["error"]["type"] == "engine_error"


def test_an_engine_that_fails_later_is_a_503_of_the_whole() -> None:
    response = post(router, "/generate", {"prompt": "a", "stream": False}, FAKE_FAIL_AT_STEP=4)
    assert response.status_code == 503


def test_an_aborted_answer_ends_as_such() -> None:
    async def check(server: Server) -> None:
        body = {"prompt": "a", "max_new_tokens": 5000, "ignore_eos": True, "stream": False}
        request = asyncio.create_task(server.client.post("/generate", json=body))
        while not (server.pool.submitted and server.pool.submitted[0].received):
            await asyncio.sleep(0)
        id = server.pool.submitted[0].request_id
        assert server.pool.abort(request_id=id) == 1
        answer = (await request).json()
        assert (answer["id"], answer["finish_reason"]) == (id, "abort")
        assert 0 < answer["usage"]["completion_tokens"] < 5000

    run(router, check)


def test_a_length_not_asked_for_is_clamped_to_the_room_left() -> None:
    body = {"prompt": "x" * 20, "ignore_eos": True}
    answer = whole(body, MAX_MODEL_LEN=32)
    assert answer["usage"] == {"prompt_tokens": 21, "completion_tokens": 11, "cached_tokens": 0}
    answer = whole(body, MAX_NEW_TOKENS_DEFAULT=3)
    assert answer["usage"]["completion_tokens"] == 3


def test_the_text_is_escaped_as_json_wants() -> None:
    quote = {"prompt": "a", "max_new_tokens": 2, "logit_bias": {str(ord('"')): 100}}
    assert "".join(line["text_delta"] for line in lines(quote)[:-1]) == '""'
    newline = {"prompt": "a", "max_new_tokens": 2, "logit_bias": {str(ord("\n")): 100}}
    assert "".join(line["text_delta"] for line in lines(newline)[:-1]) == "\n\n"


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf"])
def test_a_grammar_that_is_null_asks_for_nothing(name: str) -> None:
    assert whole({"prompt": "a", "max_new_tokens": 1, name: None})["finish_reason"] == "length"
