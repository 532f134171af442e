"""The page at `/`: a playground and a live view, in files that a browser takes as they are.

Which files there are is a table: nothing else can be asked for. The page is the same for everybody
and asks the other routes like any client.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"
HTML = "text/html; charset=utf-8"
CSS = "text/css; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"

FILES = {
    "index.html": HTML,
    "icon.svg": "image/svg+xml",
    "theme.css": CSS,
    "layout.css": CSS,
    "playground.css": CSS,
    "live.css": CSS,
    "main.js": SCRIPT,
    "theme.js": SCRIPT,
    "views.js": SCRIPT,
    "key.js": SCRIPT,
    "server.js": SCRIPT,
    "events.js": SCRIPT,
    "settings.js": SCRIPT,
    "curl.js": SCRIPT,
    "elements.js": SCRIPT,
    "transcript.js": SCRIPT,
    "playground.js": SCRIPT,
    "rates.js": SCRIPT,
    "pictures.js": SCRIPT,
    "live.js": SCRIPT,
}

HEADERS = {
    # asked for again each time, and answered by 304 as long as nothing has changed
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page, and what it is known by."""

    body: bytes
    media_type: str
    etag: str


@cache
def read(name: str) -> File:
    """A file of the table. Raises KeyError for any other."""
    media_type = FILES[name]
    body = (FOLDER / name).read_bytes()
    return File(body, media_type, f'"{blake2b(body, digest_size=12).hexdigest()}"')


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    """What the page is made of."""
    if name not in FILES:
        raise HTTPException(404)
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    found = read(name)
    headers = {**HEADERS, "ETag": found.etag}
    known = request.headers.get("if-none-match", "")
    if found.etag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.media_type)
