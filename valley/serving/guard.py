"""What stands before the API: who may come in, how much they may bring, and what every answer says to browsers."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valley.errors import OverloadError, RequestError, ServingError
from valley.serving.keys import Keys
from valley.serving.problems import problem_of
from valley.serving.settings import RequestLimits, is_loopback

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
"""What nobody needs a key to read."""
_MOST_HEADER_BYTES = 1 << 16
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_CHALLENGES = (b"Bearer", b'Basic realm="valley", charset="UTF-8"')
"""A header each: in one, Chromium understands neither, and does not ask people for a key."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class SlowClientError(Exception):
    """The client does not read what it asked for."""


class Guard:
    """Lets requests through that are allowed, whole, and not too large.

    Bodies are read here, within `limits`, so that nobody behind it waits for a client. What comes from a page of
    another site is refused, as is a host name that is not this server's: a page may make its own name lead here.

    Args:
        app: what is guarded.
        limits: what a request may cost.
        keys: of those who may come in; None: everybody.
        hosts: names of this server; empty: with keys any, else this machine's own.
        count: is told the status of each request that is turned away.
        tell_id: whether answers have the request's id as `x-request-id`; a proxy may see to that.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: RequestLimits,
        keys: Keys | None,
        hosts: tuple[str, ...],
        count: Callable[[int], None],
        *,
        tell_id: bool = True,
    ) -> None:
        self._app, self._limits, self._keys, self._count = app, limits, keys, count
        self._hosts = {host.lower() for host in hosts or (() if keys else _LOCAL)}
        self._tell_id = tell_id
        self._in_hand = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            scope["valley.id"] = uuid.uuid4().hex
            try:
                ours = {**_HEADERS, "x-request-id": scope["valley.id"]} if self._tell_id else _HEADERS
                await self._handle(scope, receive, self._patient(send, ours))
            except SlowClientError:
                logger.info("%s is given up: the client does not read", scope["valley.id"])
        else:
            await receive()
            await send({"type": "websocket.close"})  # before it is accepted: 403

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            scope["valley.client"] = self._check(scope, headers)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            self._check_post(headers)
        except RequestError as error:
            await self._refuse(send, error)
            return
        if self._in_hand >= self._limits.max_requests:
            await self._refuse(send, OverloadError(""))
            return
        self._in_hand += 1
        try:
            try:
                replayed = await self._read(receive)
            except RequestError as error:
                await self._refuse(send, error)
                return
            if replayed is not None:
                await self._app(scope, replayed, send)
        finally:
            self._in_hand -= 1

    async def _refuse(self, send: Send, error: ServingError) -> None:
        problem = problem_of(error)
        self._count(problem.status)
        body = json.dumps(problem.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in problem.headers().items()]
        if problem.status == 401:
            headers += [(b"www-authenticate", challenge) for challenge in _CHALLENGES]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Returns the name of the client's key, empty where none is needed."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADER_BYTES:
            raise RequestError("", "the headers are too long", code="headers_too_large", status=431)
        if self._hosts and _host_name(headers.get("host", "")) not in self._hosts:
            raise RequestError("", "this server is not known by that name", code="unknown_host")
        if scope["method"] == "GET" and scope["path"] in OPEN_PATHS:
            return ""
        if self._keys is None:
            if not _is_local(scope):  # whoever else listens for us, such as Ray's proxy, has settings of its own
                raise RequestError("", "without API keys this server answers its own machine", code="no_keys")
            return ""
        given = headers.get("authorization", "")
        name = self._keys.name_of(given)
        if name is None:
            said = "this API key is not known here" if given else "an API key is needed: Authorization: Bearer …"
            raise RequestError("", said, code="invalid_api_key", status=401)
        return name

    def _check_post(self, headers: Mapping[str, str]) -> None:
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RequestError("", "requests from pages of other sites are refused", code="cross_site")
        kind, _, parameters = headers.get("content-type", "").lower().partition(";")
        if kind.strip() != "application/json" or parameters.strip() not in ("", "charset=utf-8"):
            raise RequestError("", "expected Content-Type: application/json", code="unsupported_media_type", status=415)
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError("", "compressed bodies are not read", code="unsupported_media_type", status=415)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        most = self._limits.max_body_bytes
        return RequestError("", f"the body has more than {most} bytes", code="request_too_large", status=413)

    async def _read(self, receive: Receive) -> Receive | None:
        """Reads the body, which may be as large as a video; None where the client left.

        What is returned gives it away once: nobody here holds it while it is answered.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limits.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return _replayed(bytes(body), receive)
        except TimeoutError:
            raise RequestError("", "the body did not come in time", code="request_timeout", status=408) from None

    def _patient(self, send: Send, ours: Mapping[str, str]) -> Send:
        """Adds what every answer says, and gives up on clients that do not read."""

        async def patient(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message.get("headers", ())}
                more = [(name.encode(), value.encode()) for name, value in ours.items() if name.encode() not in given]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            try:
                async with asyncio.timeout(self._limits.write_timeout_s):
                    await send(message)
            except TimeoutError:
                raise SlowClientError from None

        return patient


def _is_local(scope: Scope) -> bool:
    """Tells whether a connection came to an address that only this machine reaches, or to a socket of its own."""
    host, port = scope.get("server") or ("", None)
    return port is None or is_loopback(host)


def _host_name(host: str) -> str:
    """The name without the port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
