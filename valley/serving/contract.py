"""What passes between the API and a model behind it: orders one way, events the other, also between processes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from valley.model.conversation import Message
from valley.serving.engine.interface import Decoding, EngineState, Finish, Piece
from valley.serving.sources import Source


@dataclass(frozen=True)
class Medium:
    """A medium of a request, fetched.

    Attributes:
        source: its bytes.
        label: its place in the request.
        is_image: it stands there as an image.
    """

    source: Source
    label: str
    is_image: bool = False


@dataclass(frozen=True)
class Order:
    """A request that was found right, with its media.

    Attributes:
        id: of the request.
        messages: the conversation, with a part `{"type": "video"}` or `{"type": "image"}` for each medium.
        media: in the order of those parts.
        decoding: how to write; `max_tokens` 0: as the server's limits say.
        timeout_s: for all of it.
        fps: frames a second that were asked for.
        num_frames: frames that were asked for.
    """

    id: str
    messages: Sequence[Message]
    media: Sequence[Medium]
    decoding: Decoding
    timeout_s: float
    fps: float | None = None
    num_frames: int | None = None


@dataclass(frozen=True)
class Seen:
    """What was looked at of one medium.

    Attributes:
        times_s: of the frames.
        frames: small JPEG files.
    """

    times_s: tuple[float, ...]
    frames: tuple[bytes, ...]


@dataclass(frozen=True)
class Start:
    """The request is understood, and its media have been looked at.

    Attributes:
        prompt_tokens: length of the prompt.
        visual_tokens: how many of them stand for media.
        media: what was looked at.
        decode_s: seconds that decoding took.
        encode_s: seconds of the tower.
        num_kept: media that had been seen before.
    """

    prompt_tokens: int
    visual_tokens: int
    media: tuple[Seen, ...]
    decode_s: float
    encode_s: float
    num_kept: int


Event = Start | Piece | Finish


class Backend(Protocol):
    """What the API speaks to: a `Service` of this process, or replicas of one behind Ray Serve."""

    def answer(self, order: Order) -> AsyncGenerator[Event]:
        """Yields `Start`, then the answer in pieces, then `Finish`. Closing the iterator ends the work.

        Raises:
            ServingError: it cannot be answered.
            MediaError: a medium cannot be used; its `path` is the medium's label.
        """

    async def state(self) -> EngineState:
        """Returns what the engine does now."""

    async def isolation(self) -> str:
        """Returns how decoders are kept off the network; see `valley.media.sandbox.isolation`."""
