"""A clip's tokens as bytes, and back.

    bf16    the tokens, row by row
    int8    a float32 scale for each channel, then the tokens divided by them and rounded

A pooled clip has its T global tokens and the mean of its frames' patches, T + P rows instead of T * (1 + P). It is read
back as T frames that all have that mean for patches, which is the same to v1.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt16
from torch import Tensor

from valley.features.identity import StoreHeader

LARGEST = 127
"""Of an int8, either way."""


def pack(tokens: Float[Tensor, "T N D"], header: StoreHeader) -> bytes:
    """Returns a clip's tokens, the global one of each frame first, as a store keeps them."""
    rows = tokens.detach().float().cpu()
    if header.pooled:
        rows = torch.cat([rows[:, 0], rows[:, 1:].mean(0)])
    rows = rows.reshape(-1, rows.shape[-1])
    if header.precision == "bf16":
        return rows.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    scales = rows.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return scales.numpy().tobytes() + (rows / scales).round().to(torch.int8).numpy().tobytes()


def unpack(packed: bytes | memoryview, num_frames: int, header: StoreHeader) -> UInt16[np.ndarray, "T N D"]:
    """Returns what was packed: the bits of bf16 tokens, for NumPy has no such numbers."""
    dim, num_patches = header.tower.dim, header.tower.num_patches
    content = np.frombuffer(packed, np.uint8)
    if header.precision == "bf16":
        rows = content.view(np.uint16).reshape(-1, dim)
    else:
        scales, values = content[: 4 * dim].view(np.float32), content[4 * dim :].view(np.int8).reshape(-1, dim)
        scaled = torch.from_numpy(values.astype(np.float32) * scales)
        rows = scaled.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if not header.pooled:
        return rows.reshape(num_frames, 1 + num_patches, dim)
    patches = np.broadcast_to(rows[num_frames:], (num_frames, num_patches, dim))
    return np.concatenate([rows[:num_frames, None], patches], axis=1)


def packed_bytes(num_frames: int, header: StoreHeader) -> int:
    """Returns how many bytes a clip of `num_frames` takes."""
    dim, num_patches = header.tower.dim, header.tower.num_patches
    num_rows = num_frames + num_patches if header.pooled else num_frames * (1 + num_patches)
    return 2 * num_rows * dim if header.precision == "bf16" else 4 * dim + num_rows * dim
