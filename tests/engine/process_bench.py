"""What tests of engine processes share: requests, what is right, a place that must stay clean."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from backend.fake_model import BYTE_END, BYTE_VOCABULARY, CONSONANTS, VOWELS, FakeModel
from ipc.messages import Submit
from tests.engine.scheduler_bench import ask

PATIENCE_S = 20.0
PROMPT = (1, 2, 3)
MODEL = FakeModel(BYTE_VOCABULARY, BYTE_END, (tuple(CONSONANTS), tuple(VOWELS)))


def submit(id: str, prompt: Sequence[int] = PROMPT, new: int = 4) -> Submit:
    return Submit(ask(id, prompt, new))


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model answers, from the ids alone."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(MODEL.after(ids)[0])
    return ids[len(prompt) :]


@contextmanager
def socket_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where sockets are made, here and in child processes. In the end nothing is there.

    Not pytest's own, whose paths are too long for a socket.
    """
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []
