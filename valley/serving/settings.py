"""What is served, to whom, and what one request may cost."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from valley.config import PRESETS, Location, Settings, Weights
from valley.serving.clips import find_clips
from valley.serving.engine.settings import EngineSettings
from valley.serving.keys import Keys
from valley.serving.sources import SourceSettings


class RequestLimits(Settings):
    """What one request may ask for."""

    max_body_bytes: PositiveInt = 96 << 20
    """Largest request; base64 makes media a third larger than they are."""
    body_timeout_s: PositiveFloat = 60.0
    """Seconds that a client may take to send a request."""
    write_timeout_s: PositiveFloat = 60.0
    """Seconds that a client may take to read one piece of an answer."""
    deadline_s: PositiveFloat = 300.0
    """Seconds for a request in all: media, waiting, the whole answer (504)."""
    max_requests: PositiveInt = 64
    """Requests in hand at once; more are turned away before they are read (429)."""
    max_messages: PositiveInt = 256
    """Longest conversation."""
    max_videos: NonNegativeInt = 2
    """Most videos of a conversation."""
    max_images: NonNegativeInt = 8
    """Most images of a conversation."""
    max_frames: PositiveInt = 100
    """Most frames of one video that are looked at, whatever a request asks for."""
    max_fps: PositiveFloat = 8.0
    """Most frames a second that are looked at; never more than `max_frames` in all."""
    max_tokens: PositiveInt = 256
    """Longest answer where a request does not say."""
    temperature: Annotated[NonNegativeFloat, Field(le=2)] = 0.0
    """Of requests that do not say."""


class RaySettings(Settings):
    """How many processes serve, where Ray Serve runs them. `jobs/serve.py` and `serve run` share these."""

    replicas: PositiveInt = 1
    """Copies of the model at least."""
    max_replicas: PositiveInt | None = None
    """Copies of the model at most, as load asks for; null: `replicas`."""
    cpus_per_replica: NonNegativeFloat = 1.0
    """CPUs that a copy of the model takes."""
    gpus_per_replica: NonNegativeFloat | None = None
    """GPUs that a copy of the model takes; null: one where the cluster has any when the server is started. `serve run`
    on no running cluster, and clusters that add GPUs as they are asked for, need it said."""
    decoders: PositiveInt = 1
    """Processes that decode media at least."""
    max_decoders: PositiveInt | None = None
    """Processes that decode media at most; null: `decoders`."""
    cpus_per_decoder: NonNegativeFloat = 0.5
    """CPUs that such a process takes."""
    ingresses: PositiveInt = 1
    """Processes that speak HTTP."""
    address: str | None = None
    """A running cluster; null: `$RAY_ADDRESS`, else one of this machine."""


class ServeSettings(Settings):
    """A trained model behind HTTP."""

    presets: ClassVar[Path] = PRESETS / "serve"

    model: Weights
    """Folder of a saved model, of the run that made it, or a name on a hub."""
    name: str = "valley"
    """What the API calls it."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need `keys`."""
    port: Annotated[NonNegativeInt, Field(le=65535)] = 8000
    """Port to listen on; 0: any that is free."""
    hosts: tuple[str, ...] = ()
    """Names that clients may call this server by (`Host` header); none: without `keys` this machine's own, else any."""
    keys: Location | None = None
    """File of API keys, as `jobs/make_key.py` writes it; null: no key is asked for."""
    page: bool = True
    """Whether the chat page is served at `/`."""
    clips: Location | None = None
    """Folder of clips that the chat page offers; null: none."""
    engine: EngineSettings = EngineSettings()
    media: SourceSettings = SourceSettings()
    limits: RequestLimits = RequestLimits()
    feature_bytes: NonNegativeInt = 512 << 20
    """Memory for the visual tokens of videos and images that were seen before."""
    ray: RaySettings = RaySettings()
    plain: bool = False
    """Serve from this one process, without Ray."""

    def describe(self) -> str:
        """Returns what would be served, and where, in a few lines."""
        engine, wanted = self.engine, self.ray
        where = (
            "one plain process"
            if self.plain
            else (
                f"Ray: {wanted.replicas}-{wanted.max_replicas or wanted.replicas} of the model, "
                f"{wanted.decoders}-{wanted.max_decoders or wanted.decoders} decoders, {wanted.ingresses} for HTTP"
            )
        )
        return (
            f"{self.model} as {self.name} on http://{self.host}:{self.port}, {'' if self.keys else 'no '}keys\n"
            f"{engine.slots} answers at once of {engine.max_tokens} tokens with their prompts; "
            f"{engine.max_waiting} may wait\n{where}"
        )

    @model_validator(mode="after")
    def _needs_keys(self) -> Self:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(f"keys: whoever reaches {self.host} could use this server; name a file of API keys")
        return self

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        """One process reads them here, before it loads a model; on Ray another machine may be the one that has them."""
        if self.plain:
            if self.keys is not None:
                Keys(Path(self.keys))
            if self.page:
                find_clips(self.clips)
        return self


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
