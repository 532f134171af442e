"""Opens the backend under test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.interface import Submission
from config import BatchSettings, CacheSettings
from engine.opening import open_backend
from tests.conformance.cases import BACKENDS, DOUBLES, Alone, Opener
from tests.conformance.driver import Answer, Driver


@pytest.fixture(scope="session")
def known() -> dict[tuple[str, Submission], Answer]:
    """Answers given alone, by backend: asking for each once keeps the suite short."""
    return {}


@pytest.fixture(params=BACKENDS)
def opened(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Opener]:
    """Opens the backend under test; what it holds at the end of the test is counted."""
    base = tmp_path_factory.getbasetemp() / request.param.replace(", ", "-")
    base.mkdir(exist_ok=True)
    drivers: list[Driver] = []
    if request.param in DOUBLES:
        DOUBLES[request.param](monkeypatch)

    def open_one(
        *,
        pages: int = 64,
        page_tokens: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 64,
        prefix: bool = True,
    ) -> Driver:
        settings = BACKENDS[request.param](base).model_copy(
            update={
                "cache": CacheSettings(
                    page_tokens=page_tokens, budget_tokens=pages * page_tokens, prefix=prefix
                ),
                "batch": BatchSettings(max_running=max_running, max_step_tokens=max_step_tokens),
            }
        )
        drivers.append(Driver(open_backend(settings)))
        return drivers[-1]

    yield open_one
    for driver in drivers:
        driver.drain()
        assert all(len(answer.finishes) == 1 for answer in driver.answers.values())
        driver.backend.flush()
        load = driver.backend.load()
        assert load.pages_free == load.pages_total
        driver.backend.close()


@pytest.fixture
def driver(opened: Opener) -> Driver:
    return opened()


@pytest.fixture
def alone(
    request: pytest.FixtureRequest, opened: Opener, known: dict[tuple[str, Submission], Answer]
) -> Alone:
    """What a submission is answered by an engine that does nothing else and caches nothing."""
    name = request.node.callspec.params["opened"]

    def answer(submission: Submission) -> Answer:
        if (name, submission) not in known:
            (known[name, submission],) = opened(prefix=False).run(submission)
        return known[name, submission]

    return answer
