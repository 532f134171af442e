"""What vLLM's and SGLang's clients add to OpenAI's routes, and what the engine is asked for it."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.api.in_process import Server
from tests.api.openai_bench import chunks, post, refusal, run

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ROUTES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Once", "max_tokens": 4, "temperature": 0},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "temperature": 0},
}

on_both_routes = pytest.mark.parametrize("path", ROUTES)


@on_both_routes
def test_a_lower_priority_goes_first_and_a_salt_keeps_prefixes_apart(path: str) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        for more in ({}, {"priority": -3, "cache_salt": "mine"}, {"priority": 5, "cache_salt": ""}):
            assert (await server.client.post(path, json=ROUTES[path] | more)).is_success
        asked = [live.submission for live in server.pool.submitted]
        assert [each.priority for each in asked] == [0, 3, -5]
        assert [each.namespace for each in asked] == ["", "mine", ""]

    run(check, STRICT_FIELDS=1)


@on_both_routes
@pytest.mark.parametrize("name", ["rid", "request_id"])
def test_a_request_that_is_named_answers_by_that_name_and_no_two_share_it(
    path: str, name: str
) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        answer = await server.client.post(path, json={**ROUTES[path], name: "mine"})
        assert answer.json()["id"] == "mine"
        (live,) = server.pool.submitted
        server.pool._live[live.id] = live  # as if it went on
        again = await server.client.post(path, json={**ROUTES[path], name: "mine"})
        assert refusal(again) == (400, name)
        del server.pool._live[live.id]

    run(check)


@on_both_routes
def test_the_ids_of_prompt_and_answer_are_there_for_who_wants_them(path: str) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {**ROUTES[path], "n": 2, "return_token_ids": True}
        whole = (await server.client.post(path, json=body)).json()
        seen = chunks(await server.client.post(path, json={**body, "stream": True}))
        prompt = list(server.pool.submitted[0].submission.prompt)
        received = [live.received for live in server.pool.submitted]
        assert [choice["token_ids"] for choice in whole["choices"]] == received[:2]
        places = [whole] if path == CHAT else whole["choices"]
        assert all(place["prompt_token_ids"] == prompt for place in places)
        for index in (0, 1):
            parts = [(c, each) for each in seen for c in each["choices"] if c["index"] == index]
            ids = [id for choice, _ in parts for id in choice.get("token_ids", ())]
            assert ids == received[index]
            first = parts[0][path == CHAT]
            assert first["prompt_token_ids"] == prompt

    run(check)


@on_both_routes
@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_the_text_ends_with_what_stopped_it_where_that_is_wanted(path: str, name: str) -> None:
    def text(**more: Any) -> str:
        (choice,) = post(path, {**ROUTES[path], "max_tokens": 30, **more}).json()["choices"]
        found: str = choice["message"]["content"] if path == CHAT else choice["text"]
        return found

    all_of_it = text()
    stop = all_of_it[5:7]
    end = all_of_it.index(stop)
    assert text(stop=stop) == all_of_it[:end]
    assert text(stop=stop, **{name: True}) == all_of_it[: end + 2]
    assert text(stop_regex=f"[{all_of_it[5]}]", **{name: False}) == all_of_it.split(all_of_it[5])[0]


@on_both_routes
def test_metadata_of_answers_that_are_not_stored_is_a_warning(path: str) -> None:
    body = {**ROUTES[path], "metadata": {"run": "7"}, "store": False}
    (warning,) = post(path, body, STRICT_FIELDS=1).json()["warnings"]
    assert warning.startswith("metadata ")
    assert "warnings" not in post(path, {**body, "metadata": {}}).json()


def test_as_many_best_of_as_n_asks_for_nothing() -> None:
    body = {**ROUTES[COMPLETIONS], "n": 2, "best_of": 2}
    assert len(post(COMPLETIONS, body, STRICT_FIELDS=1).json()["choices"]) == 2
    assert refusal(post(COMPLETIONS, {**body, "best_of": 3})) == (400, "best_of")


@on_both_routes
def test_every_answer_counts_what_was_cached_and_what_was_thought(path: str) -> None:
    usage = post(path, ROUTES[path]).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
