"""Ctrl-C between steps, not within them: a step cut in two would leave rows and pages held."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while inside, and raise KeyboardInterrupt at the end.

    Only where Ctrl-C would raise it: in the main thread, with Python's own handler.
    """
    default = signal.default_int_handler
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not default
    ):
        yield
        return
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed.is_set():
        raise KeyboardInterrupt
