"""Who may ask: API keys on every route but the open ones, and the operator's key on `/control`.

Keys are compared by digest, so neither their length nor a common beginning shows in the time. From
here on a key is known by its fingerprint; it is in no log line and no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError, route_of
from backend.interface import StartFailed
from config import ServerSettings

# Probes and scrapers have no key. `/metrics` tells how much is asked, never what or by whom.
# The page is the same for everybody: what it asks for needs the key.
OPEN = ("/health", "/metrics", "/")
OPEN_BELOW = ("/health/", "/static/")

# Any of them: the request came through a proxy, or from a page in somebody's browser, and the
# address of the connection says nothing about who asks.
NOT_DIRECT = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin")


def fingerprint(key: str) -> str:
    """What a key is called in this process: the `owner` of its requests."""
    return blake2b(key.encode(), digest_size=8).hexdigest()


def _digest(key: bytes) -> bytes:
    return blake2b(key).digest()


@dataclass(frozen=True, slots=True)
class Keys:
    """Who is let in. Empty: everybody, and the operator from this machine only."""

    # (digest of an API key, its fingerprint); a short key could be guessed from a digest in a log
    owners: tuple[tuple[bytes, str], ...] = field(default=(), repr=False)
    admin: tuple[bytes, str] | None = field(default=None, repr=False)  # likewise

    @staticmethod
    def of(settings: ServerSettings) -> Keys:
        """Those of API_KEY and ADMIN_API_KEY. Raises StartFailed for a flag without a key."""
        api = settings.api_key and settings.api_key.get_secret_value()
        admin = settings.admin_api_key and settings.admin_api_key.get_secret_value().strip()
        keys = [key.strip() for key in (api or "").split(",") if key.strip()]
        if api is not None and not keys:
            raise StartFailed("API_KEY holds no key: give one or more, separated by commas")
        if admin == "":
            raise StartFailed("ADMIN_API_KEY holds no key: give one, or unset it")
        return Keys(tuple(map(_entry, keys)), _entry(admin) if admin else None)

    def owner(self, headers: Headers) -> str | None:
        """Whose request it is: the fingerprint of its key, "" where none is wanted, or None."""
        if not self.owners:
            return ""
        known = self.owners if self.admin is None else (*self.owners, self.admin)
        return _match(known, headers)

    def is_admin(self, headers: Headers) -> bool:
        """Whether the request has the operator's key."""
        return self.admin is not None and _match((self.admin,), headers) is not None


def _entry(key: str) -> tuple[bytes, str]:
    return _digest(key.encode()), fingerprint(key)


def _match(known: Sequence[tuple[bytes, str]], headers: Headers) -> str | None:
    """The fingerprint of the known key that was presented. Every key is compared, always."""
    presented = [_digest(key) for key in _presented(headers)]
    found = [name for digest, name in known for given in presented if compare_digest(digest, given)]
    return found[0] if found else None


def _presented(headers: Headers) -> Iterator[bytes]:
    """The keys of `Authorization: Bearer KEY` and of `X-API-Key: KEY`."""
    for name, value in headers.raw:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                yield key.strip()


class ApiKeyMiddleware:
    """Answers 401 before a route is even looked for. Says who asks as the state's `owner`."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        owner = self.keys.owner(Headers(scope=scope))
        if owner is None and not _is_open(scope):
            refusal = _unauthorized("this server needs an API key: Authorization: Bearer KEY")
            await refusal.response(scope)(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner or ""
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path = route_of(scope)
    return path in OPEN or path.startswith(OPEN_BELOW)


def require_admin(request: Request) -> None:
    """Let the operator pass: who has ADMIN_API_KEY, or without one a program on this machine.

    The keys are the app's `state.keys`. Raises ApiError 401 or 403.
    """
    keys: Keys = request.app.state.keys
    if keys.is_admin(request.headers):
        return
    if keys.admin is not None:
        raise _unauthorized("this route needs ADMIN_API_KEY: Authorization: Bearer KEY")
    if not _is_local(request):
        raise ApiError(
            403,
            "this route answers programs on the server's own machine only: set ADMIN_API_KEY to "
            "use it from elsewhere, through a proxy or in a browser",
            "permission_error",
            code="forbidden",
        )


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, "authentication_error", code="invalid_api_key", headers=headers)


def _is_local(request: Request) -> bool:
    """Whether a program on this machine asks, and asks directly."""
    if request.client is None or any(name in request.headers for name in NOT_DIRECT):
        return False
    try:
        address = ip_address(request.client.host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_loopback
