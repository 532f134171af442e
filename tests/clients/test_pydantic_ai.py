"""Pydantic AI: agents with tools and typed output."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

pydantic_ai = pytest.importorskip(
    "pydantic_ai", reason="pydantic-ai-slim is in requirements-clients.txt"
)

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    capital: bool


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel", "AnthropicModel"])
def spoken(request: pytest.FixtureRequest, server: str, base_url: str, model: str) -> Any:
    """The model, in each of three APIs."""
    if request.param == "AnthropicModel":
        from anthropic import AsyncAnthropic
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        client = AsyncAnthropic(base_url=server, api_key="none")
        return AnthropicModel(model, provider=AnthropicProvider(anthropic_client=client))
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=base_url, api_key="none")
    return getattr(openai, request.param)(model, provider=provider)


SETTINGS = {"temperature": 0.0, "max_tokens": 96}


def test_an_agent_answers(spoken: Any) -> None:
    agent = pydantic_ai.Agent(spoken, model_settings=SETTINGS)
    assert "Paris" in agent.run_sync(QUESTION).output


def test_an_agent_gives_a_typed_answer(spoken: Any) -> None:
    agent = pydantic_ai.Agent(spoken, output_type=City, model_settings=SETTINGS)
    assert isinstance(agent.run_sync("Paris is the capital of France.").output, City)
