"""Clients that others wrote, against a real server: `make client-wall`.

They bring hundreds of packages, and so have an environment of their own; in ours each file skips.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Seen when this folder is what pytest is asked for."""
    parser.addoption("--server", help="the URL of a server that is ready")
    parser.addoption("--fake-server", help="the same of one with the fake backend")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> str:
    """Its URL."""
    return _given(request, "--server")


@pytest.fixture(scope="session")
def fake_server(request: pytest.FixtureRequest) -> str:
    """The URL of another, which answers at once and what it likes."""
    return _given(request, "--fake-server")


def _given(request: pytest.FixtureRequest, option: str) -> str:
    url: str | None = request.config.getoption(option, default=None)
    if not url:
        pytest.skip(f"no {option}: run by `make client-wall`")
    return url


@pytest.fixture(scope="session")
def base_url(server: str) -> str:
    """Where clients of OpenAI's API begin."""
    return f"{server}/v1"


MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def model() -> str:
    """What the server calls its model."""
    return MODEL
