"""Record files in the paper's format (appendix B), as the makers of data write them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def conversations(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of instruction and answer as the format's list of `human` and `gpt` messages."""
    speakers = ("human", "gpt")
    return [{"from": speaker, "value": value} for turn in turns for speaker, value in zip(speakers, turn, strict=True)]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write a JSON array, unless the file holds it already; returns the path.

    A file that needs no change keeps its time stamp, and with it whatever was derived from it.
    """
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
