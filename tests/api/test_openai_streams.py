"""Whatever is asked for: a stream of OpenAI's routes, put together, is the whole answer."""

from __future__ import annotations

from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.api.in_process import Server
from tests.api.openai_bench import chunks, run
from tests.api.openai_fold import folded, without_names

Body = dict[str, Any]

PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # smaller ones say no more
MESSAGES = [{"role": "user", "content": "Tell me a story"}]
PROMPTS: list[Any] = ["Once", ["a", "bcd", ""], [7] * 40, [[1, 2], [200, 201, 202], [3]]]

OF_BOTH: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 30),
    "temperature": st.sampled_from([0, 1]),
    "n": st.integers(1, 3),
    "stop": st.sampled_from([None, "e", ["never said", "t "]]),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
}
OF_COMPLETIONS = {
    "prompt": st.sampled_from(PROMPTS),
    "echo": st.booleans(),
    "logprobs": st.sampled_from([None, 0, 3]),
}
OF_CHAT = {
    "logprobs": st.booleans(),
    "separate_reasoning": st.booleans(),
    "stream_reasoning": st.booleans(),
}


async def both_ways(server: Server, path: str, body: Body) -> tuple[Body, list[Body]]:
    """The whole answer to a request, and the chunks of its stream."""
    whole = await server.client.post(path, json=body)
    assert whole.status_code == 200, whole.text
    options = {"include_usage": True}
    stream = await server.client.post(path, json=body | {"stream": True, "stream_options": options})
    return whole.json(), chunks(stream)


async def check_both_ways(server: Server, path: str, body: Body) -> tuple[Body, list[Body]]:
    server.pool.engine.flush()
    whole, seen = await both_ways(server, path, body)
    told = folded(seen)
    for reply in (whole, told):
        reply["usage"]["prompt_tokens_details"].pop("cached_tokens")  # the first one pays
    for choice in whole["choices"]:  # of no tokens a stream says nothing
        if not any(map(bool, (choice["logprobs"] or {}).values())):
            choice["logprobs"] = None
        if not choice.get("token_ids"):
            choice.pop("token_ids", None)
    assert without_names(told) == without_names(whole)
    return whole, seen


@hypothesis.settings(max_examples=30, deadline=None, phases=PHASES)
@hypothesis.given(body=st.fixed_dictionaries({**OF_BOTH, **OF_COMPLETIONS}))
def test_a_stream_of_completions_is_the_whole_in_pieces(body: Body) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        await check_both_ways(server, "/v1/completions", {**body, "seed": 5})

    run(check)


@hypothesis.settings(max_examples=20, deadline=None, phases=PHASES)
@hypothesis.given(body=st.fixed_dictionaries({**OF_BOTH, **OF_CHAT}))
def test_a_stream_of_a_chat_is_the_whole_in_pieces(body: Body) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        asked = {**body, "messages": MESSAGES, "seed": 5}
        if body["logprobs"]:
            asked["top_logprobs"] = 2
        whole, seen = await check_both_ways(server, "/v1/chat/completions", asked)
        ChatCompletion.model_validate(whole)
        for chunk in seen:
            for choice in chunk["choices"]:  # abort is no finish reason of OpenAI's
                assert choice["finish_reason"] in (None, "stop", "length")
            ChatCompletionChunk.model_validate(chunk)

    run(check)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ],
)
def test_counts_in_every_chunk_are_those_of_its_answer_so_far(path: str, more: Body) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"max_tokens": 9, "ignore_eos": True, "n": 2, "stream": True, **more}
        options = {"continuous_usage_stats": True, "include_usage": True}
        *seen, last = chunks(
            await server.client.post(path, json={**body, "stream_options": options})
        )
        counts: dict[int, list[int]] = {}
        for chunk in seen:
            usage = CompletionUsage.model_validate(chunk["usage"])
            (choice,) = chunk["choices"]
            counts.setdefault(choice["index"], []).append(usage.completion_tokens)
            prompt = server.pool.submitted[choice["index"]].submission.prompt
            assert usage.prompt_tokens == len(prompt)
        assert all(each == sorted(each) and each[-1] == 9 for each in counts.values())
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 9 * len(counts)
        options = {"continuous_usage_stats": True}
        bare = chunks(await server.client.post(path, json={**body, "stream_options": options}))
        assert all(each["choices"] and each["usage"] for each in bare)

    run(check)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_receipt_comes_with_the_end_of_each_answer_that_asks_for_it(
    path: str, stream: bool
) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        body = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
        asked = {**body, "max_tokens": 3, "n": 2, "receipt": True, "stream": stream}
        response = await server.client.post(path, json=asked)
        seen = chunks(response) if stream else [response.json()]
        ends = [each for one in seen for each in one["choices"] if each["finish_reason"]]
        assert len(ends) == 2
        assert all("cached_tokens" in each["receipt"] for each in ends)
        going = [each for one in seen for each in one["choices"] if not each["finish_reason"]]
        assert not [each for each in going if "receipt" in each]

    run(check)


class Reading(BaseModel):
    """What the model is asked to say."""

    unit: Literal["celsius", "kelvin"]
    good: bool


def test_the_official_client_parses_an_answer_into_its_type() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        asked: Any = {"model": "fake", "messages": MESSAGES, "temperature": 0, "max_tokens": 400}
        answer = await client.chat.completions.parse(**asked, response_format=Reading)
        assert isinstance(answer.choices[0].message.parsed, Reading)
        async with client.chat.completions.stream(**asked, response_format=Reading) as stream:
            again = await stream.get_final_completion()
        assert again.choices[0].message.parsed == answer.choices[0].message.parsed

    run(check)
