"""The state of every random generator of a process, as tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from valley.checkpoints.places import Place


def rng_state() -> dict[str, Tensor]:
    """Returns the states of Python's, NumPy's and torch's generators (CPU and this process's GPU)."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    inner = numpy_state["state"]
    tensors: dict[str, Tensor] = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(inner["key"], dtype=np.int64)),
        "numpy_position": torch.tensor([inner["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(file: Place) -> None:
    """Puts the generators back to the states that `rng_state` returned, saved in `file`."""
    tensors = load(file.read_bytes())
    version, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy_position"].tolist()
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
