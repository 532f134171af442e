"""Processes of the server: how they start, fail, drain and die."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.end_to_end.server_process import PATIENCE_S, eventually, serving

SLOW = {"FAKE_STEP_MS": 20}


def generate(url: str, tokens: int = 4, **more: object) -> httpx.Response:
    body = {"prompt": "hello", "max_new_tokens": tokens, "ignore_eos": True, **more}
    return httpx.post(f"{url}/generate", json=body, timeout=PATIENCE_S)


def lines(url: str, tokens: int, **more: object) -> Iterator[dict[str, object]]:
    """The lines of a stream, as they come."""
    body = {"prompt": "hello", "max_new_tokens": tokens, "ignore_eos": True, **more}
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=PATIENCE_S) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            yield json.loads(line)


class Reader(threading.Thread):
    """A client in the background, and every line that it has got."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.lines: list[dict[str, object]] = []
        self.started = threading.Event()
        self._of = (url, tokens)
        self.start()

    def run(self) -> None:
        for line in lines(*self._of):
            self.lines.append(line)
            self.started.set()

    def last(self) -> dict[str, object]:
        """The line that ended the stream."""
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.lines[-1]


def readers(url: str, count: int, tokens: int) -> list[Reader]:
    """Clients, all of whom have got something."""
    found = [Reader(url, tokens) for _ in range(count)]
    for reader in found:
        assert reader.started.wait(PATIENCE_S)
    return found


def test_health_answers_before_the_engines_are_there(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        url = server.url
        assert httpx.get(f"{url}/health").status_code == 200
        server.ready()
        assert generate(url, stream=False).status_code == 200
        assert "engine 0" in server.text
        assert server.stop() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.text


def test_a_start_that_fails_is_one_line_with_its_cause(tmp_path: Path) -> None:
    with serving(tmp_path / "log", MODEL_LOCAL_DIR=tmp_path / "nothing") as server:
        assert server.process.wait(PATIENCE_S) not in (0, None)
        named = [line for line in server.text.splitlines() if "no config.json" in line]
        assert len(named) >= 1
        assert "Traceback" not in server.text
        eventually(lambda: not server.left_over(), "the end of the engines")


def test_a_start_that_fails_for_a_reason_nobody_thought_of_ends_too(
    tmp_path: Path, small_model: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(small_model / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 5}))
    with serving(tmp_path / "log", MODEL_LOCAL_DIR=tmp_path) as server:
        assert server.process.wait(PATIENCE_S) not in (0, None)
        assert "the server cannot start" in server.text


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path / "log", SCHEDULER_MODE="perhaps") as server:
        assert server.process.wait(PATIENCE_S) != 0
        assert "SCHEDULER_MODE=perhaps" in server.text
        assert "Traceback" not in server.text


def test_a_control_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        flags = {"ZMQ_CONTROL": 1, "ZMQ_CONTROL_ENDPOINT": endpoint}
        with serving(tmp_path / "log", **flags) as server:
            assert server.process.wait(PATIENCE_S) != 0
            assert "ZMQ_CONTROL_ENDPOINT" in server.text
            assert "Traceback" not in server.text


def test_two_servers_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as first, serving(tmp_path / "b", REPLICAS=2) as second:
        urls = first.ready(), second.ready()
        assert [generate(url, stream=False).status_code for url in urls] == [200, 200]
        assert (len(first.engines()), len(second.engines())) == (1, 2)


def test_several_workers_are_refused_in_one_line(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--workers", "2") as server:
        server.process.wait(PATIENCE_S)
        told = [line for line in server.text.splitlines() if "REPLICAS=n adds engines" in line]
        assert len(told) == 1
        assert "Traceback" not in server.text
        eventually(lambda: not server.left_over(), "the end of the engines")


def test_reload_and_keys_go_together(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--reload", API_KEY="secret") as server:
        url = server.ready()
        assert generate(url).status_code == 401
        key = {"Authorization": "Bearer secret"}
        body = {"prompt": "hi", "stream": False, "max_new_tokens": 2}
        response = httpx.post(f"{url}/generate", json=body, headers=key, timeout=PATIENCE_S)
        assert response.status_code == 200
        assert len(server.engines()) == 1
        server.stop()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_short_answers_end_and_cuts_long_ones_at_the_drain_timeout(
    tmp_path: Path, how: signal.Signals
) -> None:
    with serving(tmp_path / "log", DRAIN_TIMEOUT_S=2, **SLOW) as server:
        url = server.ready()
        short, long = readers(url, 8, tokens=30), readers(url, 8, tokens=4000)
        started = time.monotonic()
        server.process.send_signal(how)
        assert [reader.last()["finish_reason"] for reader in short] == ["length"] * 8
        assert [reader.last()["finish_reason"] for reader in long] == ["abort"] * 8
        server.process.wait(PATIENCE_S)
        assert time.monotonic() - started < PATIENCE_S / 2
        eventually(lambda: not server.left_over(), "the end of the engines")
        assert "Traceback" not in server.text


def test_a_client_that_does_not_read_cannot_keep_the_server_from_ending(tmp_path: Path) -> None:
    with serving(tmp_path / "log", DRAIN_TIMEOUT_S=0, FAKE_STEP_MS=1) as server:
        address = urlsplit(server.ready())
        content = {"prompt": "hi", "n": 8, "logprobs": 20, "max_new_tokens": 8000}
        body = json.dumps({**content, "ignore_eos": True})
        head = f"POST /generate HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.hostname, address.port))
            client.sendall((head + body).encode())
            eventually(lambda: statuses(server.url)["running"] == 8, "eight answers under way")
            time.sleep(1)  # until its buffers are full, which nothing here can see
            server.stop()


def test_killing_the_front_leaves_no_engine(tmp_path: Path) -> None:
    with serving(tmp_path / "log", REPLICAS=2, **SLOW) as server:
        url = server.ready()
        eventually(lambda: len(server.engines()) == 2, "two engines")
        body = {"prompt": "hello", "max_new_tokens": 4000, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/generate", json=body) as response:
            next(response.iter_lines())
            server.stop(signal.SIGKILL)


def two(engines: list[psutil.Process]) -> list[psutil.Process]:
    """Both, or none."""
    return engines if len(engines) == 2 else []


def statuses(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/stats").json()
    return found


def all_ready(url: str) -> bool:
    return all(each["state"] == "ready" for each in statuses(url)["replicas"])


def test_a_killed_engine_ends_its_requests_and_comes_back_while_the_other_serves(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "log", REPLICAS=2, **SLOW) as server:
        url = server.ready()
        engines = eventually(lambda: two(server.engines()), "two engines")
        eventually(lambda: all_ready(url), "two ready engines")
        found = readers(url, 8, tokens=100)
        engines[0].kill()
        assert generate(url, stream=False).status_code == 200
        ends = [reader.last() for reader in found]
        assert sorted(str(end["event"]) for end in ends) == ["done"] * 4 + ["error"] * 4
        for reader in found:
            assert sum("event" in line for line in reader.lines) == 1
        error = next(end["error"] for end in ends if end["event"] == "error")
        assert "SIGKILL" in str(error)
        pids = {engines[0].pid}
        eventually(
            lambda: (now := two(server.engines())) and pids.isdisjoint(each.pid for each in now),
            "a new engine",
        )
        assert generate(url, stream=False).status_code == 200
        restarts = "minisgl_engine_restarts_total 1.0"
        eventually(lambda: restarts in httpx.get(f"{url}/metrics").text, "a counted restart")


def test_a_lost_device_is_an_error_for_its_requests_and_the_engine_starts_again(
    tmp_path: Path,
) -> None:
    with serving(tmp_path / "log", FAKE_FAIL_AT_STEP=20, **SLOW) as server:
        url = server.ready()
        *_, end = lines(url, tokens=100)
        assert end["event"] == "error"
        assert eventually(lambda: generate(url, 4, stream=False).status_code == 200, "serving")
