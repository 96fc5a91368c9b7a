"""What an engine is: prompts of embeddings in, streams of text out. Another engine implements `Engine`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_tokens: longest answer.
        temperature: of the draw of each token; 0: always the likeliest.
        top_p: the draw is among the likeliest tokens that together have this probability.
        seed: of the draw; None: another one each time.
        stop: texts that end the answer; they are not part of it.
        min_tokens: the model may not end the answer before; stop texts may.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as the language model takes it.

    Attributes:
        embeds: of its tokens, visual ones among them.
        keys: what stands at each position: a token's id, or a negative number made from the medium's digest. Prompts
            whose keys begin alike have the same attention cache there.
    """

    embeds: Float[Tensor, "L H"]
    keys: Int64[np.ndarray, " L"]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Generation:
    """One answer that is asked for.

    Attributes:
        id: by which it can be aborted.
        prompt: what it answers.
        decoding: how.
        timeout_s: when it is given up, from now.
    """

    id: str
    prompt: Prompt
    decoding: Decoding
    timeout_s: float = float("inf")


@dataclass(frozen=True)
class Piece:
    """More of an answer; the text may be empty where tokens make no certain text yet.

    Attributes:
        text: what was added.
        num_tokens: tokens so far.
    """

    text: str
    num_tokens: int


@dataclass(frozen=True)
class Finish:
    """The end of an answer, and what it took.

    Attributes:
        reason: `stop` where the model or a stop text ended it, `length` where `max_tokens` did.
        num_tokens: of the answer, its end mark included.
        num_cached: tokens of the prompt whose attention cache was there already.
        queue_s: until the engine took it up.
        batch_size: answers that were written in the same steps, on average.
    """

    reason: FinishReason
    num_tokens: int
    num_cached: int
    queue_s: float
    batch_size: float


@dataclass(frozen=True)
class EngineState:
    """What an engine is doing.

    Attributes:
        running: answers being written.
        waiting: answers that wait for room.
        slots: answers that can be written at once.
        steps: passes through the language model since the start.
        tokens: written since the start.
        prefix_bytes: memory of the prompts that are kept.
    """

    running: int
    waiting: int
    slots: int
    steps: int
    tokens: int
    prefix_bytes: int = 0


class Engine(Protocol):
    """Writes answers, several at once."""

    @property
    def max_tokens(self) -> int:
        """Longest prompt and answer together."""

    def generate(self, generation: Generation) -> AsyncIterator[Piece | Finish]:
        """Yields an answer as it is written, and how it ended. Closing the iterator ends the generation.

        Raises:
            OverloadError: too many wait already.
            DeadlineError: `timeout_s` has passed.
            GenerationError: the model failed on this prompt.
            EngineError: the engine is gone.
        """

    def abort(self, generation_id: str) -> None:
        """Ends a generation, wherever it stands; one that is unknown is no error."""

    def check_health(self) -> None:
        """Does nothing while the engine moves.

        Raises:
            EngineError: it is gone, or has work and has not moved for too long.
        """

    def state(self) -> EngineState:
        """Returns what it is doing now."""

    def close(self) -> None:
        """Ends every generation and gives the memory back."""
