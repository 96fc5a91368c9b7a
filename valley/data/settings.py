"""What a run learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from valley.config import Location, Settings
from valley.media.decode import Limits
from valley.media.sampling import Sampling


class SourceSettings(Settings):
    """One data file and the folder its media live in."""

    path: Location
    """Records (appendix B) as a JSON array, JSON Lines or Parquet; a path or fsspec URI."""
    root: Location = ""
    """Folder or fsspec URI that media paths are relative to; empty: the data file's own folder."""
    name: str | None = None
    """Name in tables and metrics; null: the data file's stem."""
    weight: NonNegativeFloat = 1.0
    """Passes over this source in an epoch: 2.5 is two copies and a seeded half."""
    sampling: Sampling | None = None
    """Sampling of this source's clips; null: `data.sampling`."""


class ValidationSettings(Settings):
    """Held-out samples the loss is measured on."""

    sources: list[SourceSettings] = []
    """Data files to validate on; empty: a seeded split of `data.sources`."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of every source that is split off when `sources` is empty; 0: no validation."""
    max_samples: PositiveInt = 512
    """At most this many samples are looked at, each time."""
    every_steps: NonNegativeInt = 200
    """Steps between two validations; 0: only at the end."""
    prompts: NonNegativeInt = 8
    """Samples whose answers are generated and logged at each validation."""
    questions: NonNegativeInt = 0
    """Held-out records that have `kind`, `answer` and `choices`: so many of them are asked at each validation, and the
    share of right answers is a curve (`validation/accuracy`), in all and by kind."""


class DataSettings(Settings):
    """Where the samples come from and how they are read."""

    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    """The data files of the mixture."""
    validation: ValidationSettings = ValidationSettings()
    sampling: Sampling = Sampling()
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """Which library decodes; `auto`: the fastest that is right for the file."""
    limits: Limits = Limits()
    max_remote_bytes: PositiveInt = 1 << 30
    """Largest file read from a remote root; it is held in memory whole, twice while it is decoded, by every worker."""
    blind: bool = False
    """Leave all media out of the dialogues: a run that shows what can be learned from their text alone."""
    max_tokens: PositiveInt = 2048
    """Longest sample in tokens, visual tokens included (appendix A); longer ones are cut at the end of their text."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rejected samples that stops the job, judged after `rejects_grace` samples."""
    rejects_grace: PositiveInt = 200
    """Samples seen before `max_rejected` is judged."""
    known_rejects: Location | None = None
    """An earlier run's `rejects.parquet`; its files are skipped unless they changed. Null: this run folder's own."""
    retries: NonNegativeInt = 4
    """Tries again, with jitter, after a storage error that may pass."""
