"""What servers tell of themselves, ours and others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from backend.interface import Unavailable
from bench.http_connection import Address
from bench.server_facts import ServerFacts, ask_facts, check_ready, flush
from bench.server_process import free_port
from bench.workloads import LARGE_VOCABULARY

MODELS = json.dumps({"data": [{"id": "small"}, {"id": "other"}]})
Routes = dict[str, tuple[int, str]]


@contextmanager
def serving(routes: Routes, asked: list[tuple[str, str, str | None]]) -> Iterator[Address]:
    """A server with these routes; `asked` gets the method, path and key of each request."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append((self.command, self.path, self.headers.get("Authorization")))
            status, body = routes.get(self.path, (404, "{}"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Address(f"http://127.0.0.1:{server.server_port}", "secret")
        server.shutdown()
        thread.join()


def test_our_server_tells_everything() -> None:
    model = {"device": "cpu", "backend": "hf", "dtype": "float32", "attention": "sdpa"}
    routes: Routes = {
        "/v1/models": (200, MODELS),
        "/model_info": (200, json.dumps({**model, "vocabulary": 260, "depth": 1})),
        "/server_info": (200, json.dumps({"versions": {"python": "3.11"}, "uptime_s": 4})),
    }
    asked: list[tuple[str, str, str | None]] = []
    with serving(routes, asked) as address:
        facts = ask_facts(address)
    versions = {"python": "3.11"}
    assert facts == ServerFacts("small", "cpu", "hf", "float32", "sdpa", versions, 260)
    assert "vocabulary" not in facts.as_json()
    assert {key for _, _, key in asked} == {"Bearer secret"}


def test_another_server_tells_its_model() -> None:
    with serving({"/v1/models": (200, MODELS)}, []) as address:
        facts = ask_facts(address)
        flush(address)  # there is no such route, and nobody minds
    assert facts == ServerFacts("small", None, None, None, None, None, LARGE_VOCABULARY)


def test_a_cache_is_flushed_whatever_the_server_says_to_it() -> None:
    asked: list[tuple[str, str, str | None]] = []
    with serving({"/flush_cache": (200, "Cache flushed.")}, asked) as address:
        flush(address)
    assert asked == [("POST", "/flush_cache", "Bearer secret")]


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        ({}, "lists no model at /v1/models"),
        ({"/v1/models": (200, '{"data": []}')}, "lists no model at /v1/models"),
        ({"/v1/models": (200, "<html>")}, "is no JSON object: is this the server's address"),
        ({"/v1/models": (200, "[]")}, "is no JSON object: is this the server's address"),
        ({"/v1/models": (401, "{}")}, "/v1/models answers 401 Unauthorized"),
        ({"/v1/models": (503, "{}")}, "/v1/models answers 503 Service Unavailable"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_line(routes: Routes, says: str) -> None:
    with (
        serving(routes, []) as address,
        pytest.raises(Unavailable, match=says) as error,
    ):
        ask_facts(address)
    assert "\n" not in str(error.value)


def test_no_server_is_one_line() -> None:
    with pytest.raises(Unavailable, match=r"no server answers at .*/health/ready: .*refused"):
        check_ready(Address(f"http://127.0.0.1:{free_port()}"))
