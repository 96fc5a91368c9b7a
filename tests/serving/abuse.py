"""What the tests of abuse share: a canary that must never be called, names that resolve as told, hosts that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from valley.errors import MediaError
from valley.media.fetch import Fetcher, FetchSettings

PUBLIC = "93.184.215.14"
HOST = "media.example"
SECRET = "X-Amz-Signature=s3cr3t"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Canary:
    """A server on the loopback that counts who connects, and answers everyone with a secret."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._accepted = 0
        self._own = 0
        self._names: list[tuple[str, int]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def connections(self) -> int:
        """How many connected so far. Its own comes last in the queue: when that is accepted, all are counted."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as own, self._changed:
            assert own
            self._own += 1
            name = own.getsockname()
            assert self._changed.wait_for(lambda: name in self._names, 30)
            return self._accepted - self._own

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, name = self._server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
                with self._changed:
                    self._accepted += 1
                    self._names.append(name)
                    self._changed.notify_all()


@contextlib.contextmanager
def canary() -> Iterator[Canary]:
    bird = Canary()
    try:
        yield bird
    finally:
        bird.close()


class Names:
    """A resolver that answers from a table; a name with several answers gives them one after the other, then the last.

    Attributes:
        asked: the names asked for, in order.
    """

    def __init__(self, table: dict[str, Sequence[list[str]]]) -> None:
        self._table = {name: list(answers) for name, answers in table.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str) -> list[str]:
        self.asked.append(host)
        if host not in self._table:
            raise socket.gaierror(socket.EAI_NONAME, "no such name: a secret of the resolver")
        answers = self._table[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, *, address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server on the loopback that hands each connection to `handler`; its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await handler(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, address, port, ssl=tls, backlog=256)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def replying(*pieces: bytes, then: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None) -> Handler:
    """Reads the request, sends the pieces, does `then`, and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if then is not None:
            await then(writer)

    return handle


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP response; underscores in header names stand for hyphens. `Content_Length=""` leaves that out."""
    stated = {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in stated.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def for_ever(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def local_settings(port: int, **changes: object) -> FetchSettings:
    """Settings that let the fetcher reach one port of the loopback."""
    return FetchSettings.model_validate(
        {"schemes": ("http", "https"), "ports": (port,), "private_networks": ("127.0.0.0/8",), **changes}
    )


def local_fetcher(port: int, names: Names | None = None, **changes: object) -> Fetcher:
    """A fetcher for which `media.example` is this machine."""
    return Fetcher(local_settings(port, **changes), names or Names({HOST: [["127.0.0.1"]]}))


class Host:
    """Answers one request after the other from a list, the last for ever, and remembers the requests."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.requests = list(answers), []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        await writer.drain()


def fetch(fetcher: Fetcher, url: str) -> bytes:
    async def run() -> bytes:
        try:
            return await fetcher.fetch(url, "video_url")
        finally:
            await fetcher.close()

    return asyncio.run(run())


def fetched_from(handler, path: str = "/clip.mp4", *, scheme: str = "http", **changes: object) -> bytes:
    """What the fetcher makes of a host on this machine that behaves like `handler`."""

    async def run() -> bytes:
        async with serving(handler) as port:
            fetcher = local_fetcher(port, **changes)
            try:
                return await fetcher.fetch(f"{scheme}://{HOST}:{port}{path}", "video_url")
            finally:
                await fetcher.close()

    return asyncio.run(run())


def assert_tells_nothing(error: BaseException) -> None:
    """Nothing of the URL, of addresses and of other people's exceptions is in an error."""
    assert isinstance(error, MediaError)
    assert error.path == "video_url"
    for text in ("s3cr3t", "example", "://", "127.", "169.254", "93.184", "Errno", "aiohttp", "object at", "/clip"):
        assert text not in str(error)
