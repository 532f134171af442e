"""A server that is paused: what streams stands still, what comes waits, and nothing is stuck."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.server_process import PATIENCE_S, ServerProcess, eventually, serving

TOKENS = 400
BODY: dict[str, Any] = {"prompt": "hello", "max_new_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all, with steps of 3 ms on two engines."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, FAKE_STEP_MS=3, REPLICAS=2) as found:
        found.ready()
        eventually(lambda: len(found.engines()) == 2, "two engines")
        yield found
        assert "Traceback" not in found.text


@dataclass
class Reader:
    """A client that reads a stream in a thread of its own."""

    url: str
    text: str = ""
    end: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", f"{self.url}/generate", json=BODY, timeout=PATIENCE_S) as lines:
            for line in lines.iter_lines():
                news = json.loads(line)
                self.text += news.get("text_delta", "")
                self.end = news if "event" in news else {}

    def ended(self) -> dict[str, Any]:
        """How the stream ended. Waits for it."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        return self.end


def steps(url: str) -> int:
    """What the engines have done so far."""
    loads = [each["load"] for each in httpx.get(f"{url}/stats").json()["replicas"]]
    return sum(load["steps"] for load in loads if load)


def post(url: str, path: str, **body: object) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def undisturbed(url: str) -> str:
    answer = httpx.post(f"{url}/generate", json={**BODY, "stream": False}, timeout=PATIENCE_S)
    return str(answer.json()["text"])


def at_rest(url: str) -> bool:
    """Whether nothing runs and every page is home."""
    stats = httpx.get(f"{url}/stats").json()
    return (stats["running"], stats["waiting"], stats["pages"]["leased"]) == (0, 0, 0)


def test_a_pause_in_place_holds_streams_which_go_on_with_the_same_text(
    server: ServerProcess,
) -> None:
    url = server.url
    right = undisturbed(url)
    readers = [Reader(url) for _ in range(3)]
    eventually(lambda: all(len(each.text) > 5 for each in readers), "text")
    post(url, "/pause_generation", mode="in_place")
    before = steps(url)
    late = Reader(url)
    eventually(lambda: httpx.get(f"{url}/stats").json()["waiting"] == 1, "the late one in line")
    assert httpx.get(f"{url}/stats").json()["state"] == "paused"
    assert httpx.get(f"{url}/health/progress").status_code == 200
    assert httpx.get(f"{url}/health_generate").status_code == 503
    assert httpx.post(f"{url}/flush_cache").status_code == 400
    assert steps(url) == before
    assert late.text == ""
    assert not any(each.end for each in readers)
    post(url, "/continue_generation")
    for reader in (*readers, late):
        assert reader.ended()["finish_reason"] == "length"
        assert reader.text == right
    eventually(lambda: at_rest(url), "rest")


def test_a_pause_that_aborts_ends_what_runs_and_holds_what_comes(server: ServerProcess) -> None:
    url = server.url
    readers = [Reader(url) for _ in range(3)]
    eventually(lambda: all(len(each.text) > 5 for each in readers), "text")
    assert post(url, "/pause_generation", mode="abort")["aborted"] == 3
    assert [each.ended()["finish_reason"] for each in readers] == ["abort"] * 3
    late = Reader(url)
    eventually(lambda: httpx.get(f"{url}/stats").json()["waiting"] == 1, "the late one in line")
    assert late.text == ""
    post(url, "/continue_generation")
    assert late.ended()["finish_reason"] == "length"
    eventually(lambda: at_rest(url), "rest")


def test_after_a_pause_that_aborts_the_cache_can_be_flushed_at_once(server: ServerProcess) -> None:
    url = server.url
    reader = Reader(url)
    eventually(lambda: len(reader.text) > 5, "text")
    post(url, "/pause_generation", mode="in_place")
    post(url, "/pause_generation")
    assert post(url, "/flush_cache")["ok"] is True
    assert reader.ended()["finish_reason"] == "abort"
    post(url, "/continue_generation")
    assert undisturbed(url)


def test_who_leaves_during_a_pause_leaves_nothing_behind(server: ServerProcess) -> None:
    url = server.url
    body = {**BODY, "stream": False, "max_new_tokens": 5000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", json=body, timeout=httpx.Timeout(PATIENCE_S, read=0.5))
    post(url, "/pause_generation", mode="in_place")
    post(url, "/continue_generation")
    eventually(lambda: at_rest(url), "rest")


def test_a_paused_server_stops_when_told(tmp_path: Path) -> None:
    with serving(tmp_path / "log", FAKE_STEP_MS=3, DRAIN_TIMEOUT_S=0.2) as paused:
        url = paused.ready()
        reader = Reader(url)
        eventually(lambda: len(reader.text) > 5, "text")
        post(url, "/pause_generation", mode="in_place")
        paused.stop()
        assert reader.ended()["finish_reason"] == "abort"
