"""`/v1/chat/completions`: what OpenAI's client sends and reads, and what the model gets to see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI

from backend.interface import SamplingParams
from backend.tokenizer import open_tokenizer
from tests.api.in_process import Server
from tests.api.openai_bench import chunks, post, run, text_of

PATH = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story"}]
PROMPT = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"


def seen_by_the_model(server: Server, index: int = -1) -> str:
    """The prompt of a request as text, special tokens spelled out."""
    table = server.service.model.tokenizer.table
    prompt = server.pool.submitted[index].submission.prompt
    return b"".join(table[id] for id in prompt).decode()


def prompt_of(body: Mapping[str, Any], **flags: object) -> str:
    """What the model sees of a request."""
    prompts = []

    async def check(server: Server, _: AsyncOpenAI) -> None:
        response = await server.client.post(PATH, json={"max_tokens": 1, **body})
        assert response.is_success, response.text
        prompts.append(seen_by_the_model(server))

    run(check, **flags)
    return prompts[0]


# The answer


def test_the_official_client_reads_a_whole_answer() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="fake", messages=MESSAGES, max_completion_tokens=9, seed=3
        )
        assert answer.id.startswith("chatcmpl-")
        assert (answer.object, answer.model) == ("chat.completion", "fake")
        (choice,) = answer.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert (choice.message.role, choice.message.refusal) == ("assistant", None)
        assert choice.message.content == text_of(server)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(server.pool.submitted[0].submission.prompt)
        assert answer.usage.completion_tokens == 9
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9

    run(check)


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": "e"}, {"stop": ["no such text", "zz"]}])
def test_a_stream_says_what_the_whole_answer_says(more: dict[str, Any]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body: Any = {"model": "fake", "messages": MESSAGES, "seed": 5, "max_tokens": 60, **more}
        whole = await client.chat.completions.create(**body)
        stream = await client.chat.completions.create(
            **body, stream=True, stream_options={"include_usage": True}
        )
        seen = [chunk async for chunk in stream]
        assert len({(each.id, each.created, each.model, each.object) for each in seen}) == 1
        assert all(each.usage is None for each in seen[:-1])
        assert (seen[-1].choices, seen[-1].usage is None) == ([], False)
        assert seen[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert seen[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        for choice in whole.choices:
            first, *pieces, last = [
                piece for each in seen for piece in each.choices if piece.index == choice.index
            ]
            assert (first.delta.role, first.delta.content) == ("assistant", "")
            assert all(piece.delta.role is None for piece in (*pieces, last))
            text = "".join(piece.delta.content for piece in pieces)
            assert text == choice.message.content
            assert {piece.finish_reason for piece in (first, *pieces)} == {None}
            assert (last.finish_reason, last.delta.content) == (choice.finish_reason, None)

    run(check)


def test_the_helper_of_the_official_client_puts_a_stream_together() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        async with client.chat.completions.stream(
            model="fake",
            messages=MESSAGES,
            logit_bias={"257": 100},  # the end token, as soon as it may be drawn
            extra_body={"min_tokens": 9},
        ) as stream:
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.content == text_of(server)
        assert answer.choices[0].finish_reason == "stop"

    run(check)


def test_the_bytes_of_a_stream_are_those_of_openai() -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "temperature": 0, "logit_bias": {"34": 100}}
    response = post(PATH, {**body, "stream": True})
    head = {key: chunks(response)[0][key] for key in ("id", "object", "created", "model")}
    assert head["object"] == "chat.completion.chunk"

    def event(delta: Mapping[str, str], finish: Mapping[str, object]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, **finish}
        return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"

    going = {"finish_reason": None}
    role = event({"role": "assistant", "content": ""}, going)
    texts = event({"content": '"'}, going) * 2
    end = event({}, {"finish_reason": "length", "matched_stop": None})
    assert response.content == role + texts + end + b"data: [DONE]\n\n"


def test_an_answer_of_no_tokens_has_its_role_and_its_end() -> None:
    role, end = chunks(post(PATH, {"messages": MESSAGES, "max_tokens": 0, "stream": True}))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert role["choices"][0]["finish_reason"] is None
    assert end["choices"][0]["delta"] == {}
    assert end["choices"][0]["finish_reason"] == "length"


def test_an_answer_can_be_the_next_turn() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        messages = list(MESSAGES)
        answer = await client.chat.completions.create(model="fake", messages=messages, max_tokens=5)
        said = answer.choices[0].message
        messages += [said, {"role": "user", "content": "Go on"}]
        again = await client.chat.completions.create(model="fake", messages=messages, max_tokens=5)
        assert seen_by_the_model(server) == (
            f"{PROMPT}{said.content}<|im_end|>\n"
            "<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n"
        )
        assert "warnings" not in again.to_dict()

    run(check, STRICT_FIELDS=1)


# The prompt


def test_the_model_sees_its_template_and_no_special_token_more() -> None:
    assert prompt_of({"messages": MESSAGES}) == PROMPT


def test_a_real_template_is_rendered_with_the_checkpoints_own_tokens(small_model: Path) -> None:
    text = prompt_of({"messages": MESSAGES}, MODEL_LOCAL_DIR=small_model)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith(PROMPT)
    tokenizer = open_tokenizer(str(small_model), 0)
    assert text == tokenizer.render(MESSAGES)


def test_text_parts_are_put_together_as_they_are() -> None:
    parts = [{"type": "text", "text": text} for text in ("Tell ", "me", " a story")]
    assert prompt_of({"messages": [{"role": "user", "content": parts}]}) == PROMPT


def test_a_developer_speaks_as_the_system_and_the_other_roles_as_themselves() -> None:
    roles = ("developer", "system", "user", "assistant")
    messages = [{"role": role, "content": "x"} for role in roles]
    seen = prompt_of({"messages": messages, "add_generation_prompt": False})
    shown = ("system", "system", "user", "assistant")
    assert seen == "".join(f"<|im_start|>{role}\nx<|im_end|>\n" for role in shown)


def template_folder(folder: Path, small_model: Path, template: str) -> Path:
    """A model that differs from the small one in its chat template."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).symlink_to(small_model / file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_template_gets_names_reasoning_and_the_variables_of_the_client(
    small_model: Path, tmp_path: Path
) -> None:
    template = (
        "{% if tools %}{% endif %}{% for m in messages %}"
        "{{ m.name }}:{{ m.tool_call_id }}:{{ m.reasoning_content }}:"
        "{{ m.content }};{% endfor %}{{ enable_thinking }} {{ add_generation_prompt }}"
    )
    folder = template_folder(tmp_path, small_model, template)
    messages = [
        {"role": "user", "name": "ann", "content": "hi"},
        {"role": "assistant", "reasoning": "hm", "content": "ho"},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]
    body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    seen = prompt_of(body, MODEL_LOCAL_DIR=folder)
    assert seen == "ann:::hi;::hm:ho;:c1::;False True"


def test_a_template_that_refuses_is_a_400_with_its_words(small_model: Path, tmp_path: Path) -> None:
    folder = template_folder(tmp_path, small_model, "{{ raise_exception('no such role') }}")
    response = post(PATH, {"messages": MESSAGES}, MODEL_LOCAL_DIR=folder)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "no such role" in response.json()["error"]["message"]


# What is asked of the engine


def test_every_sampling_field_reaches_the_engine() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            max_tokens=6,
            max_completion_tokens=6,
            temperature=0.5,
            top_p=0.25,
            frequency_penalty=-1.5,
            presence_penalty=2,
            logit_bias={"65": -100},
            seed=11,
            n=2,
            user="somebody",
            parallel_tool_calls=True,
            extra_body={
                "top_k": 4,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "min_tokens": 3,
                "ignore_eos": True,
                "stop_token_ids": [1, 2],
            },
        )
        assert [live.submission.seed for live in server.pool.submitted] == [11, 12]
        assert server.pool.submitted[0].submission.sampling == SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            frequency_penalty=-1.5,
            presence_penalty=2,
            repetition_penalty=1.5,
            logit_bias=((65, -100),),
            max_new_tokens=6,
            min_new_tokens=3,
            stop_token_ids=(1, 2),
            ignore_eos=True,
        )

    run(check, STRICT_FIELDS=1)


@pytest.mark.parametrize(
    ("more", "length"),
    [
        ({}, 300),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 7, "max_completion_tokens": None}, 7),
    ],
)
def test_the_length_goes_by_either_name(more: dict[str, Any], length: int) -> None:
    async def check(server: Server, _: AsyncOpenAI) -> None:
        assert (await server.client.post(PATH, json={"messages": MESSAGES, **more})).is_success
        (live,) = server.pool.submitted
        assert live.submission.max_new_tokens == length

    run(check, MAX_NEW_TOKENS_DEFAULT=300)
