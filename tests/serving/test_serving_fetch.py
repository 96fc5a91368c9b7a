"""The fetcher reaches what strangers may have fetched, and nothing else, whatever URL, name or host they bring."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import logging
import pickle
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from abuse import (
    HOST,
    PUBLIC,
    Canary,
    Names,
    canary,
    for_ever,
    local_fetcher,
    local_settings,
    replying,
    response,
    serving,
)

from valley.config import SettingsError, validate
from valley.errors import (
    FetchBusyError,
    FetchTimeoutError,
    MediaError,
    MediaLimitError,
    RefusedMediaError,
    UnreachableMediaError,
)
from valley.media.addresses import is_public, parse_address
from valley.media.fetch import Fetcher, FetchSettings
from valley.media.urls import parse_url

SECRET = "X-Amz-Signature=s3cr3t"
SHORT_S = 0.4
STAND_IN = "127.0.0.2"
"""An address of this machine that tests allow in place of a public one, while 127.0.0.1 stays forbidden."""


@pytest.fixture
def bird() -> Iterator[Canary]:
    with canary() as one:
        yield one


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


def test_the_canary_counts_who_connects(bird):
    names = Names({HOST: [["127.0.0.1"]]})

    assert bird.connections() == 0
    assert fetch(Fetcher(local_settings(bird.port), names), f"http://{HOST}:{bird.port}/") == b"secret"
    assert fetch(Fetcher(local_settings(bird.port), names), f"http://127.0.0.1:{bird.port}/") == b"secret"
    assert bird.connections() == 2


NAMES = {
    "public.example": [[PUBLIC]],
    "localhost": [["127.0.0.1"]],
    "a.localhost": [["127.0.0.1"]],
    "private.example": [["127.0.0.1"]],
    "mixed.example": [[PUBLIC, "127.0.0.1"]],
    "mapped.example": [["::ffff:127.0.0.1"]],
    "nat64.example": [["64:ff9b::7f00:1"]],
    "scoped.example": [["fe80::1%lo"]],
    "rubbish.example": [["127.1"]],
}

SSRF = {
    "1 our own dashboard on 127.0.0.1": "http://127.0.0.1:{port}/api/jobs/",
    "2 metadata service of a cloud": "http://169.254.169.254/latest/meta-data/",
    "3 localhost": "http://localhost:{port}/",
    "3 localhost with a trailing dot": "http://localhost.:{port}/",
    "3 LOCALHOST": "http://LOCALHOST:{port}/",
    "3 a name below localhost": "http://a.localhost:{port}/",
    "4 decimal host": "http://2130706433:{port}/",
    "4 hexadecimal host": "http://0x7f000001:{port}/",
    "4 hexadecimal and short host": "http://0x7f.1:{port}/",
    "4 octal host": "http://0177.0.0.1:{port}/",
    "4 short host": "http://127.1:{port}/",
    "4 zero": "http://0:{port}/",
    "4 address with a trailing dot": "http://127.0.0.1.:{port}/",
    "4 too many numbers": "http://1.127.0.0.1:{port}/",
    "5 IPv6 loopback": "http://[::1]:{port}/",
    "5 v4-mapped loopback": "http://[::ffff:127.0.0.1]:{port}/",
    "5 v4-mapped metadata service": "http://[::ffff:a9fe:a9fe]/",
    "5 v4-compatible loopback": "http://[::127.0.0.1]:{port}/",
    "6 NAT64": "http://[64:ff9b::7f00:1]:{port}/",
    "6 NAT64 for local use": "http://[64:ff9b:1::7f00:1]:{port}/",
    "6 6to4": "http://[2002:7f00:1::]:{port}/",
    "6 Teredo": "http://[2001:0:7f00:1::]:{port}/",
    "7 CGNAT": "http://100.64.0.1/",
    "7 0.0.0.0": "http://0.0.0.0:{port}/",
    "7 multicast": "http://224.0.0.1/",
    "7 IPv6 multicast": "http://[ff02::1]/",
    "7 broadcast": "http://255.255.255.255/",
    "7 reserved": "http://240.0.0.1/",
    "7 benchmarking": "http://198.18.0.1/",
    "8 RFC1918, 10/8": "http://10.0.0.1/",
    "8 RFC1918, 172.16/12": "http://172.16.0.1/",
    "8 RFC1918, 192.168/16": "http://192.168.0.1/",
    "8 fc00::/7": "http://[fd00::1]/",
    "8 fe80:: with a zone": "http://[fe80::1%eth0]/",
    "8 fe80:: with an encoded zone": "http://[fe80::1%25eth0]/",
    "9 host name whose A record is private": "http://private.example:{port}/",
    "9 host name whose AAAA record is a mapped address": "http://mapped.example:{port}/",
    "9 host name whose AAAA record is NAT64": "http://nat64.example:{port}/",
    "9 host name whose AAAA record has a zone": "http://scoped.example:{port}/",
    "10 mixed answer: one public, one private A record": "http://mixed.example:{port}/",
    "16 another port": "http://public.example:6379/",
    "17 backslash host confusion": "http://public.example\\@127.0.0.1:{port}/",
    "17 backslash host confusion, reversed": "http://127.0.0.1:{port}\\@public.example/",
    "17 backslashes for slashes": "http:\\\\127.0.0.1:{port}/",
    "18 userinfo that looks like a host": "http://public.example@127.0.0.1:{port}/",
    "18 user and password": "http://user:pw@public.example/",
    "18 empty userinfo": "http://@127.0.0.1:{port}/",
    "18 encoded userinfo": "http://public.example%40127.0.0.1:{port}/",
    "19 CR LF in the path": "http://public.example/\r\nHost: 127.0.0.1",
    "19 tab in the scheme": "ht\ttp://127.0.0.1:{port}/",
    "19 tab in the host": "http://127.0.0.1\t:{port}/",
    "19 NUL in the host": "http://127.0.0.1\0.public.example:{port}/",
    "19 blank before": " http://127.0.0.1:{port}/",
    "19 newline behind": "http://127.0.0.1:{port}/\n",
    "19 unicode dot": "http://127。0。0。1:{port}/",
    "19 fullwidth digits": "http://①②⑦.0.0.1:{port}/",
    "19 IDN homograph": "http://рublic.example:{port}/",
    "19 encoded host": "http://%31%32%37.0.0.1:{port}/",
    "19 soft hyphen": "http://local\u00adhost:{port}/",
    "no host": "http:///127.0.0.1:{port}/",
    "two ports": "http://127.0.0.1:{port}:80/",
    "port beyond 16 bits": "http://127.0.0.1:99999/",
    "port that is no number": "http://127.0.0.1:+{port}/",
    "no slashes": "http:127.0.0.1:{port}/",
    "brackets around a name": "http://[localhost]:{port}/",
    "text behind brackets": "http://[::1]evil.example:{port}/",
    "another scheme": "ftp://127.0.0.1:{port}/",
    "gopher": "gopher://127.0.0.1:{port}/_INFO",
    "a relative URL": "//127.0.0.1:{port}/",
    "a very long URL": "http://127.0.0.1:{port}/" + "a" * 9000,
}


@pytest.mark.parametrize("url", SSRF.values(), ids=SSRF)
def test_a_forbidden_url_is_refused_and_nothing_connected_to(url, bird):
    settings = FetchSettings(schemes=("http", "https"), ports=(80, 443, bird.port))

    with pytest.raises(RefusedMediaError) as caught:
        fetch(Fetcher(settings, Names(NAMES)), url.replace("{port}", str(bird.port)))

    assert_tells_nothing(caught.value)
    assert bird.connections() == 0


@pytest.mark.parametrize("host", ["localhost", "LocalHost"])
def test_3_localhost_is_refused_as_the_system_resolves_it(host, bird):
    settings = FetchSettings(schemes=("http",), ports=(bird.port,))

    with pytest.raises(RefusedMediaError, match="not on the public internet"):
        fetch(Fetcher(settings), f"http://{host}:{bird.port}/")

    assert bird.connections() == 0


@pytest.mark.parametrize("url", ["http://public.example/", "http://127.0.0.1/"])
def test_http_is_refused_unless_it_is_switched_on(url, bird):
    with pytest.raises(RefusedMediaError, match="only https URLs are fetched"):
        fetch(Fetcher(FetchSettings(), Names(NAMES)), url)


ADDRESSES = {
    "93.184.215.14": True,
    "8.8.8.8": True,
    "2606:4700::1111": True,
    "::ffff:8.8.8.8": True,
    "64:ff9b::808:808": True,
    "::ffff:10.0.0.1": False,
    "64:ff9b::a00:1": False,
    "64:ff9b:1::808:808": False,
    "2002:808:808::": False,
    "2001:0:808:808::1": False,
    "2001:db8::1": False,
    "3fff::1": False,
    "5f00::1": False,
    "fec0::1": False,
    "::": False,
    "::8.8.8.8": False,
    "100::1": False,
    "0.1.2.3": False,
    "100.127.255.255": False,
    "169.254.0.1": False,
    "172.31.255.255": False,
    "192.0.0.1": False,
    "192.0.2.1": False,
    "192.88.99.1": False,
    "198.19.255.255": False,
    "203.0.113.1": False,
    "239.255.255.250": False,
}


@pytest.mark.parametrize(("text", "public"), ADDRESSES.items(), ids=ADDRESSES)
def test_which_addresses_are_public(text, public):
    assert is_public(parse_address(text)) is public


def test_an_address_with_a_zone_is_not_public():
    assert not is_public(ipaddress.IPv6Address("2606:4700::1111%eth0"))


def test_a_url_is_read_in_one_way():
    target = parse_url("HTTPS://Media.Example:443?a=%2e%2E%0d&b=c:d@e#f")

    assert target.url == "https://media.example/?a=%2e%2E%0d&b=c:d@e"
    assert parse_url("https://xn--mnchen-3ya.example/ü".replace("ü", "%C3%BC")).host == "xn--mnchen-3ya.example"
    assert parse_url("http://[2606:4700:0::1111]/", ("http",)).url == "http://[2606:4700:0::1111]/"


def test_wrong_settings_are_told():
    with pytest.raises(SettingsError, match="private_networks"):
        validate(FetchSettings, {"private_networks": ["10.0.0.1/8"]})
    with pytest.raises(SettingsError, match="schemes"):
        validate(FetchSettings, {"schemes": ["file"]})


def trapped(bird: Canary, handler, names: dict[str, list[list[str]]], url: str, **changes: object) -> bytes:
    """Fetches with a host at the stand-in's address and the canary at the same port of 127.0.0.1."""
    table = {HOST: [[STAND_IN]], "other.example": [[STAND_IN]], "private.example": [["127.0.0.1"]]} | names

    async def run() -> bytes:
        async with serving(handler, address=STAND_IN, port=bird.port):
            settings = local_settings(bird.port, private_networks=(f"{STAND_IN}/32",), **changes)
            fetcher = Fetcher(settings, Names(table))
            try:
                return await fetcher.fetch(url.replace("{port}", str(bird.port)), "video_url")
            finally:
                await fetcher.close()

    return asyncio.run(run())


REDIRECTS = {
    "12 302 to 127.0.0.1": "http://127.0.0.1:{port}/",
    "12 302 to a name that is private": "http://private.example:{port}/",
    "12 302 to [::1]": "http://[::1]:{port}/",
    "12 302 to the host of a scheme-relative URL": "//127.0.0.1:{port}/",
    "12 302 to a decimal host": "http://2130706433:{port}/",
    "15 302 to file:": "file:///etc/passwd",
    "15 302 to gopher:": "gopher://127.0.0.1:{port}/",
    "15 302 to ftp:": "ftp://127.0.0.1:{port}/",
    "15 302 to data:": "data:video/mp4;base64,AAAA",
    "16 302 to another port on the same host": f"http://{HOST}:6379/",
    "17 302 with a backslash": f"http://{HOST}:{{port}}\\@127.0.0.1:{{port}}/",
    "18 302 with credentials": f"http://user:pw@{HOST}:{{port}}/",
    "19 302 with a tab": "http://127.0.0.1\t:{port}/",
    "19 302 with characters beyond ASCII": "http://127。0。0。1:{port}/",
    "302 to nowhere": "http://[::1/",
}


@pytest.mark.parametrize("location", REDIRECTS.values(), ids=REDIRECTS)
def test_a_redirect_is_checked_like_the_first_url(location, bird):
    answer = response(status="302 Found", Location=location.replace("{port}", str(bird.port)))

    with pytest.raises(RefusedMediaError) as caught:
        trapped(bird, replying(answer), {}, f"http://{HOST}:{{port}}/clip.mp4?{SECRET}")

    assert_tells_nothing(caught.value)
    assert bird.connections() == 0


class Host:
    """Answers one request after the other from a list, the last for ever, and remembers the requests."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.requests = list(answers), []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        await writer.drain()


def test_13_a_redirect_from_an_allowed_host_to_another_is_refused(bird):
    host = Host(response(status="302 Found", Location=f"http://other.example:{bird.port}/"), response(b"clip"))
    url = f"http://{HOST}:{{port}}/"

    with pytest.raises(RefusedMediaError, match="not one that is fetched from"):
        trapped(bird, host, {}, url, allowed_hosts=(HOST,))
    assert len(host.requests) == 1
    assert trapped(bird, host, {}, url, allowed_hosts=(HOST.upper(), "other.example")) == b"clip"


@pytest.mark.parametrize("url", ["http://other.example:{port}/", "http://127.0.0.2:{port}/", "http://a.media.example/"])
def test_a_host_that_is_not_listed_is_refused(url, bird):
    host = Host(response(b"clip"))

    with pytest.raises(RefusedMediaError, match=r"not one that is fetched from"):
        trapped(bird, host, {}, url, allowed_hosts=(HOST,), ports=(80, bird.port))
    assert not host.requests


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_14_a_redirect_loop_ends(status, bird):
    host = Host(response(status=status, Location="/again"))

    with pytest.raises(RefusedMediaError, match="more than 3 redirects"):
        trapped(bird, host, {}, f"http://{HOST}:{{port}}/")

    assert len(host.requests) == 4


def test_an_honest_redirect_is_followed(bird):
    host = Host(response(status="302 Found", Location="../b.mp4?x=%2F#part"), response(b"clip"))

    assert trapped(bird, host, {}, f"http://{HOST}:{{port}}/folder/a.mp4") == b"clip"
    assert host.requests[1].startswith("GET /b.mp4?x=%2F HTTP/1.1\r\n")


def test_11_a_name_that_changes_its_address_is_asked_for_once(bird):
    """Even when the host has to be asked again."""
    host = Host(b"", response(b"clip"))
    names = Names({HOST: [[STAND_IN], ["127.0.0.1"]]})

    async def run() -> bytes:
        async with serving(host, address=STAND_IN, port=bird.port):
            settings = local_settings(bird.port, private_networks=(f"{STAND_IN}/32",))
            return await Fetcher(settings, names).fetch(f"http://{HOST}:{bird.port}/")

    assert asyncio.run(run()) == b"clip"
    assert names.asked == [HOST]
    assert len(host.requests) == 2
    assert bird.connections() == 0


def test_11_a_redirect_to_the_same_name_is_checked_anew(bird):
    host = Host(response(status="302 Found", Location="/again"))

    with pytest.raises(RefusedMediaError, match="not on the public internet"):
        trapped(bird, host, {HOST: [[STAND_IN], ["127.0.0.1"]]}, f"http://{HOST}:{{port}}/")

    assert bird.connections() == 0


def test_20_proxies_of_the_environment_are_ignored(bird, monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{bird.port}")
        monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{bird.port}")
    (tmp_path / "netrc").write_text(f"machine {HOST} login me password s3cr3t\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    host = Host(response(b"clip", Set_Cookie="session=1"))

    assert fetched_from(host) == b"clip"
    assert fetched_from(host) == b"clip"

    assert bird.connections() == 0
    assert not any(word in request.lower() for request in host.requests for word in ("cookie", "authorization"))
    assert "accept-encoding: identity" in host.requests[0].lower()


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

    try:
        assert fetched_from(host) == b"clip"
    except UnreachableMediaError as error:  # what follows came in time to be taken for a second answer
        assert "broke off" in str(error)


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


def test_answers_of_a_resolver_that_are_no_addresses_lead_nowhere(bird):
    with pytest.raises(UnreachableMediaError, match="not known"):
        fetch(Fetcher(FetchSettings(), Names(NAMES)), "https://rubbish.example/")


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


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that `media.example` signed for itself, and its key, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def tls_fetch(certificates: tuple[Path, Path], host: Host, name: str = HOST, **changes: object) -> tuple[bytes, list]:
    """What is fetched by https, and the names that the client asked the server for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    asked: list[str | None] = []
    context.sni_callback = lambda _, asked_for, __: asked.append(asked_for)

    async def run() -> bytes:
        async with serving(host, tls=context) as port:
            names = Names({HOST: [["127.0.0.1"]], "other.example": [["127.0.0.1"]]})
            return await local_fetcher(port, names, **changes).fetch(f"https://{name}:{port}/a%20b?c=d", "video_url")

    return asyncio.run(run()), asked


def test_the_checked_address_is_asked_under_the_original_name(certificates):
    host = Host(response(b"clip"))

    data, asked = tls_fetch(certificates, host, ca_file=str(certificates[0]))

    assert data == b"clip"
    assert asked == [HOST]
    assert host.requests[0].startswith("GET /a%20b?c=d HTTP/1.1\r\n")
    assert f"\r\nHost: {HOST}:" in host.requests[0]


def test_a_certificate_is_checked(certificates):
    host = Host(response(b"clip"))

    for name, changes in ((HOST, {}), ("other.example", {"ca_file": str(certificates[0])})):
        with pytest.raises(UnreachableMediaError, match="no TLS connection to its host that can be trusted") as caught:
            tls_fetch(certificates, host, name, **changes)
        assert_tells_nothing(caught.value)
    assert not host.requests


def test_a_redirect_from_https_to_http_is_refused_unless_http_is_switched_on(certificates):
    host = Host(response(status="302 Found", Location=f"http://{HOST}/"))

    with pytest.raises(RefusedMediaError, match="only https URLs"):
        tls_fetch(certificates, host, ca_file=str(certificates[0]), schemes=("https",))
