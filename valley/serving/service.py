"""One model behind the API: looks at the media of a request, builds its prompt, has the engine write the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64

from valley.assistant.loading import Assistant, load
from valley.errors import MediaError, RequestError
from valley.media.sampling import Sampling
from valley.model.conversation import Message
from valley.serving.engine.batching import batching_engine
from valley.serving.engine.interface import Decoding, Engine, EngineState, Finish, Generation, Piece, Prompt
from valley.serving.engine.packing import serving_dtype
from valley.serving.engine.settings import EngineSettings
from valley.serving.settings import ServeSettings
from valley.serving.sources import Source
from valley.serving.viewing import Decode, Look, View, Viewer


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

    def answer(self, order: Order) -> AsyncIterator[Event]:
        """Yields `Start`, then the answer in pieces, then `Finish`. Closing the iterator ends the work.

        Raises:
            ServingError: it cannot be answered.
            MediaError: a medium cannot be used; its `path` is the medium's label.
        """

    async def state(self) -> EngineState:
        """Returns what the engine does now."""

    async def isolation(self) -> str:
        """Returns how decoders are kept off the network; see `valley.media.sandbox.isolation`."""


class Service:
    """A model, its engine, and its eyes; in one process, without Ray.

    Args:
        settings: what to serve.
        decode: how media become frames.
        assistant: a model that is loaded already; it is the service's from then on.
        new_engine: builds what writes the answers.

    Raises:
        ModelError: the model cannot be loaded.
        EngineError: its backbone does not run in the engine.
    """

    def __init__(
        self,
        settings: ServeSettings,
        decode: Decode,
        assistant: Assistant | None = None,
        new_engine: Callable[[Assistant, EngineSettings], Engine] = batching_engine,
    ) -> None:
        self._settings = settings
        if assistant is None:
            assistant = load(settings.model)
            dtype = serving_dtype(settings.engine.dtype, assistant.model.dtype, assistant.model.device)
            for parameter in assistant.model.parameters():  # not the buffers: rotary frequencies stay exact
                parameter.data = parameter.data.to(dtype)
        self._assistant = assistant
        self._viewer = Viewer(assistant.model, decode, settings.feature_bytes, settings.engine.spare_threads)
        self.engine = new_engine(assistant, settings.engine)

    async def answer(self, order: Order) -> AsyncIterator[Event]:
        """Answers a request; see `Backend.answer`."""
        give_up_at = time.monotonic() + order.timeout_s
        views = await _all([self._view(medium, order) for medium in order.media])
        order = replace(order, media=())  # which may be large, and is seen
        ids = await asyncio.to_thread(self._ids, order.messages, views)
        decoding = self._bounded(order.decoding, len(ids))
        prompt = await asyncio.to_thread(self._prompt, ids, views)
        answer = self.engine.generate(Generation(order.id, prompt, decoding, give_up_at - time.monotonic()))
        yield Start(
            prompt_tokens=len(prompt),
            visual_tokens=sum(len(view.keys) for view in views),
            media=tuple(Seen(view.times_s, view.thumbnails) for view in views),
            decode_s=max((view.decode_s for view in views), default=0.0),
            encode_s=sum(view.encode_s for view in views),
            num_kept=sum(view.is_kept for view in views),
        )
        async for event in answer:
            yield event

    async def state(self) -> EngineState:
        """Returns what the engine does now."""
        return self.engine.state()

    def close(self) -> None:
        """Ends every answer and gives the memory back."""
        self.engine.close()
        self._viewer.close()

    async def _view(self, medium: Medium, order: Order) -> View:
        framing, limits = self._assistant.processor.framing, self._settings.media.limits
        look = Look(medium.source, self._sampling(order), framing, limits, medium.is_image)
        try:
            return await self._viewer.view(look)
        except MediaError as error:
            raise error.named(medium.label) from None

    def _sampling(self, order: Order) -> Sampling:
        """The model's own sampling, or what was asked for within the server's limits."""
        limits, own = self._settings.limits, self._assistant.processor.sampling
        if order.num_frames is not None:
            return Sampling(mode="fixed", num_frames=min(order.num_frames, limits.max_frames))
        most = min(own.max_frames, limits.max_frames)
        if order.fps is not None:
            return Sampling(mode="fps", fps=min(order.fps, limits.max_fps), max_frames=most)
        return own.model_copy(update={"max_frames": most, "num_frames": min(own.num_frames, limits.max_frames)})

    def _ids(self, messages: Sequence[Message], views: Sequence[View]) -> Int64[np.ndarray, " L"]:
        try:
            return self._assistant.processor.encode_prompt(messages, [len(view.times_s) for view in views])
        except ValueError as error:
            raise RequestError("messages", str(error)) from None

    @torch.inference_mode()
    def _prompt(self, ids: Int64[np.ndarray, " L"], views: Sequence[View]) -> Prompt:
        model = self._assistant.model
        keys = ids.copy()
        places = np.isin(ids, (model.config.image_patch_token_id, model.config.video_frame_token_id))
        if views:
            keys[places] = np.concatenate([view.keys for view in views])
        visual = torch.cat([view.tokens for view in views]) if views else torch.zeros(0, model.projector.out_features)
        return Prompt(model.embed_prompt(torch.from_numpy(ids).to(model.device), visual.to(model.device)), keys)

    def _bounded(self, decoding: Decoding, prompt_tokens: int) -> Decoding:
        """The decoding with as many tokens as there is room for, if none were asked for.

        Raises:
            RequestError: prompt and answer are longer than the context.
        """
        most = self.engine.max_tokens
        wanted = decoding.max_tokens or max(min(self._settings.limits.max_tokens, most - prompt_tokens), 1)
        if prompt_tokens + wanted > most:
            raise RequestError(
                "messages",
                f"the prompt has {prompt_tokens} tokens and the answer may take {wanted}: together more than {most}",
                code="context_length_exceeded",
            )
        return replace(decoding, max_tokens=wanted)


async def _all(work: Sequence[Coroutine[Any, Any, View]]) -> list[View]:
    """Waits for all of it; the first that fails ends the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
