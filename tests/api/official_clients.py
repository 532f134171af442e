"""The clients that OpenAI and Anthropic publish, pointed at a server in this process."""

from __future__ import annotations

import httpx2
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.api.in_process import Server


def openai_of(server: Server, key: str = "none") -> AsyncOpenAI:
    """OpenAI's."""
    return AsyncOpenAI(
        base_url="http://server/v1", api_key=key, max_retries=0, http_client=_http_of(server)
    )


def anthropic_of(server: Server) -> AsyncAnthropic:
    """Anthropic's."""
    return AsyncAnthropic(
        base_url="http://server", api_key="none", max_retries=0, http_client=_http_of(server)
    )


def _http_of(server: Server) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport)
