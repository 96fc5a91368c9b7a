"""What people serve with who have no engine: `generate`, one request at a time or in static batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from valley.assistant.loading import Assistant
from valley.assistant.writing import Writer
from valley.serving.engine.batching import batching_engine
from valley.serving.engine.interface import Engine, EngineState, Finish, Generation, Piece
from valley.serving.engine.settings import EngineSettings

_MOMENT_S = 0.1


class _Generate:
    """transformers' `generate` on prompts of embeddings."""

    def __init__(self, assistant: Assistant, settings: EngineSettings) -> None:
        self._assistant, self._settings = assistant, settings
        self._num_running = 0

    @property
    def max_tokens(self) -> int:
        return self._settings.max_tokens

    def abort(self, generation_id: str) -> None:
        """It cannot be ended."""

    def check_health(self) -> None:
        """Nothing is known of it."""

    def state(self) -> EngineState:
        return EngineState(self._num_running, 0, 1, 0, 0)

    def close(self) -> None:
        """There is nothing to close."""

    def write(self, generations: Sequence[Generation]) -> list[list[int]]:
        """Returns the tokens of the answers, written as one batch."""
        torch.set_num_threads(self._settings.num_threads)  # of this thread
        prompts = [generation.prompt.embeds for generation in generations]
        flipped = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True)
        mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], batch_first=True)
        model: Any = self._assistant.model
        with torch.inference_mode():
            written = model.language_model.generate(
                inputs_embeds=flipped.flip(1),  # padded on the left
                attention_mask=mask.flip(1),
                do_sample=False,
                max_new_tokens=max(generation.decoding.max_tokens for generation in generations),
                min_new_tokens=min(generation.decoding.min_tokens for generation in generations) or None,
                eos_token_id=self._assistant.processor.stop_token_ids,
                pad_token_id=self._assistant.processor.tokenizer.pad_token_id,
            )
        ends = set(self._assistant.processor.stop_token_ids)
        return [_until(row.tolist(), ends) for row in written]

    def tell(self, tokens: list[int]) -> list[Piece | Finish]:
        """Returns the events of an answer that is complete."""
        writer = Writer(self._assistant.processor)
        text = writer.add(tokens) + writer.end()
        return [Piece(text, len(tokens)), Finish("stop", len(tokens), num_cached=0, queue_s=0.0, batch_size=1.0)]


class OneAtATime(_Generate):
    """`generate`, one request after the other; an answer is told when it is complete."""

    def __init__(self, assistant: Assistant, settings: EngineSettings) -> None:
        super().__init__(assistant, settings)
        self._turn = threading.Lock()

    async def generate(self, generation: Generation) -> AsyncIterator[Piece | Finish]:
        """Yields the answer at its end."""

        def write() -> list[int]:
            with self._turn:
                return self.write([generation])[0]

        for event in self.tell(await asyncio.to_thread(write)):
            yield event


class StaticBatches(_Generate):
    """`generate` on what has come together within a moment, as `serve.batch` collects it; all wait for the longest."""

    def __init__(self, assistant: Assistant, settings: EngineSettings) -> None:
        super().__init__(assistant, settings)
        self._turn = asyncio.Lock()
        self._waiting: list[tuple[Generation, asyncio.Future[list[int]]]] = []

    async def generate(self, generation: Generation) -> AsyncIterator[Piece | Finish]:
        """Yields the answer when its batch is complete."""
        written: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((generation, written))
        async with self._turn:
            if not written.done():
                await asyncio.sleep(_MOMENT_S)
                batch, self._waiting = self._waiting[: self._settings.slots], self._waiting[self._settings.slots :]
                answers = await asyncio.to_thread(self.write, [one for one, _ in batch])
                for (_, future), tokens in zip(batch, answers, strict=True):
                    future.set_result(tokens)
        for event in self.tell(await written):
            yield event


ENGINES: dict[str, tuple[str, Callable[[Assistant, EngineSettings], Engine]]] = {
    "generate": ("`generate`, one at a time", OneAtATime),
    "static": ("`generate`, static batches", StaticBatches),
    "valley": ("Valley's engine", batching_engine),
}
"""Name on the command line -> what tables call it, and what builds it."""


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends an answer, it included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
