"""A small whole checkpoint, in a folder or an object store."""

from __future__ import annotations

from pathlib import Path

from valley.checkpoints.places import Place
from valley.checkpoints.writer import Writer


def write(root: Place, step: int, loss: float | None = None, content: str = "weights") -> Place:
    writer = Writer(root)
    writer.start(step, lambda folder: fill(folder, content), {"validation_loss": loss, "position": step})
    path = writer.finish()
    assert path is not None
    return path


def fill(folder: Path, content: str) -> None:
    (folder / "weights.bin").write_text(content)
    (folder / "nested").mkdir()
    (folder / "nested" / "state.bin").write_text(content * 2)
