"""What the chat-completions API takes and gives: OpenAI's names, and what this server can do of it.

Source: OpenAI's API reference, "Create chat completion", and vLLM's of its extra parameters. Unknown fields are
ignored; known ones that ask for what this server cannot do are refused, for an answer that silently leaves them out
would be wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from valley.errors import RequestError

_MOST_STOPS, _LONGEST_STOP = 4, 256
_MOST_PARTS = 512
_SEED = 2**63 - 1
_LEAST_FPS = 1e-3
_PARTS = ("text", "image_url", "video_url")
_OUR_WORDS = {"model_type": "expected an object", "model_attributes_type": "expected an object"}
_MOST_VALUES = 1 << 18
"""Lists, objects and their entries in one body: a hundred MB of `[],[],…` would become gigabytes."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (False,),
    "media_io_kwargs": ({},),
    "min_p": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # there are no tools to call
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _is_text(value: str) -> str:
    try:
        if not value.isascii():  # of ASCII, such as a file in base64, that is known at once
            value.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Link(_Model):
    """Where a medium is: https, `data:…;base64,`, a list of JPEG frames, or `file://` where the server allows it."""

    url: Text


class TextPart(_Model):
    """What somebody says."""

    type: Literal["text"]
    text: Text


class ImagePart(_Model):
    """An image to look at."""

    type: Literal["image_url"]
    image_url: Link

    @property
    def url(self) -> str:
        """Where it is."""
        return self.image_url.url


class VideoPart(_Model):
    """A video to look at."""

    type: Literal["video_url"]
    video_url: Link

    @property
    def url(self) -> str:
        """Where it is."""
        return self.video_url.url


def _part_type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else getattr(part, "type", None)


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image_url")] | Annotated[VideoPart, Tag("video_url")],
    Discriminator(_part_type),
]


class ChatMessage(_Model):
    """One turn. Media belong into a user's turn; a system message comes first."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=_MOST_PARTS, fail_fast=True)]


class StreamOptions(_Model):
    """What a stream tells besides the answer."""

    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP), AfterValidator(_is_text)]


class ChatRequest(_Model):
    """A request for a chat completion. `null` stands for the default everywhere."""

    model: Text
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEED - 1, le=_SEED)] | None = None
    stop: Annotated[list[Stop], Field(max_length=_MOST_STOPS), BeforeValidator(_as_list)] | None = None
    n: Literal[1] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """The model may not end its answer before (beyond OpenAI's)."""
    fps: Annotated[float, Field(ge=_LEAST_FPS)] | None = None
    """Frames a second to look at (beyond OpenAI's); the server's limit holds."""
    num_frames: Annotated[int, Field(ge=1)] | None = None
    """Frames to look at, spread over the video, in place of `fps` (beyond OpenAI's); the server's limit holds."""
    return_frames: bool | None = None
    """Send the frames that were looked at, small, with their times (beyond OpenAI's): `valley.media` of the answer."""

    @property
    def asked_tokens(self) -> int:
        """Longest answer that is asked for; 0: nothing is said of it."""
        return self.max_completion_tokens or self.max_tokens or 0


class _NotJSONError(ValueError):
    """What Python's parser lets pass."""


def parse_request(body: bytes) -> ChatRequest:
    """Reads the body of a request.

    Raises:
        RequestError: it is not JSON, not such an object, or asks for something that is not supported.
    """
    tree = _parse_json(body)
    for name, neutral in _UNSUPPORTED.items():
        if tree.get(name) is not None and tree[name] not in neutral:
            raise RequestError(name, "not supported by this server", code="unsupported_parameter")
    if tree.get("stream_options") is not None and not tree.get("stream"):
        raise RequestError("stream_options", "only together with stream=true")
    try:
        request = ChatRequest.model_validate(tree)
    except ValidationError as error:
        raise _explained(error) from None
    if request.fps is not None and request.num_frames is not None:
        raise RequestError("num_frames", "either fps or num_frames")
    return request


def _parse_json(body: bytes) -> dict[str, Any]:
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise RequestError("", f"the body has more than {_MOST_VALUES} values", code="invalid_json")
    try:
        tree = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except UnicodeDecodeError:
        raise RequestError("", "the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise RequestError("", "the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise RequestError("", f"the body is not JSON at character {error.pos}", code="invalid_json") from None
    except _NotJSONError as error:
        raise RequestError("", f"the body is not JSON: {error}", code="invalid_json") from None
    except ValueError:  # an integer of more digits than Python reads
        raise RequestError("", "a number in the body is too long", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise RequestError("", "the body is not a JSON object", code="invalid_json")
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJSONError(f"{name} is not a number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise _NotJSONError("a number is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise _NotJSONError("an object has a key twice")
    return tree


def _explained(error: ValidationError) -> RequestError:
    """The first thing that is wrong, without what the client sent: that may be megabytes."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    detail = max(details, key=lambda detail: len(detail["loc"]))  # of a union, the member that came furthest
    path = ""
    before: int | str = ""
    for place in detail["loc"]:
        if isinstance(place, int):
            path += f"[{place}]"
        elif not _is_member(place, before):
            path += f".{place}" if path else place
        before = place
    if detail["type"] == "union_tag_invalid":
        return RequestError(f"{path}.type", "expected text, image_url or video_url")
    if detail["type"] == "union_tag_not_found":
        return RequestError(path, "expected an object with a type: text, image_url or video_url")
    reason = _OUR_WORDS.get(detail["type"], detail["msg"]).removeprefix("Value error, ")
    reason = reason.replace(" after validation", "")
    code = "missing_required_parameter" if detail["type"] == "missing" else "invalid_value"
    return RequestError(path, f"{reason[0].lower()}{reason[1:]}", code=code)


def _is_member(place: str, before: int | str) -> bool:
    """What pydantic puts into a location for the member of a union that it tried: a type, or a part's after its number.

    What follows such a member is a field, which may have the same name.
    """
    return "[" in place or (before == "content" and place == "str") or (isinstance(before, int) and place in _PARTS)


def usage(prompt_tokens: int, completion_tokens: int, *, cached: int, visual: int) -> Mapping[str, Any]:
    """Returns OpenAI's count of tokens; visual ones are part of the prompt."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached, "visual_tokens": visual},
    }
