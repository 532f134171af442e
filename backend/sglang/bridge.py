"""Between our thread and SGLang's event loop: requests go in, what comes of them is collected.

SGLang lives in one thread of ours: its engine is made there, on an event loop that runs until the
end. So none of its signal handlers is set (it sets them in the main thread only), and what its
processes say by a signal comes to `_on_quit` instead. Everything public here is called by the
thread that owns the backend, which must be the main one.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import uvloop

from backend.interface import DeviceLost, StartFailed, Unsupported, first_line
from backend.sglang.custody import Custody
from backend.sglang.last_words import LastWords
from backend.sglang.runtime import Engine, Sglang, TokenizerManager, load_sglang

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # during the start: has one of its processes said that it failed?
GIVE_UP_S = 15.0  # then SGLang sees it within five seconds, and says so by an exception
END_S = 10.0  # that SGLang has to let go of what it holds in this process
WORDS_S = 2.0  # for the last that its processes say
# Of its processes, which read it when they load.
ENVIRONMENT = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # log-probabilities are those before temperature
    "SPT_NOENV": "1",  # a process that renames itself keeps the environment that it is known by
}

Result = TypeVar("Result")


class News(NamedTuple):  # one for each burst of tokens: the quickest to make
    """What came of a request."""

    rid: str
    output: Mapping[str, Any] | None = None
    error: str | None = None  # in place of an output: SGLang would not take the request


@dataclass(frozen=True, slots=True)
class Facts:
    """What SGLang decided when it started."""

    context: int
    vocabulary: int
    end_ids: frozenset[int]  # that it knows of the model
    dtype: str
    attention: str
    tokens: int  # of its pool
    max_running: int
    max_step_tokens: int
    page_tokens: int
    prefix: bool  # it keeps what was computed


@dataclass(slots=True)
class Followed:
    """A request that SGLang has or will have. The loop's thread alone knows it."""

    aborted: bool = False
    task: asyncio.Task[None] | None = None  # held, because the loop does not


class Bridge:
    """One runtime, from its start to its end."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Start SGLang and wait until it serves. Raises StartFailed, and then nothing is left."""
        self._arguments = arguments
        self._inbox: deque[News] = deque()  # filled by the loop's thread
        self._told = False  # the loop's thread will signal what is in there
        self._followed: dict[str, Followed] = {}
        self._reported = False  # a process of SGLang has said that it failed
        self._facts: Facts | None = None
        self._failure: BaseException | None = None
        self._engine: Engine | None = None
        self._ready = threading.Event()
        self._ending = asyncio.Event()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._live, name="sglang", daemon=True)
        with ExitStack() as stack:  # what was opened is closed if the rest fails, last first
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._wake)
            self._poll = select.epoll()
            stack.callback(self._poll.close)
            self._poll.register(self._wake, select.EPOLLIN)
            stack.callback(self._give_signal_back, self._take_signal())
            self._words = LastWords()
            stack.callback(self._words.close, WORDS_S)
            stack.callback(self._leave)
            self._custody = Custody()
            stack.callback(self._end_processes)
            stack.callback(self._ask_to_leave)
            self._start()
            self._opened = stack.pop_all()

    # The start

    def _take_signal(self) -> Any:
        """Returns who had it before."""
        try:
            return signal.signal(signal.SIGQUIT, self._on_quit)
        except ValueError:
            raise Unsupported(
                "BACKEND_IMPL=sglang must be opened in the main thread: its processes report what "
                "fails by a signal"
            ) from None

    def _start(self) -> None:
        with self._custody.marking(ENVIRONMENT), self._words.heard(), undisturbed():
            self._thread.start()
            while not self._ready.wait(LOOK_S):
                if self._reported and not self._ready.wait(GIVE_UP_S):
                    break
        if isinstance(self._failure, StartFailed):
            raise self._failure
        if self._engine is None or self._facts is None:
            raise self._start_failed(self._failure)
        try:
            descriptors = self._custody.watch(self._engine.get_all_child_pids())
        except ProcessLookupError:
            raise self._start_failed(None) from None
        for descriptor in descriptors:
            self._poll.register(descriptor, select.EPOLLIN)

    def _start_failed(self, failure: BaseException | None) -> StartFailed:
        """With the root cause. RuntimeError is what SGLang raises when a process of its ended: that
        process has said why. Any other speaks for itself.
        """
        said = "one of its processes has ended" if failure is None else _in_one_line(failure)
        if failure is None or isinstance(failure, RuntimeError):
            said = self._words.cause() or said
        found = StartFailed(f"SGLang does not start: {said}")
        found.__cause__ = failure
        return found

    @property
    def facts(self) -> Facts:
        """What was decided at the start."""
        assert self._facts is not None
        return self._facts

    # The loop's thread

    def _live(self) -> None:
        # what SGLang starts inherits it: Ctrl-C in a terminal is for us, not for its processes
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as failure:  # whatever it is, the other thread waits for it
            self._failure = failure
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._sglang: Sglang = load_sglang()
        self._engine = self._sglang.engine(**self._arguments)
        try:
            self._facts = await _ask_facts(self._engine.tokenizer_manager)
            self._ready.set()
            await self._ending.wait()
        finally:
            self._engine.shutdown()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, fields: Mapping[str, Any]) -> None:
        followed = self._followed[fields["rid"]] = Followed()
        followed.task = self._loop.create_task(self._follow(fields["rid"], followed, fields))

    async def _follow(self, rid: str, followed: Followed, fields: Mapping[str, Any]) -> None:
        """Hand on what comes of a request, until its end."""
        assert self._engine is not None
        try:
            if followed.aborted:
                return  # before SGLang heard of it
            request = self._sglang.request(**fields)
            async for output in self._engine.tokenizer_manager.generate_request(request, None):
                self._tell(News(rid, output))
        except Exception as error:  # it would not take the request, whatever it raises
            self._tell(News(rid, error=_in_one_line(error)))
        finally:
            del self._followed[rid]

    def _abort(self, rid: str) -> None:
        assert self._engine is not None
        if rid in self._followed:
            self._followed[rid].aborted = True
            self._engine.tokenizer_manager.abort_request(rid)

    def _tell(self, news: News) -> None:
        """One signal for all that one turn of the loop brings."""
        self._inbox.append(news)
        if not self._told:
            self._told = True
            self._loop.call_soon(self._signal)

    def _signal(self) -> None:
        self._told = False
        os.eventfd_write(self._wake, 1)

    # Our thread

    def ask(self, fields: Mapping[str, Any]) -> None:
        """Let SGLang take a request, which has a `rid` that no other ever had."""
        self._loop.call_soon_threadsafe(self._begin, fields)

    def abort(self, rid: str) -> None:
        """Let SGLang end a request. What it still says of it will be collected."""
        self._loop.call_soon_threadsafe(self._abort, rid)

    def call(self, work: Callable[[Engine], Awaitable[Result]], wait_s: float) -> Result:
        """Do `work` with the engine on its loop. Given up after `wait_s` seconds: then it raises
        concurrent.futures.TimeoutError.
        """

        async def run() -> Result:
            assert self._engine is not None
            return await work(self._engine)

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result(wait_s)
        finally:
            future.cancel()  # nothing to a result

    def fileno(self) -> int:
        """Readable when `collect` has something, or the runtime is lost."""
        return self._poll.fileno()

    def collect(self, wait_s: float) -> list[News]:
        """What came, in order. Waits for the first, `wait_s` seconds at most. Raises DeviceLost
        when a process of SGLang has ended or failed, after what came before.
        """
        readable = [descriptor for descriptor, _ in self._poll.poll(wait_s)]
        if self._wake in readable:
            os.eventfd_read(self._wake)
        news = [self._inbox.popleft() for _ in range(len(self._inbox))]
        if not news:
            ended = [descriptor for descriptor in readable if descriptor != self._wake]
            if ended or self._reported:
                raise DeviceLost(self._obituary(ended))
        return news

    def _obituary(self, ended: list[int]) -> str:
        cause = self._words.cause()
        how = self._custody.how_it_ended(ended[0]) if ended else "one of its processes failed"
        return f"SGLang is lost: {cause or how}"

    def _on_quit(self, *_: object) -> None:
        """A process of SGLang, or what watches them in this one, says that one has failed."""
        self._reported = True
        with suppress(OSError):  # closed
            os.eventfd_write(self._wake, 1)

    # The end, in this order

    def close(self) -> None:
        """End SGLang: no process and no thread of it is left. Called once."""
        self._opened.close()

    def _ask_to_leave(self) -> None:
        with suppress(RuntimeError):  # it has left already
            self._loop.call_soon_threadsafe(self._ending.set)
        if self._ready.is_set():  # else it waits for its processes, which go first
            self._thread.join(END_S)

    def _end_processes(self) -> None:
        if not self._custody.close():
            logger.error("a process of SGLang could not be ended")

    def _leave(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(END_S)
        if self._thread.is_alive():
            logger.error("SGLang does not let go of this process")
        if self._facts is not None and self._failure is not None:
            logger.error("SGLang's end failed", exc_info=self._failure)

    def _give_signal_back(self, before: Any) -> None:
        if not self._thread.is_alive():  # else it may still send one, which would end the process
            signal.signal(signal.SIGQUIT, before)


async def _ask_facts(manager: TokenizerManager) -> Facts:
    state = (await manager.get_internal_state())[0]
    model = manager.model_config
    return Facts(
        context=model.context_len,
        vocabulary=model.vocab_size,
        end_ids=frozenset(model.hf_eos_token_id or ()),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(state["attention_backend"]),
        tokens=state["memory_usage"]["token_capacity"],
        max_running=state["effective_max_running_requests_per_dp"],
        max_step_tokens=state["chunked_prefill_size"],
        page_tokens=state["page_size"],
        prefix=not state["disable_radix_cache"],
    )


def _in_one_line(error: BaseException) -> str:
    """An error that is none of ours, with its kind: others say it in many lines."""
    message = first_line(error) if isinstance(error, Exception) else str(error)
    kind = type(error).__name__
    return message if message == kind else f"{kind}: {message}"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep what SGLang sets for the whole process when it starts: the root logger (it closes the
    handlers that are there, so ours are out of its reach meanwhile), and how processes are started.

    Its processes would run our main module again, to find in it what they are to do. That is in a
    module of SGLang's: so the main module is out of reach, too, and may be a script of any kind.
    """
    root, main = logging.getLogger(), sys.modules["__main__"]
    handlers, level = root.handlers, root.level
    method = multiprocessing.get_start_method(allow_none=True)
    root.handlers, sys.modules["__main__"] = [], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        root.handlers = handlers
        root.setLevel(level)
        multiprocessing.set_start_method(method, force=True)
