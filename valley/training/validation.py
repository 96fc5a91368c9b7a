"""How good the model is on samples it does not learn from: loss by source, and answers a person can read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
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
from valley.evaluation.metrics import is_right
from valley.evaluation.questions import Question, read_questions
from valley.model.processing import ValleyProcessor
from valley.training.engines.base import Engine
from valley.training.feed import Stream
from valley.training.tracking import metric_name

ACCURACY = "validation/accuracy"
"""Name of the curve of right answers; `/` and a kind follow in those of single kinds."""
MAX_ANSWER_TOKENS = 64
_CHOICE_TOKENS = 16
"""Longest answer to a question that has choices."""


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


class Exam:
    """Asks the same held-out questions each time, shared out over the ranks.

    Args:
        engine: holds the model.
        processor: turns tokens into text.
        loader: loads the held-out samples.
        stream: loads ahead.
        micro_batch: questions asked at once.
        max_questions: at most this many, spread over all records that are questions, the same whatever the seed.
    """

    def __init__(
        self,
        engine: Engine,
        processor: ValleyProcessor,
        loader: Loader,
        stream: Stream,
        *,
        micro_batch: int,
        max_questions: int,
    ) -> None:
        self._engine, self._processor, self._loader, self._stream = engine, processor, loader, stream
        self._width = micro_batch
        self._questions = dict(find_questions(loader, max_questions))
        self._kinds = sorted({question.kind for question in self._questions.values()})
        slots = np.array(list(self._questions), dtype=np.int64)
        self._slots = slots[engine.rank :: engine.world_size] if engine.replicates_weights else slots

    def __call__(self) -> dict[str, float]:
        """Returns the share of right answers, in all and by kind, by the names of their curves; every rank calls it."""
        asked, right = Counter[str](), Counter[str]()
        with self._engine.inference():
            for samples in self._stream(self._loader, self._slots, self._width):
                whole = [sample for sample in samples if sample.weight and not (sample.rejects or sample.cut_tokens)]
                prompts = [_prompt(self._loader, sample, last=True) for sample in whole]
                for prompt, (_, answer) in zip(prompts, self._answers(prompts), strict=True):
                    question = self._questions[prompt.sample.slot]
                    asked[question.kind] += 1
                    right[question.kind] += is_right(answer, question.answer, question.choices)
        counts = [float(count[kind]) for count in (asked, right) for kind in self._kinds]
        sums = self._engine.all_reduce_sum(counts)  # the same on all ranks when all ask everything
        totals = dict(zip(self._kinds, zip(*np.split(np.array(sums), 2), strict=True), strict=True))
        accuracy = {f"/{metric_name(kind)}": right / asked for kind, (asked, right) in totals.items() if asked}
        if accuracy:
            every = np.array(list(totals.values())).sum(0)
            accuracy[""] = every[1] / every[0]
        return {f"{ACCURACY}{kind}": float(share) for kind, share in accuracy.items()}

    def _answers(self, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
        return _generate(self._engine, self._processor, prompts, _CHOICE_TOKENS)


def find_questions(loader: Loader, max_questions: int) -> Iterator[tuple[int, Question]]:
    """Yields the slots of held-out records that are questions, with these: the same records whatever the seed."""
    manifest = loader.manifest
    read = [read_questions(source.path)[0] for source in manifest.sources]
    asked = [{question.record.id: question for question in questions} for questions in read]
    slots = {loader.order.row(slot): slot for slot in held_out_slots(loader, len(manifest)).tolist()}
    found = [
        (slots[row], question)
        for row in sorted(slots)
        if (question := asked[manifest.source_of(row)].get(manifest.record(row).id))
    ]
    if len(found) <= max_questions:
        yield from found
    else:
        yield from (found[index] for index in np.linspace(0, len(found) - 1, max_questions).round().astype(int))


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
        said = [_generate(engine, processor, [prompt], MAX_ANSWER_TOKENS)[0] for prompt in prompts]
    answers = [
        Answer(step, prompt.sample.sample_id, prompt.question, truth, answer)
        for prompt, (truth, answer) in zip(prompts, said, strict=True)
    ]
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


def _prompt(loader: Loader, sample: Sample, *, last: bool = False) -> Prompt:
    """Cuts a sample before its first or last answer, so that the prompt is, token by token, what training sees."""
    bounds = np.flatnonzero(np.diff(sample.labels != IGNORED, prepend=False, append=False))
    begin, end = (int(bound) for bound in (bounds[-2:] if last else bounds[:2]))
    messages = loader.manifest.record(sample.row).messages
    question = next(message for message in messages if message["role"] == "user")
    text = " ".join(part["text"] for part in question["content"] if part["type"] == "text")
    return Prompt(sample, text.strip(), begin, end)


def _generate(
    engine: Engine, processor: ValleyProcessor, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Lets the model answer prompts side by side, greedily; returns the truth and the answer of each."""
    if not prompts:
        return []
    model: Any = engine.model
    length = max(prompt.begin for prompt in prompts)
    input_ids = np.full((len(prompts), length), processor.tokenizer.pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(prompts), length), dtype=np.int64)
    frames, num_frames = [], []
    for row, prompt in enumerate(prompts):
        tokens, sample = prompt.sample.input_ids[: prompt.begin], prompt.sample
        input_ids[row, length - len(tokens) :], attention_mask[row, length - len(tokens) :] = tokens, 1
        num_frames.append(sample.num_frames[: int((tokens == model.config.image_start_token_id).sum())])
        frames.append(sample.frames[: int(num_frames[-1].sum())])
    pictures = frames_tensor(np.concatenate(frames)).to(engine.device)
    media = torch.from_numpy(np.concatenate(num_frames).astype(np.int64)).to(engine.device)
    generated = model.generate(
        input_ids=torch.from_numpy(input_ids).to(engine.device),
        attention_mask=torch.from_numpy(attention_mask).to(engine.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **processor.stopping,
        **({frames_argument(pictures): pictures, "num_frames": media} if len(media) else {}),
    )
    truths = [prompt.sample.input_ids[prompt.begin : prompt.end] for prompt in prompts]
    said = processor.post_process_image_text_to_text([*truths, *generated[:, length:]])
    return [(truth.strip(), answer.strip()) for truth, answer in zip(said, said[len(prompts) :], strict=False)]
