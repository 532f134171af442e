"""`continue_final_message`: the model sees the last turn open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from api.continuation import Continuation
from backend.interface import RequestRefused
from tests.api.in_process import Server
from tests.api.openai_bench import post, refusal, run

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Tell me a story"}


def conversation(said: Any, **more: Any) -> dict[str, Any]:
    messages = [USER, {"role": "assistant", "content": said, **more}]
    return {"messages": messages, "continue_final_message": True, "max_tokens": 1}


def prompt_of(body: dict[str, Any], **flags: object) -> str:
    """What the model sees of a request."""
    prompts = []

    async def check(server: Server, _: AsyncOpenAI) -> None:
        response = await server.client.post(PATH, json=body)
        assert response.is_success, response.text
        table = server.service.model.tokenizer.table
        prompt = server.pool.submitted[0].submission.prompt
        prompts.append(b"".join(table[id] for id in prompt).decode())

    run(check, **flags)
    return prompts[0]


@pytest.mark.parametrize("said", ["Once", "Once ", " Once\n\n", "", "<|im_end|>", "🙂"])
@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_the_prompt_ends_with_the_text_of_the_last_turn(said: str, more: dict[str, Any]) -> None:
    opened = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of({**conversation(said), **more}) == opened + said


def test_a_real_template_is_cut_there_too(small_model: Path) -> None:
    seen = prompt_of(conversation("Once upon"), MODEL_LOCAL_DIR=small_model)
    assert seen.endswith("<|im_start|>assistant\nOnce upon")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER], "continue_final_message": True},
        {**conversation("a"), "add_generation_prompt": True},
    ],
)
def test_what_cannot_be_continued_is_refused(body: dict[str, Any]) -> None:
    assert refusal(post(PATH, body)) == (400, "continue_final_message")


def test_a_template_that_does_not_show_the_text_is_refused() -> None:
    with pytest.raises(RequestRefused, match="continue_final_message"):
        Continuation().cut("nothing of it")
