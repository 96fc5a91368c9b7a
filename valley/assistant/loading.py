"""A saved model and its processor, ready to be asked."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from valley.model.build import load_saved
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor, load_saved_processor


@dataclass(frozen=True)
class Assistant:
    """A model and its processor.

    Attributes:
        model: in evaluation mode, on the device it answers on.
        processor: samples, frames and tokenises as the model was trained.
    """

    model: ValleyForConditionalGeneration
    processor: ValleyProcessor


def load(
    path: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Assistant:
    """Loads a saved model.

    Args:
        path: its folder, the folder of the run that made it, or a name on a hub.
        device: where it answers; None: the GPU, if there is one.
        dtype: of its weights; None: what they were saved in.

    Raises:
        ModelError: there is none, it cannot be read, or it is a checkpoint that has to be exported first.
    """
    processor = load_saved_processor(os.fspath(path))
    model = load_saved(os.fspath(path), dtype="auto" if dtype is None else dtype)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Assistant(model.eval(), processor)  # type: ignore[no-untyped-call]  # transformers
