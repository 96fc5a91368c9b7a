"""From errors to answers: one status policy, in OpenAI's form. No other library's words get out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from valley.errors import (
    DamagedMediaError,
    DeadlineError,
    DecoderDiedError,
    DecodeTimeoutError,
    EmptyMediaError,
    EngineError,
    FetchBusyError,
    FetchTimeoutError,
    GenerationError,
    MediaError,
    MediaLimitError,
    MissingMediaError,
    OverloadError,
    RefusedMediaError,
    RequestError,
    UnreachableMediaError,
    UnsupportedMediaError,
)

CLIENT_LEFT = 499
"""In the log and the figures only: there is nobody to answer."""
RETRY_AFTER_S = 2
"""When it is worth another try where too many wait, or a replica is being replaced."""


@dataclass(frozen=True)
class Problem:
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        code: for programs.
        message: for people.
        param: the field at fault.
        retry_after_s: when it is worth another try; None: no time is known.
    """

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Returns the headers that belong to it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        return headers


_MEDIA: dict[type[MediaError], tuple[int, str, str]] = {
    # status, code, and what is said; an empty text: the error's own reason
    RefusedMediaError: (400, "media_refused", ""),
    MissingMediaError: (400, "media_not_found", "there is no such file"),
    EmptyMediaError: (422, "media_empty", ""),
    UnsupportedMediaError: (415, "media_unsupported", ""),
    DamagedMediaError: (422, "media_damaged", ""),
    MediaLimitError: (413, "media_too_large", ""),
    DecoderDiedError: (422, "media_damaged", "it cannot be decoded"),
    DecodeTimeoutError: (504, "media_timeout", "it could not be decoded in time"),
    FetchTimeoutError: (504, "media_timeout", ""),
    FetchBusyError: (429, "media_busy", "too many media are being fetched"),
}


def problem_of(error: BaseException) -> Problem:
    """Returns what a client is told of an error. What nobody foresaw is a bare 500: its text may hold anything."""
    match error:
        case RequestError():
            return Problem(error.status, "invalid_request_error", error.code, str(error), error.field or None)
        case UnreachableMediaError():
            return _upstream(error)
        case MediaError():
            return _media(error)
        case OverloadError():
            return Problem(429, "rate_limit_error", "overloaded", "too many requests", retry_after_s=RETRY_AFTER_S)
        case DeadlineError() | TimeoutError():
            return Problem(504, "server_error", "timeout", "the request took too long")
        case GenerationError():
            return Problem(500, "server_error", "model_error", "the model failed on this request")
        case EngineError():
            return Problem(503, "server_error", "not_ready", "the model is not available", retry_after_s=RETRY_AFTER_S)
        case _:
            return Problem(500, "server_error", "internal_error", "internal error")


def _media(error: MediaError) -> Problem:
    status, code, said = next(
        (entry for kind, entry in _MEDIA.items() if isinstance(error, kind)), (422, "media_unusable", "")
    )
    retry = RETRY_AFTER_S if status == 429 else None
    kind = {429: "rate_limit_error", 504: "server_error"}.get(status, "invalid_request_error")
    return Problem(status, kind, code, f"{error.path}: {said or error.reason}", error.path, retry)


def _upstream(error: UnreachableMediaError) -> Problem:
    """The client's fault where its host says so (404), else that host's."""
    status = 422 if error.status is not None and 400 <= error.status < 500 else 502
    kind = "invalid_request_error" if status == 422 else "server_error"
    return Problem(status, kind, "media_unreachable", f"{error.path}: {error.reason}", error.path)
