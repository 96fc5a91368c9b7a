"""Questions about videos and images, and the model's answers: whole, or as they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from valley.assistant.generation import generate_tokens
from valley.assistant.loading import Assistant
from valley.assistant.writing import Writer
from valley.media.decode import sample_clip
from valley.model.conversation import MEDIA, Message
from valley.model.processing import ValleyProcessor

MAX_NEW_TOKENS = 256

Clip = UInt8[np.ndarray, "T H W 3"]
Medium = str | Path | bytes | Clip
"""A video or image: its path, the bytes of its file, or frames that are sampled already."""
Media = Medium | Sequence[Medium] | None


def chat(
    assistant: Assistant,
    media: Media,
    question: str,
    *,
    history: Sequence[Message] | None = None,
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int | None = None,
) -> str:
    """Returns the answer to a question.

    Args:
        assistant: what `load` returned.
        media: the video or image that the conversation is about, several of them, or None.
        question: what to ask now.
        history: the turns before, oldest first: `{"role": "user" | "assistant", "content": …}`. The media stand before
            the first question. Later questions bring theirs as parts: `{"type": "video", "video": path or bytes}`.
        system: another system message; empty: none; None: the one the model was trained with.
        max_new_tokens: longest answer.
        temperature: of the draw of each token; 0: always the likeliest.
        seed: of the draw; None: torch's global generator goes on.

    Raises:
        MediaError: a file cannot be used; which error it is says why.
        OSError: the storage failed.
        ValueError: a role or part that has no place there, or a number out of range.
    """
    return "".join(
        stream(
            assistant,
            media,
            question,
            history=history,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    )


def stream(
    assistant: Assistant,
    media: Media,
    question: str,
    *,
    history: Sequence[Message] | None = None,
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the answer that `chat` returns, in pieces as they are written.

    Media are read at once; the model begins with the first piece that is asked for. Closing the iterator, or an
    exception at the one who iterates, ends it.

    Arguments and errors are those of `chat`.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise ValueError(f"expected max_new_tokens > 0 and temperature >= 0, found {max_new_tokens}, {temperature}")
    messages = _messages(assistant, media, question, history or (), system)
    inputs = assistant.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    ).to(assistant.model.device)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options = {**inputs, **drawn, **assistant.processor.stopping, "max_new_tokens": max_new_tokens}
    return _pieces(assistant.processor, generate_tokens(assistant.model, options, seed=seed))


def look(assistant: Assistant, media: Media) -> list[Clip]:
    """Returns the frames that the model sees of each medium; they can be handed over in place of the media.

    Raises:
        MediaError: a file cannot be used.
        OSError: the storage failed.
    """
    if media is None:
        return []
    several = [media] if isinstance(media, str | Path | bytes | np.ndarray) else list(media)
    return [_frames(assistant, medium) for medium in several]


def _frames(assistant: Assistant, medium: Medium) -> Clip:
    if isinstance(medium, np.ndarray):
        return medium
    processor = assistant.processor
    return sample_clip(medium, processor.sampling, **processor.framing).pixels


def _messages(
    assistant: Assistant, media: Media, question: str, history: Sequence[Message], system: str | None
) -> list[Message]:
    """The whole conversation, its media read and in their places."""
    turns: list[Message] = [
        {**turn, "content": [_read_part(assistant, part) for part in _parts(turn["content"])]}
        for turn in [*history, {"role": "user", "content": question}]
    ]
    first = next(number for number, turn in enumerate(turns) if turn["role"] == "user")
    # A picture is a clip of one frame: to the model they are the same.
    clips = [{"type": "video", "video": frames} for frames in look(assistant, media)]
    turns[first] = {**turns[first], "content": [*clips, *turns[first]["content"]]}
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _read_part(assistant: Assistant, part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part["type"]
    if kind not in MEDIA or kind not in part:
        return part
    return {"type": "video", "video": _frames(assistant, part[kind])}


def _pieces(processor: ValleyProcessor, generated: Iterator[Sequence[int]]) -> Iterator[str]:
    """Turns tokens into text, piece by piece."""
    writer = Writer(processor)
    for tokens in generated:
        if piece := writer.add(tokens):
            yield piece
    if piece := writer.end():
        yield piece
