"""Names for weights that do not train: where they came from, and a hash of what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrozenPart:
    """One frozen part of a model, named instead of written again.

    Attributes:
        source: the path, hub name or tag it was loaded from.
        sha256: of names, shapes, dtypes and bytes of its tensors.
        num_parameters: how many numbers it holds.
    """

    source: str
    sha256: str
    num_parameters: int


def name_frozen(source: str, tensors: Iterable[tuple[str, Tensor]]) -> FrozenPart:
    """Names a frozen part by its source and the content of its tensors.

    Each tensor is hashed on its own thread (hashing releases the interpreter's lock), then the hashes in order of name.
    """
    ordered = sorted(tensors, key=lambda item: item[0])
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(lambda item: _hash_tensor(*item), ordered))
    return FrozenPart(source, hashlib.sha256(b"".join(digests)).hexdigest(), sum(t.numel() for _, t in ordered))


def _hash_tensor(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
