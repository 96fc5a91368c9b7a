"""The one fetcher for URLs given by strangers, who would have it read what only this machine can reach.

A URL is parsed once, its host resolved once, and nothing but the addresses that were checked is connected to: a name
that means something else a moment later (DNS rebinding) leads nowhere. Redirects are followed here, each checked like
the first URL. No proxy, cookie, credential or compression takes part. One deadline and one size bound everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal, Protocol, runtime_checkable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from yarl import URL

from valley.config import Location, Settings
from valley.errors import (
    FetchBusyError,
    FetchTimeoutError,
    MediaError,
    MediaLimitError,
    RefusedMediaError,
    UnreachableMediaError,
)
from valley.media.addresses import Address, is_allowed, parse_address
from valley.media.urls import NAME, Target, parse_url, redirected

logger = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept": "video/*, image/*;q=0.9, */*;q=0.1", "Accept-Encoding": "identity", "User-Agent": "valley"}
_RETRIES = 1
_RETRY_WAIT_S = 0.2


class FetchSettings(Settings):
    """What may be fetched for strangers, and what that may cost."""

    schemes: Annotated[tuple[Literal["http", "https"], ...], Field(min_length=1)] = ("https",)
    """Schemes of URLs."""
    ports: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(min_length=1)] = (80, 443)
    """Ports that are connected to."""
    allowed_hosts: tuple[Annotated[str, AfterValidator(str.lower)], ...] = ()
    """The only hosts that URLs and redirects may name, each in full; none: any that is public."""
    private_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks that are connected to although they are not public: storage on the premises, such as 10.1.0.0/16."""
    ca_file: Location | None = None
    """PEM file of certificate authorities trusted besides the system's."""
    max_redirects: NonNegativeInt = 3
    """Most redirects from one URL."""
    max_bytes: PositiveInt = 64 << 20
    """Largest file."""
    timeout_s: PositiveFloat = 30.0
    """Seconds for one file in all: waiting for a turn, redirects and the second try included."""
    connect_timeout_s: PositiveFloat = 5.0
    """Seconds for one connection, TLS included."""
    concurrent: PositiveInt = 8
    """Files fetched at the same time."""
    waiting: NonNegativeInt = 32
    """Files that wait for their turn; more are turned away."""


@runtime_checkable
class Resolver(Protocol):
    """Finds the addresses of a host."""

    async def resolve(self, host: str) -> list[str]:
        """Returns the IP addresses of a host name.

        Raises:
            OSError: there are none, or they could not be found out.
        """
        ...


class SystemResolver:
    """The system's resolver, in threads of its own: a name that takes long to resolve holds up no other work.

    Args:
        num_threads: names resolved at the same time.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="resolve")

    async def resolve(self, host: str) -> list[str]:
        """See `Resolver`."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]


class Fetcher:
    """Fetches files by URL, a bounded number at a time; the same URL asked for at the same time is fetched once.

    It belongs to one event loop.

    Args:
        settings: what may be fetched.
        resolver: finds the addresses of hosts; None: as the system does.
    """

    def __init__(self, settings: FetchSettings | None = None, resolver: Resolver | None = None) -> None:
        self._settings = settings or FetchSettings()
        self._resolver: Resolver = resolver or SystemResolver(self._settings.concurrent)
        self._tls = ssl.create_default_context()
        if self._settings.ca_file is not None:
            self._tls.load_verify_locations(self._settings.ca_file)
        self._turns = asyncio.Semaphore(self._settings.concurrent)
        self._flights: dict[str, _Flight] = {}
        self._is_closed = False

    async def fetch(self, url: str, label: str = NAME) -> bytes:
        """Returns the file at a URL, whatever type its host says it is of.

        Args:
            url: as the stranger wrote it.
            label: what errors call the file; the URL is never in them.

        Raises:
            RefusedMediaError: the URL is malformed, or it or a redirect leads where nothing may be fetched from.
            MediaLimitError: the file is larger than `max_bytes`.
            UnreachableMediaError: the host is not known, cannot be reached, failed, or has no such file.
            FetchTimeoutError: the file was not there in time.
            FetchBusyError: too many files are being fetched.
        """
        try:
            return await self._fetch_once(self._parse(url))
        except MediaError as error:
            raise error.named(label) from None

    async def close(self) -> None:
        """Gives up what is being fetched; nothing more is."""
        self._is_closed = True
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch_once(self, target: Target) -> bytes:
        flight = self._flights.get(target.url)
        if flight is None:
            if self._is_closed or len(self._flights) >= self._settings.concurrent + self._settings.waiting:
                raise FetchBusyError(NAME, "too many files are being fetched")
            flight = self._flights[target.url] = _Flight(asyncio.create_task(self._fetch_in_time(target)))
        flight.num_callers += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if self._is_closed and flight.task.cancelled():
                raise FetchBusyError(NAME, "no more files are fetched") from None
            raise
        finally:
            flight.num_callers -= 1
            if not flight.num_callers:
                self._flights.pop(target.url, None)
                flight.task.cancel()  # without effect when it is done

    async def _fetch_in_time(self, target: Target) -> bytes:
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._turns:
                return await self._follow(target)
        except TimeoutError:
            raise FetchTimeoutError(NAME, f"not fetched within {self._settings.timeout_s:g} s") from None

    async def _follow(self, target: Target) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            answer = await self._ask(target)
            if isinstance(answer, bytes):
                return answer
            target = self._parse(redirected(target, answer))
        raise RefusedMediaError(NAME, f"more than {self._settings.max_redirects} redirects")

    async def _ask(self, target: Target) -> bytes | str:
        """The file, or where its host redirects to; asks again when the host fails in a way that may pass."""
        addresses = await self._checked_addresses(target)
        for _ in range(_RETRIES):
            try:
                return await self._ask_once(target, addresses)
            except UnreachableMediaError as error:
                if error.status is not None and error.status < 500:
                    raise
                logger.info("%s: %s; asked once more", target.host, error.reason)
            await asyncio.sleep(_RETRY_WAIT_S)
        return await self._ask_once(target, addresses)

    async def _ask_once(self, target: Target, addresses: Sequence[Address]) -> bytes | str:
        connector = aiohttp.TCPConnector(
            resolver=_Pinned(target.host, addresses), use_dns_cache=False, ssl=self._tls, force_close=True
        )
        with self._translated():
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    headers=_HEADERS,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=False,
                    auto_decompress=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
                    middlewares=(self._translate,),
                ) as session,
                session.get(URL(target.url, encoded=True), allow_redirects=False) as response,
            ):
                return await self._read(response)

    async def _translate(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Within aiohttp, which asks once more by itself after some errors of its own."""
        with self._translated():
            return await handler(request)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Makes errors of aiohttp Valley's, which tell neither addresses nor URLs."""
        try:
            yield
        except aiohttp.ConnectionTimeoutError:
            reason = f"its host took no connection within {self._settings.connect_timeout_s:g} s"
            raise FetchTimeoutError(NAME, reason) from None
        except aiohttp.ClientSSLError:
            raise UnreachableMediaError(NAME, "no TLS connection to its host that can be trusted") from None
        except aiohttp.ClientConnectorError:
            raise UnreachableMediaError(NAME, "its host took no connection") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise UnreachableMediaError(NAME, "its host broke off, or does not speak HTTP") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | str:
        status, most = response.status, self._settings.max_bytes
        if status in _REDIRECTS and "Location" in response.headers:
            return response.headers["Location"]
        if status != 200:
            raise UnreachableMediaError(NAME, f"its host answered {status}", status)
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise UnreachableMediaError(NAME, "its host compressed it, which it was asked not to do", status)
        if response.content_length is not None and response.content_length > most:
            raise MediaLimitError(NAME, f"{response.content_length} bytes, more than {most}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > most:
                raise MediaLimitError(NAME, f"more than {most} bytes")
        return bytes(body)

    def _parse(self, url: str) -> Target:
        target = parse_url(url, self._settings.schemes, self._settings.ports)
        if self._settings.allowed_hosts and target.host not in self._settings.allowed_hosts:
            raise RefusedMediaError(NAME, "its host is not one that is fetched from")
        return target

    async def _checked_addresses(self, target: Target) -> list[Address]:
        """The addresses of a host, all of which may be connected to."""
        try:
            texts = [target.host] if target.address is not None else await self._resolver.resolve(target.host)
            addresses = [parse_address(text) for text in texts]
        except (OSError, ValueError):
            addresses = []
        if not addresses:
            raise UnreachableMediaError(NAME, "its host is not known")
        if not all(is_allowed(address, self._settings.private_networks) for address in addresses):
            raise RefusedMediaError(NAME, "its host is not on the public internet")
        return addresses


@dataclass
class _Flight:
    """A file that is being fetched, and how many callers wait for it."""

    task: asyncio.Task[bytes]
    num_callers: int = 0


class _Pinned(AbstractResolver):
    """Answers with the addresses that were checked. About a host that is an address, aiohttp does not ask."""

    def __init__(self, host: str, addresses: Sequence[Address]) -> None:
        self._host, self._addresses = host, addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host != self._host:
            raise OSError("another host than the one that was checked")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """There is nothing to close."""
