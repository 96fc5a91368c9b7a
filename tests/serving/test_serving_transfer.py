"""A host that is slow, broken, endless or lying costs no more than the settings say, and nobody but who asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import pickle

import pytest
from abuse import (
    HOST,
    SECRET,
    Host,
    Names,
    assert_tells_nothing,
    fetch,
    fetched_from,
    for_ever,
    local_fetcher,
    replying,
    response,
    serving,
)

from valley.errors import (
    FetchBusyError,
    FetchTimeoutError,
    MediaLimitError,
    UnreachableMediaError,
)
from valley.media.fetch import Fetcher, FetchSettings

SHORT_S = 0.4


def test_29_a_file_that_is_stated_too_large_is_refused_before_its_body():
    stated = response(Content_Length=str(10 << 30))

    with pytest.raises(MediaLimitError, match="10737418240 bytes, more than 1000"):
        fetched_from(replying(stated, then=for_ever), max_bytes=1000)


def test_30_an_endless_body_is_cut_off_and_the_connection_closed():
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(Content_Length="", Transfer_Encoding="chunked"))
        try:
            while True:
                writer.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
                await writer.drain()
        except OSError:
            closed.set()

    async def run() -> None:
        async with serving(handle) as port:
            with pytest.raises(MediaLimitError, match="more than 100000 bytes"):
                await local_fetcher(port, max_bytes=100_000).fetch(f"http://{HOST}:{port}/")
            await closed.wait()

    asyncio.run(run())


def test_31_no_more_is_read_than_was_stated():
    host = Host(response(b"clip" + bytes(100), Content_Length="4"))

    with contextlib.suppress(UnreachableMediaError):  # when the rest came in time to be taken for a second answer
        assert fetched_from(host) == b"clip"


def test_31_less_than_was_stated_is_a_failure_of_the_host():
    host = Host(response(b"clip", Content_Length="100"))

    with pytest.raises(UnreachableMediaError, match="broke off"):
        fetched_from(host)
    assert len(host.requests) == 2


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "x", "gzip, identity"])
def test_32_a_compressed_body_is_refused_and_not_unpacked(coding):
    bomb = gzip.compress(bytes(10 << 20))

    with pytest.raises(UnreachableMediaError, match="compressed"):
        fetched_from(replying(response(bomb, Content_Encoding=coding)))


async def drip(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


SLOW = {
    "33 slow-drip": replying(response(Content_Length="1000000"), then=drip),
    "33 slow-drip of headers": replying(b"HTTP/1.1 200 OK\r\nX: ", then=drip),
    "34 accepts TCP, never answers": replying(then=for_ever),
    "34 headers, then nothing": replying(response(Content_Length="10"), then=for_ever),
}


@pytest.mark.parametrize("handler", SLOW.values(), ids=SLOW)
def test_a_slow_host_meets_the_deadline(handler):
    with pytest.raises(FetchTimeoutError, match=r"not fetched within 0\.4 s") as caught:
        fetched_from(handler, f"/clip.mp4?{SECRET}", timeout_s=SHORT_S)
    assert_tells_nothing(caught.value)


def test_34_a_stalled_tls_handshake_meets_the_connection_s_deadline():
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await for_ever(writer)

    with pytest.raises(FetchTimeoutError, match=r"no connection within 0\.4 s"):
        fetched_from(say_nothing, scheme="https", connect_timeout_s=SHORT_S)


def test_a_name_that_takes_for_ever_to_resolve_meets_the_deadline():
    class Silent:
        async def resolve(self, host: str) -> list[str]:
            await asyncio.sleep(3600)
            return []

    with pytest.raises(FetchTimeoutError):
        fetch(Fetcher(FetchSettings(timeout_s=SHORT_S), Silent()), "https://media.example/")


def test_redirects_and_second_tries_share_one_deadline():
    async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.15)
        writer.write(response(status="302 Found", Location="/again"))
        await writer.drain()

    with pytest.raises(FetchTimeoutError):
        fetched_from(again, timeout_s=SHORT_S, max_redirects=1000)


@pytest.mark.parametrize("status", [404, 403, 401, 410, 204, 206, 304, 429])
def test_35_what_the_host_answered_is_told(status):
    host = Host(response(status=f"{status} Nothing", Content_Length="" if status in (204, 304) else "0"))

    with pytest.raises(UnreachableMediaError, match=f"its host answered {status}") as caught:
        fetched_from(host, f"/clip.mp4?{SECRET}")

    assert caught.value.status == status
    assert pickle.loads(pickle.dumps(caught.value)).status == status
    assert_tells_nothing(caught.value)
    assert len(host.requests) == 1


BROKEN = {
    "36 upstream 500": (response(status="500 Oops"), 500),
    "36 upstream 503": (response(status="503 Later"), 503),
    "36 reset mid-body": (response(b"part", Content_Length="100"), None),
    "36 hangs up at once": (b"", None),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", None),
    "a Content-Length that is no number": (response(b"clip", Content_Length="-1"), None),
    "two Content-Lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nclip", None),
    "a header of 100 KB": (response(b"clip", X="x" * 100_000), None),
    "10,000 headers": (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 10_000 + b"\r\n", None),
    "bad chunks": (response(b"zz\r\nclip\r\n", Content_Length="", Transfer_Encoding="chunked"), None),
}


@pytest.mark.parametrize(("answer", "status"), BROKEN.values(), ids=BROKEN)
def test_a_broken_host_is_asked_twice(answer, status):
    host = Host(answer)

    with pytest.raises(UnreachableMediaError) as caught:
        fetched_from(host, f"/clip.mp4?{SECRET}")

    assert caught.value.status == status
    assert_tells_nothing(caught.value)
    assert len(host.requests) == 2


@pytest.mark.parametrize("answer", [response(status="502 Oops"), b""])
def test_36_a_host_that_comes_back_is_forgiven(answer):
    assert fetched_from(Host(answer, response(b"clip"))) == b"clip"


def test_a_host_that_takes_no_connection_is_unreachable(bird):
    port = bird.port
    bird.close()

    with pytest.raises(UnreachableMediaError, match="took no connection") as caught:
        fetch(local_fetcher(port), f"http://{HOST}:{port}/")
    assert_tells_nothing(caught.value)


def test_a_name_that_is_not_known_is_unreachable():
    with pytest.raises(UnreachableMediaError, match="its host is not known") as caught:
        fetch(Fetcher(FetchSettings(), Names({})), "https://media.example/")
    assert_tells_nothing(caught.value)


def test_answers_of_a_resolver_that_are_no_addresses_lead_nowhere():
    with pytest.raises(UnreachableMediaError, match="not known"):
        fetch(Fetcher(FetchSettings(), Names({"rubbish.example": [["127.1"]]})), "https://rubbish.example/")


def gated(gate: asyncio.Event, asked: list[str]):
    """A host that answers when the gate opens."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split()[1])
        await gate.wait()
        writer.write(response(b"clip"))
        await writer.drain()

    return handle


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_38_of_64_clients_with_slow_urls_those_beyond_the_pool_are_turned_away_at_once():
    async def run() -> None:
        gate, asked = asyncio.Event(), []
        async with serving(gated(gate, asked)) as port:
            fetcher = local_fetcher(port, concurrent=2, waiting=4)
            tasks = [asyncio.create_task(fetcher.fetch(f"http://{HOST}:{port}/{n}", f"url {n}")) for n in range(64)]
            await until(lambda: sum(task.done() for task in tasks) == 58 and len(asked) == 2)
            for number, task in enumerate(tasks[6:], 6):
                assert isinstance(task.exception(), FetchBusyError)
                assert task.exception().path == f"url {number}"
            gate.set()
            assert await asyncio.gather(*tasks[:6]) == [b"clip"] * 6
            assert await fetcher.fetch(f"http://{HOST}:{port}/later") == b"clip"

    asyncio.run(run())


def test_39_the_same_url_in_50_requests_is_fetched_once():
    async def run() -> None:
        gate, asked = asyncio.Event(), []
        async with serving(gated(gate, asked)) as port:
            fetcher = local_fetcher(port, concurrent=1, waiting=0)
            urls = [f"http://{HOST}:{port}/clip", f"HTTP://{HOST.upper()}:{port}/clip#{SECRET}"] * 25
            tasks = [asyncio.create_task(fetcher.fetch(url)) for url in urls]
            await until(lambda: asked)
            tasks[0].cancel()  # the one that began it
            await asyncio.sleep(0)
            gate.set()
            assert await asyncio.gather(*tasks[1:]) == [b"clip"] * 49
            assert asked == ["/clip"]
            assert await fetcher.fetch(urls[0]) == b"clip"
            assert asked == ["/clip"] * 2

    asyncio.run(run())


def test_a_failure_that_callers_share_names_each_of_them():
    async def run() -> list[object]:
        async with serving(Host(response(status="404 Nothing"))) as port:
            fetcher = local_fetcher(port)
            fetches = [fetcher.fetch(f"http://{HOST}:{port}/", label) for label in ("one", "two")]
            return await asyncio.gather(*fetches, return_exceptions=True)

    assert [(type(error), error.path) for error in asyncio.run(run())] == [
        (UnreachableMediaError, "one"),
        (UnreachableMediaError, "two"),
    ]


def test_a_download_that_nobody_waits_for_any_more_ends():
    async def run() -> None:
        hung_up = asyncio.Event()
        asked = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()
            hung_up.set()

        async with serving(handle) as port:
            fetcher = local_fetcher(port, concurrent=1, waiting=0)
            tasks = [asyncio.create_task(fetcher.fetch(f"http://{HOST}:{port}/")) for _ in range(2)]
            await asked.wait()
            for task in tasks:
                task.cancel()
            await hung_up.wait()
            with pytest.raises(UnreachableMediaError, match="not known"):  # and its place is free
                await fetcher.fetch(f"http://unknown.example:{port}/")

    asyncio.run(run())


def test_a_closed_fetcher_gives_up_what_it_does():
    async def run() -> None:
        gate, asked = asyncio.Event(), []
        async with serving(gated(gate, asked)) as port:
            fetcher = local_fetcher(port)
            task = asyncio.create_task(fetcher.fetch(f"http://{HOST}:{port}/"))
            await until(lambda: asked)
            await fetcher.close()
            for waiting in (task, fetcher.fetch(f"http://{HOST}:{port}/other")):
                with pytest.raises(FetchBusyError):
                    await waiting

    asyncio.run(run())


def test_96_logs_hold_no_url_no_address_and_no_secret(caplog):
    caplog.set_level(logging.DEBUG)

    for handler in (Host(response(status="500 Oops")), Host(b""), replying(response(b"clip"))):
        try:
            fetched_from(handler, f"/clip.mp4?{SECRET}")
        except UnreachableMediaError as error:
            assert_tells_nothing(error)

    assert "asked once more" in caplog.text
    for text in ("s3cr3t", "/clip", "127.0.0.1"):
        assert text not in caplog.text
