"""What a server tells of itself: the model, the device, the versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from backend.interface import Unavailable
from bench.http_connection import Address
from bench.workloads import LARGE_VOCABULARY

ANSWER_S = 10.0  # for a question that needs no model
NO_ROUTE = (404, 405)

# without a proxy, as the load
_opener = build_opener(ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a reader needs to know before comparing results; None: the server does not tell."""

    model: str
    device: str | None
    backend: str | None
    dtype: str | None
    attention: str | None
    versions: dict[str, str] | None
    vocabulary: int

    def as_json(self) -> dict[str, object]:
        """Its part of the last line."""
        facts = asdict(self)
        del facts["vocabulary"]
        return facts


def ask_facts(address: Address) -> ServerFacts:
    """Of a server that speaks at least OpenAI's API. Raises Unavailable with one line."""
    models = _object(address, "/v1/models")
    if not models.get("data"):
        raise Unavailable(f"{address.url} lists no model at /v1/models")
    model, server = _object(address, "/model_info"), _object(address, "/server_info")
    return ServerFacts(
        model=models["data"][0]["id"],
        device=model.get("device"),
        backend=model.get("backend"),
        dtype=model.get("dtype"),
        attention=model.get("attention"),
        versions=server.get("versions"),
        vocabulary=model.get("vocabulary") or LARGE_VOCABULARY,
    )


def check_ready(address: Address) -> None:
    """Raises Unavailable until the server can serve."""
    _ask(address, "GET", "/health/ready")


def flush(address: Address) -> None:
    """Empty the prefix cache, where the server has a route for that. Raises Unavailable."""
    _ask(address, "POST", "/flush_cache")


def _object(address: Address, path: str) -> dict[str, Any]:
    """The JSON object of a route; empty where there is no such route."""
    body = _ask(address, "GET", path)
    try:
        value = json.loads(body or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unavailable(f"{address.url}{path} is no JSON object: is this the server's address?")
    return value


def _ask(address: Address, method: str, path: str) -> bytes | None:
    """The body of an answer; None where there is no such route.

    Raises Unavailable when no server answers, or it refuses.
    """
    url = address.url + path
    request = Request(url, method=method, headers=address.headers)
    try:
        with _opener.open(request, timeout=ANSWER_S) as answer:
            body: bytes = answer.read()
            return body
    except HTTPError as error:
        error.close()
        if error.code in NO_ROUTE:
            return None
        raise Unavailable(f"{url} answers {error.code} {error.reason}") from None
    except URLError as error:
        raise Unavailable(f"no server answers at {url}: {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise Unavailable(f"no server answers at {url}: {error}") from None
