"""How good the model is on samples it does not learn from: loss by source, and answers a person can read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from valley.checkpoints.store import write_json
from valley.data.collate import IGNORED, Sample, collate, frames_argument, frames_tensor
from valley.data.loading import Loader
from valley.data.order import EMPTY
from valley.data.rejects import Reject
from valley.model.processing import ValleyProcessor
from valley.training.engines.base import Engine
from valley.training.feed import Stream
from valley.training.tracking import metric_name

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        loss: mean over all supervised tokens of the held-out samples; NaN when none could be used.
        source_losses: the same for each source that has any.
        num_samples: samples looked at.
        rejects: held-out samples that this rank could not use.
    """

    loss: float
    source_losses: dict[str, float]
    num_samples: int
    rejects: tuple[Reject, ...] = ()

    def __str__(self) -> str:
        sources = ", ".join(f"{name} {loss:.4f}" for name, loss in self.source_losses.items())
        return f"validation loss {self.loss:.4f} on {self.num_samples} sample(s) ({sources})"

    def metrics(self) -> dict[str, float]:
        """Returns the losses by the names of their curves."""
        sources = {f"validation/loss/{metric_name(name)}": loss for name, loss in self.source_losses.items()}
        return {"validation/loss": self.loss, **sources}


@dataclass(frozen=True)
class Answer:
    """What the model says about a held-out sample, beside the truth."""

    step: int
    sample_id: str
    question: str
    truth: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A held-out sample whose first question the model is asked.

    Attributes:
        sample: the whole sample.
        question: what the person says first.
        begin: where the true answer begins in its tokens, and the prompt ends.
        end: where that answer ends.
    """

    sample: Sample
    question: str
    begin: int
    end: int


class Validator:
    """Looks at the same held-out samples each time, shared out over the ranks.

    Args:
        engine: computes losses.
        loader: loads the held-out samples; its order says which slot holds which.
        stream: loads ahead.
        pad_id: the token that pads.
        micro_batch: rows of a batch.
        max_samples: at most this many samples, in proportion to the sources.
    """

    def __init__(
        self, engine: Engine, loader: Loader, stream: Stream, *, pad_id: int, micro_batch: int, max_samples: int
    ) -> None:
        self._engine, self._loader, self._stream, self._pad_id = engine, loader, stream, pad_id
        self._width = micro_batch
        self._batches = self._share(held_out_slots(loader, max_samples))

    def __call__(self) -> Validation:
        """Measures; every rank calls it, and goes through as many batches (a must under ZeRO-3)."""
        names = [source.name for source in self._loader.manifest.sources]
        sums = np.zeros((len(names), 3))  # token losses, supervised tokens, samples
        rejects: list[Reject] = []
        with self._engine.inference():
            for samples in self._stream(self._loader, np.concatenate(self._batches), self._width):
                rejects += [reject for sample in samples for reject in sample.rejects]
                batch = collate(samples, self._pad_id).to(self._engine.device)
                loss = self._engine.loss(batch, 1).item()
                if (source := max(batch.sources)) >= 0:
                    sums[source] += loss, batch.num_supervised, sum(row >= 0 for row in batch.sources)
        totals = np.array(self._engine.all_reduce_sum(sums.ravel().tolist())).reshape(sums.shape)
        losses = {name: row[0] / row[1] for name, row in zip(names, totals, strict=True) if row[1]}
        tokens = totals[:, 1].sum()
        loss = float(totals[:, 0].sum() / tokens) if tokens else math.nan
        return Validation(loss, losses, int(totals[:, 2].sum()), tuple(rejects))

    def _share(self, slots: Int64[np.ndarray, " N"]) -> list[Int64[np.ndarray, " width"]]:
        """This rank's batches, each of one source; ranks that come out short get empty ones."""
        rows = np.array([self._loader.order.row(int(slot)) for slot in slots])
        sources = self._loader.manifest.row_sources[rows]
        batches = []
        for source in np.unique(sources):
            members = slots[sources == source]
            for start in range(0, len(members), self._width):
                batch = np.full(self._width, EMPTY, dtype=np.int64)
                part = members[start : start + self._width]
                batch[: len(part)] = part
                batches.append(batch)
        world_size = self._engine.world_size
        while len(batches) % world_size:
            batches.append(np.full(self._width, EMPTY, dtype=np.int64))
        return batches[self._engine.rank :: world_size]


def held_out_slots(loader: Loader, max_samples: int) -> Int64[np.ndarray, " N"]:
    """Returns the slots of the held-out samples that are looked at: a seeded draw, the same each time."""
    slots = np.flatnonzero(loader.order.rows(0) != EMPTY)
    if len(slots) <= max_samples:
        return slots
    return slots[np.linspace(0, len(slots) - 1, max_samples).round().astype(np.int64)]


def load_prompts(loader: Loader, num_prompts: int) -> list[Prompt]:
    """Loads the held-out samples whose first questions are asked at every validation, spread over all of them."""
    samples = (loader.load(slot) for slot in held_out_slots(loader, num_prompts).tolist())
    return [_prompt(loader, sample) for sample in samples if sample.weight]


def answer_prompts(engine: Engine, processor: ValleyProcessor, prompts: Sequence[Prompt], step: int) -> list[Answer]:
    """Lets the model answer.

    Rank 0 does it; under ZeRO-3, where a forward pass needs every rank, all do the same.

    Args:
        engine: holds the model.
        processor: turns tokens into text.
        prompts: the same on all ranks.
        step: steps taken.

    Returns:
        One answer a prompt, on rank 0; none on others.
    """
    if engine.rank != 0 and engine.replicates_weights:
        return []
    with engine.inference():
        answers = [_answer(engine, processor, prompt, step) for prompt in prompts]
    return answers if engine.rank == 0 else []


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Adds answers to a JSON table of columns and rows, as pandas (`orient="split"`) and MLflow read it."""
    columns = [field.name for field in fields(Answer)]
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"columns": columns, "data": []}
    table["data"] += [list(asdict(answer).values()) for answer in answers]
    write_json(path, table)


def drop_answers(path: Path, first_step: int) -> None:
    """Removes the answers that were given after `first_step`, which will be given again."""
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        table["data"] = [row for row in table["data"] if row[table["columns"].index("step")] <= first_step]
        write_json(path, table)


def _prompt(loader: Loader, sample: Sample) -> Prompt:
    """Cuts a sample before its first answer, so that the prompt is, token by token, what training sees."""
    supervised = np.append(sample.labels != IGNORED, False)
    begin = int(supervised.argmax())
    end = begin + int(supervised[begin:].argmin())
    messages = loader.manifest.record(sample.row).messages
    question = next(message for message in messages if message["role"] == "user")
    text = " ".join(part["text"] for part in question["content"] if part["type"] == "text")
    return Prompt(sample, text.strip(), begin, end)


def _answer(engine: Engine, processor: ValleyProcessor, prompt: Prompt, step: int) -> Answer:
    model: Any = engine.model
    sample = prompt.sample
    input_ids = torch.from_numpy(sample.input_ids[None, : prompt.begin]).to(engine.device)
    num_media = int((input_ids == model.config.image_start_token_id).sum())
    num_frames = torch.from_numpy(sample.num_frames[:num_media])
    frames = frames_tensor(sample.frames[: int(num_frames.sum())]).to(engine.device)
    media = {frames_argument(frames): frames, "num_frames": num_frames.to(engine.device)}
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        **processor.stopping,
        **(media if num_media else {}),
    )
    truth, answer = processor.post_process_image_text_to_text(
        [sample.input_ids[prompt.begin : prompt.end], generated[0, prompt.begin :]]
    )
    return Answer(step, sample.sample_id, prompt.question, truth.strip(), answer.strip())
