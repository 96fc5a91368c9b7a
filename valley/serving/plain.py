"""The server in one plain process: API, decoders' parent, tower and engine; without Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

import uvicorn

from valley.assistant.loading import Assistant
from valley.errors import EngineError
from valley.media import sandbox
from valley.serving.api import create_app
from valley.serving.engine.batching import batching_engine
from valley.serving.engine.interface import Engine
from valley.serving.engine.settings import EngineSettings
from valley.serving.service import Service
from valley.serving.settings import ServeSettings
from valley.serving.viewing import LocalDecoder

logger = logging.getLogger(__name__)

_GRACE_S = 10
_LOOK_EVERY_S, _WATCH_EVERY_S = 0.05, 2.0


def serve_plain(
    settings: ServeSettings, new_engine: Callable[[Assistant, EngineSettings], Engine] = batching_engine
) -> None:
    """Serves until it is interrupted; answers that are being written are finished first.

    Args:
        settings: what to serve.
        new_engine: builds what writes the answers.

    Raises:
        ValleyError: model or keys cannot be used.
        EngineError: the engine has ended, or is stuck; whoever started the server can start it again.
    """
    service = Service(settings, LocalDecoder(), new_engine=new_engine)
    try:
        server = uvicorn.Server(server_config(settings, LocalBackend(service)))
        threading.Thread(target=_watch, args=(service, server), daemon=True).start()
        server.run()
        service.engine.check_health()
    finally:
        service.close()


class LocalBackend:
    """A service of this process, as the API speaks to it."""

    def __init__(self, service: Service) -> None:
        self.answer, self.state = service.answer, service.state

    async def isolation(self) -> str:
        """How decoders are kept off the network."""
        return await asyncio.to_thread(sandbox.isolation)


def _watch(service: Service, server: uvicorn.Server) -> None:
    """Says when a server is there; ends it if its engine is gone, without waiting for answers that will not come."""
    while not (server.started or server.should_exit):
        time.sleep(_LOOK_EVERY_S)
    if server.started:
        host, port, *_ = server.servers[0].sockets[0].getsockname()
        logger.info("serving on http://%s:%d", host, port)
    while not server.should_exit:
        try:
            service.engine.check_health()
        except EngineError as error:
            logger.critical("the server ends: %s", error)
            server.should_exit = server.force_exit = True
        time.sleep(_WATCH_EVERY_S)


def server_config(settings: ServeSettings, backend: LocalBackend) -> uvicorn.Config:
    """Returns how uvicorn serves the API."""
    return uvicorn.Config(
        create_app(backend, settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(settings.limits.deadline_s) + _GRACE_S,
    )
