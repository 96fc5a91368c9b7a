"""Every error Valley raises on purpose, in one tree.

    ValleyError
    ├── SettingsError        a wrong setting; lists every problem at once
    ├── MediaError           one media file cannot be used: becomes a row of the rejects table
    │   ├── MissingMediaError       no such file
    │   ├── EmptyMediaError         zero bytes, or not one frame in it
    │   ├── UnsupportedMediaError   not a video or image we read: playlist, script, text, unknown container or codec
    │   ├── DamagedMediaError       truncated or corrupt
    │   ├── MediaLimitError         larger or longer than the limits allow
    │   ├── DecodeTimeoutError      the decoder passed its deadline
    │   │   └── DecoderDiedError    the decoder died
    │   ├── RefusedMediaError       a reference that is malformed, or that policy forbids to follow
    │   ├── UnreachableMediaError   the host it is on failed, or has no such file
    │   ├── FetchTimeoutError       it was not there within the deadline
    │   └── FetchBusyError          too many are being fetched already
    ├── RecordError          one record of a data file cannot be used: becomes a row of the rejects table
    ├── StorageError         storage failed again and again: the job stops (never a bad sample)
    ├── RejectLimitError     more samples were rejected than `data.max_rejected` allows
    ├── DivergedError        loss or gradient is not finite
    ├── ModelError           a tower, backbone, template or tokenizer that cannot be used
    ├── CheckpointError      a checkpoint is missing, incomplete or does not fit
    ├── TrackingError        MLflow cannot be used as configured
    ├── ClusterError         the cluster cannot run what was asked
    ├── ComparisonError      trials of a comparison failed
    └── ServingError         one request cannot be answered; the server goes on
        ├── RequestError            the request is wrong: names the field
        ├── OverloadError           too many wait already
        ├── DeadlineError           not answered in time
        ├── GenerationError         the model failed on this prompt
        └── EngineError             the engine is gone or stuck

Data errors (`MediaError`, `RecordError`) are caught per sample and counted; all others stop the run.
Each error carries its subject as attributes, so that tables and messages are built from fields, not from text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self


class ValleyError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(ValleyError):
    """One or more settings are wrong.

    Attributes:
        problems: one line each, beginning with the dotted path of the setting.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SettingsError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class MediaError(ValleyError):
    """One media file cannot be used.

    Attributes:
        path: the file as the data names it, or a short label for bytes.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.path, self.reason)

    def named(self, path: str) -> Self:
        """Returns the same error under another name of the file, such as its place in a request."""
        kind, (_, *rest) = self.__reduce__()
        return kind(path, *rest)


class MissingMediaError(MediaError):
    """There is no such file."""


class EmptyMediaError(MediaError):
    """The file has no bytes, or not one frame."""


class UnsupportedMediaError(MediaError):
    """The bytes are not a container and codec that we read (playlists and scripts are refused here)."""


class DamagedMediaError(MediaError):
    """The file is truncated or corrupt."""


class MediaLimitError(MediaError):
    """The file is larger, longer or has more pixels than the limits allow."""


class DecodeTimeoutError(MediaError):
    """The decoder passed its deadline."""


class DecoderDiedError(DecodeTimeoutError):
    """The decoder died before it was done."""


class RefusedMediaError(MediaError):
    """The reference to the file is malformed, or policy forbids to follow it."""


class UnreachableMediaError(MediaError):
    """The host that the file is on failed, or has no such file for us.

    Attributes:
        status: the HTTP status it answered with; None: there was no answer.
    """

    def __init__(self, path: str, reason: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(path, reason)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.path, self.reason, self.status)


class FetchTimeoutError(MediaError):
    """The file was not there within the deadline."""


class FetchBusyError(MediaError):
    """Too many files are being fetched, and too many wait for their turn."""


class RecordError(ValleyError):
    """One record of a data file cannot be used.

    Attributes:
        sample_id: the record's id, or its position when it has none.
        field: the field at fault.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, sample_id: str, field: str, reason: str) -> None:
        self.sample_id, self.field, self.reason = sample_id, field, reason
        super().__init__(f"{sample_id}: {field}: {reason}")

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, str]]:
        return type(self), (self.sample_id, self.field, self.reason)


class StorageError(ValleyError):
    """Storage failed on every retry; the samples are not to blame."""


class RejectLimitError(ValleyError):
    """Too large a share of the samples was rejected."""


class DivergedError(ValleyError):
    """Loss or gradient of a step is not finite.

    Attributes:
        step: its number, counted from 1.
        loss: of its global batch.
        grad_norm: of all gradients.
        sample_ids: the samples of its global batch.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, sample_ids: Sequence[str]) -> None:
        self.step, self.loss, self.grad_norm, self.sample_ids = step, loss, grad_norm, tuple(sample_ids)
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}; it changed no weight, and the last checkpoint "
            f"is from before it. Its samples: {', '.join(self.sample_ids)}"
        )

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, tuple[str, ...]]]:
        return type(self), (self.step, self.loss, self.grad_norm, self.sample_ids)


class ModelError(ValleyError):
    """A tower, backbone, template or tokenizer cannot be used."""


class CheckpointError(ValleyError):
    """A checkpoint is missing, incomplete or does not fit this model."""


class TrackingError(ValleyError):
    """MLflow cannot be used as configured."""


class ClusterError(ValleyError):
    """The cluster cannot run what was asked."""


class ComparisonError(ValleyError):
    """Trials of a comparison failed.

    Args:
        consequence: what became of the others.
        failures: one line for each that failed.
    """

    def __init__(self, consequence: str, failures: Sequence[str]) -> None:
        self.consequence, self.failures = consequence, tuple(failures)
        super().__init__("\n  ".join([f"{len(self.failures)} trial(s) failed; {consequence}", *self.failures]))

    def __reduce__(self) -> tuple[type[ComparisonError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.consequence, self.failures)


class ServingError(ValleyError):
    """One request cannot be answered."""


class RequestError(ServingError):
    """A request is wrong.

    Attributes:
        field: the field at fault, as a dotted path; empty where it is the whole.
        reason: what is wrong with it, in one line.
        code: a short name that programs may look at.
        status: the HTTP status it is answered with.
    """

    def __init__(self, field: str, reason: str, *, code: str = "invalid_value", status: int = 400) -> None:
        self.field, self.reason, self.code, self.status = field, reason, code, status
        super().__init__(f"{field}: {reason}" if field else reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), code=self.code, status=self.status), (self.field, self.reason)


class OverloadError(ServingError):
    """Too many requests wait already."""


class DeadlineError(ServingError):
    """A request was not answered in time."""


class GenerationError(ServingError):
    """The model failed on one prompt; others are not concerned."""


class EngineError(ServingError):
    """The engine is gone, or has work and does not move."""
