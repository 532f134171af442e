"""What the runtime's processes write to stderr: shown as it comes, and its end remembered, so that
a death has a cause.

They inherit our stderr. While they are started it is a pipe of ours; afterwards ours is what it was
before, and theirs is the pipe for as long as they live.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

STDERR = 2
REMEMBERED = 1 << 17  # bytes
RECENT_S = 30.0  # before the last word: what is older has another story
SETTLE_S = 1.0  # in which the last words of an ended process are read, at most
TURN_S = 0.02

TRACEBACK = "Traceback (most recent call last):"
RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*(?P<kind>[A-Za-z_]\w*)(?:: (?P<message>.*))?$")
MORE = ("During handling of the above exception", "The above exception was the direct cause")
# What ends a process without an exception of Python's, or is said of one that hangs.
FATAL = re.compile(
    r"terminate called after .*|Fatal Python error: .*|Segmentation fault.*|watchdog timeout.*"
)


class LastWords:
    """One owner, the bridge. Opened before the processes are started, closed after they ended."""

    def __init__(self) -> None:
        self._shown = os.dup(STDERR)
        self._reader, self._writer = os.pipe()
        self._heard: deque[tuple[float, bytes]] = deque()  # (when, what)
        self._size = 0
        self._opened = time.monotonic()
        self._thread = threading.Thread(target=self._listen, name="sglang stderr", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while heard := os.read(self._reader, 1 << 16):
            self._heard.append((time.monotonic(), heard))
            self._size += len(heard)
            while self._size > REMEMBERED and len(self._heard) > 1:
                self._size -= len(self._heard.popleft()[1])
            with suppress(OSError):  # nobody looks any more; they must not wait for that
                os.write(self._shown, heard)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Whatever process is started inside writes here from then on. Entered once."""
        os.dup2(self._writer, STDERR)
        try:
            yield
        finally:
            os.dup2(self._shown, STDERR)
            os.close(self._writer)  # so that the pipe ends with the last of them

    def cause(self) -> str | None:
        """Why a process ended, as far as it said so. Waits until it has said all."""
        until = time.monotonic() + SETTLE_S
        while self._unread() and time.monotonic() < until:
            time.sleep(TURN_S)
        time.sleep(TURN_S)  # what was read is remembered at once
        recent = [what for when, what in list(self._heard) if when >= self._last() - RECENT_S]
        return root_cause(b"".join(recent).decode(errors="replace"))

    def _unread(self) -> bool:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return self._thread.is_alive() and bool(poll.poll(0))

    def _last(self) -> float:
        return self._heard[-1][0] if self._heard else self._opened

    def close(self, wait_s: float) -> None:
        """Stop listening. Whoever still writes is heard for `wait_s` seconds at most."""
        self._thread.join(wait_s)
        if not self._thread.is_alive():  # else it reads the descriptors: they stay
            os.close(self._reader)
            os.close(self._shown)


def root_cause(text: str) -> str | None:
    """The exception of the first traceback in `text`, in one line; where there is none, what was
    said by a library that gave up.

    Of a chain the last exception counts: whoever raised it knew the one before and chose the words.
    Processes that share a fate tell it one after another, and the first is the one it began with.
    """
    lines = text.splitlines()
    begun = [index for index, line in enumerate(lines) if line.endswith(TRACEBACK)]
    for start, end in pairwise([*begun, len(lines)]):
        block = lines[start + 1 : end]
        if any(line.startswith(MORE) for line in block):
            continue  # the traceback behind it says more
        raised = next((found for line in block if (found := RAISED.match(line))), None)
        if raised is not None:
            kind, message = raised["kind"], (raised["message"] or "").strip()
            return f"{kind}: {message}" if message else kind
    fatal = next(filter(None, map(FATAL.search, lines)), None)
    return None if fatal is None else fatal[0].strip()
