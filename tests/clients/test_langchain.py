"""LangChain's ChatOpenAI, over chat completions and over responses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

langchain = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is in requirements-clients.txt"
)

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    capital: bool


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(request: pytest.FixtureRequest, base_url: str, model: str) -> Any:
    """A chat model of LangChain's, for each of OpenAI's APIs."""
    return langchain.ChatOpenAI(
        model=model,
        base_url=base_url,
        api_key="none",
        temperature=0,
        max_tokens=64,
        use_responses_api=request.param,
    )


def test_a_question_is_answered(chat: Any) -> None:
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.text
    assert answer.usage_metadata["output_tokens"] > 0


def test_a_stream_is_the_whole_answer(chat: Any) -> None:
    assert "".join(piece.text for piece in chat.stream(QUESTION)) == chat.invoke(QUESTION).text


def test_structured_output_by_schema(chat: Any) -> None:
    bound = chat.with_structured_output(City, method="json_schema")
    assert isinstance(bound.invoke("Paris"), City)


def test_structured_output_by_a_tool(chat: Any) -> None:
    bound = chat.with_structured_output(City, method="function_calling")
    assert isinstance(bound.invoke("Paris"), City)
