"""Clients that others wrote, against a real server: `make client-wall`.

They bring hundreds of packages, and so have an environment of their own; in ours each file skips.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Seen when this folder is what pytest is asked for."""
    parser.addoption("--server", help="the URL of a server that is ready")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> str:
    """Its URL."""
    url: str | None = request.config.getoption("--server", default=None)
    if not url:
        pytest.skip("no --server: run by `make client-wall`")
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
