"""Questions about videos and images whose answers are known, read from a data file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from valley.data.datafile import DataFileError, open_records
from valley.data.records import Message, Record, parse_record
from valley.errors import RecordError, SettingsError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        record: the dialogue and its media; its last turn is the true answer as a sentence.
        kind: what it is about, such as "colour".
        answer: the true choice.
        choices: all answers there are to choose from, different from each other.
        pair: names what it depends on: questions of one pair stand or fall together.
        single_frame: whether one frame of the clip suffices; None: not known.
        duration_s: of the clip; None: not known.
    """

    record: Record
    kind: str
    answer: str
    choices: tuple[str, ...]
    pair: str
    single_frame: bool | None = None
    duration_s: float | None = None

    @property
    def prompt(self) -> list[Message]:
        """The dialogue up to the answer that is asked for."""
        return self.record.messages[:-1]


def read_questions(path: str, max_questions: int | None = None) -> tuple[list[Question], list[RecordError]]:
    """Returns the questions of a data file, and what is wrong with the records that hold none.

    Args:
        path: a data file whose records also have `kind`, `answer` and `choices`, and may have `pair`, `single_frame`
            and `duration_s`.
        max_questions: stop after so many.

    Raises:
        SettingsError: it is no data file.
        StorageError: storage failed on every try.
    """
    questions: list[Question] = []
    rejects: list[RecordError] = []
    try:
        with tempfile.TemporaryDirectory() as scratch, open_records(path, Path(scratch)) as records:
            for position, raw in enumerate(records):
                if len(questions) == max_questions:
                    break
                try:
                    questions.append(_read_question(raw, position))
                except RecordError as error:
                    rejects.append(error)
    except (DataFileError, FileNotFoundError) as error:
        raise SettingsError([f"questions: {path}: {error}"]) from None
    return questions, rejects


def _read_question(raw: object, position: int) -> Question:
    if isinstance(raw, RecordError):  # not even JSON
        raise raw
    record = parse_record(raw, position, "questions")
    assert isinstance(raw, dict)  # what parse_record takes
    kind, answer, choices = (raw.get(key) for key in ("kind", "answer", "choices"))
    if not isinstance(kind, str):
        raise RecordError(record.id, "kind", "expected text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise RecordError(record.id, "choices", "expected a list of texts")
    if not isinstance(answer, str) or choices.count(answer) != 1:
        raise RecordError(record.id, "answer", "expected exactly one of the choices")
    pair = raw.get("pair") or (record.media[0].paths[0] if record.media else record.id)
    duration_s, single_frame = raw.get("duration_s"), raw.get("single_frame")
    return Question(
        record,
        kind,
        answer,
        tuple(choices),
        str(pair),
        single_frame if isinstance(single_frame, bool) else None,
        float(duration_s) if isinstance(duration_s, int | float) else None,
    )
