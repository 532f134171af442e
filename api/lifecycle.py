"""From the settings to a server that answers, and back: start-up, signals, shutdown.

The front answers at once and the engines follow: until the first is ready whatever needs one gets a
503. What cannot start ends the process with one line.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from api.control import Control
from api.fleet_guard import FleetGuard
from api.service import Service
from backend.interface import EngineError, Finish
from config import Settings
from engine.log import start_log
from engine.multi_device import EnginePool
from engine.statistics import Statistics
from ipc.zmq_control import ControlSocket

logger = logging.getLogger(__name__)

STOPPING = Finish("abort", message="the server is stopping")
ENDS = (signal.SIGTERM, signal.SIGINT)
FAREWELL_S = 3.0  # for the last lines to be read


class Lifecycle:
    """One life of a server. Made, started and stopped on the event loop."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartFailed when another worker has the engines."""
        start_log(settings.log_level)
        self._settings = settings
        self._guard = FleetGuard()
        self.statistics = Statistics(settings.server.metric_window)
        self.pool = EnginePool(
            settings.pool, settings.adaptive, settings.queue, settings.backend, self.statistics
        )
        self.service = Service(settings, self.pool)
        self._socket: ControlSocket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._restore: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Listen for control, begin to start the engines, and return. Raises StartFailed."""
        control = self._settings.control
        if control.enabled:
            self._socket = ControlSocket(control.endpoint, Control(self.service).run)
            self._socket.start()
            self._tasks.append(asyncio.create_task(self._socket.run()))
            logger.info("control plane on %s", control.endpoint)
        await self.pool.start()
        self._tasks.append(asyncio.create_task(self._bring_up()))
        self._restore = on_signal(self._begin_to_stop)

    async def _bring_up(self) -> None:
        """Wait for the engines, then warm them. Without any, the process ends."""
        try:
            await self.service.wait_for_model()
            texts = (self._settings.server.warm_prefixes or "").split("||")
            prefixes = await self.service.encode([text for text in texts if text], "WARM_PREFIXES")
            self.pool.keep_warm(prefixes)
        except Exception as error:  # whatever it is, a server that cannot serve ends
            expected = isinstance(error, EngineError)  # else it is a defect: the trace is wanted
            cause = str(error) if expected else f"{type(error).__name__}: {error}"
            logger.critical("the server cannot start: %s", cause, exc_info=not expected)
            await self.stop()
            # from the loop itself: nobody waits for this task, who would pass its exit code on
            asyncio.get_running_loop().call_soon(sys.exit, 1)
            return
        gc.collect()
        gc.freeze()  # what a start leaves lives as long as we do: no collection stops us for it
        logger.info("%s is served", self.service.model.names[0])

    def _begin_to_stop(self) -> None:
        """A signal has come: nothing new is taken, and what runs has DRAIN_TIMEOUT_S to end."""
        self.pool.drain()
        self._tasks.append(asyncio.create_task(self._end_streams()))

    async def _end_streams(self) -> None:
        """Let answers end, then end them; `stop` ends this task when the last has left.

        A client that does not read keeps its connection, and uvicorn waits for it. A second signal
        makes it leave at once.
        """
        if not await self.pool.drained(self._settings.server.drain_timeout_s):
            logger.warning("%d requests are ended early", self.pool.abort(finish=STOPPING))
        await asyncio.sleep(FAREWELL_S)
        logger.warning("clients that do not read their answers are cut off")
        await self.stop()
        signal.raise_signal(signal.SIGINT)

    async def stop(self) -> None:
        """End the engines and let go of everything."""
        self._restore()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._socket is not None:
            await self._socket.close()
        await self.pool.close()
        self._guard.release()


def on_signal(act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` on the running loop at SIGTERM or SIGINT, then whoever listened before.

    Only the main thread can listen. Returns what restores the earlier listeners.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in ENDS}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(act)
        listener = before[signal.Signals(number)]
        if callable(listener):
            listener(number, frame)

    def restore() -> None:
        for number, listener in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, listener)

    for number in ENDS:
        signal.signal(number, handle)
    return restore
