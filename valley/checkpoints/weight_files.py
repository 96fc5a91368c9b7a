"""Weights in a folder, as Hugging Face lays them out: named tensors in one file or in shards, read one at a time."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from valley.errors import CheckpointError

SHARD_BYTES = 2 << 30
"""Size of the shards that are written."""

_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", "mm_projector*.bin")
"""Weight files by how they are called; the first pattern that fits any file counts, so no weight is read twice."""


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The named tensors of a folder. Only their names and shapes are held; `read` fetches one.

    Args:
        folder: one with `model*.safetensors`, or `pytorch_model*.bin`, or `mm_projector*.bin`.

    Attributes:
        folder: that folder.
        tensors: what is there, by name.

    Raises:
        CheckpointError: no such file, one that cannot be read, a shard that the index names is missing, or a name that
            two files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        for path in _weight_paths(folder):
            for name, stored in self._survey(path):
                if name in self.tensors:
                    raise CheckpointError(f"{folder}: {name} is in {self.tensors[name].path.name} and in {path.name}")
                self.tensors[name] = stored

    def read(self, name: str) -> Tensor:
        """Returns one tensor, on the CPU, in the precision it is stored in.

        Raises:
            CheckpointError: its file cannot be read.
        """
        path = self.tensors[name].path
        if path.suffix == ".bin":
            return self._open_bin(path)[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return tensor

    def _survey(self, path: Path) -> Iterator[tuple[str, Stored]]:
        if path.suffix == ".bin":
            for name, tensor in self._open_bin(path).items():
                yield name, Stored(path, tuple(tensor.shape), tensor.dtype)
            return
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    # An empty range reads no values, but tells torch's name for the precision.
                    dtype = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
                    yield name, Stored(path, tuple(part.get_shape()), dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def _open_bin(self, path: Path) -> Mapping[str, Tensor]:
        """Maps a pickled file into memory, the last one only; files of an age that cannot be mapped are read whole."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # so that a file that was read whole is gone before the next one comes
            try:
                found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{path}: cannot be read as weights alone: {error}") from error
            if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
                raise CheckpointError(f"{path}: expected named tensors, found something else")
            self._opened = path, found
        return self._opened[1]


def write_weights(
    folder: Path, specs: Mapping[str, Tensor], read: Callable[[str], Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors as Hugging Face's `model*.safetensors`, with no more than one shard of them in memory.

    Args:
        folder: where to.
        specs: what to write, by name; of these only shape and precision count (they may be on the meta device).
        read: returns a tensor by its name.
        shard_bytes: a shard ends before it would be larger than this.
    """
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and num_bytes + spec.nbytes > shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += spec.nbytes
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: read(name).to(specs[name].dtype).contiguous() for name in names}, folder / file, {"format": "pt"}
        )
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _weight_paths(folder: Path) -> list[Path]:
    for pattern in _PATTERNS:
        if paths := sorted(folder.glob(pattern)):
            break
    else:
        raise CheckpointError(f"{folder}: no weights here: expected {', '.join(_PATTERNS)}")
    for index in folder.glob(f"{pattern}.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of weights: {error}") from error
        if missing := sorted(named - {path.name for path in paths}):
            raise CheckpointError(f"{folder}: {index.name} names files that are not here: {', '.join(missing)}")
        paths = [path for path in paths if path.name in named]
    return paths
