"""One model behind the API: looks at the media of a request, builds its prompt, has the engine write the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from valley.assistant.loading import Assistant, load
from valley.errors import MediaError, OverloadError, RequestError
from valley.media.sampling import Sampling
from valley.model.conversation import Message
from valley.serving.contract import Event, Medium, Order, Seen, Start
from valley.serving.engine.batching import batching_engine
from valley.serving.engine.interface import Decoding, Engine, EngineState, Generation, Prompt
from valley.serving.engine.packing import serving_dtype
from valley.serving.engine.settings import EngineSettings
from valley.serving.settings import ServeSettings
from valley.serving.viewing import Decode, Look, View, Viewer


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
        self._in_hand, self._most_in_hand = 0, settings.engine.slots + settings.engine.max_waiting
        self._viewer = Viewer(assistant.model, decode, settings.feature_bytes, settings.engine.num_tower_threads)
        self.engine = new_engine(assistant, settings.engine)

    async def answer(self, order: Order) -> AsyncGenerator[Event]:
        """Answers a request; see `Backend.answer`."""
        if self._in_hand >= self._most_in_hand:  # before it is looked at: the engine would refuse it afterwards
            raise OverloadError(f"{self._in_hand} requests are in hand already")
        self._in_hand += 1
        try:
            async for event in self._answer(order):
                yield event
        finally:
            self._in_hand -= 1

    async def _answer(self, order: Order) -> AsyncGenerator[Event]:
        give_up_at = time.monotonic() + order.timeout_s
        if order.media:  # what is too long with a single frame of each is too long
            fewest = await asyncio.to_thread(self._ids, order.messages, [1] * len(order.media))
            self._bounded(order.decoding, len(fewest))
        views = await _all([self._view(medium, order) for medium in order.media])
        order = replace(order, media=())  # which may be large, and is seen
        ids = await asyncio.to_thread(self._ids, order.messages, [len(view.times_s) for view in views])
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
        wanted: dict[str, Any] = {"max_frames": min(own.max_frames, limits.max_frames)}
        wanted["num_frames"] = min(order.num_frames or own.num_frames, limits.max_frames)
        if order.num_frames is not None:
            wanted["mode"] = "fixed"
        elif order.fps is not None:
            wanted |= {"mode": "fps", "fps": min(order.fps, limits.max_fps)}
        return own.model_copy(update=wanted)

    def _ids(self, messages: Sequence[Message], num_frames: Sequence[int]) -> Int64[np.ndarray, " L"]:
        try:
            return self._assistant.processor.encode_prompt(messages, num_frames)
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
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
