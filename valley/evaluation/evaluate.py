"""Asks every question, and writes down what was answered and how much of it was right."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from valley.checkpoints.store import write_json
from valley.data.records import Media
from valley.data.storage import Root
from valley.errors import MediaError, SettingsError
from valley.evaluation.answerer import Answerer, ModelAnswerer
from valley.evaluation.metrics import format_scores, is_right, score
from valley.evaluation.questions import Question, read_questions
from valley.evaluation.settings import EvaluationSettings
from valley.media.decode import sample_clip

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
ANSWERS_FILE = "answers.json"


def run_evaluation(settings: EvaluationSettings) -> str:
    """Evaluates the model that the settings name; returns its scores as text.

    Raises:
        ValleyError: settings, model, data or storage cannot be used.
    """
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise SettingsError(["device: cuda, but this machine has no GPU that torch can use"])
    device = torch.device("cuda" if gpu else "cpu")
    answerer = ModelAnswerer(settings.model, device=device, max_new_tokens=settings.max_new_tokens)
    return evaluate(answerer, settings)


def evaluate(answerer: Answerer, settings: EvaluationSettings) -> str:
    """Asks `answerer` all questions and writes `summary.json` and `answers.json` into the output folder.

    A question whose medium cannot be used is left out and listed in the summary.

    Returns:
        A table of the scores by kind.

    Raises:
        SettingsError: there is nothing to ask.
        StorageError: storage failed on every try.
    """
    started_s = time.perf_counter()
    questions, broken = read_questions(settings.questions, settings.max_questions)
    rejects = [str(error) for error in broken]
    answers: list[dict[str, Any]] = []
    posed = _pose(questions, answerer, settings, rejects)
    while batch := list(islice(posed, settings.batch)):
        said = answerer([conversation for _, conversation in batch])
        answers += [_judge(question, answer) for (question, _), answer in zip(batch, said, strict=True)]
        logger.info("%d of %d questions answered", len(answers), len(questions))
    if not answers:
        raise SettingsError(
            [f"questions: {settings.questions}: nothing to ask: {'; '.join(rejects[:5]) or 'it is empty'}"]
        )
    scores = score((row["kind"], row["right"], len(row["choices"])) for row in answers)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ANSWERS_FILE, answers)
    summary = {
        "model": settings.model,
        "questions": settings.questions,
        "frames": settings.frames,
        "kinds": {
            row.kind: asdict(row) | {"accuracy": row.accuracy, "interval_95": list(row.interval)} for row in scores
        },
        "rejected": rejects,
        "seconds": round(time.perf_counter() - started_s, 3),
    }
    write_json(folder / SUMMARY_FILE, summary)
    return format_scores(scores)


def _pose(
    questions: Sequence[Question], answerer: Answerer, settings: EvaluationSettings, rejects: list[str]
) -> Iterator[tuple[Question, list[Any]]]:
    """Yields each question with its conversation, the frames in it; notes what cannot be used in `rejects`."""
    root = Root(settings.root or settings.questions.rpartition("/")[0])
    for question in questions:
        try:
            media = question.record.media if settings.frames != "none" else ()
            clips = iter([_read(medium, root, answerer, settings) for medium in media])
        except MediaError as error:
            rejects.append(f"{question.record.id}: {error}")
            continue
        yield (
            question,
            [
                {
                    "role": message["role"],
                    "content": [
                        part if part["type"] == "text" else _carrying(part["type"], next(clips))
                        for part in message["content"]
                        if part["type"] == "text" or settings.frames != "none"
                    ],
                }
                for message in question.prompt
            ],
        )


def _carrying(kind: str, frames: UInt8[np.ndarray, "T S S 3"]) -> dict[str, Any]:
    return {"type": kind, kind: frames if kind == "video" else frames[0]}


def _read(medium: Media, root: Root, answerer: Answerer, settings: EvaluationSettings) -> UInt8[np.ndarray, "T S S 3"]:
    """Returns the frames of a medium that the answerer wants; pictures of a clip one after the other.

    Raises:
        MediaError: it cannot be used.
        StorageError: storage failed on every try.
    """
    files = [root.read(root.find(medium.candidates(path))) for path in medium.paths]
    clips = [sample_clip(file, answerer.sampling, limits=settings.limits, **answerer.framing) for file in files]
    frames = np.concatenate([clip.pixels for clip in clips])
    if settings.frames == "shuffled":  # any order, the true one too: each order and its reverse are as likely
        frames = frames[np.random.default_rng(zlib.crc32(medium.paths[0].encode())).permutation(len(frames))]
    return frames


def _judge(question: Question, answer: str) -> dict[str, Any]:
    return {
        "id": question.record.id,
        "kind": question.kind,
        "pair": question.pair,
        "single_frame": question.single_frame,
        "duration_s": question.duration_s,
        "choices": list(question.choices),
        "truth": question.answer,
        "answer": answer,
        "right": is_right(answer, question.answer, question.choices),
    }
