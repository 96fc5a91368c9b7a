"""What is known of a run beside its checkpoints, so that the same command goes on with it after whatever ended it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from valley.checkpoints.places import Place, read_text
from valley.checkpoints.store import write_json
from valley.model.saved import saved_folder
from valley.training.mlflow_tracker import MlflowRun
from valley.training.settings import RunSettings
from valley.training.tracking import flatten

RECORD_FILE = "run.json"
_DECIDING = (
    "seed",
    "model.",
    "data.sampling.",
    "data.blind",
    "data.max_tokens",
    "data.validation.fraction",
    "data.validation.sources",
    "train.",
    "lora",
)
"""Settings that decide which weights come out; a run goes on under the same ones only."""
_INDIFFERENT = (
    "model.llm.attention",
    "model.vision.micro_batch",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.spike",
)
"""Among those, what changes how it is computed and not what."""

_LOOKS, _LOOK_BYTES = 64, 1 << 16
"""How often, and how much of it, a file is looked at: small ones are read whole, and large ones are not."""


@dataclass(frozen=True)
class Start:
    """One time that the workers began or went on.

    Attributes:
        time: in ISO 8601, UTC.
        step: steps taken before.
        num_workers: how many they were.
    """

    time: str
    step: int
    num_workers: int


@dataclass(frozen=True)
class RunRecord:
    """The run that checkpoints belong to.

    Attributes:
        identity: what must be the same for it to go on: settings by their dotted paths, and the data's hash.
        mlflow: its MLflow run.
        starts: the first start, and every restart.
    """

    identity: Mapping[str, str]
    mlflow: MlflowRun | None
    starts: tuple[Start, ...] = ()

    def started(self, step: int, num_workers: int) -> RunRecord:
        """Returns the record with one more start."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return replace(self, starts=(*self.starts, Start(now, step, num_workers)))

    def differences(self, identity: Mapping[str, str]) -> list[str]:
        """Returns what stands in the way of going on under another identity, a line each."""
        keys = sorted(self.identity.keys() | identity.keys())
        missing = "nothing"
        return [
            f"{key}: {self.identity.get(key, missing)}, now {identity.get(key, missing)}"
            for key in keys
            if self.identity.get(key) != identity.get(key)
        ]


def identity_of(settings: RunSettings, data_hash: str) -> dict[str, str]:
    """Returns what decides a run's weights.

    Args:
        settings: the run's settings.
        data_hash: of the records, their sampling and weights included.
    """
    deciding = {
        key: value
        for key, value in flatten(settings).items()
        if key.startswith(_DECIDING) and not key.startswith(_INDIFFERENT)
    }
    weights = [source.weight for source in settings.data.sources]
    return {
        **deciding,
        "data.sources.weight": json.dumps(weights),
        "data": data_hash,
        "model.path contents": _fingerprint(settings.model.path),
    }


def _fingerprint(path: str | None) -> str:
    """The files of a saved model by their names, sizes and samples of their bytes: copies of a model are the same."""
    files = sorted(file for file in Path(saved_folder(path)).glob("*") if file.is_file()) if path else []
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for begin in sorted({size * part // _LOOKS for part in range(_LOOKS)}):
                content.seek(begin)
                digest.update(content.read(_LOOK_BYTES))
    return digest.hexdigest()[:16] if files else "none"


def write_record(checkpoints: Place, record: RunRecord) -> None:
    """Writes the record, whole or not at all."""
    if isinstance(checkpoints, Path):
        checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / RECORD_FILE, asdict(record))


def read_record(checkpoints: Place) -> RunRecord | None:
    """Returns the record of the run that wrote these checkpoints; None when there is none."""
    try:
        content = json.loads(read_text(checkpoints / RECORD_FILE))
    except FileNotFoundError:
        return None
    mlflow = MlflowRun(**content["mlflow"]) if content["mlflow"] else None
    return RunRecord(content["identity"], mlflow, tuple(Start(**start) for start in content["starts"]))
