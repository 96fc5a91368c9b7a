"""One shape for the records of every dataset: an id, turns of text with places for media, and the media.

What the data files have in common (paper appendix B): an optional `id`, `video` or `image` (a path or a list of
paths), an optional `source`, and a dialogue. The dialogue comes in the formats of the table `FORMATS`; a new one is a
reader and a line there.

Rules that hold for all of them:

- Roles alternate, the human first and the assistant last; a system turn may stand before them.
- `<video>` or `<image>` in a human turn is a placeholder while media remain, and plain text after that. Either name
  stands for either kind, as in the published data.
- One path takes the first placeholder. A list of n paths takes n placeholders, or one when it is the frames of one
  clip, given as pictures. Anything else does not agree, and the record is rejected.
- Paths lie below the source's root. One that is absolute, a URL or climbs with `..` is rejected unopened. What climbs
  only below a remote root, where `%2e%2e` may mean the same, is found by `storage.Root`, which knows what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import msgspec

from valley.errors import RecordError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_PLACEHOLDER = re.compile("<(?:video|image)>")
_SEPARATOR = re.compile(r"[/\\]")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(TypedDict, total=False):
    """One part of a chat message's content."""

    type: Literal["text", "video", "image"]
    text: str


class Message(TypedDict):
    """A Hugging Face chat message."""

    role: Role
    content: list[Part]


class Media(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A video or an image of a record.

    Attributes:
        kind: what it is to the model: a clip or a still.
        paths: below the source's root, with `/` between folders. Several are the frames of one clip, in order.
        folder: the record's own `source`. The published code keeps the files of each in a folder of that name, so a
            file that is not below the root itself is looked for there.
    """

    kind: Literal["video", "image"]
    paths: tuple[str, ...]
    folder: str = ""

    def candidates(self, path: str) -> list[str]:
        """Where one of its paths may be below the root, most likely first; data often leaves `.mp4` out."""
        names = [path]
        if self.kind == "video" and len(self.paths) == 1:
            names.append(path.removesuffix(".mp4") if path.endswith(".mp4") else f"{path}.mp4")
        return names + [f"{self.folder}/{name}" for name in names if self.folder]


class Turn(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One turn of a dialogue.

    Attributes:
        role: who speaks.
        parts: text as it stands in the data; None is the place of the record's next medium.
    """

    role: Role
    parts: tuple[str | None, ...]


class Record(msgspec.Struct, frozen=True, gc=False):
    """One sample as the data describes it, nothing opened yet.

    Attributes:
        id: the record's `id`, or `#` and its position in the data file when it has none.
        source: name of the source it comes from.
        turns: the dialogue.
        media: in the order of their places in the dialogue.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]

    @property
    def messages(self) -> list[Message]:
        """The dialogue as Hugging Face chat messages, one `video` or `image` part per medium, in order."""
        kinds = iter(medium.kind for medium in self.media)
        return [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part} if part is not None else {"type": next(kinds)} for part in turn.parts
                ],
            }
            for turn in self.turns
        ]

    def without_media(self) -> Record:
        """The same dialogue, its text alone."""
        turns = tuple(Turn(turn.role, tuple(part for part in turn.parts if part is not None)) for turn in self.turns)
        return Record(self.id, self.source, turns, ())


class _FaultError(Exception):
    """A record's fault, before it is known whose it is."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(field, reason)


def parse_record(raw: object, position: int, source: str) -> Record:
    """Reads one record of a data file.

    Args:
        raw: the record as JSON or Parquet gave it.
        position: its place in the data file, from 0; names a record without id.
        source: name of the source.

    Raises:
        RecordError: what is wrong with it, and in which field.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"#{position}", "record", f"expected an object, found {_name_type(raw)}")
    sample_id = _read_id(raw.get("id"), position)
    try:
        kind, paths = _read_paths(raw)
        field = next((name for name in FORMATS if raw.get(name) is not None), None)
        if field is None:
            raise _FaultError(next(iter(FORMATS)), "missing")
        dialogue = FORMATS[field](field, raw[field], len(paths))
        _check_roles(field, dialogue)
        media = _group_media(field, kind, paths, _count_placeholders(dialogue), _read_folder(raw.get("source")))
        return Record(sample_id, source, _place_media(field, dialogue, len(media)), media)
    except _FaultError as fault:
        raise RecordError(sample_id, fault.field, fault.reason) from None


def _read_conversations(field: str, value: object, num_paths: int) -> list[tuple[Role, str]]:
    del num_paths  # placeholders say where media stand
    dialogue: list[tuple[Role, str]] = []
    for number, turn in enumerate(_read_list(field, value), start=1):
        name = turn.get("from")
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise _FaultError(field, f"turn {number}: unknown role {name!r}; known: {', '.join(ROLES)}")
        dialogue.append((role, _read_text(field, number, turn, "value")))
    return dialogue


def _read_questions(field: str, value: object, num_paths: int) -> list[tuple[Role, str]]:
    dialogue: list[tuple[Role, str]] = []
    for number, pair in enumerate(_read_list(field, value), start=1):
        words = [_read_text(field, number, pair, key) for key in ("i", "q") if pair.get(key)]
        if not words:
            raise _FaultError(field, f"turn {number}: no question")
        dialogue.append(("user", "\n".join(words)))
        dialogue.append(("assistant", _read_text(field, number, pair, "a")))
    # This format has no placeholders: what is talked about stands before the first question.
    role, question = dialogue[0]
    dialogue[0] = role, "<video>\n" * num_paths + question
    return dialogue


FORMATS: dict[str, Callable[[str, object, int], list[tuple[Role, str]]]] = {
    # [{"from": "human" | "gpt", "value": text}]: Valley-702k, Valley-instruct-73k, LLaVA-CC3M, LLaVA-instruct-150k
    "conversations": _read_conversations,
    # [{"q": text, "a": text}], in some files with an instruction "i": VideoChat-instruct-11K as its authors publish it
    "QA": _read_questions,
}
"""Field that holds the dialogue -> reader of that field: (field, value, number of media paths) -> turns."""


def _read_id(value: object, position: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() and _is_unicode(value) else f"#{position}"


def _read_list(field: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _FaultError(field, f"expected a list, found {_name_type(value)}")
    if not value:
        raise _FaultError(field, "empty")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise _FaultError(field, f"turn {number}: expected an object, found {_name_type(entry)}")
    return value


def _read_text(field: str, number: int, turn: dict[str, Any], key: str) -> str:
    text = turn.get(key)
    if not isinstance(text, str):
        raise _FaultError(field, f"turn {number}: {key}: expected text, found {_name_type(text)}")
    if not _is_unicode(text):
        raise _FaultError(field, f"turn {number}: {key}: not valid Unicode")
    return text


def _read_paths(raw: dict[str, Any]) -> tuple[Literal["video", "image"], list[str]]:
    video, image = raw.get("video"), raw.get("image")
    if video is not None and image is not None:
        raise _FaultError("video", "the record has both video and image")
    kind: Literal["video", "image"] = "image" if video is None else "video"
    value = image if video is None else video
    if value is None:
        return kind, []
    paths = value if isinstance(value, list) else [value]
    if not paths:
        raise _FaultError(kind, "an empty list")
    return kind, [_read_path(kind, path) for path in paths]


def _read_path(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _FaultError(field, f"expected a path, found {_name_type(value)}")
    if not _is_unicode(value) or _CONTROL.search(value):
        raise _FaultError(field, "control characters in the path")
    if "://" in value:
        raise _FaultError(field, f"a URL, not a path below the root: {value}")
    if value[:1] in ("/", "\\") or _DRIVE.match(value):
        raise _FaultError(field, f"an absolute path, not one below the root: {value}")
    folders = _SEPARATOR.split(value)
    if ".." in folders:
        raise _FaultError(field, f"climbs out of the root: {value}")
    path = "/".join(folder for folder in value.split("/") if folder not in ("", "."))
    if not path.strip():
        raise _FaultError(field, "an empty path")
    return path


def _read_folder(value: object) -> str:
    try:
        return _read_path("source", value) if value else ""
    except _FaultError:
        return ""  # `source` is a remark in most files; only where it names a folder is it of use


def _check_roles(field: str, dialogue: list[tuple[Role, str]]) -> None:
    start = 1 if dialogue[0][0] == "system" else 0
    for number, (role, text) in enumerate(dialogue[start:], start=start + 1):
        expected = "user" if (number - start) % 2 else "assistant"
        if role != expected:
            raise _FaultError(field, f"turn {number}: expected the {_SPEAKER[expected]}, found the {_SPEAKER[role]}")
        if not text.strip():
            raise _FaultError(field, f"turn {number}: the {_SPEAKER[role]} says nothing")
    if dialogue[-1][0] != "assistant":
        raise _FaultError(field, f"ends with the {_SPEAKER[dialogue[-1][0]]}, not with an answer")


_SPEAKER = {"system": "system", "user": "human", "assistant": "assistant"}


def _count_placeholders(dialogue: list[tuple[Role, str]]) -> int:
    return sum(len(_PLACEHOLDER.findall(text)) for role, text in dialogue if role == "user")


def _group_media(
    field: str, kind: Literal["video", "image"], paths: list[str], num_placeholders: int, folder: str
) -> tuple[Media, ...]:
    if len(paths) == num_placeholders or (len(paths) == 1 and num_placeholders > 1):
        return tuple(Media(kind, (path,), folder) for path in paths)
    if not paths:
        return ()
    pictures = kind == "image" or all(path.lower().endswith(PICTURE_SUFFIXES) for path in paths)
    if len(paths) > 1 and num_placeholders == 1 and pictures:
        return (Media("video", tuple(paths), folder),)
    raise _FaultError(field, f"{len(paths)} {kind} path(s) but {num_placeholders} placeholder(s)")


def _place_media(field: str, dialogue: list[tuple[Role, str]], num_media: int) -> tuple[Turn, ...]:
    turns = []
    left = num_media
    for role, text in dialogue:
        if left and role == "user":
            pieces = _PLACEHOLDER.split(text, maxsplit=left)
            left -= len(pieces) - 1
            parts = [pieces[0], *(part for piece in pieces[1:] for part in (None, piece))]
            turns.append(Turn(role, tuple(part for part in parts if part != "")))
        else:
            turns.append(Turn(role, (text,)))
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    # JSON may spell half a surrogate pair, which no encoding can write.
    return text.isascii() or not _SURROGATE.search(text)


def _name_type(value: object) -> str:
    names = {type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
