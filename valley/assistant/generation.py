"""Tokens as the model writes them: it generates on a thread of its own, and whoever reads them may stop it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from valley.model.modeling import ValleyForConditionalGeneration


def generate_tokens(
    model: ValleyForConditionalGeneration, options: Mapping[str, Any], *, seed: int | None
) -> Iterator[Sequence[int]]:
    """Yields the tokens of one answer as they come; ending the iterator ends the generation.

    Args:
        model: what generates.
        options: arguments of its `generate`, the inputs of one prompt among them.
        seed: of what is drawn; None: the global generator.

    Raises:
        Exception: whatever `generate` raises, at the one who iterates.
    """
    queue: SimpleQueue[Sequence[int] | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        untyped: Any = model
        try:
            with _seeded(seed, model.device):
                untyped.generate(**options, streamer=_Outlet(queue), stopping_criteria=[_Stop(stop)])
            queue.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again below, on the thread that waits for it
            queue.put(error)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class _Outlet(BaseStreamer):
    """Puts generated tokens into a queue.

    Not transformers' `TextIteratorStreamer`: it begins to decode anew at each line, where LLaMA's tokenizer then
    swallows a space, and whoever reads it waits for ever when `generate` fails.
    """

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue = queue
        self._prompt_is_next = True

    def put(self, value: Int64[Tensor, "..."]) -> None:
        """Takes the prompt first, then each token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self._queue.put(value.view(-1).tolist())

    def end(self) -> None:
        """Nothing is held back."""


class _Stop(StoppingCriteria):
    """Ends the generation after the token that is being made."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(
        self, input_ids: Int64[Tensor, "B L"], scores: Float[Tensor, "..."], **kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """Returns for each row whether it is done."""
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
