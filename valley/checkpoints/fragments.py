"""Optimizer state as named pieces: written by any number of ranks, read by any other number.

ZeRO cuts the flat optimizer state wherever the number of ranks happens to put the knife. Here every piece is stored
under its parameter's name with its offset in that parameter, so a reader asks for the range it needs and gets it,
whoever wrote it. Files are safetensors: nothing in them is executed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from valley.checkpoints.places import Place, read_range
from valley.errors import CheckpointError

MASTER, MOMENTUM, VARIANCE = "master", "exp_avg", "exp_avg_sq"
"""What is kept of a parameter: its fp32 value and AdamW's two averages."""

_STEPS = "optimizer_steps"
_FLOAT_BYTES = 4
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter's flattened state.

    Attributes:
        name: the parameter's name in the model.
        offset: where the range begins in the flattened parameter.
        tensors: by kind (`MASTER`, `MOMENTUM`, `VARIANCE`), fp32 [N], all of one length.
    """

    name: str
    offset: int
    tensors: Mapping[str, Float[Tensor, " N"]]


class _Piece(NamedTuple):
    offset: int
    length: int
    file: Place
    begin: int
    """Where its bytes begin in the file."""


def copy_fragments(fragments: Iterable[Fragment]) -> dict[str, Float[Tensor, " N"]]:
    """Returns copies of one rank's share of the state, in CPU memory; no range may come twice over all ranks."""
    return {
        f"{kind}/{fragment.offset}/{fragment.name}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }


def write_fragments(path: Path, copies: dict[str, Float[Tensor, " N"]], optimizer_steps: int) -> None:
    """Writes one rank's fragments to a safetensors file.

    Args:
        path: the file.
        copies: what `copy_fragments` returned.
        optimizer_steps: updates that the optimizer had made.
    """
    save_file(copies, path, metadata={_STEPS: str(optimizer_steps)})


class FragmentReader:
    """The fragments of all ranks of a checkpoint, read by range.

    Attributes:
        optimizer_steps: updates that the optimizer had made.
    """

    def __init__(self, files: Sequence[Place]) -> None:
        self.optimizer_steps = 0
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for file in files:
            header, data_begin = _header(file)
            self.optimizer_steps = int(header.pop("__metadata__")[_STEPS])
            for key, entry in header.items():
                kind, offset, name = key.split("/", 2)
                (length,), (begin, _) = entry["shape"], entry["data_offsets"]
                self._pieces[name, kind].append(_Piece(int(offset), length, file, data_begin + begin))

    def read(self, name: str, kind: str, offset: int, length: int) -> Float[Tensor, " {length}"]:
        """Returns the values of `kind` of parameter `name` from `offset` on, fp32 on the CPU.

        Raises:
            CheckpointError: part of the range was not written.
        """
        values = torch.empty(length)
        missing = length
        for piece in self._pieces.get((name, kind), []):
            begin, end = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if begin >= end:
                continue
            bounds = (piece.begin + _FLOAT_BYTES * (at - piece.offset) for at in (begin, end))
            part = bytearray(read_range(piece.file, *bounds))
            values[begin - offset : end - offset] = torch.frombuffer(part, dtype=torch.float32)
            missing -= end - begin
        if missing:
            raise CheckpointError(
                f"{name}: {kind}: {missing} of {length} values from {offset} on are not in the checkpoint"
            )
        return values


def _header(file: Place) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the tensors' bytes begin: 8 bytes of length, JSON, bytes.

    Read by hand, for the library opens local files only, and whole ones.
    """
    length = int.from_bytes(read_range(file, 0, _LENGTH_BYTES), "little")
    header: dict[str, Any] = json.loads(read_range(file, _LENGTH_BYTES, _LENGTH_BYTES + length))
    return header, _LENGTH_BYTES + length
