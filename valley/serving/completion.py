"""Answers in OpenAI's form: whole, or as server-sent events while they are written."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from valley.serving.contract import Event, Start
from valley.serving.engine.interface import Finish, Piece
from valley.serving.problems import Problem
from valley.serving.schema import ChatRequest, usage

_CHUNK = "chat.completion.chunk"
_NOTHING: Mapping[str, Any] = {}
DONE = b"data: [DONE]\n\n"


class Completion:
    """One answer as it grows.

    Args:
        request_id: of the answer.
        request: what was asked.

    Attributes:
        start: what was understood, once it is known.
        finish: how it ended, likewise.
        is_stream: it is told as it is written.
    """

    def __init__(self, request_id: str, request: ChatRequest) -> None:
        self.is_stream = bool(request.stream)
        self._with_frames = bool(request.return_frames)  # not the request itself: it may hold a whole video
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": request.model}
        self._text = ""
        self.start: Start | None = None
        self.finish: Finish | None = None

    def take(self, event: Event) -> None:
        """Takes what comes from the model."""
        match event:
            case Start():
                self.start = event
            case Piece():
                self._text += event.text
            case Finish():
                self.finish = event

    def whole(self) -> dict[str, Any]:
        """Returns the answer in one piece; it has to be finished."""
        assert self.start is not None
        assert self.finish is not None
        message = {"role": "assistant", "content": self._text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish.reason, "logprobs": None}
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}
        return body | ({"valley": self._seen(self.start)} if self._with_frames else {})

    def events(self, event: Event) -> Iterator[bytes]:
        """Takes what comes from the model, and yields the server-sent events for it."""
        self.take(event)
        match event:
            case Start():
                seen = {"valley": self._seen(event)} if self._with_frames else {}
                yield self._chunk({"role": "assistant", "content": ""}, more=seen)
            case Piece(text=text) if text:
                yield self._chunk({"content": text})
            case Finish(reason=reason):
                yield self._chunk({}, reason)
                if self._with_usage:
                    yield _event({**self._head, "object": _CHUNK, "choices": [], "usage": self._usage()})
                yield DONE

    def _chunk(self, delta: Mapping[str, str], reason: str | None = None, more: Mapping[str, Any] = _NOTHING) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        none_yet = {"usage": None} if self._with_usage else {}
        return _event({**self._head, "object": _CHUNK, "choices": [choice], **none_yet, **more})

    def _usage(self) -> Any:
        assert self.start is not None
        assert self.finish is not None
        return usage(
            self.start.prompt_tokens,
            self.finish.num_tokens,
            cached=self.finish.num_cached,
            visual=self.start.visual_tokens,
        )

    @staticmethod
    def _seen(start: Start) -> dict[str, Any]:
        media = [
            {
                "times_s": list(seen.times_s),
                "frames": [f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}" for frame in seen.frames],
            }
            for seen in start.media
        ]
        return {"media": media, "decode_s": start.decode_s, "encode_s": start.encode_s, "known": start.num_kept}


def error_event(problem: Problem) -> bytes:
    """Returns the event that ends a stream which failed; no `[DONE]` follows it."""
    return _event(problem.body())


def _event(body: dict[str, Any]) -> bytes:
    # In ASCII: some clients take U+2028 and the like for the end of a line.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
