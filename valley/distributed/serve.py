"""A model behind Ray Serve: HTTP, decoding and the model itself in processes that scale apart from each other.

    client -> Ray's proxy -> Ingress (HTTP, fetching) -> Model (tower, engine; a GPU each) -> Decoder (CPUs)

Tower and language model share a replica, for visual tokens are best left on the device they were made on. Orders and
answers are the plain dataclasses of `valley.serving.contract`; nothing in there knows of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from valley.config import assign, read_config, validate
from valley.distributed.cluster import connect
from valley.errors import EngineError, OverloadError, SettingsError, ValleyError
from valley.media import sandbox
from valley.serving.api import create_app
from valley.serving.contract import Event, Order
from valley.serving.engine.interface import EngineState
from valley.serving.service import Service
from valley.serving.settings import ServeSettings
from valley.serving.viewing import Clip, LocalDecoder, Look
from valley.training.settings import ClusterSettings

logger = logging.getLogger(__name__)

_APPLICATION = "valley"
_GRACE_S = 10.0
_HEALTH_PERIOD_S = 5.0
_DECODES_AT_ONCE = 2
_MANY = 4096
_DRAIN_POLL_S = 0.2


class Decoder:
    """Decodes media of strangers, each in a child process without network that may be killed."""

    def __init__(self) -> None:
        self._decode = LocalDecoder(_DECODES_AT_ONCE)

    async def decode(self, look: Look) -> Clip | ValleyError:
        """Returns the frames of a medium, or why there are none: raised, Ray would log it as a failure."""
        try:
            return await self._decode(look)
        except ValleyError as error:
            return error

    async def isolation(self) -> str:
        """Returns how the child processes are kept off the network."""
        return await asyncio.to_thread(sandbox.isolation)


class Model:
    """One copy of the model.

    Args:
        settings: what is served, as JSON.
        decoder: decodes for it.
    """

    def __init__(self, settings: str, decoder: DeploymentHandle[Any]) -> None:
        self._decoder = decoder
        served = ServeSettings.model_validate_json(settings)
        engine, share = served.engine, max(1, int(served.ray.cpus_per_replica))
        threads = {"threads": engine.threads or share, "tower_threads": engine.tower_threads or share}
        served = served.model_copy(update={"engine": engine.model_copy(update=threads)})
        self._service = Service(served, self._decode)

    async def answer(self, order: Order) -> AsyncIterator[Event | ValleyError]:
        """Answers a request; what is wrong with it is the last event."""
        try:
            async for event in self._service.answer(order):
                yield event
        except ValleyError as error:
            yield error

    async def state(self) -> EngineState:
        """Returns what the engine does now."""
        return await self._service.state()

    async def isolation(self) -> str:
        """Returns how decoders are kept off the network."""
        isolation: str = await self._decoder.isolation.remote()
        return isolation

    def check_health(self) -> None:
        """Has Ray replace a replica whose engine does not move."""
        self._service.engine.check_health()

    def __del__(self) -> None:
        """Ends the engine's thread with the replica."""
        if hasattr(self, "_service"):
            self._service.close()

    async def _decode(self, look: Look) -> Clip:
        with _gone_is_an_error():
            clip: Clip | ValleyError = await self._decoder.decode.remote(look)
        if isinstance(clip, ValleyError):
            raise clip
        return clip


class Ingress:
    """Speaks HTTP.

    Args:
        settings: what is served, as JSON.
        model: answers.
    """

    def __init__(self, settings: str, model: DeploymentHandle[Any]) -> None:
        self._settings, self._model = ServeSettings.model_validate_json(settings), model

    def __serve_build_asgi_app__(self) -> Any:
        """Returns the API; Ray asks for it when the replica starts."""
        return create_app(RayBackend(self._model), self._settings, tell_id=False)  # Ray's proxy tells one of its own


class RayBackend:
    """Replicas of the model, as the API speaks to them."""

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        self._model = model
        self._stream: Any = model.options(stream=True)

    async def answer(self, order: Order) -> AsyncGenerator[Event]:
        """Answers a request; leaving the iterator cancels it in the replica."""
        answer = self._stream.answer.remote(order)
        del order  # which may be large, and is on its way
        try:
            with _gone_is_an_error():
                async for event in answer:
                    if isinstance(event, ValleyError):
                        raise event
                    yield event
        finally:
            answer.cancel()  # nothing happens to one that is complete

    async def state(self) -> EngineState:
        """Returns what one of the replicas does now."""
        state: EngineState = await self._model.state.remote()
        return state

    async def isolation(self) -> str:
        """Returns how decoders are kept off the network."""
        isolation: str = await self._model.isolation.remote()
        return isolation


@contextlib.contextmanager
def _gone_is_an_error() -> Iterator[None]:
    """Raises what Ray says of replicas that are busy or gone as ours."""
    try:
        yield
    except BackPressureError:
        raise OverloadError("every replica is busy") from None
    except (RayActorError, DeploymentUnavailableError):
        raise EngineError("the replica is gone") from None


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Builds the application: `serve run valley.distributed.serve:app model=… engine.slots=4`, or a YAML file's `args`.

    Args:
        arguments: settings by their dotted paths, or as a tree; `config` names a preset or a file below them.

    Raises:
        SettingsError: one of them is wrong.
    """
    tree: dict[str, Any] = {}
    if config := arguments.get("config"):
        tree = read_config(str(config), ServeSettings)
    for name, value in arguments.items():
        if name != "config":
            assign(tree, name.split("."), yaml.safe_load(value) if isinstance(value, str) else value)
    return build(validate(ServeSettings, tree))


def build(settings: ServeSettings) -> serve.Application:
    """Returns the application of these settings: who runs where, and how many of them."""
    text, wanted = settings.model_dump_json(), settings.ray
    gpus = wanted.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0
    grace_s = settings.limits.deadline_s + _GRACE_S
    common: dict[str, Any] = {"graceful_shutdown_timeout_s": grace_s, "health_check_period_s": _HEALTH_PERIOD_S}
    deployment: Any = serve.deployment
    decoder = (
        deployment(Decoder)
        .options(
            **common,
            **_copies(wanted.decoders, wanted.max_decoders, _DECODES_AT_ONCE),
            max_ongoing_requests=_DECODES_AT_ONCE,
            ray_actor_options={"num_cpus": wanted.cpus_per_decoder},
        )
        .bind()
    )
    model = (
        deployment(Model)
        .options(
            **common,
            **_copies(wanted.replicas, wanted.max_replicas, settings.engine.slots),
            max_ongoing_requests=settings.engine.slots + settings.engine.max_waiting + settings.limits.max_requests,
            ray_actor_options={"num_cpus": wanted.cpus_per_replica, "num_gpus": gpus},
        )
        .bind(text, decoder)
    )
    application: serve.Application = (
        deployment(serve.ingress()(Ingress))
        .options(
            **common,
            num_replicas=wanted.ingresses,
            max_ongoing_requests=_MANY,  # it turns away by itself what is too much
            ray_actor_options={"num_cpus": 0},
        )
        .bind(text, model)
    )
    return application


def serve_on_ray(settings: ServeSettings) -> None:
    """Serves until it is interrupted, on the cluster that the settings name or on one of this machine.

    Raises:
        ClusterError: the cluster cannot be reached.
        SettingsError: the application does not start.
    """
    connect(ClusterSettings(address=settings.ray.address))
    serve.start(http_options=http_options(settings))
    try:
        serve.run(build(settings), name=_APPLICATION, route_prefix="/")
    except RuntimeError as error:
        serve.shutdown()
        raise SettingsError([f"the application did not start: {error}"]) from None
    logger.info("serving %s on http://%s:%d", settings.name, settings.host, settings.port)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with contextlib.suppress(KeyboardInterrupt):
        over.wait()
    logger.info("answers that are being written are finished first; once more ends them")
    try:
        drain(settings.limits.deadline_s + _GRACE_S)
    finally:
        serve.shutdown()


def drain(most_s: float) -> None:
    """Takes the application away once what it has in hand is answered; a shutdown alone cuts every stream.

    Args:
        most_s: seconds to wait for that.
    """
    serve.delete(_APPLICATION, _blocking=False)
    give_up_at = time.monotonic() + most_s
    while _APPLICATION in serve.status().applications and time.monotonic() < give_up_at:
        time.sleep(_DRAIN_POLL_S)


def http_options(settings: ServeSettings) -> HTTPOptions:
    """Returns where Ray's proxy listens. Deadlines are the API's own: Ray's would cut streams that are well."""
    return HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=None)


def _copies(fewest: int, most: int | None, at_once: int) -> dict[str, Any]:
    if most is None or most <= fewest:
        return {"num_replicas": fewest}
    scaling = AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=at_once)
    return {"autoscaling_config": scaling}
