"""What is no right HTTP, and what of HTTP few use."""

from __future__ import annotations

import json
import socket

import pytest
from asking import assert_is_well, assert_tells_nothing, chat, connect, read_all, request_bytes

PROTOCOL = {
    # name: what is sent, and how the answer may begin
    "91 two lengths": (request_bytes(b"{}", "Content-Length: 50"), (b"400",)),
    "91 a length and chunks": (request_bytes(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5"), (b"400",)),
    "91 a length below zero": (request_bytes(b"{}", length=-1), (b"400",)),
    "91 a length that is no number": (request_bytes(b"{}", "Content-Length: 0x10"), (b"400",)),
    "91 a chunk of no size": (request_bytes(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (b"400",)),
    "91 chunks of another coding": (request_bytes(b"{}", "Transfer-Encoding: gzip"), (b"400", b"415", b"501")),
    "91 NUL in a header": (request_bytes(b"{}", "X: a\0b"), (b"400",)),
    "91 a header without a name": (request_bytes(b"{}", ": x"), (b"400",)),
    "91 a header that goes on": (request_bytes(b"{}", "X: a\r\n b"), (b"400",)),
    "91 no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), (b"400",)),
    "91 an older HTTP": (b"GET /health HTTP/1.0\r\n\r\n", (b"400",)),  # by no name at all
    "91 HTTP/2 from the start": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (b"400",)),
    "91 two hosts, the second not ours": (
        b"GET /ready HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        (b"400",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOL)
def test_what_is_no_right_http_is_refused(server: str, name: str) -> None:
    data, statuses = PROTOCOL[name]
    with connect(server) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert answer.startswith(tuple(b"HTTP/1.1 " + status for status in statuses)), answer[:200]
    assert_tells_nothing(answer.decode())
    assert_is_well(server)


def test_91_a_body_may_come_in_chunks_and_be_asked_for(server: str) -> None:
    body = json.dumps(chat(max_tokens=1)).encode()
    with connect(server) as client:
        client.sendall(request_bytes(b"", "Expect: 100-continue", "Connection: close", length=len(body)))
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert b"HTTP/1.1 200 OK" in read_all(client)
    with connect(server) as client:
        chunks = b"".join(b"%x\r\n%s\r\n" % (1, bytes([byte])) for byte in body) + b"0\r\n\r\n"
        client.sendall(request_bytes(chunks, "Transfer-Encoding: chunked", "Connection: close"))
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")


def test_91_ten_thousand_headers_are_too_many(server: str) -> None:
    with connect(server) as client:
        client.sendall(request_bytes(b"{}", *(f"x-{number}: y" for number in range(10_000)), "Connection: close"))
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"headers_too_large" in answer
    assert_is_well(server)
