"""Whoever answers questions: a saved model, or a stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from valley.errors import ModelError
from valley.media.sampling import Sampling
from valley.model.build import build_model
from valley.model.processing import load_saved_processor
from valley.model.settings import ModelSettings
from valley.model.video_processing import Framing


@runtime_checkable
class Answerer(Protocol):
    """Answers questions about clips."""

    @property
    def sampling(self) -> Sampling:
        """Which frames of a clip it looks at."""
        ...

    @property
    def framing(self) -> Framing:
        """What these frames have to look like."""
        ...

    def __call__(self, conversations: Sequence[Sequence[Any]]) -> list[str]:
        """Returns the next turn of each conversation.

        Args:
            conversations: chat messages whose `video` parts carry uint8 frames `[T, S, S, 3]`, `image` parts one frame.
        """
        ...


class ModelAnswerer:
    """A saved Valley model that answers greedily.

    Args:
        path: its folder.
        device: where to compute, on a GPU in bf16.
        max_new_tokens: longest answer.

    Raises:
        ModelError: no model can be loaded from there.
    """

    def __init__(self, path: str, *, device: torch.device, max_new_tokens: int) -> None:
        try:
            self._processor = load_saved_processor(path)
        except ModelError as error:
            raise ModelError(f"model: {error}") from error
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model: Any = build_model(ModelSettings(path=path), seed=0, dtype=dtype)
        self._model = model.eval().to(device)
        self._device, self._max_new_tokens = device, max_new_tokens

    @property
    def sampling(self) -> Sampling:
        """The frames that it was trained on."""
        return self._processor.sampling

    @property
    def framing(self) -> Framing:
        """The tower's size."""
        return self._processor.framing

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[Sequence[Any]]) -> list[str]:
        """See `Answerer`."""
        inputs = self._processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(self._device)
        generated = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, **self._processor.stopping
        )
        answers = generated[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in self._processor.post_process_image_text_to_text(answers)]
