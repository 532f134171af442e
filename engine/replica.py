"""A place where engines run, one process at a time, and what the front hears from it.

Owned by its supervisor, on the event loop of the front. Engines are started from the loop's thread:
the kernel ends them with the thread that started them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

from backend.interface import BackendFailed, BackendSpec, StartFailed
from engine.devices import ReplicaPlan
from ipc.messages import (
    EngineMessage,
    Failed,
    Flush,
    Flushed,
    FrontMessage,
    Pause,
    Paused,
    Phase,
    Ready,
    Step,
)
from ipc.zmq_data import EngineLink

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # what `engine` is imported from
LEFTOVER_GRACE_S = 5.0  # for an engine that failed, to give back its device
UNDER_WAY = {"": "process", "process": "backend", "backend": "backend"}  # after which phase


class EngineProcess:
    """One life of an engine: its process, and the link to it."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Raises OSError."""
        self.link = EngineLink()
        self.messages = self._receive()
        loop = asyncio.get_running_loop()
        self._exit_code: asyncio.Future[int] = loop.create_future()
        command = [sys.executable, "-m", "engine.worker"]
        command += ["--index", str(plan.index), "--endpoint", self.link.endpoint]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the lifeline: it closes when we are gone
                env=environment(plan),
                start_new_session=True,  # Ctrl-C in a terminal is for the front, which decides
            )
        except OSError:
            self.link.close()
            raise
        threading.Thread(target=self._watch, args=(loop,), name="engine exit", daemon=True).start()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread, because each kind of event loop has another way to wait for a process."""
        code = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(self._exited, code)

    def _exited(self, code: int) -> None:
        self._exit_code.set_result(code)
        self.link.end()

    @property
    def pid(self) -> int | None:
        """None: the process has ended."""
        return None if self._exit_code.done() else self._process.pid

    async def _receive(self) -> AsyncIterator[EngineMessage]:
        """All that the engine says, until its process has ended."""
        while messages := await self.link.receive():
            for message in messages:
                yield message

    async def how_it_ended(self) -> str:
        """In words. Waits for it."""
        code = await asyncio.shield(self._exit_code)
        if code >= 0:
            return f"ended with exit code {code}"
        hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    async def close(self, grace_s: float) -> None:
        """End the process: asked first, killed after `grace_s` seconds. Nothing is left of it."""
        try:
            self._process.terminate()
            await asyncio.wait((self._exit_code,), timeout=grace_s)
        finally:
            self._process.kill()
            self.link.close()
        await asyncio.shield(self._exit_code)
        if self._process.stdin is not None:
            self._process.stdin.close()


class Replica:
    """Engines on one device, one after another."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self.plan = plan
        self._name = f"engine {plan.index}"
        self._life: EngineProcess | None = None
        self._down: str | None = f"{self._name} has not been started"  # None: it serves
        self._asked: dict[int, asyncio.Future[int]] = {}  # what the engine has to answer yet
        self._numbers = itertools.count()

    @property
    def pid(self) -> int | None:
        """The engine's process; None when there is none."""
        return None if self._life is None else self._life.pid

    async def start(self, on_phase: Callable[[str, float], None]) -> BackendSpec:
        """Start an engine, in place of the last one, and wait until it serves.

        `on_phase` hears of each phase that ends, and its seconds. Raises StartFailed with one line,
        and then nothing is left of it.
        """
        await self.close(LEFTOVER_GRACE_S)
        try:
            self._life = EngineProcess(self.plan)
        except OSError as error:
            raise StartFailed(f"{self._name} cannot be started: {error}") from None
        try:
            spec = await self._until_ready(self._life, on_phase)
        except BaseException:
            await self.close(LEFTOVER_GRACE_S)
            raise
        self._down = None
        return spec

    async def _until_ready(
        self, life: EngineProcess, on_phase: Callable[[str, float], None]
    ) -> BackendSpec:
        phase = ""
        async for message in life.messages:
            if isinstance(message, Ready):
                return message.spec
            if isinstance(message, Failed):
                raise StartFailed(message.message)
            if isinstance(message, Phase):
                phase = message.name
                logger.info("%s: %s in %.1f s", self._name, phase, message.seconds)
                on_phase(phase, message.seconds)
        how = await life.how_it_ended()
        raise StartFailed(f'{self._name} {how} in the start-up phase "{UNDER_WAY[phase]}"')

    async def run(self, on_step: Callable[[Step], None]) -> str:
        """Hand out the steps of an engine that was started, until it fails or its process ends.

        Returns the reason, one line. All that came before is handed out before.
        """
        if self._life is None:
            raise RuntimeError(f"{self._name} runs no process: start it first")
        reason = await self._deliver(self._life, on_step)
        self._give_up(reason)
        return reason

    async def _deliver(self, life: EngineProcess, on_step: Callable[[Step], None]) -> str:
        async for message in life.messages:
            if isinstance(message, Step):
                on_step(message)
            elif isinstance(message, Flushed):
                self._answered(message.number, message.pages)
            elif isinstance(message, Paused):
                self._answered(message.number, 0)
            elif isinstance(message, Failed):
                return message.message
        return f"{self._name} {await life.how_it_ended()}"

    def _answered(self, number: int, result: int) -> None:
        answer = self._asked.pop(number)
        if not answer.done():  # whoever asked may have given up
            answer.set_result(result)

    def send(self, message: FrontMessage) -> None:
        """Send to the engine. Dropped where none serves, which `run` says."""
        if self._life is not None:
            self._life.link.send(message)

    async def flush(self) -> int:
        """Give up every cached prefix that is not in use. Returns the pages freed.

        Works while `run` does. Raises BackendFailed when no engine serves, or not until the answer.
        """
        return await self._ask(Flush)

    async def pause(self, paused: bool) -> None:
        """Let the engine do no steps, or go on. It is so, and every earlier step has been handed
        out, when this returns. Raises as `flush` does.
        """
        await self._ask(lambda number: Pause(number, paused))

    async def _ask(self, question: Callable[[int], FrontMessage]) -> int:
        if self._down is not None:
            raise BackendFailed(self._down)
        number = next(self._numbers)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self.send(question(number))
        return await answer

    def _give_up(self, reason: str) -> None:
        """No engine serves from now on."""
        self._down = reason
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            if not answer.done():
                answer.set_exception(BackendFailed(reason))

    async def close(self, grace_s: float) -> None:
        """End the engine, if there is one. `run` returns then."""
        life, self._life = self._life, None
        if life is not None:
            self._give_up(f"{self._name} was closed")
            await life.close(grace_s)


def environment(plan: ReplicaPlan) -> dict[str, str]:
    """Of an engine's process: ours, and the code is ours, not what lies where we were started."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **found, **plan.environment}
