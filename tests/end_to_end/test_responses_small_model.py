"""`/v1/responses` of a real server with the small real model, asked by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.end_to_end.server_process import serving

QUESTION: dict[str, Any] = {
    "model": "small",
    "input": "What is the capital of France?",
    "temperature": 0,
    "max_output_tokens": 24,
}


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


@pytest.fixture(scope="module")
def client(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("responses") / "log"
    flags = {"BACKEND_IMPL": "hf", "DTYPE": "float32", "PAGE_TOKEN_BUDGET": 8192}
    with (
        serving(log, MODEL_LOCAL_DIR=small_model, MODEL_ALIAS="small", **flags) as server,
        openai.OpenAI(base_url=f"{server.ready()}/v1", api_key="none") as found,
    ):
        yield found


def test_an_answer_is_given_streamed_and_continued(client: openai.OpenAI) -> None:
    whole = client.responses.create(**QUESTION, store=True)
    assert "Paris" in whole.output_text
    with client.responses.stream(**QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == whole.output_text
    assert len(deltas) > 3
    again = {**QUESTION, "input": "And of Italy?", "previous_response_id": whole.id}
    more = client.responses.create(**again)
    assert more.usage is not None
    assert more.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(whole.id) == whole


def test_an_answer_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    asked = {**QUESTION, "max_output_tokens": 120}
    answer = client.responses.parse(**asked, text_format=City)
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, City)
