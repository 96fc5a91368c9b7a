"""The fetcher reaches what strangers may have fetched, and nothing else, whatever URL, name or host they bring."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest
from abuse import (
    HOST,
    PUBLIC,
    SECRET,
    Canary,
    Host,
    Names,
    assert_tells_nothing,
    fetch,
    fetched_from,
    local_settings,
    replying,
    response,
    serving,
)

from valley.config import SettingsError, validate
from valley.errors import RefusedMediaError
from valley.media.addresses import is_public, parse_address
from valley.media.fetch import Fetcher, FetchSettings
from valley.media.urls import parse_url

STAND_IN = "127.0.0.2"
"""An address of this machine that tests allow in place of a public one, while 127.0.0.1 stays forbidden."""


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
}

SSRF = {
    "1 our own dashboard on 127.0.0.1": "http://127.0.0.1:{port}/api/jobs/",
    "2 metadata service of a cloud": "http://169.254.169.254/latest/meta-data/",
    "2 metadata service of Oracle's older cloud": "http://192.0.0.192/latest/meta-data/",
    "2 services of Azure for its machines": "http://168.63.129.16/machine?comp=goalstate",
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
    "168.63.129.15": True,
    "168.63.129.16": False,
    "64:ff9b::a83f:8110": False,
    "192.0.0.1": False,
    "192.0.0.192": False,
    "::ffff:192.0.0.192": False,
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
