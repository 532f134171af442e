"""A batch job over a real app and a real engine, in one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.types import Receive, Scope, Send

from api import chat, completions
from api.batch_file import Line, Output
from api.batch_run import ATTEMPTS, Job
from api.errors import api_error
from backend.interface import BackendFailed, Unavailable
from engine.multi_device import EnginePool
from tests.api.in_process import Server, serve

CHAT = "/v1/chat/completions"


def line(name: str, url: str = "/v1/completions", **body: Any) -> Line:
    content = {"prompt": "hello", "max_tokens": 4, **body}
    return Line(custom_id=name, method="POST", url=url, body=content)


class FailingApp:
    """Refuses as it is told to, and counts who is there."""

    def __init__(self, server: Server, failures: int = 0) -> None:
        self.server = server
        self.failures = failures  # that are still to come
        self.present = self.most = self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.present += 1
        self.most = max(self.most, self.present)
        try:
            if self.failures:
                self.failures -= 1
                await api_error(BackendFailed("the engine died")).response(scope)(
                    scope, receive, send
                )
            else:
                await self.server.app(scope, receive, send)
        finally:
            self.present -= 1


def answers(path: Path) -> dict[str, dict[str, Any]]:
    """Responses by custom_id, each of which may be there once."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    found = {each["custom_id"]: each["response"] for each in lines}
    assert len(found) == len(lines)
    return found


async def run(
    server: Server, path: Path, lines: Sequence[Line], app: Any = None, concurrency: int = 4
) -> dict[str, dict[str, Any]]:
    """Do a job to its end."""
    with closing(Output(path, {each.custom_id for each in lines})) as output:
        job = Job(app or server.app, cast(EnginePool, server.pool), output)
        await job.run(iter(lines), concurrency)
    return answers(path)


def test_each_line_is_answered_as_the_route_answers(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router, chat.router) as server:
            messages = [{"role": "user", "content": "hi"}]
            asked = {
                "plain": line("plain"),
                "chat": Line(
                    custom_id="chat",
                    method="POST",
                    url=CHAT,
                    body={"messages": messages, "max_tokens": 4, "temperature": 0},
                ),
            }
            found = await run(server, tmp_path / "out", list(asked.values()))
            for name, each in asked.items():
                direct = (await server.client.post(each.url, json=each.body)).json()
                body = found[name]["body"]
                assert found[name]["status_code"] == 200
                assert body["usage"]["completion_tokens"] == 4
                assert body.keys() == direct.keys()
                assert body["object"] == direct["object"]

    asyncio.run(check())


def test_an_error_of_a_line_is_its_answer_and_the_others_go_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            lines = [
                line("good"),
                line("wrong", temperature=-1),
                line("streamed", stream=True),
                line("unserved", url="/v1/embeddings"),
                line("other model", model="gpt"),
                line("also good"),
            ]
            found = await run(server, tmp_path / "out", lines)
            statuses = {name: each["status_code"] for name, each in found.items()}
            assert statuses == {
                "good": 200,
                "wrong": 400,
                "streamed": 400,
                "unserved": 404,
                "other model": 404,
                "also good": 200,
            }
            assert found["wrong"]["body"]["error"]["param"] == "temperature"
            assert found["streamed"]["body"]["error"]["param"] == "stream"

    asyncio.run(check())


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_as_many_are_asked_at_a_time_as_is_said(tmp_path: Path, concurrency: int) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            app = FailingApp(server)
            lines = [line(str(index)) for index in range(12)]
            found = await run(server, tmp_path / "out", lines, app, concurrency)
            assert found.keys() == {each.custom_id for each in lines}
            assert app.most == min(concurrency, 12)

    asyncio.run(check())


def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            lines = [line(str(index)) for index in range(6)]
            path = tmp_path / "out"
            before = await run(server, path, lines)
            texts = path.read_text().splitlines(keepends=True)
            path.write_text("".join(texts[:4]) + texts[4][:20])
            app = FailingApp(server)
            after = await run(server, path, lines, app)
            assert app.calls == 2
            assert after.keys() == before.keys()
            assert path.read_text().startswith("".join(texts[:4]))

    asyncio.run(check())


def test_a_request_whose_engine_was_lost_is_asked_again_but_not_for_ever(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            app = FailingApp(server, failures=ATTEMPTS - 1)
            found = await run(server, tmp_path / "one", [line("a")], app)
            assert (found["a"]["status_code"], app.calls) == (200, ATTEMPTS)
            app = FailingApp(server, failures=ATTEMPTS)
            found = await run(server, tmp_path / "two", [line("a")], app)
            assert (found["a"]["status_code"], app.calls) == (503, ATTEMPTS)

    asyncio.run(check())


def test_a_job_whose_engines_are_all_down_ends_and_can_go_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            server.pool.state = "down"
            lines = [line("a"), line("b")]
            with pytest.raises(Unavailable, match="down"):
                await run(server, tmp_path / "out", lines)
            assert (tmp_path / "out").read_bytes() == b""
            server.pool.state = "ready"
            assert (await run(server, tmp_path / "out", lines)).keys() == {"a", "b"}

    asyncio.run(check())


def test_a_job_that_is_cancelled_leaves_no_request_behind(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            lines = [line(str(index), max_tokens=200, ignore_eos=True) for index in range(3)]
            job = asyncio.ensure_future(run(server, tmp_path / "out", lines))
            while len(server.pool.submitted) < 3:
                await asyncio.sleep(0)
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            assert all(live.finish is not None for live in server.pool.submitted)
            assert (tmp_path / "out").read_bytes() == b""

    asyncio.run(check())


def test_a_defect_is_the_answer_of_its_line_alone(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(completions.router) as server:
            failing = [True, True]

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                if failing and failing.pop():
                    if failing:
                        await api_error(ValueError()).response(scope)(scope, receive, send)
                    raise ValueError
                await server.app(scope, receive, send)

            found = await run(server, tmp_path / "out", [line("a"), line("b"), line("c")], app)
            assert sorted(each["status_code"] for each in found.values()) == [200, 500, 500]
            errors = [each["body"] for each in found.values() if each["status_code"] == 500]
            assert errors[0] == errors[1] == api_error(ValueError()).body()

    asyncio.run(check())
