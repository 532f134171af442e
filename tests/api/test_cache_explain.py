"""`POST /cache/explain`: what it claims, held against what the next answer says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api.cache_explain import router as explain_router
from api.generate import router as generate_router
from tests.api.in_process import Server, post, refusal, serve

LINE = "The quick brown fox jumps over the lazy dog, and nobody minds at all. "  # 70 bytes


def play(check: Callable[[Server], Awaitable[None]], **flags: object) -> None:
    async def served() -> None:
        async with serve(explain_router, generate_router, **flags) as server:
            await check(server)

    asyncio.run(served())


async def explained(server: Server, **body: Any) -> dict[str, Any]:
    response = await server.client.post("/cache/explain", json=body)
    assert response.status_code == 200, response.text
    (replica,) = response.json()["replicas"]
    found: dict[str, Any] = replica
    return found


async def cached(server: Server, prompt: str, **more: Any) -> int:
    body = {"prompt": prompt, "stream": False, "max_new_tokens": 1, **more}
    response = await server.client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["cached_tokens"]
    return found


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (LINE * 3, LINE * 3, "all"),
        (LINE * 3, LINE * 2 + "something else " * 5, "diverged"),
        (LINE * 2, LINE * 4, "ended"),
        (LINE * 3, LINE[:12], "short"),
        (LINE[:40], LINE[:40], "all"),  # less than a block
        (LINE[:40], LINE[:33] + "!" * 30, "diverged"),
        (LINE, LINE[:63], "all"),  # a block and no more: its last page is computed again
    ],
)
def test_the_claim_is_what_the_next_answer_finds(first: str, second: str, reason: str) -> None:
    async def check(server: Server) -> None:
        assert (await explained(server, prompt=first))["hit_tokens"] == 0
        await cached(server, first)
        claim = await explained(server, prompt=second)
        assert claim["reason"] == reason
        assert claim["told_tokens"] <= claim["hit_tokens"]
        assert claim["hit_tokens"] == await cached(server, second)

    play(check)


def test_where_two_prompts_part_is_shown_with_the_text_around() -> None:
    async def check(server: Server) -> None:
        await cached(server, LINE + "It is 10:15 now. " + LINE)
        claim = await explained(server, text=LINE + "It is 10:47 now. " + LINE)
        assert claim["at"] == 1 + len(LINE + "It is 10:")
        assert (claim["yours"], claim["theirs"]) == ("t is 10:47 now. ", "t is 10:15 now. ")

    play(check)


def test_a_salt_of_its_own_hides_a_prompt_and_the_claim_says_so() -> None:
    async def check(server: Server) -> None:
        await cached(server, LINE, cache_salt="red")
        assert (await explained(server, prompt=LINE))["reason"] == "other_salt"
        claim = await explained(server, prompt=LINE, cache_salt="red")
        assert (claim["reason"], claim["hit_tokens"]) == ("all", 64)

    play(check)


def test_what_was_evicted_is_told_with_its_time_and_claimed_no_further() -> None:
    async def check(server: Server) -> None:
        await cached(server, LINE * 3)
        await cached(server, "other " * 30)
        claim = await explained(server, prompt=LINE * 3)
        assert claim["reason"] == "evicted"
        assert claim["evicted_s_ago"] >= 0
        assert claim["hit_tokens"] <= await cached(server, LINE * 3) < claim["hit_tokens"] + 64

    play(check, PAGE_TOKEN_BUDGET=320)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "text": "b"}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [999]}, "input_ids"),
        ({"input_ids": [1] * 8193}, "input_ids"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "cache_salt": "x" * 300}, "cache_salt"),
    ],
)
def test_what_no_engine_would_take_is_a_400(body: dict[str, Any], param: str) -> None:
    assert refusal(post(explain_router, "/cache/explain", body)) == (400, param)


def test_a_server_that_caches_nothing_has_nothing_to_explain() -> None:
    response = post(explain_router, "/cache/explain", {"prompt": LINE}, PREFIX_CACHE=0)
    assert refusal(response) == (400, None)
    assert "PREFIX_CACHE=0" in response.text
