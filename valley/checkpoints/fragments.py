"""Optimizer state as named pieces: written by any number of ranks, read by any other number.

ZeRO cuts the flat optimizer state wherever the number of ranks happens to put the knife. Here every piece is stored
under its parameter's name with its offset in that parameter, so a reader asks for the range it needs and gets it,
whoever wrote it. Files are safetensors: nothing in them is executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from valley.errors import CheckpointError

MASTER, MOMENTUM, VARIANCE = "master", "exp_avg", "exp_avg_sq"
"""What is kept of a parameter: its fp32 value and AdamW's two averages."""

_STEPS = "optimizer_steps"


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
    path: Path
    key: str


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

    def __init__(self, paths: Sequence[Path]) -> None:
        self.optimizer_steps = 0
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self.optimizer_steps = int(file.metadata()[_STEPS])
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    kind, offset, name = key.split("/", 2)
                    (length,) = file.get_slice(key).get_shape()
                    self._pieces[name, kind].append(_Piece(int(offset), length, path, key))

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
            with safe_open(piece.path, framework="pt") as file:
                part = file.get_slice(piece.key)[begin - piece.offset : end - piece.offset]
            values[begin - offset : end - offset] = part
            missing -= end - begin
        if missing:
            raise CheckpointError(
                f"{name}: {kind}: {missing} of {length} values from {offset} on are not in the checkpoint"
            )
        return values
