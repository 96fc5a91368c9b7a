"""Clients that leave, do not read or do not send, and models that fail on the way: what was taken is given back."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import pytest
from asking import (
    CHAT,
    FINISH,
    HTTP,
    JSON,
    START,
    FakeBackend,
    assert_is_error,
    assert_tells_nothing,
    chat,
    connect,
    events,
    eventually,
    faked,
    figures,
    is_idle,
    nothing,
    one_word,
    post,
    read_all,
    read_answer,
    read_until,
    request_bytes,
    sent,
    two_words,
    words_of,
)
from serving_makers import serve_settings, serving

from valley.errors import DamagedMediaError, DeadlineError, EngineError, GenerationError, OverloadError
from valley.serving.api import create_app
from valley.serving.contract import Event, Order
from valley.serving.engine.interface import Piece

LONG = {"max_tokens": 1500}


# Clients that leave a real model


def runs(server: str, running: int, waiting: int = 0) -> Callable[[], bool]:
    return lambda: [figures(server)[f"num_requests_{name}"] for name in ("running", "waiting")] == [running, waiting]


def test_whoever_leaves_gives_the_slot_back() -> None:
    with serving("engine.slots=1", "engine.chunk_tokens=1") as server:
        writing = sent(server, chat(**LONG, stream=True))
        read_until(writing, b'"content":"')
        queued = sent(server, chat(**LONG, stream=True))
        eventually(runs(server, 1, 1))
        queued.close()  # while it waits
        eventually(runs(server, 1, 0))
        writing.close()  # while it is written
        eventually(lambda: is_idle(server, status_499=2))
        reading = sent(server, chat("who? " * 300, stream=True))
        eventually(runs(server, 1))
        reading.close()  # before the first token
        eventually(lambda: is_idle(server, status_499=3))
        whole = sent(server, chat(**LONG))
        eventually(runs(server, 1))
        whole.close()  # where nothing is streamed
        eventually(lambda: is_idle(server, status_499=4))
        assert post(server, chat()).status_code == 200
        assert is_idle(server, status_499=4, status_200=1)


def test_batch_mates_of_those_who_come_and_leave_write_what_they_write_alone() -> None:
    with serving("engine.slots=3", "engine.prefix_bytes=0") as server:
        alone = post(server, chat("what is it?", max_tokens=120)).json()
        with HTTP.stream("POST", server + CHAT, json=chat("what is it?", max_tokens=120, stream=True)) as mate:
            lines = mate.iter_lines()
            text = next(lines)
            for number in range(3):
                with sent(server, chat(f"number {number}?", **LONG, stream=True, temperature=1)) as other:
                    read_until(other, b'"content":"')
                text += "\n" + next(lines)
            text += "\n" + "\n".join(lines)
        chunks = events(text)
        together = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        assert together == alone["choices"][0]["message"]["content"]
        eventually(lambda: is_idle(server, status_499=3, status_200=2))


# Clients that leave, of which the server knows in other ways


def as_asgi(body: Any, server: tuple[str, int] = ("127.0.0.1", 8000)) -> tuple[dict[str, Any], Callable[[], Any]]:
    """A request as a server hands it to the app, from a client that stays."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "root_path": "",
             "http_version": "1.1", "headers": headers, "server": server}  # fmt: skip
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()

    return scope, receive


@pytest.mark.parametrize(("server", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 400)])
def test_without_keys_only_this_machine_is_answered_whoever_listens(server: str, status: int) -> None:
    sent_messages: list[Any] = []

    async def send(message: Any) -> None:
        sent_messages.append(message)

    app = create_app(FakeBackend(two_words), serve_settings())
    asyncio.run(app(*as_asgi(chat(), (server, 8000)), send))
    assert sent_messages[0]["status"] == status
    assert (b"no_keys" in sent_messages[1]["body"]) == (status == 400)


def test_nothing_holds_a_body_while_it_is_answered() -> None:
    held: list[int] = []

    async def weigh(order: Order) -> AsyncGenerator[Event]:
        held.append(tracemalloc.get_traced_memory()[0])
        for event in (START, FINISH):
            yield event

    def parts() -> Iterator[bytes]:
        yield from [b" " * 65536] * 300
        yield json.dumps(chat()).encode()

    with faked(weigh) as (server, _):
        post(server, chat())
        tracemalloc.start()
        try:
            assert HTTP.post(server + CHAT, content=parts(), headers=JSON).status_code == 200
        finally:
            tracemalloc.stop()
    assert held[-1] < 5_000_000


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [nothing, one_word])
def test_an_answer_ends_with_its_client(script: Any, stream: bool) -> None:
    with faked(script) as (server, backend):
        client = sent(server, chat(stream=stream))
        eventually(lambda: backend.num_begun == 1)
        if stream and script is one_word:
            read_until(client, b'"content":"one"')
        assert figures(server)["requests_in_hand"] == 1
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: is_idle(server, status_499=1))
        assert backend.num_left == 1
        client.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [nothing, one_word])
def test_an_answer_ends_with_the_task_that_handles_it(script: Any, stream: bool) -> None:
    """Ray Serve cancels the task when the client leaves."""

    async def run() -> tuple[int, str]:
        backend = FakeBackend(script)
        app = create_app(backend, serve_settings())

        async def send(_: Any) -> None:
            return None

        task = asyncio.create_task(app(*as_asgi(chat(stream=stream)), send))
        while not backend.num_begun:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return backend.num_left, (await client.get("/metrics")).text

    num_left, text = asyncio.run(run())
    assert num_left == 1
    assert 'valley_requests_in_hand{model_name="valley"} 0.0' in text
    assert 'valley_requests_total{model_name="valley",status="499"} 1.0' in text


# Models that fail


SECRET = RuntimeError("a secret of /tmp/secret.mp4 at 0xdeadbeef on 10.0.0.7")
FAILURES: list[tuple[Exception, int, str]] = [
    (SECRET, 500, "internal_error"),
    (OSError(28, "No space left on device", "/tmp/x"), 500, "internal_error"),
    (GenerationError("the model failed: /tmp/x"), 500, "model_error"),
    (EngineError("the replica at 10.0.0.7 is gone"), 503, "not_ready"),
    (OverloadError("33 wait"), 429, "overloaded"),
    (DeadlineError("no answer"), 504, "timeout"),
    (DamagedMediaError("messages[0].content[0]", "it cannot be decoded"), 422, "media_damaged"),
]


def failing(error: Exception, *, after: bool = False) -> Callable[[Order], AsyncGenerator[Event]]:
    async def script(order: Order) -> AsyncGenerator[Event]:
        if words_of(order) == "well?":
            async for event in two_words(order):
                yield event
            return
        if after:
            yield START
            yield Piece("one", 1)
        raise error

    return script


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=[type(error).__name__ for error, _, _ in FAILURES])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_is_an_answer(error: Exception, status: int, code: str, stream: bool) -> None:
    with faked(failing(error)) as (server, _):
        answer = post(server, chat(stream=stream))
        said = assert_is_error(answer, status, code)
        assert "secret" not in said
        if status in (429, 503):
            assert int(answer.headers["retry-after"]) >= 1
        assert post(server, chat("well?")).status_code == 200
        assert is_idle(server, **{f"status_{status}": 1, "status_200": 1})


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=[type(error).__name__ for error, _, _ in FAILURES])
def test_an_error_after_the_first_token_is_an_event_and_no_done_follows(
    error: Exception, status: int, code: str
) -> None:
    with faked(failing(error, after=True)) as (server, _):
        answer = post(server, chat(stream=True))  # it ends: httpx would raise were it cut off
        assert answer.status_code == 200
        *chunks, last = events(answer.text)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one"
        assert last["error"]["code"] == code
        assert last["error"].keys() == {"message", "type", "param", "code"}
        assert_tells_nothing(answer.text)
        assert "secret" not in answer.text
        assert is_idle(server, **{f"status_{status}": 1})
        assert_is_error(post(server, chat()), status, code)  # and where nothing is streamed, an answer


def test_one_bad_request_harms_no_other() -> None:
    async def run(server: str) -> list[tuple[int, str]]:
        async with httpx.AsyncClient(base_url=server, timeout=60) as client:
            answers = await asyncio.gather(*(client.post(CHAT, json=chat(text)) for text in ("well?", "bad") * 10))
        return [(answer.status_code, answer.text) for answer in answers]

    with faked(failing(SECRET)) as (server, _):
        answers = asyncio.run(run(server))
        assert [status for status, _ in answers] == [200, 500] * 10
        assert all("two words" in text for status, text in answers if status == 200)
        assert is_idle(server, status_200=10, status_500=10)


async def interrupted(order: Order) -> AsyncGenerator[Event]:
    yield START
    raise asyncio.CancelledError


def test_work_that_somebody_else_ended_is_no_empty_answer() -> None:
    with faked(interrupted) as (server, _):
        assert_is_error(post(server, chat()), 503, "not_ready")


# Deadlines


@pytest.mark.parametrize("headers", [{}, {"x-request-timeout-seconds": "0"}])
def test_a_deadline_before_the_first_token_is_504(headers: dict[str, str]) -> None:
    with faked(nothing, "limits.deadline_s=0.2") as (server, backend):
        for stream in (True, False):
            assert_is_error(post(server, chat(stream=stream), **headers), 504, "timeout")
        eventually(lambda: backend.num_left == 2)
        assert is_idle(server, status_504=2)


def test_a_deadline_within_a_stream_is_an_event() -> None:
    with faked(one_word, "limits.deadline_s=1") as (server, backend):
        *chunks, last = events(post(server, chat(stream=True)).text)
        assert chunks[-1]["choices"][0]["delta"] == {"content": "one"}
        assert last["error"]["code"] == "timeout"
        assert_is_error(post(server, chat()), 504, "timeout")
        eventually(lambda: backend.num_left == 2)
        assert is_idle(server, status_504=2)


async def chatter(order: Order) -> AsyncGenerator[Event]:
    yield START
    while True:
        yield Piece("x", 1)


def test_a_deadline_that_passes_while_the_client_is_told_of_something_is_an_event() -> None:
    sent_parts: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent_parts.append(message["body"])
            await asyncio.sleep(0.02)

    app = create_app(FakeBackend(chatter), serve_settings("limits.deadline_s=1"))
    asyncio.run(asyncio.wait_for(app(*as_asgi(chat(stream=True)), send), 30))
    *_, last = events(b"".join(sent_parts).decode())
    assert last["error"]["code"] == "timeout"


def test_a_real_model_that_is_too_slow_is_504() -> None:
    with serving("limits.deadline_s=1", "engine.slots=1") as server:
        assert_is_error(post(server, chat(**LONG)), 504, "timeout")
        eventually(lambda: is_idle(server, status_504=1))
        *_, last = events(post(server, chat(**LONG, stream=True)).text)
        assert last["error"]["code"] == "timeout"
        eventually(lambda: is_idle(server, status_504=2))
        assert post(server, chat()).status_code == 200


# Too many, too slow, too much


def test_many_at_once_are_answered_or_told_to_come_again() -> None:
    async def run(server: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server, timeout=60, limits=limits) as client:
            return await asyncio.gather(
                *(client.post(CHAT, json=chat(f"number {number}?", stream=number % 2 == 0)) for number in range(200))
            )

    with serving("limits.max_requests=12", "engine.slots=4", "engine.max_waiting=2") as server:
        answers = asyncio.run(run(server))
        counts = {status: sum(answer.status_code == status for answer in answers) for status in (200, 429)}
        assert sum(counts.values()) == 200, {answer.status_code for answer in answers}
        assert counts[200] >= 4
        assert counts[429] > 0
        for answer in answers:
            if answer.status_code == 429:
                assert_is_error(answer, 429, "overloaded")
                assert int(answer.headers["retry-after"]) >= 1
        eventually(lambda: is_idle(server, status_200=counts[200], status_429=counts[429]))
        assert post(server, chat()).status_code == 200


def test_no_more_requests_are_in_hand_than_allowed() -> None:
    with faked(two_words, "limits.max_requests=1") as (server, _):
        body = json.dumps(chat()).encode()
        first = connect(server)
        first.sendall(request_bytes(body[:-1], "Expect: 100-continue", length=len(body)))
        assert first.recv(100).startswith(b"HTTP/1.1 100 ")  # it is in hand now
        answer = post(server, chat())
        assert_is_error(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert HTTP.get(f"{server}/health").status_code == 200
        first.sendall(body[-1:])
        assert read_answer(first).status_code == 200
        first.close()
        assert post(server, chat()).status_code == 200
        second = connect(server)
        second.sendall(request_bytes(body[:-1], "Expect: 100-continue", length=len(body)))
        assert second.recv(100).startswith(b"HTTP/1.1 100 ")
        second.close()  # in the middle of its body
        eventually(lambda: post(server, chat()).status_code == 200)


def test_a_body_that_does_not_come_is_408() -> None:
    with faked(two_words, "limits.body_timeout_s=0.2") as (server, backend):
        with connect(server) as client:
            client.sendall(request_bytes(b'{"model"', length=100))
            answer = read_answer(client)
            assert_is_error(answer, 408, "request_timeout")
            assert answer.headers["connection"] == "close"
            assert client.recv(1) == b""
        assert backend.num_begun == 0
        assert post(server, chat()).status_code == 200
        assert figures(server)["requests_total 408"] == 1


@pytest.mark.parametrize("length", [1001, 10 * 2**30, 10**17, 10**30])
def test_a_body_that_says_it_is_too_large_is_413_before_it_comes(length: int) -> None:
    with faked(two_words, "limits.max_body_bytes=1000") as (server, _):
        with connect(server) as client:
            client.sendall(request_bytes(b"", "Expect: 100-continue", length=length))
            answer = client.recv(20)
            if length == 10**30:  # no length that the HTTP parser knows
                assert answer.startswith(b"HTTP/1.1 400 ")
            else:
                assert answer.startswith(b"HTTP/1.1 413 ")
                assert b"request_too_large" in read_all(client)
        assert post(server, chat()).status_code == 200


def test_a_body_in_chunks_is_413_as_soon_as_it_is_too_large() -> None:
    with faked(two_words, "limits.max_body_bytes=1000") as (server, backend):
        with connect(server) as client:
            client.sendall(request_bytes(b"258\r\n%s\r\n" % (b" " * 600), "Transfer-Encoding: chunked"))
            client.sendall(b"258\r\n%s\r\n" % (b" " * 600))  # and no end
            answer = read_answer(client)
            assert_is_error(answer, 413, "request_too_large")
            assert "1000" in answer.text
            assert client.recv(1) == b""
        assert backend.num_begun == 0
        assert post(server, chat()).status_code == 200


async def flood(order: Order) -> AsyncGenerator[Event]:
    yield START
    if words_of(order) == "all of it?":
        yield Piece("x" * 3_000_000, 1)
        yield FINISH
        return
    while True:
        yield Piece("x" * 65536, 1)


def test_a_client_that_does_not_read_is_dropped() -> None:
    with faked(flood, "limits.write_timeout_s=0.2") as (server, backend):
        client = sent(server, chat("much?", stream=True))
        eventually(lambda: is_idle(server, status_499=1))
        assert backend.num_left == 1
        rest = read_all(client)  # what was on its way already
        assert rest.startswith(b"HTTP/1.1 200 OK")
        assert b"[DONE]" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        client.close()
        answer = post(server, chat("all of it?"))
        assert len(answer.json()["choices"][0]["message"]["content"]) == 3_000_000


def test_others_are_answered_while_a_large_body_is_read() -> None:
    with faked(two_words) as (server, _):
        body = json.dumps(chat("x" * 60_000, stop=["y"] * 3)).encode() + b" " * 8_000_000
        waiting = connect(server)
        waiting.sendall(request_bytes(body[:-1], length=len(body)))
        assert post(server, chat()).status_code == 200
        waiting.sendall(body[-1:])
        assert read_answer(waiting).status_code == 200
        waiting.close()
        assert is_idle(server, status_200=2)


def test_a_connection_serves_one_request_after_the_other_whatever_their_ends() -> None:
    with faked(failing(SECRET)) as (server, _), httpx.Client(base_url=server, headers=JSON) as client:
        for body, status in (
            (chat("well?"), 200),
            (chat(), 500),
            (chat(model="x"), 404),
            ({}, 400),
            (chat("well?"), 200),
        ):
            assert client.post(CHAT, content=json.dumps(body)).status_code == status
