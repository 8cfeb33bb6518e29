"""What every request passes first: an id, a key, limits, and one shape for every error. A plain ASGI middleware."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from .openai import ApiError

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answered = Callable[[str, int, float], None]

OPEN = ("/", "/health", "/ready")
"""Paths that need no key: they say nothing of the model, and draw nothing."""
GONE = 499
"""The status that logs and metrics have for a client that left before it was answered."""
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Gate:
    """Checks requests before the application has them, and sees to it that each ends in one answer.

    Args:
        app: the application.
        keys: bearer keys, one of which a request must carry; empty asks for none.
        routes: paths that metrics name; others count as `other`.
        max_body: bytes of a body at most.
        receive_timeout: seconds that a body may take to arrive.
        local: whether the service listens to this machine only; then requests must be for a name of this machine, so
            that no page of the web reaches it by a name that it points here.
        answered: is told of each answer: route, status, seconds.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Sequence[str],
        routes: Sequence[str],
        max_body: int,
        receive_timeout: float,
        local: bool,
        answered: Answered,
    ) -> None:
        self.app, self.answered, self.routes = app, answered, frozenset(routes)
        self.keys = [key.encode() for key in keys]
        self.max_body, self.receive_timeout, self.local = max_body, receive_timeout, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        passage = _Passage(self, scope, headers, receive, send)
        try:
            self._check(scope, headers)
            await self.app(scope, passage.receive, passage.send)
        except ApiError as problem:
            await passage.refuse(problem)
        except asyncio.CancelledError:
            passage.status = passage.status or GONE
            raise
        except Exception:
            log.exception("request %s failed", passage.name)
            message = f"an unexpected failure; the service's log has it under request {passage.name}"
            await passage.refuse(ApiError(500, message, "internal_error"))
        finally:
            passage.end()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse what must not reach the application.

        Raises:
            ApiError: saying which rule is broken.
        """
        host = headers.get("host", "")
        if self.local and not is_here(host):
            message = f"this service answers this machine only, and the request is for {host!r:.80}"
            raise ApiError(421, message, "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin!r:.80} may not use this service", "wrong_origin")
        if self.keys and scope["path"] not in OPEN:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.max_body:
            raise self.too_large()

    def _check_key(self, authorization: str) -> None:
        word, _, given = authorization.partition(" ")
        # Every key is compared, each in constant time: how long it takes tells nothing about any of them.
        matches = [hmac.compare_digest(given.strip().encode("utf-8", "replace"), key) for key in self.keys]
        if word.lower() != "bearer" or not any(matches):
            challenge = {"WWW-Authenticate": "Bearer"}
            message = "a valid key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers=challenge)

    def too_large(self) -> ApiError:
        """The answer to a body that is too large."""
        return ApiError(413, f"the body is larger than the {self.max_body} bytes that are read", "body_too_large")


class _Passage:
    """One request on its way: counts its body, notes its answer."""

    def __init__(self, gate: Gate, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        given = headers.get("x-request-id", "")
        self.name = given if _ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = self.name
        self.since, self.until = time.monotonic(), time.monotonic() + gate.receive_timeout
        self.length, self.whole, self.status = 0, False, 0

    async def receive(self) -> Message:
        """The next part of the body, within its bounds of bytes and time; then the client's leaving."""
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self.until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            why = f"the body did not arrive within {self.gate.receive_timeout:g} s"
            raise ApiError(408, why, "body_too_slow") from None
        self.length += len(message.get("body", b""))
        if self.length > self.gate.max_body:
            raise self.gate.too_large()
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer, with our headers in its head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            named = [(b"x-request-id", self.name.encode())]
            if not self.whole and self.scope["method"] not in ("GET", "HEAD"):
                named.append((b"connection", b"close"))  # what is left of the body is not read
            there = {name.lower() for name, _ in message.get("headers", ())}
            safe = [pair for pair in _SAFE if pair[0] not in there]
            message = {**message, "headers": [*message.get("headers", ()), *safe, *named]}
        await self._send(message)

    async def refuse(self, problem: ApiError) -> None:
        """Answer with an error, unless an answer has begun: then the connection ends."""
        if self.status:
            return
        body = json.dumps(problem.body).encode()
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **problem.headers}
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """Log the answer and count it."""
        seconds, path = time.monotonic() - self.since, self.scope["path"]
        route = path if path in self.gate.routes else "other"
        status = self.status or GONE
        self.gate.answered(route, status, seconds)
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") and status == 200 else logging.INFO
        log.log(level, "%s %s %s %d in %.3f s", self.name, self.scope["method"], _printable(path), status, seconds)


def _printable(path: str) -> str:
    """A path for a line of the log: nothing in it may look like another line."""
    return path[:200].encode("unicode_escape").decode("ascii")


def is_here(host: str) -> bool:
    """Whether a Host header names this machine: localhost, or an address of the loopback."""
    return is_local(urlsplit(f"//{host}").hostname or "") if _is_authority(host) else False


def is_local(name: str) -> bool:
    """Whether a name or an address is this machine's own, which no other one reaches."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_authority(host: str) -> bool:
    return re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", host, re.ASCII) is not None
