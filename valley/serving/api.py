"""The HTTP API: OpenAI's chat completions, models, health, metrics, and the chat page. No Ray, no model in here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from valley.errors import DeadlineError, EngineError, OverloadError, RequestError, ValleyError
from valley.media.fetch import Fetcher
from valley.serving.completion import Completion, error_event
from valley.serving.contract import Backend, Event, Order, Start
from valley.serving.engine.interface import Decoding, Finish, Piece
from valley.serving.guard import Guard, SlowClientError
from valley.serving.keys import Keys
from valley.serving.metrics import Metrics
from valley.serving.ordering import make_order
from valley.serving.page import add_page
from valley.serving.problems import CLIENT_LEFT, Problem, problem_of
from valley.serving.schema import ChatRequest, parse_request
from valley.serving.settings import ServeSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _ClientLeftError(Exception):
    """There is nobody to answer any more."""


_LARGE_BODY = 1 << 18
"""Bytes from which on a body is parsed on a thread of its own: others wait for Python's JSON parser, and no longer."""
_READY_FOR_S, _NOT_READY_FOR_S = 5.0, 1.0
"""How long it is not asked again."""
_READY_WITHIN_S, _STATE_WITHIN_S = 30.0, 5.0
_SCHEMAS = "#/components/schemas/"


def create_app(
    backend: Backend, settings: ServeSettings, *, fetcher: Fetcher | None = None, tell_id: bool = True
) -> ASGIApp:
    """Returns the API in front of a model.

    Args:
        backend: answers.
        settings: what is served, and to whom.
        fetcher: of the media that URLs name; None: one of `settings.media.fetch`.
        tell_id: see `Guard`.

    Raises:
        SettingsError: keys or clips cannot be read.
    """
    api = _Api(backend, settings, fetcher or Fetcher(settings.media.fetch))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await api.fetcher.close()

    # Its documentation pages load scripts from elsewhere; /openapi.json is enough for tools.
    app = FastAPI(title="Valley", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_exception_handler(ValleyError, _tell_error)
    app.add_exception_handler(Exception, _tell_error)
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/ready", api.ready, methods=["GET"])
    app.add_api_route("/metrics", api.metrics_text, methods=["GET"])
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", api.model, methods=["GET"])
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}ChatRequest"}}}}
    app.add_api_route(
        "/v1/chat/completions", api.chat, methods=["POST"], response_model=None, openapi_extra={"requestBody": body}
    )
    if settings.page:
        add_page(app, settings)
    _define_request(app)
    keys = None if settings.keys is None else Keys(Path(settings.keys))
    return Guard(app, settings.limits, keys, settings.hosts, api.metrics.refused, tell_id=tell_id)


def _define_request(app: FastAPI) -> None:
    """Adds what a request is made of to /openapi.json, which FastAPI writes of routes and does not know that."""
    schema = ChatRequest.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    parts = schema.pop("$defs")
    schemas = app.openapi().setdefault("components", {}).setdefault("schemas", {})  # what it returns is kept and served
    schemas.update(parts, ChatRequest=schema)


class _Api:
    def __init__(self, backend: Backend, settings: ServeSettings, fetcher: Fetcher) -> None:
        self._backend, self._settings, self.fetcher = backend, settings, fetcher
        self.metrics = Metrics(settings.name)
        self._created = int(time.time())
        self._isolation: str | None = None
        self._ask_again_at = float("-inf")
        self._asking = asyncio.Lock()

    async def health(self) -> dict[str, str]:
        """The server is there."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """The model answers: one token is generated, at most once in a few seconds however many ask."""
        async with self._asking:
            if time.monotonic() > self._ask_again_at:
                self._isolation = await self._try()
                self._ask_again_at = time.monotonic() + (_READY_FOR_S if self._isolation else _NOT_READY_FOR_S)
        if self._isolation is None:
            problem = problem_of(EngineError("not ready"))
            body = {"status": "not ready", "model": self._settings.name, **problem.body()}
            return JSONResponse(body, problem.status, problem.headers())
        return JSONResponse({"status": "ready", "model": self._settings.name, "decoder_isolation": self._isolation})

    async def _try(self) -> str | None:
        """Has one token generated; returns how decoders are kept off the network, None if the model does not answer.

        A model that has more to do than it can is ready, too, as long as it moves.
        """
        messages = [{"role": "user", "content": "Hi"}]
        order = Order(f"ready-{uuid.uuid4().hex}", messages, [], Decoding(1), _READY_WITHIN_S)
        busy = self._isolation or "unknown"
        try:
            async with asyncio.timeout(_STATE_WITHIN_S):
                before = await self._backend.state()
            try:
                async with asyncio.timeout(_READY_WITHIN_S):
                    async for _ in self._backend.answer(order):
                        pass
                    return await self._backend.isolation()
            except OverloadError:
                return busy
            except (TimeoutError, DeadlineError):
                async with asyncio.timeout(_STATE_WITHIN_S):
                    moved = (await self._backend.state()).steps != before.steps
                return busy if moved else None
        except Exception as error:  # noqa: BLE001 - whatever it is, the server is not ready
            logger.warning("not ready: %s", type(error).__name__)
            return None

    async def metrics_text(self) -> Response:
        """Figures for Prometheus."""
        state = None
        with contextlib.suppress(Exception):  # the figures of this process are there without the engine's
            async with asyncio.timeout(_STATE_WITHIN_S):
                state = await self._backend.state()
        text, kind = self.metrics.text(state)
        return Response(text, media_type=kind)

    async def models(self) -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """What is served under a name."""
        if name != self._settings.name:
            raise RequestError("model", "there is no such model here", code="model_not_found", status=404)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {"id": self._settings.name, "object": "model", "created": self._created, "owned_by": "valley"}

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, whole or as it is written."""
        # The guard has read it all; from now on there is nothing to receive but the client's leaving.
        body = [part async for part in request.stream()]
        call = _Call(request.scope, self._backend, self.metrics, self._settings.limits.deadline_s)
        try:
            completion, first = await _unless_left(request, call.begin(body, self._settings, self.fetcher))
            if completion.is_stream:
                return _EventStream(call, completion, first)
            await _unless_left(request, call.complete(completion, first))
        except _ClientLeftError:
            await call.stop()
            call.end(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except asyncio.CancelledError:  # how some servers say that the client left
            call.end(CLIENT_LEFT)
            raise
        except Exception as error:  # noqa: BLE001 - the rim: logged with the request's id, told in our own words
            await call.stop()
            return _error_response(call.failed(error))
        call.end(200)
        return JSONResponse(completion.whole())


class _Call:
    """One request for a completion, from its arrival to its end."""

    def __init__(self, scope: Scope, backend: Backend, metrics: Metrics, deadline_s: float) -> None:
        self._scope, self._backend, self._metrics = scope, backend, metrics
        self._began = time.monotonic()
        self._deadline_s = deadline_s
        self._first_token_s: float | None = None
        self._is_ended = False
        self._events: AsyncGenerator[Event] | None = None
        metrics.began()

    @property
    def id(self) -> str:
        return str(self._scope["valley.id"])

    def within_deadline(self) -> asyncio.Timeout:
        """A context that ends with a TimeoutError when the time for the whole request is over."""
        return asyncio.timeout(self._began + self._deadline_s - time.monotonic())

    async def begin(
        self, body: list[bytes], settings: ServeSettings, fetcher: Fetcher
    ) -> tuple[Completion, list[Event]]:
        """Understands the request, and lets go of its body; returns the first events, the first text among them."""
        async with self.within_deadline():
            request = await _parse(body)
            completion = Completion(self.id, request)
            self._events = self._backend.answer(await self._order(request, settings, fetcher))
            del request
            first: list[Event] = []
            async for event in self._events:
                first.append(event)
                self._note(event)
                if not isinstance(event, Start):
                    break
        return completion, first

    async def _order(self, request: ChatRequest, settings: ServeSettings, fetcher: Fetcher) -> Order:
        parsed_at = time.monotonic()
        order = await _only_error(make_order(self.id, request, settings, fetcher))
        if order.media:
            self._metrics.fetched(time.monotonic() - parsed_at)
        return order

    async def complete(self, completion: Completion, first: list[Event]) -> None:
        """Waits for the end of the answer."""
        async with self.within_deadline():
            for event in first:
                completion.take(event)
            async for event in self.rest():
                completion.take(event)

    async def rest(self) -> AsyncIterator[Event]:
        """Yields what is left of the answer."""
        assert self._events is not None
        async for event in self._events:
            self._note(event)
            yield event

    def _note(self, event: Event) -> None:
        now_s = time.monotonic() - self._began
        match event:
            case Start():
                self._metrics.started(event)
            case Piece():
                if self._first_token_s is None:
                    self._first_token_s = now_s
                    self._metrics.first_token(now_s)
            case Finish():
                self._metrics.finished(event, self._first_token_s or now_s, now_s)

    async def stop(self) -> None:
        """Ends the work on it, if there is any left."""
        if self._events is not None:
            await self._events.aclose()

    def failed(self, error: BaseException) -> Problem:
        """Notes an error; returns what is told of it."""
        problem = problem_of(error)
        if problem.code == "internal_error":
            logger.error("%s failed", self.id, exc_info=error)
        self.end(problem.status)
        return problem

    def end(self, status: int) -> None:
        """Notes the end, once."""
        if not self._is_ended:
            self._is_ended = True
            self._metrics.ended(status)
            client = self._scope.get("valley.client") or "-"
            logger.info("%s client=%s status=%d seconds=%.3f", self.id, client, status, time.monotonic() - self._began)


class _EventStream(Response):
    """The rest of an answer as server-sent events; ends with the client or with the answer."""

    def __init__(self, call: _Call, completion: Completion, first: list[Event]) -> None:
        self._call, self._completion, self._first = call, completion, first
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._call.stop()
            self._call.end(200 if self._completion.finish else CLIENT_LEFT)

    async def _write(self, send: Send) -> None:
        async def put(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            # The deadline is here, not where events come from: it may pass while the client is told of one.
            async with self._call.within_deadline():
                for event in self._first:
                    for data in self._completion.events(event):
                        await put(data)
                async for event in self._call.rest():
                    for data in self._completion.events(event):
                        await put(data)
        except SlowClientError:
            raise
        except Exception as error:  # noqa: BLE001 - the rim: the client is told in the stream, without [DONE]
            await put(error_event(self._call.failed(error)), more=False)
            return
        self._call.end(200)
        await put(b"", more=False)


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """Waits for something while the client does.

    Raises:
        _ClientLeftError: it left; the work was cancelled.
        EngineError: the work was cancelled by somebody else.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        has_left = leaving.done()
        leaving.cancel()
        task.cancel()  # nothing happens to one that is done
        await asyncio.gather(task, leaving, return_exceptions=True)
    if task.cancelled():
        raise _ClientLeftError if has_left else EngineError("cancelled")
    return task.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _parse(body: list[bytes]) -> ChatRequest:
    """Empties the body, and returns what it asks for."""
    whole = b"".join(body)
    body.clear()
    if len(whole) > _LARGE_BODY:
        return await asyncio.to_thread(parse_request, whole)
    return parse_request(whole)


async def _only_error(work: Awaitable[T]) -> T:
    """Raises the first error of a group by itself."""
    try:
        return await work
    except ExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _error_response(problem: Problem) -> Response:
    return JSONResponse(problem.body(), problem.status, problem.headers())


async def _tell_error(_: Request, error: Exception) -> Response:
    """Tells what went wrong; what nobody foresaw is raised again behind it, and logged by whoever runs the app."""
    return _error_response(problem_of(error))


async def _tell_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    names = {404: "not_found", 405: "method_not_allowed"}
    said = {404: "there is no such page", 405: "this method is not known here"}.get(error.status_code, "refused")
    problem = Problem(error.status_code, "invalid_request_error", names.get(error.status_code, "refused"), said)
    return JSONResponse(problem.body(), error.status_code, dict(error.headers or {}))
