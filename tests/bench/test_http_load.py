"""Load against a server on a real socket that does what the test says."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from itertools import pairwise

import pytest

from backend.interface import RequestRefused
from bench.answer_stream import ENDPOINTS
from bench.asks import Ask
from bench.http_connection import Address
from bench.http_load import Asker, ClosedLoop, Load, LoadRun, OpenLoop
from bench.server_process import free_port
from bench.summary import Record
from tests.bench.scripted_server import (
    Script,
    ScriptedServer,
    chat,
    completion,
    lines,
    native,
    serving,
    stream,
    whole,
)

REFUSAL = b'{"error": {"message": "full", "code": "queue_full"}}'
FULL = whole("429 Too Many Requests", REFUSAL)
ANSWER = stream(*native(["a", "b"], 2))


def asks(count: int) -> list[Ask]:
    return [Ask(f"prompt {number}", 2, 0.0, number, False) for number in range(count)]


def load(
    how: Load,
    count: int,
    *scripts: Script,
    endpoint: str = "generate",
    timeout_s: float = 20.0,
) -> tuple[LoadRun, ScriptedServer]:
    """Ask `count` times, each request answered by the next script, the last one for ever."""

    async def run() -> tuple[LoadRun, ScriptedServer]:
        async with serving(*scripts) as server:
            address = Address(server.url, "secret")
            asker = Asker(address, ENDPOINTS[endpoint], "m", timeout_s)
            return await how.run(asker, asks(count)), server

    return asyncio.run(run())


def failures(run: LoadRun) -> list[str]:
    return [record.failure or "" for record in run.records]


@pytest.mark.parametrize(
    ("endpoint", "pieces"),
    [
        ("generate", native(["a", "b", "c"], 7)),
        ("chat", chat(["a", "b", "c"], 7)),
        ("completions", completion(["a", "b", "c"], 7)),
    ],
)
def test_an_answer_in_each_form_is_recorded_frame_by_frame(
    endpoint: str, pieces: list[bytes]
) -> None:
    pause_s = 0.02
    run, server = load(ClosedLoop(1), 1, stream(*pieces, pause_s=pause_s), endpoint=endpoint)
    (record,) = run.records
    assert server.paths == [ENDPOINTS[endpoint].path]
    assert "authorization: bearer secret\r\n" in server.heads[0].lower()
    assert [frames for _, frames in record.arrivals] == [1, 1, 1]
    assert all(gap > pause_s / 2 for gap in record.gaps())
    assert (record.prompt_tokens, record.output_tokens, record.failed) == (5, 7, False)
    assert record.ended is not None
    assert record.submitted < record.arrivals[0][0] < record.arrivals[-1][0] < record.ended
    assert run.duration_s > 3 * pause_s
    assert 0 < run.client_cpu_share < 1


def test_chunks_may_cut_frames_and_hold_several() -> None:
    body = b"".join(native(["a", "b", "c"], 3))
    run, _ = load(ClosedLoop(1), 2, stream(*(body[at : at + 7] for at in range(0, len(body), 7))))
    assert [sum(frames for _, frames in record.arrivals) for record in run.records] == [3, 3]
    assert failures(run) == ["", ""]


@pytest.mark.parametrize("users", [1, 3, 8])
def test_a_closed_loop_keeps_so_many_requests_in_flight_and_its_connections(users: int) -> None:
    answer = stream(*native(["a", "b"], 2), pause_s=0.002)
    run, server = load(ClosedLoop(users), 24, answer)
    assert server.most == users
    assert server.connections == users
    assert {body["prompt"] for body in server.bodies} == {f"prompt {each}" for each in range(24)}
    assert failures(run) == [""] * 24


def test_a_server_that_closes_after_each_answer_is_asked_again() -> None:
    answer = whole("429 Too Many Requests", REFUSAL, "connection: close")
    run, server = load(ClosedLoop(1), 3, answer)
    assert server.connections == 3
    assert failures(run) == ["HTTP 429 queue_full: full"] * 3


def test_failed_requests_are_records_and_the_others_go_on() -> None:
    error = {"event": "error", "error": {"message": "lost", "code": "engine_failed"}}
    run, server = load(
        *(ClosedLoop(1), 7, FULL),
        *(stream(*native(["a"], 1)[:1], *lines(error)), stream(*native(["a"], 1)[:1])),
        *(stream(*native(["a"], 1)[:1], complete=False), whole("200 OK", b""), ANSWER),
    )
    cut = "cut short: the stream ended without its last frame"
    assert failures(run) == [
        "HTTP 429 queue_full: full",
        "error event engine_failed: lost",
        cut,
        "connection failed: it was closed before the end of the answer",
        cut,
        "",
        "",
    ]
    assert [record.output_tokens for record in run.records] == [0, 1, 1, 1, 0, 2, 2]
    assert server.connections == 2  # only the cut one was opened again


def test_an_answer_that_does_not_end_is_given_up() -> None:
    run, server = load(
        *(ClosedLoop(1), 2, stream(*native(["a"], 1)[:1], pause_s=60), ANSWER), timeout_s=0.2
    )
    assert failures(run) == ["timeout: no end within 0.2 s", ""]
    assert server.connections == 2


def test_what_does_not_speak_http_is_a_failed_connection() -> None:
    async def other(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    run, _ = load(ClosedLoop(1), 1, other)
    assert failures(run)[0].startswith("connection failed: not an HTTP answer")


def test_a_server_that_is_not_there_fails_every_request() -> None:
    asker = Asker(Address(f"http://127.0.0.1:{free_port()}"), ENDPOINTS["chat"], "m", 5.0)
    run = asyncio.run(ClosedLoop(2).run(asker, asks(4)))
    assert [failure.partition(":")[0] for failure in failures(run)] == ["connection failed"] * 4


def test_progress_is_told_of_every_end() -> None:
    told: list[int] = []

    async def run() -> None:
        async with serving(FULL, ANSWER) as server:
            asker = Asker(Address(server.url), ENDPOINTS["generate"], "m", 5.0, told.append)
            await ClosedLoop(2).run(asker, asks(5))

    asyncio.run(run())
    assert told == [1] * 5


def test_visitors_come_when_they_come_and_count_from_when_they_meant_to() -> None:
    slow = stream(*native(["a"], 1), pause_s=0.3)
    how = OpenLoop(request_rate=200.0, seed=4)
    run, server = load(how, 20, slow)
    assert server.most == 20  # nobody waited for anybody's answer
    assert server.connections == 20
    start = run.records[0].submitted - how.arrivals(20)[0]
    for record, arrival in zip(run.records, how.arrivals(20), strict=True):
        assert record.submitted == pytest.approx(start + arrival, abs=1e-6)
        assert record.arrivals[0][0] > record.submitted


def test_a_client_that_falls_behind_does_not_hide_it() -> None:
    async def run() -> list[Record]:
        async with serving(ANSWER) as server:
            asker = Asker(Address(server.url), ENDPOINTS["generate"], "m", 5.0)
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)  # nobody can ask meanwhile
            return (await OpenLoop(request_rate=1000.0, seed=0).run(asker, asks(5))).records

    firsts = [record.first_token() for record in asyncio.run(run())]
    assert all(first is not None and first > 0.25 for first in firsts)


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_are_poisson_and_their_seeds_decide_them(rate: float) -> None:
    arrivals = OpenLoop(rate, seed=1).arrivals(20_000)
    gaps = [after - before for before, after in pairwise([0.0, *arrivals])]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.05)  # as an exponential has it
    longer = sum(gap > 1 / rate for gap in gaps) / len(gaps)
    assert longer == pytest.approx(1 / math.e, abs=0.02)
    assert OpenLoop(rate, seed=1).arrivals(100) == arrivals[:100]
    assert OpenLoop(rate, seed=2).arrivals(100) != arrivals[:100]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:70000", ""]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RequestRefused, match="is no address of a server"):
        Address(url)


def test_a_path_in_the_address_comes_before_the_route() -> None:
    request = Address("https://host:8443/models/small").post("/generate", b"{}").decode()
    assert request.startswith("POST /models/small/generate HTTP/1.1\r\nHost: host:8443\r\n")
    assert request.endswith("\r\nContent-Length: 2\r\n\r\n{}")


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Address("http://host", "secret"))
