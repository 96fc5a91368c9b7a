"""Continuous batching: answers join and leave the running batch at every step.

A thread of its own runs the language model, a step at a time. A step takes one token of each answer that is being
written, and at most `chunk_tokens` of prompts that are not taken in yet, in one pass. Whoever asked hears of it through
a queue of the event loop that it came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from valley.assistant.loading import Assistant
from valley.assistant.writing import Writer
from valley.errors import DeadlineError, EngineError, GenerationError, OverloadError
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor
from valley.serving.engine.backbone import check_positions, prepare_backbone
from valley.serving.engine.drawing import draw, new_generator
from valley.serving.engine.interface import EngineState, Finish, FinishReason, Generation, Piece
from valley.serving.engine.packing import pack_linear_layers
from valley.serving.engine.prefix import PrefixCache
from valley.serving.engine.settings import EngineSettings
from valley.serving.engine.slots import Chunk, Slots, Step

logger = logging.getLogger(__name__)

_CLOSE_WITHIN_S = 10.0


@dataclass(eq=False)
class _Answer:
    """One answer on its way.

    Attributes:
        tell: hands an event to whoever asked.
        asked_at: on the monotonic clock, as are the other times.
        slot: where its cache is; -1 while it waits.
        num_read: tokens in the cache.
        tokens: written so far; the last of them is not in the cache yet.
        batch_sizes: sum over its steps.
    """

    generation: Generation
    tell: Callable[[Piece | Finish | Exception], None]
    writer: Writer
    asked_at: float
    random: torch.Generator
    slot: int = -1
    num_read: int = 0
    num_cached: int = 0
    tokens: list[int] = field(default_factory=list)
    taken_at: float = 0.0
    batch_sizes: int = 0
    is_aborted: bool = False

    @property
    def is_reading(self) -> bool:
        """Its prompt is not taken in yet."""
        return not self.tokens

    @property
    def keys(self) -> np.ndarray:
        """What stands at each position of its cache."""
        written = np.array(self.tokens[: max(self.num_read - len(self.generation.prompt), 0)], dtype=np.int64)
        return np.concatenate([self.generation.prompt.keys, written])[: self.num_read]


class BatchingEngine:
    """Writes answers with a language model of any backbone that takes its attention from transformers' registry.

    The model is the engine's from then on: its attention is another one.

    Args:
        model: in evaluation mode, on the device it is to run on.
        processor: of the model.
        settings: how large.

    Raises:
        EngineError: this backbone computes something else in the engine than by itself.
    """

    def __init__(
        self, model: ValleyForConditionalGeneration, processor: ValleyProcessor, settings: EngineSettings
    ) -> None:
        self._language_model: Any = model.language_model
        self._processor = processor
        self._settings = settings
        self._device = model.device
        self._suppressed = torch.tensor(model.config.added_token_ids, device=self._device)
        self._ends = processor.stop_token_ids
        context = getattr(model.config.text_config, "max_position_embeddings", None) or settings.max_tokens
        self._max_tokens = min(settings.max_tokens, context)
        self._embed = model.get_input_embeddings()
        self._slots = Slots(settings.slots, self._max_tokens)
        self._prefixes = PrefixCache(settings.prefix_bytes)
        self._free = list(range(settings.slots))
        self._changed = threading.Condition()
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []
        self._known: dict[str, _Answer] = {}
        self._num_steps = self._num_tokens = 0
        self._moved_at = time.monotonic()
        self._is_closing = False
        check_positions(self._language_model.config, self._max_tokens)
        prepare_backbone(self._language_model, self._slots)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # For those who ask

    @property
    def max_tokens(self) -> int:
        """Longest prompt and answer together."""
        return self._max_tokens

    async def generate(self, generation: Generation) -> AsyncIterator[Piece | Finish]:
        """Yields an answer as it is written; see `Engine.generate`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Piece | Finish | Exception] = asyncio.Queue()

        def tell(event: Piece | Finish | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._submit(generation, tell)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            self.abort(generation.id)

    def abort(self, generation_id: str) -> None:
        """Ends a generation, wherever it stands."""
        with self._changed:
            if answer := self._known.get(generation_id):
                answer.is_aborted = True
                self._changed.notify()

    def check_health(self) -> None:
        """Raises EngineError when the thread is gone or has not moved for too long; see `Engine.check_health`."""
        if not self._thread.is_alive():
            raise EngineError("the engine's thread has ended")
        with self._changed:
            idle_s = time.monotonic() - self._moved_at if self._waiting or self._running else 0.0
        if idle_s > self._settings.stuck_after_s:
            raise EngineError(f"the engine has work and made no step for {idle_s:.0f} s")

    def state(self) -> EngineState:
        """Returns what it is doing now."""
        with self._changed:
            return EngineState(
                running=len(self._running),
                waiting=len(self._waiting),
                slots=self._settings.slots,
                steps=self._num_steps,
                tokens=self._num_tokens,
                prefix_bytes=self._prefixes.num_bytes,
            )

    def forget_prefixes(self) -> None:
        """Forgets the prompts before; while nothing is being written."""
        self._prefixes.clear()

    def close(self) -> None:
        """Ends every generation and the thread; one that is stuck is left to the end of the process."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_WITHIN_S)

    def _submit(self, generation: Generation, tell: Callable[[Piece | Finish | Exception], None]) -> None:
        length = len(generation.prompt) + generation.decoding.max_tokens
        if length > self._max_tokens:
            raise GenerationError(f"prompt and answer may take {self._max_tokens} tokens together, not {length}")
        answer = _Answer(
            generation,
            tell,
            Writer(self._processor, generation.decoding.stop),
            time.monotonic(),
            new_generator(generation.decoding),
        )
        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise EngineError("the engine has ended")
            if len(self._waiting) >= self._settings.max_waiting + len(self._free):
                raise OverloadError(f"{len(self._waiting)} answers are waiting already")
            if not self._waiting and not self._running:
                self._moved_at = time.monotonic()
            self._waiting.append(answer)
            self._known[generation.id] = answer
            self._changed.notify()

    # The thread

    def _run(self) -> None:
        torch.set_num_threads(self._settings.num_threads)
        try:
            with torch.inference_mode():
                while self._await_work():
                    self._let_go()
                    self._take_up()
                    if self._running:
                        self._advance()
        except BaseException as error:
            logger.exception("the engine has ended")
            self._end_all(EngineError(f"the engine has ended: {type(error).__name__}"))
            raise
        self._end_all(EngineError("the engine was closed"))

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._waiting or self._running)
            return not self._is_closing

    def _let_go(self) -> None:
        """Ends the answers that nobody wants any more, and those that took too long."""
        now = time.monotonic()
        with self._changed:
            answers = [*self._waiting, *self._running]
        for answer in answers:
            if answer.is_aborted:
                if answer.is_reading:
                    self._clean(answer)
                self._remove(answer)
            elif now - answer.asked_at > answer.generation.timeout_s:
                self._fail(answer, DeadlineError(f"no answer within {answer.generation.timeout_s:g} s"))

    def _take_up(self) -> None:
        """Gives free slots to those who wait, the longest waiting first."""
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
                answer.slot = self._free.pop(0)
                self._running.append(answer)
            answer.taken_at = time.monotonic()
            length, snapshot = self._prefixes.find(answer.generation.prompt.keys)
            if snapshot is not None:
                self._slots.copy_in(answer.slot, snapshot, length)
                answer.num_read = answer.num_cached = length

    def _advance(self) -> None:
        """One step of everything that runs; where it fails, of each answer by itself, so that only the culprit ends."""
        chunks = self._plan_chunks()
        writing = sorted((answer for answer in self._running if not answer.is_reading), key=lambda answer: answer.slot)
        try:
            self._step(chunks, writing)
        except Exception as error:  # noqa: BLE001 - whatever a backbone raises, the others go on
            logger.warning("a step of %d answers failed: %s", len(chunks) + len(writing), type(error).__name__)
            for answer, length in chunks:
                self._step_alone([(answer, length)], [])
            for answer in writing:
                self._step_alone([], [answer])

    def _step_alone(self, chunks: Sequence[tuple[_Answer, int]], writing: Sequence[_Answer]) -> None:
        try:
            self._step(chunks, writing)
        except Exception as error:
            (answer,) = [*(answer for answer, _ in chunks), *writing]
            logger.exception("%s failed", answer.generation.id)
            self._fail(answer, GenerationError(f"the model failed on this prompt: {type(error).__name__}"))

    def _plan_chunks(self) -> list[tuple[_Answer, int]]:
        """Which prompts the step takes in, and how much of each: the longest waiting first."""
        left = self._settings.chunk_tokens
        chunks = []
        for answer in self._running:
            if answer.is_reading and left > 0:
                length = min(len(answer.generation.prompt) - answer.num_read, left)
                chunks.append((answer, length))
                left -= length
        return chunks

    def _step(self, chunks: Sequence[tuple[_Answer, int]], writing: Sequence[_Answer]) -> None:
        """Passes the tokens through the model, and the next tokens on."""
        step = Step(
            slots=self._slots,
            chunks=[Chunk(answer.slot, answer.num_read, length) for answer, length in chunks],
            rows=[answer.slot for answer in writing],
            positions=[answer.num_read for answer in writing],
            device=self._device,
        )
        whole = [(answer, answer.num_read + length == len(answer.generation.prompt)) for answer, length in chunks]
        ends = np.cumsum([length for _, length in chunks]) - 1
        wanted = [int(end) for end, (_, is_whole) in zip(ends, whole, strict=True) if is_whole]
        first_row = int(ends[-1]) + 1 if chunks else 0
        wanted += range(first_row, first_row + len(writing))
        logits = self._language_model(
            inputs_embeds=self._embeds(chunks, writing),
            position_ids=step.position_ids,
            use_cache=False,
            logits_to_keep=torch.tensor(wanted or [0], device=self._device),
            step=step,
        ).logits[0]
        asking = [*(answer for answer, is_whole in whole if is_whole), *writing]
        drawn = self._draw(asking, logits) if asking else []
        # Nothing has changed so far but what slots hold: a step that failed may be done again.
        self._moved_at = time.monotonic()
        self._num_steps += 1
        for answer, length in chunks:
            answer.num_read += length
        for answer in writing:
            answer.num_read += 1
        for answer, token in zip(asking, drawn, strict=True):
            self._write(answer, token, len(asking))

    def _embeds(self, chunks: Sequence[tuple[_Answer, int]], writing: Sequence[_Answer]) -> Float[Tensor, "1 N H"]:
        parts = [
            answer.generation.prompt.embeds[answer.num_read : answer.num_read + length].to(self._device)
            for answer, length in chunks
        ]
        if writing:
            last = torch.tensor([answer.tokens[-1] for answer in writing], device=self._device)
            parts.append(self._embed(last))
        return torch.cat(parts)[None].to(self._language_model.dtype)

    def _draw(self, answers: Sequence[_Answer], logits: Float[Tensor, "B V"]) -> list[int | None]:
        """Returns the next token of each answer; None where its scores are not finite."""
        logits[:, self._suppressed] = float("-inf")
        for row, answer in enumerate(answers):
            if len(answer.tokens) < answer.generation.decoding.min_tokens:
                logits[row, self._ends] = float("-inf")
        tokens, usable = draw(
            logits, [answer.generation.decoding for answer in answers], [answer.random for answer in answers]
        )
        return [token if is_usable else None for token, is_usable in zip(tokens.tolist(), usable.tolist(), strict=True)]

    def _write(self, answer: _Answer, token: int | None, batch_size: int) -> None:
        """Adds a token to an answer, and ends it if it is complete."""
        if token is None:
            self._fail(answer, GenerationError("the model gave no finite scores for this prompt"))
            return
        try:
            if answer.is_reading:
                self._keep_prefix(answer)
            answer.tokens.append(token)
            answer.batch_sizes += batch_size
            self._num_tokens += 1
            self._tell(answer, token)
        except Exception as error:
            logger.exception("%s failed", answer.generation.id)
            self._fail(answer, GenerationError(f"the answer cannot be told: {type(error).__name__}"))

    def _tell(self, answer: _Answer, token: int) -> None:
        text = "" if token in self._ends else answer.writer.add([token])
        reason: FinishReason | None = None
        if token in self._ends or answer.writer.stopped:
            reason = "stop"
        elif len(answer.tokens) >= answer.generation.decoding.max_tokens:
            reason = "length"
        if reason is None:
            answer.tell(Piece(text, len(answer.tokens)))
            return
        answer.tell(Piece(text + answer.writer.end(), len(answer.tokens)))
        self._keep_prefix(answer)
        self._remove(answer)
        answer.tell(
            Finish(
                reason=reason,
                num_tokens=len(answer.tokens),
                num_cached=answer.num_cached,
                queue_s=answer.taken_at - answer.asked_at,
                batch_size=answer.batch_sizes / len(answer.tokens),
            )
        )

    def _keep_prefix(self, answer: _Answer) -> None:
        keys = answer.keys
        if self._prefixes.wants(keys):
            self._prefixes.add(keys, self._slots.copy_out(answer.slot, 0, len(keys)))

    def _fail(self, answer: _Answer, error: Exception) -> None:
        self._clean(answer)
        self._remove(answer)
        answer.tell(error)

    def _clean(self, answer: _Answer) -> None:
        """Empties the slot of an answer that never had finite scores: what is masked must be finite for the next."""
        if answer.slot >= 0:
            self._slots.clear(answer.slot)

    def _remove(self, answer: _Answer) -> None:
        with self._changed:
            self._known.pop(answer.generation.id, None)
            if answer in self._running:
                self._running.remove(answer)
                self._free = sorted([*self._free, answer.slot])
            elif answer in self._waiting:
                self._waiting.remove(answer)

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            self._is_closing = True
            answers = [*self._waiting, *self._running]
        for answer in answers:
            self._remove(answer)
            answer.tell(error)
        self._prefixes.clear()


def batching_engine(assistant: Assistant, settings: EngineSettings) -> BatchingEngine:
    """Returns an engine for a model that is the engine's from then on: packed, on a CPU, and with other attention."""
    if settings.pack_weights:
        pack_linear_layers(assistant.model.language_model)
    return BatchingEngine(assistant.model, assistant.processor, settings)
