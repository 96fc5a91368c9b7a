"""From a request to an order: its rules checked, its media read."""

from __future__ import annotations

import asyncio
from typing import Any

from valley.errors import RequestError
from valley.media.fetch import Fetcher
from valley.model.conversation import Message
from valley.serving.contract import Medium, Order
from valley.serving.engine.interface import Decoding
from valley.serving.schema import ChatMessage, ChatRequest, ImagePart, TextPart, VideoPart
from valley.serving.settings import ServeSettings
from valley.serving.sources import read_source

_CHARACTERS_PER_TOKEN = 64
"""More than text has, whatever the tokenizer: what is longer than the context for certain is not tokenised at all."""


async def make_order(request_id: str, request: ChatRequest, settings: ServeSettings, fetcher: Fetcher) -> Order:
    """Returns what the model is asked for.

    Rules of a conversation: a system message comes first or not at all, media stand in a user's turn, and the last turn
    is a user's.

    Raises:
        RequestError: a rule or a limit is broken; found out before any medium is read.
        MediaError: a medium cannot be had.
    """
    _check(request, settings)
    places = [
        (part, f"messages[{turn}].content[{number}]")
        for turn, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for number, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]
    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(_read(part, label, settings, fetcher)) for part, label in places]
    limits = settings.limits
    return Order(
        id=request_id,
        messages=[_message(message) for message in request.messages],
        media=[task.result() for task in reading],
        decoding=Decoding(
            max_tokens=request.asked_tokens,
            temperature=limits.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=tuple(request.stop or ()),
            min_tokens=request.min_tokens or 0,
        ),
        timeout_s=limits.deadline_s,
        fps=request.fps,
        num_frames=request.num_frames,
    )


def _check(request: ChatRequest, settings: ServeSettings) -> None:
    if request.model != settings.name:
        raise RequestError(
            "model", f"there is no such model here, only {settings.name}", code="model_not_found", status=404
        )
    if request.asked_tokens and (request.min_tokens or 0) > request.asked_tokens:
        raise RequestError("min_tokens", f"{request.min_tokens}, but the answer may take {request.asked_tokens}")
    limits = settings.limits
    if len(request.messages) > limits.max_messages:
        raise RequestError("messages", f"{len(request.messages)} of them, the most being {limits.max_messages}")
    for number, message in enumerate(request.messages):
        if message.role in ("system", "developer") and number:
            raise RequestError(f"messages[{number}].role", "a system message stands first")
        if message.role != "user" and any(not isinstance(part, TextPart) for part in _parts(message)):
            raise RequestError(f"messages[{number}].content", "media stand in a user's turn")
    if request.messages[-1].role != "user":
        raise RequestError(f"messages[{len(request.messages) - 1}].role", "the last turn is a user's")
    parts = [part for message in request.messages for part in _parts(message)]
    for kind, most, name in ((VideoPart, limits.max_videos, "videos"), (ImagePart, limits.max_images, "images")):
        if (count := sum(isinstance(part, kind) for part in parts)) > most:
            raise RequestError("messages", f"{count} {name}, the most being {most}", code="too_many_media")
    _check_length(request, settings.engine.max_tokens)


def _check_length(request: ChatRequest, most: int) -> None:
    """Finds out cheaply what is far too long; the engine's own count is made once there is a prompt."""
    num_characters = sum(len(text) for message in request.messages for text in _texts(message))
    if num_characters > most * _CHARACTERS_PER_TOKEN:
        reason = f"{num_characters} characters of text are more than {most} tokens, prompt and answer together"
        raise RequestError("messages", reason, code="context_length_exceeded")
    if request.asked_tokens >= most:
        reason = f"prompt and answer take {most} tokens together at most, and the answer alone may take "
        raise RequestError("max_tokens", f"{reason}{request.asked_tokens}", code="context_length_exceeded")


def _parts(message: ChatMessage) -> list[Any]:
    return [] if isinstance(message.content, str) else list(message.content)


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if isinstance(part, TextPart)]


async def _read(part: ImagePart | VideoPart, label: str, settings: ServeSettings, fetcher: Fetcher) -> Medium:
    is_image = isinstance(part, ImagePart)
    source = await read_source(part.url, "image" if is_image else "video", settings.media, fetcher, label)
    return Medium(source, label, is_image)


def _message(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": [_part(part) for part in message.content]}


def _part(part: TextPart | ImagePart | VideoPart) -> dict[str, str]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            return {"type": "image"}
        case VideoPart():
            return {"type": "video"}
