"""Checkpoints in a folder or an object store: complete, or ignored.

    checkpoints/
      step-00000500/
        rank-00000/        what rank 0 wrote, and `hashes.json` of it
        rank-00001/        …
        manifest.json      comes last, by rename: its being there makes the checkpoint complete

Every rank hashes its own files. Rank 0 gathers the hashes into the manifest after all are done (`writer.py`), so a
crash at any moment leaves either the whole checkpoint or a folder without a manifest, which nothing reads and the next
pruning removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valley.checkpoints.places import (
    Place,
    children,
    files_below,
    read_text,
    remove,
    size_of,
    sync,
    sync_tree,
    to_fill,
    write_whole,
)
from valley.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
HASHES = "hashes.json"
WEIGHTS_FILE = "weights.safetensors"
"""What trains, whole, by its names in the model; rank 0 writes it."""
FORMAT = 1
_PREFIX = "step-"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileHash:
    """What one file of a checkpoint must be."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its manifest tells it.

    Attributes:
        path: its folder.
        step: optimizer steps taken; the step to go on with.
        world_size: ranks that wrote it.
        files: by path relative to the folder.
        info: whatever the writer put in: position, settings, validation loss, frozen parts.
    """

    path: Place
    step: int
    world_size: int
    files: Mapping[str, FileHash]
    info: Mapping[str, Any]

    @property
    def validation_loss(self) -> float | None:
        """The loss that decides which checkpoint is the best; None when it was not measured."""
        return self.info.get("validation_loss")

    def rank_folder(self, rank: int) -> Place:
        """The folder that `rank` wrote."""
        return _rank_folder(self.path, rank)


def folder_of(root: Place, step: int) -> Place:
    """Returns the folder of the checkpoint after `step` steps."""
    return root / f"{_PREFIX}{step:08d}"


def clear(folder: Place) -> None:
    """Makes a checkpoint's folder anew, without what an earlier attempt left."""
    _discard(folder)
    if isinstance(folder, Path):
        folder.mkdir(parents=True)


def write_rank(folder: Place, rank: int, write_files: Callable[[Path], None]) -> None:
    """Writes and hashes one rank's files.

    Args:
        folder: the checkpoint's.
        rank: whose files.
        write_files: writes them into the folder it is given.
    """
    own = _rank_folder(folder, rank)
    with to_fill(own) as filled:
        write_files(filled)
        hashes = {
            f"{own.name}/{path.relative_to(filled).as_posix()}": asdict(FileHash(hash_file(path), path.stat().st_size))
            for path in files_below(filled)
        }
    write_json(own / HASHES, hashes)


def all_written(folder: Place, world_size: int) -> bool:
    """Returns whether every rank has written and hashed its files."""
    return all(size_of(_rank_folder(folder, rank) / HASHES) is not None for rank in range(world_size))


def write_manifest(folder: Place, step: int, world_size: int, info: Mapping[str, Any]) -> None:
    """Completes a checkpoint whose ranks have all written.

    Args:
        folder: the checkpoint's.
        step: optimizer steps taken.
        world_size: number of ranks.
        info: what the manifest says besides; must fit JSON.
    """
    files: dict[str, Any] = {}
    for rank in range(world_size):
        files |= json.loads(read_text(_rank_folder(folder, rank) / HASHES))
    content = {"format": FORMAT, "step": step, "world_size": world_size, "files": files, "info": dict(info)}
    write_json(folder / MANIFEST, content)


def steps_in(root: Place) -> Iterator[tuple[int, Place]]:
    """Yields (step, folder) of whatever looks like a checkpoint, complete or not, the newest first."""
    found = [(int(number), path) for path in children(root) if (number := _number(path.name)).isdigit()]
    yield from sorted(found, key=lambda entry: entry[0], reverse=True)


def read(path: Place) -> Checkpoint:
    """Reads a checkpoint's manifest and looks whether its files have their sizes.

    Raises:
        CheckpointError: no manifest (the checkpoint was never completed), or a file is missing or has another size.
    """
    try:
        manifest = json.loads(read_text(path / MANIFEST))
        files = {name: FileHash(**entry) for name, entry in manifest["files"].items()}
        checkpoint = Checkpoint(path, manifest["step"], manifest["world_size"], files, manifest["info"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}: the checkpoint is not complete") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest: {error}") from error
    for name, expected in files.items():
        file = path / name
        if (found := size_of(file)) != expected.num_bytes:
            raise CheckpointError(f"{file}: expected {expected.num_bytes} bytes, found {found}")
    return checkpoint


def verify(checkpoint: Checkpoint, *, part: int = 0, parts: int = 1) -> None:
    """Compares the files of a checkpoint with their hashes.

    Args:
        checkpoint: as `read` returned it.
        part: which part of the files, where several ranks do it together.
        parts: how many parts there are.

    Raises:
        CheckpointError: a file is not what was written.
    """
    for name in sorted(checkpoint.files)[part::parts]:
        expected = checkpoint.files[name].sha256
        if (found := hash_file(checkpoint.path / name)) != expected:
            raise CheckpointError(f"{checkpoint.path / name}: expected sha256 {expected}, found {found}")


def newest_complete(root: Place) -> Checkpoint | None:
    """Returns the newest checkpoint below `root` that is whole, its hashes compared; None when there is none."""
    for checkpoint in complete(root):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
        else:
            return checkpoint
    return None


def disown(folder: Place) -> None:
    """Makes a checkpoint that turned out to be damaged an incomplete one, which nothing counts and nothing reads."""
    remove(folder / MANIFEST)


def best_complete(root: Place) -> Checkpoint | None:
    """Returns the complete checkpoint of the lowest validation loss, the newer of equals; None when none has one."""
    measured = [(c.validation_loss, -c.step, c) for c in complete(root) if c.validation_loss is not None]
    finite = [entry for entry in measured if math.isfinite(entry[0])]
    return min(finite, key=lambda entry: entry[:2])[2] if finite else None


def prune(root: Place, keep_last: int) -> list[Place]:
    """Removes all but the newest `keep_last` complete checkpoints and the best, and what was never completed.

    Incomplete folders newer than the newest complete checkpoint stay: they may be in the making.

    Returns:
        The folders removed.
    """
    whole = complete(root)
    if not whole:
        return []
    best = best_complete(root)
    kept = {str(c.path) for c in whole[:keep_last]} | ({str(best.path)} if best else set())
    doomed = [path for step, path in steps_in(root) if str(path) not in kept and step <= whole[0].step]
    for path in doomed:
        _discard(path)
    return doomed


def set_aside(folder: Path) -> Path | None:
    """Moves what an earlier run made out of the way, over what was moved before.

    Args:
        folder: its checkpoints, or its model.

    Returns:
        Where it is now; None when there is nothing.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    aside = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def publish(path: Path, write_files: Callable[[Path], None]) -> Path:
    """Writes a folder beside `path` and renames it there, so that `path` is never half-written.

    An earlier folder of that name is replaced.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_files(partial)
    sync_tree(partial)
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return path


def hash_file(path: Place) -> str:
    """Returns the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Place, content: object) -> None:
    """Writes JSON: the file is the old one or the new one, never part of one."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))


def complete(root: Place) -> list[Checkpoint]:
    """Returns the checkpoints below `root` that have a manifest and all their files, the newest first."""
    found = []
    for _, path in steps_in(root):
        try:
            found.append(read(path))
        except CheckpointError as error:
            logger.debug("not complete: %s", error)
    return found


def _number(name: str) -> str:
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else ""


def _rank_folder(folder: Place, rank: int) -> Place:
    return folder / f"rank-{rank:05d}"


def _discard(folder: Place) -> None:
    """Removes a checkpoint, its manifest first: half-removed is incomplete."""
    disown(folder)
    remove(folder)
