"""What the tests of the API share: requests of every kind, figures, answers that tell nothing, and a backend that obeys."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving_makers import running, serve_settings

from valley.serving.contract import Event, Order, Start
from valley.serving.engine.interface import EngineState, Finish, Piece

HTTP = httpx.Client(timeout=60, verify=False, trust_env=False)
"""One client for all: a new one reads every certificate of the machine."""
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
START = Start(prompt_tokens=7, visual_tokens=0, media=(), decode_s=0.0, encode_s=0.0, num_kept=0)
FINISH = Finish(reason="stop", num_tokens=2, num_cached=0, queue_s=0.0, batch_size=1.0)


def chat(text: str = "what is it?", **fields: Any) -> dict[str, Any]:
    """A request of a few tokens."""
    return {"model": "valley", "messages": [{"role": "user", "content": text}], "max_tokens": 4} | fields


def post(server: str, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    return HTTP.post(server + path, content=json.dumps(body).encode(), headers=JSON | headers)


def figures(server: str, **headers: str) -> dict[str, float]:
    """The server's figures by name; a status stands behind the name: `requests_total 200`."""
    response = HTTP.get(f"{server}/metrics", headers=headers)
    assert response.status_code == 200
    return {
        " ".join([sample.name.removeprefix("valley_"), *filter(None, [sample.labels.get("status")])]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def eventually(is_so: Callable[[], bool]) -> None:
    """Waits for something that has to come."""
    give_up_at = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < give_up_at, "it never came"
        time.sleep(0.01)


def is_idle(server: str, **counts: float) -> bool:
    """Nothing is in hand, running or waiting; `status_499=1`: so often it was answered with that."""
    now = figures(server)
    gauges = ("requests_in_hand", "num_requests_running", "num_requests_waiting")
    wanted = {f"requests_total {name.removeprefix('status_')}": value for name, value in counts.items()}
    return not any(now[name] for name in gauges) and all(now.get(name, 0) == value for name, value in wanted.items())


def assert_tells_nothing(text: str) -> None:
    """No path, address, trace or other library's words are in an answer."""
    for word in (
        "Traceback",
        "Error:",
        "Exception",
        "127.0.0.1",
        "/tmp",
        "/work",
        "/home",
        "site-packages",
        ".py",
        "pydantic",
    ):
        assert word not in text
    assert not re.search(r"\b0x[0-9a-f]+", text)


def assert_is_error(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    """An error in OpenAI's form that tells nothing; returns what is said to people."""
    assert response.status_code == status, response.text[:300]
    assert_tells_nothing(response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    assert "/" not in error["message"].replace("application/json", "")
    assert len(error["message"]) < 300
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    message: str = error["message"]
    return message


def assert_is_well(server: str) -> None:
    answer = post(server, chat(max_tokens=1))
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 1


def connect(server: str) -> socket.socket:
    host, port = server.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request_bytes(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST, byte for byte; `length`: what it claims to have."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def sent(server: str, body: Any) -> socket.socket:
    """A connection that a request was sent on, and nothing read."""
    client = connect(server)
    client.sendall(request_bytes(json.dumps(body).encode()))
    return client


def read_until(client: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        more = client.recv(65536)
        assert more, data[-300:]
        data += more
    return data


def read_all(client: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(65536):
            data += more
    return data


def read_answer(client: socket.socket) -> httpx.Response:
    """One whole answer of a known length."""
    head, _, body = read_until(client, b"\r\n\r\n").partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(headers["content-length"]):
        more = client.recv(65536)
        assert more
        body += more
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)


def events(text: str) -> list[Any]:
    """The server-sent events of a stream."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, kind)
    return file.getvalue()


class FakeBackend:
    """Answers each order as it is told, and knows which answers were ended by whoever asked.

    Attributes:
        num_begun: answers asked for.
        num_left: answers that nobody waited for to the end.
    """

    def __init__(self, script: Callable[[Order], AsyncGenerator[Event]]) -> None:
        self._script = script
        self.num_begun = self.num_left = 0

    async def answer(self, order: Order) -> AsyncGenerator[Event]:
        self.num_begun += 1
        try:
            async for event in self._script(order):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_left += 1
            raise

    async def state(self) -> EngineState:
        return EngineState(running=0, waiting=0, slots=1, steps=0, tokens=0)

    async def isolation(self) -> str:
        return "namespace"


async def two_words(order: Order) -> AsyncGenerator[Event]:
    for event in (START, Piece("two ", 1), Piece("words", 2), FINISH):
        yield event


async def nothing(order: Order) -> AsyncGenerator[Event]:
    yield START
    await asyncio.Event().wait()


async def one_word(order: Order) -> AsyncGenerator[Event]:
    yield START
    yield Piece("one", 1)
    await asyncio.Event().wait()


def words_of(order: Order) -> str:
    return str(order.messages[-1]["content"])


@contextlib.contextmanager
def faked(script: Callable[[Order], AsyncGenerator[Event]], *overrides: str) -> Iterator[tuple[str, FakeBackend]]:
    """A server whose answers follow a script."""
    backend = FakeBackend(script)
    with running(serve_settings(*overrides), backend) as address:
        yield address, backend
