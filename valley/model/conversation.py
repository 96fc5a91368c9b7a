"""From chat messages to a prompt: which characters are control, which are somebody's text, and which are learned.

A prompt is a sequence of segments. Only their kind decides how they are tokenised and supervised, so nothing that a
user writes can become a control token, and the label mask needs no search for marks in the text. Strings only; the ids
are made in `valley.model.tokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from valley.model.templates import Template

ADDED_TOKENS = ("<im_start>", "<im_patch>", "<im_end>", "<vi_start>", "<vi_frame>", "<vi_end>")
"""Special tokens added to every tokenizer. A video or image of T frames becomes, P patches a frame,
`<im_start> <im_patch>*P <im_end> <vi_start> <vi_frame>*T <vi_end>`."""

Kind = Literal["control", "text", "answer", "end", "video", "image"]
PLAIN: frozenset[Kind] = frozenset({"text", "answer"})
"""Kinds in which special tokens stay text."""
SUPERVISED: frozenset[Kind] = frozenset({"answer", "end"})
"""Kinds the model learns to write."""
MEDIA: frozenset[Kind] = frozenset({"video", "image"})
"""Kinds that stand for visual tokens."""

Message = Mapping[str, Any]
"""A Hugging Face chat message: `role`, and `content`, a string or a list of `{"type": "text"|"video"|"image", …}`."""

_PLACEHOLDER = re.compile("(<video>|<image>)")


class Segment(NamedTuple):
    """A stretch of a prompt that is tokenised by itself; a medium's text is its placeholder."""

    kind: Kind
    text: str


class RenderedPrompt(str):
    """A rendered prompt that remembers its segments, so that tokenising it keeps text and control apart.

    Cutting or joining it gives an ordinary string, in which every special token and placeholder is control.
    """

    __slots__ = ("segments",)
    segments: tuple[Segment, ...]

    def __new__(cls, segments: Sequence[Segment]) -> RenderedPrompt:
        """Joins the segments' texts."""
        prompt = super().__new__(cls, "".join(segment.text for segment in segments))
        prompt.segments = tuple(segments)
        return prompt

    def __getnewargs__(self) -> tuple[tuple[Segment, ...]]:  # type: ignore[override]  # what __new__ takes, not a str
        return (self.segments,)


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    system: str,
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = False,
) -> RenderedPrompt:
    """Renders one conversation.

    Args:
        messages: the turns, oldest first; a system message may come first.
        template: what stands around them.
        system: the system message where `messages` brings none; empty for none at all.
        bos: what every prompt begins with.
        eos: the tokenizer's EOS.
        add_generation_prompt: open the answer that is to be generated.

    Raises:
        ValueError: a role or part that has no place there.
    """
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        system = _plain_text(turns.pop(0)["content"])
    segments = [Segment("control", bos)]
    if system := template.escape(system):
        segments += [
            Segment("control", template.before_system),
            Segment("text", system),
            Segment("control", template.after_system),
        ]
    else:
        segments.append(Segment("control", template.start))
    for number, turn in enumerate(turns):
        match turn["role"]:
            case "user":
                segments += _question(turn["content"], template)
            case "assistant":
                segments += _answer(turn["content"], template, eos)
            case role:
                raise ValueError(f"message {number} has the role {role!r}: known are user, assistant, and system first")
    if add_generation_prompt:
        segments.append(Segment("control", template.before_answer))
    return RenderedPrompt(list(_join_control(segments)))


def read_prompt(text: str) -> RenderedPrompt:
    """Takes a prompt that was written by hand: all of it is control, and `<video>`, `<image>` are media.

    A `RenderedPrompt` comes back as it is.
    """
    if isinstance(text, RenderedPrompt):
        return text
    pieces = _PLACEHOLDER.split(text)
    kinds: dict[str, Kind] = {"<video>": "video", "<image>": "image"}
    return RenderedPrompt([Segment(kinds.get(piece, "control"), piece) for piece in pieces if piece])


def carried_frames(conversations: Sequence[Sequence[Message]], kind: Kind) -> Iterator[Any]:
    """Yields the frames that parts of one kind bring along (`{"type": "video", "video": …}`), in order."""
    for messages in conversations:
        for message in messages:
            for part in _parts(message["content"]):
                if part["type"] == kind and kind in part:
                    yield part[kind]


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _question(content: Any, template: Template) -> list[Segment]:
    """A user's turn: texts and media, each on lines of its own whatever whitespace stood between them."""
    runs: list[Segment] = []
    text = ""
    for part in _parts(content):
        match part["type"]:
            case "text":
                text += part["text"]
            case "video" | "image" as kind:
                runs += [Segment("text", template.escape(text)), Segment(kind, f"<{kind}>")]
                text = ""
            case kind:
                raise ValueError(f"a part has the type {kind!r}: known are text, video, image")
    runs.append(Segment("text", template.escape(text)))
    segments = [Segment("control", template.before_user)]
    for position, run in enumerate(run for run in runs if run.text):
        if position == 0 and run.kind == "text":
            segments.append(Segment("text", template.glue + run.text))
        else:
            segments += [Segment("control", "\n" if position else template.glue), run]
    return [*segments, Segment("control", template.after_user)]


def _answer(content: Any, template: Template, eos: str) -> list[Segment]:
    text = _plain_text(content).strip()
    return [
        Segment("control", template.before_answer),
        Segment("answer", template.glue + text if text else ""),
        Segment("end", template.end + (eos if template.ends_with_eos else "")),
        Segment("control", template.after_answer),
    ]


def _plain_text(content: Any) -> str:
    parts = _parts(content)
    for part in parts:
        if part["type"] != "text":
            raise ValueError(f"a part of type {part['type']!r} stands outside a user message")
    return "".join(part["text"] for part in parts)


def _join_control(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Drops empty segments and makes neighbours that are control one: `###` + ` Human:` is tokenised as a whole."""
    pending = ""
    for segment in segments:
        if segment.kind == "control":
            pending += segment.text
        elif segment.text:
            if pending:
                yield Segment("control", pending)
                pending = ""
            yield segment
    if pending:
        yield Segment("control", pending)
