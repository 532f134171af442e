"""One engine process: its loop without a process, and how the process begins and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from backend.interface import Submission
from config import QueueSettings
from engine.engine import Engine
from engine.opening import open_backend
from engine.worker import DEADLINE_WAIT_S, REST_WAIT_S, Worker
from ipc.messages import (
    Cancel,
    EngineMessage,
    Failed,
    Flush,
    Flushed,
    FrontMessage,
    Phase,
    Ready,
    Step,
)
from ipc.zmq_data import EngineLink, FrontLink, make_endpoint
from tests.engine.engine_bench import Scripted, fake_settings
from tests.engine.process_bench import PATIENCE_S, PROMPT, greedy, socket_place, submit

AT_REST: list[FrontMessage] = []  # what comes after it is said when the engine sleeps


class Over(Exception):
    """The front has nothing more to say, and the engine is at rest."""


class Front(FrontLink):
    """A front that says its batches, one for each look into the inbox."""

    def __init__(self, *batches: Sequence[FrontMessage]) -> None:
        self.batches = list(batches)
        self.sent: list[EngineMessage] = []
        self.polls: list[tuple[float, int | None]] = []

    def send(self, message: EngineMessage) -> None:
        self.sent.append(message)

    def poll(self, timeout_s: float, also_fd: int | None = None) -> bool:
        self.polls.append((timeout_s, also_fd))
        if timeout_s != REST_WAIT_S:
            return bool(self.batches) and self.batches[0] is not AT_REST
        if not self.batches:
            raise Over
        if self.batches[0] is AT_REST:
            del self.batches[0]
        return bool(self.batches)

    def receive(self) -> list[FrontMessage]:
        if not self.batches or self.batches[0] is AT_REST:
            return []
        return list(self.batches.pop(0))

    @property
    def steps(self) -> list[Step]:
        return [message for message in self.sent if isinstance(message, Step)]

    def heard(self) -> dict[str, tuple[list[int], list[str]]]:
        """Tokens and finish reasons of each answer."""
        heard: dict[str, tuple[list[int], list[str]]] = {}
        for delta in (delta for step in self.steps for delta in step.deltas()):
            tokens, reasons = heard.setdefault(delta.id, ([], []))
            tokens += delta.tokens
            reasons += [delta.finish.reason] if delta.finish else []
        return heard


@dataclass
class Polled(Scripted):
    """A backend that works by itself and says by a descriptor when there is something."""

    descriptor: int = field(default=99)

    def fileno(self) -> int | None:
        return self.descriptor


def serve(*batches: Sequence[FrontMessage], engine: Engine | None = None, **fake: int) -> Front:
    """All that a worker says to these batches, until it is at rest or has failed."""
    front = Front(*batches)
    backend = open_backend(fake_settings(**fake))
    with suppress(Over):
        Worker(engine or Engine(backend, QueueSettings()), front).run()
    return front


# The loop


@pytest.mark.parametrize("depth", [1, 3])
def test_every_token_of_every_answer_is_sent(depth: int) -> None:
    prompts = {str(index): (index + 1, 5, 6) for index in range(7)}
    front = serve([submit(id, prompt, 6) for id, prompt in prompts.items()], depth=depth)
    right = {id: (greedy(prompt, 6), ["length"]) for id, prompt in prompts.items()}
    assert front.heard() == right


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_message_says_that_everything_is_home(depth: int) -> None:
    front = serve([submit("a"), submit("b", new=9)], depth=depth)
    load = front.steps[-1].load
    assert (load.running, load.waiting, load.pages_leased) == (0, 0, 0)


def test_an_engine_at_rest_sleeps_and_says_nothing_twice() -> None:
    front = serve([submit("a")], AT_REST, [Cancel("nobody")], AT_REST, [Cancel("a")])
    assert front.polls == [(REST_WAIT_S, None)] * 4, (
        "asleep before each batch that finds it at rest"
    )
    told = [(step.deltas(), step.load) for step in front.steps]
    assert all(one != next for one, next in pairwise(told))
    assert front.heard() == {"a": (greedy(PROMPT, 4), ["length"])}


def test_an_engine_at_rest_prepares_before_it_sleeps_and_looks_up_between_two_pieces() -> None:
    backend = Scripted(open_backend(fake_settings()).spec, to_prepare=3)
    front = serve(AT_REST, [submit("a")], engine=Engine(backend, QueueSettings()))
    look = (0.0, None)
    assert front.polls == [look, look, look, (REST_WAIT_S, None), (REST_WAIT_S, None)]
    busy = Scripted(backend.spec, to_prepare=3)
    front = serve([submit("a")], engine=Engine(busy, QueueSettings()))
    assert front.polls[0] == look
    assert busy.began, "what had come was not kept waiting for the rest"


def test_a_backend_that_works_by_itself_is_waited_for_with_the_inbox() -> None:
    backend = Polled(open_backend(fake_settings()).spec)
    front = serve([submit("a"), submit("b")], engine=Engine(backend, QueueSettings()))
    assert front.polls == [(REST_WAIT_S, 99), (DEADLINE_WAIT_S, 99), (REST_WAIT_S, 99)]


def test_a_refused_submission_ends_with_one_line_and_nobody_else_does() -> None:
    front = serve([submit("a"), submit("wrong", [10**6]), submit("b")])
    reasons = {id: reasons for id, (_, reasons) in front.heard().items()}
    assert reasons == {"a": ["length"], "wrong": ["error"], "b": ["length"]}
    (finish,) = [d.finish for s in front.steps for d in s.deltas() if d.id == "wrong"]
    assert finish is not None
    assert finish.message == "prompt holds token id 1000000, outside the vocabulary of 260"


def test_a_defect_at_a_submission_reaches_its_client_and_its_trace_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(open_backend(fake_settings()), QueueSettings())
    accept = engine.submit

    def stumble(submission: Submission) -> None:
        if submission.id == "unlucky":
            raise KeyError("a bug\nin two lines")
        accept(submission)

    monkeypatch.setattr(engine, "submit", stumble)
    front = serve([submit("unlucky"), submit("a")], engine=engine)
    assert front.heard()["a"][1] == ["length"]
    (finish,) = [d.finish for s in front.steps for d in s.deltas() if d.id == "unlucky"]
    assert finish is not None
    assert finish.message == r"KeyError: 'a bug\nin two lines'"
    assert [bool(record.exc_info) for record in caplog.records] == [True]


def test_a_cancelled_answer_ends_with_abort() -> None:
    front = serve([submit("a", new=50), submit("b", new=5)], [], [], [Cancel("a")])
    tokens, reasons = front.heard()["a"]
    assert reasons == ["abort"]
    assert len(tokens) < 10
    assert front.heard()["b"][1] == ["length"]


def test_a_flush_is_answered_by_its_number_with_the_pages() -> None:
    front = serve([submit("a", range(1, 101), 4)], AT_REST, [Flush(7), Flush(8)])
    assert [each for each in front.sent if isinstance(each, Flushed)] == [
        Flushed(7, 25),
        Flushed(8, 0),
    ]
    assert front.steps[-1].load.pages_cached == 0
    assert front.steps[-1].evicted


def test_when_the_backend_fails_each_answer_ends_once_and_the_cause_comes_last() -> None:
    asked = [submit(str(index), (index + 1, 5, 6)) for index in range(9)]
    front = serve(asked, fail_at_step=2)
    assert {id: reasons for id, (_, reasons) in front.heard().items()} == {
        str(index): ["error"] for index in range(9)
    }
    last = front.sent[-1]
    assert isinstance(last, Failed)
    assert last.message.startswith("the backend failed: DeviceLost: the fake device was lost")
    assert sum(isinstance(message, Failed) for message in front.sent) == 1


# The process


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are made. In the end nothing is left there."""
    with socket_place(monkeypatch) as folder:
        yield folder


def process(root: Path, endpoint: str, **flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "engine.worker", "--index", "4", "--endpoint", endpoint],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "BACKEND_IMPL": "fake", **flags},
    )


def ended(worker: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Exit code and log of a process that ends while its lifeline is held."""
    assert worker.stdin is not None
    assert worker.stderr is not None
    code = worker.wait(PATIENCE_S)
    with worker.stdin, worker.stderr:
        return code, worker.stderr.read()


async def conversation(link: EngineLink) -> list[EngineMessage]:
    """What a worker says of its start, up to its last word about it."""
    said: list[EngineMessage] = []
    while not (said and isinstance(said[-1], Ready | Failed)):
        said += await asyncio.wait_for(link.receive(), PATIENCE_S)
    return said


def test_a_process_tells_its_start_ignores_ctrl_c_and_ends_when_asked(
    root: Path, place: Path
) -> None:
    async def main() -> None:
        link = EngineLink()
        worker = process(root, link.endpoint)
        before, loaded, ready = await conversation(link)
        assert isinstance(before, Phase)
        assert isinstance(loaded, Phase)
        assert isinstance(ready, Ready)
        assert (before.name, loaded.name, ready.spec.name) == ("process", "backend", "fake")
        worker.send_signal(signal.SIGINT)
        link.send(Flush(1))
        while Flushed(1, 0) not in await asyncio.wait_for(link.receive(), PATIENCE_S):
            pass
        worker.send_signal(signal.SIGTERM)
        assert ended(worker) == (0, b"")
        link.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ({"MAX_RUNNING": "none"}, "MAX_RUNNING=none: "),
        ({"MODEL_LOCAL_DIR": "/nowhere"}, "MODEL_LOCAL_DIR=/nowhere has no config.json: "),
    ],
)
def test_a_start_that_fails_is_one_line_and_no_trace(
    root: Path, place: Path, flags: dict[str, str], cause: str
) -> None:
    async def main() -> None:
        link = EngineLink()
        worker = process(root, link.endpoint, **flags)
        failed = (await conversation(link))[-1]
        end = ended(worker)
        link.close()
        assert isinstance(failed, Failed)
        assert failed.message.startswith(cause)
        assert "\n" not in failed.message
        assert end == (1, b"")

    asyncio.run(main())


def test_a_process_ends_when_its_lifeline_does(root: Path, place: Path) -> None:
    async def main() -> None:
        link = EngineLink()
        worker = process(root, link.endpoint)
        await conversation(link)
        worker.communicate(timeout=PATIENCE_S)  # which lets go of it
        assert worker.returncode == 1
        link.close()

    asyncio.run(main())


def test_a_front_that_died_before_it_was_reached_leaves_nothing(root: Path, place: Path) -> None:
    worker = process(root, make_endpoint())
    worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 1
