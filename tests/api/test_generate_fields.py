"""Fields that both forms of `POST /generate` have, each told in the words of its form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.generate import router
from tests.api.in_process import Server, post, refusal, run

LONG = {"temperature": 0, "max_new_tokens": 12}


def ours(more: dict[str, Any], **beside: object) -> dict[str, Any]:
    """A body of our own form, answered whole."""
    return {"prompt": "hello", "stream": False, **LONG, **more, **beside}


def sglangs(more: dict[str, Any], **beside: object) -> dict[str, Any]:
    return {"text": "hello", "sampling_params": {**LONG, **more}, **beside}


FORMS = pytest.mark.parametrize(("form", "path"), [(ours, ""), (sglangs, "sampling_params.")])


def told(body: dict[str, Any]) -> tuple[str, str, Any]:
    """The text of an answer, how it ended, and what matched."""
    response = post(router, "/generate", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    if "meta_info" not in answer:
        return answer["text"], answer["finish_reason"], answer.get("matched")
    reason = answer["meta_info"]["finish_reason"]
    return answer["text"], reason["type"], reason.get("matched")


@FORMS
def test_a_pattern_ends_the_text_ahead_of_its_match(form: Any, path: str) -> None:
    text, _, _ = told(form({}))
    pattern = f"{text[5]}[{text[6]}]|never"
    kept = text[: text.index(text[5:7])]
    assert told(form({"stop_regex": pattern})) == (kept, "stop", pattern)
    assert told(form({"stop_regex": ["never", pattern]})) == (kept, "stop", pattern)
    assert told(form({"stop_regex": "never"})) == (text, "length", None)


@FORMS
def test_the_text_ends_with_what_stopped_it_where_that_is_asked_for(form: Any, path: str) -> None:
    text, _, _ = told(form({}))
    end = text.index(text[5:7]) + 2
    for stop in ({"stop": text[5:7]}, {"stop_regex": text[5:7]}):
        kept, reason, _ = told(form({**stop, "no_stop_trim": True}))
        assert (kept, reason) == (text[:end], "stop")


@FORMS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_regex", "(?=a)b"),
        ("stop_regex", "a*"),
        ("stop_regex", ["a"] * 33),
        ("stop_regex", 5),
        ("no_stop_trim", "yes"),
    ],
)
def test_a_wrong_field_is_named_in_the_words_of_the_form(
    form: Any, path: str, name: str, value: object
) -> None:
    assert refusal(post(router, "/generate", form({name: value}))) == (400, path + name)


@pytest.mark.parametrize(
    ("body", "namespace", "priority"),
    [
        (ours({}), "", 0),
        (ours({}, cache_salt="mine", priority=3), "mine", 3),
        (sglangs({}), "", 0),
        (sglangs({}, cache_salt="mine", priority=3), "mine", 3),
        (sglangs({}, extra_key="mine", priority=-1), "mine", -1),
    ],
)
def test_the_salt_and_the_priority_reach_the_engine(
    body: dict[str, Any], namespace: str, priority: int
) -> None:
    async def check(server: Server) -> None:
        response = await server.client.post("/generate", json=body)
        assert response.status_code == 200
        found = server.pool.submitted[0].submission
        assert (found.namespace, found.priority) == (namespace, priority)

    run(router, check)


def test_each_prompt_may_have_its_own_key() -> None:
    async def check(server: Server) -> None:
        body = {"text": ["a", "b"], "extra_key": ["x", "y"], "sampling_params": LONG}
        await server.client.post("/generate", json=body)
        assert [each.submission.namespace for each in server.pool.submitted] == ["x", "y"]

    run(router, check)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (sglangs({}, extra_key="a", cache_salt="b"), "cache_salt"),
        (sglangs({}, extra_key="a" * 257), "extra_key"),
        (sglangs({}, priority=1 << 40), "priority"),
        (ours({}, priority=0.5), "priority"),
        (ours({}, cache_salt=["a"]), "cache_salt"),
        (ours({}, receipt=1), "receipt"),
        (sglangs({"stream_interval": 0}), "sampling_params.stream_interval"),
        (sglangs({}, token_ids_logprob=[1]), "token_ids_logprob"),
        (sglangs({"beam_width": 2}), "sampling_params.beam_width"),
    ],
)
def test_what_stands_beside_them_is_checked_too(body: dict[str, Any], name: str) -> None:
    assert refusal(post(router, "/generate", body)) == (400, name)


def test_a_receipt_comes_with_the_end_of_each_answer() -> None:
    whole = post(router, "/generate", ours({}, receipt=True, n=2)).json()
    found = [each["receipt"] for each in whole["answers"]]
    lines = post(router, "/generate", ours({}, receipt=True, stream=True)).text.splitlines()
    found.append(json.loads(lines[-1])["receipt"])
    found.append(
        post(router, "/generate", sglangs({}, receipt=True)).json()["meta_info"]["receipt"]
    )
    assert all(each["queue_s"] is None or each["queue_s"] >= 0 for each in found)
    assert all(each["computed_tokens"] > 0 for each in found)
    assert "receipt" not in post(router, "/generate", ours({})).json()
    assert "receipt" not in post(router, "/generate", sglangs({})).json()["meta_info"]


def test_an_interval_thins_the_events_of_a_stream_and_loses_nothing() -> None:
    def events(**more: object) -> list[dict[str, Any]]:
        response = post(router, "/generate", sglangs(dict(more), stream=True))
        *found, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in found]

    counts = [len(event["output_ids"]) for event in events(stream_interval=5)]
    assert counts == [1, 6, 11, 12]
    assert events(stream_interval=100)[-1]["text"] == events()[-1]["text"]


def test_the_ids_of_the_prompt_are_told_where_they_are_asked_for() -> None:
    answer = post(router, "/generate", sglangs({}, return_prompt_token_ids=True)).json()
    assert answer["prompt_token_ids"] == [256, *b"hello"]
    assert len(answer["prompt_token_ids"]) == answer["meta_info"]["prompt_tokens"]


def test_stop_tokens_of_another_model_are_ignored_with_a_warning_in_sglangs_form_alone() -> None:
    body = sglangs({"stop_token_ids": [119690, 3]})
    response = post(router, "/generate", body)
    assert "119690" in response.json()["meta_info"]["warnings"][0]
    wrong = "sampling_params.stop_token_ids"
    assert refusal(post(router, "/generate", body, STRICT_FIELDS=1)) == (400, wrong)
    assert refusal(post(router, "/generate", ours({"stop_token_ids": [119690]}))) == (
        400,
        "stop_token_ids",
    )
