"""A run in a process of its own that writes down which samples it is given: `killable_run.py SETTINGS LOG [STEP]`.

With STEP it kills itself, with no chance to tidy up, before the first step after that many which has a checkpoint of
`OLDEST_GONE_ON_FROM` steps or more behind it. A checkpoint is written while the training goes on, and is complete when
the next one is due at the latest.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from valley.checkpoints import store
from valley.data.collate import Sample
from valley.data.loading import Loader
from valley.training.feed import load_ahead
from valley.training.job import checkpoints_of, job_status, open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve

OLDEST_GONE_ON_FROM = 5


def main(settings_file: str, log: str, last_step: str | None = None) -> None:
    torch.set_num_threads(1)
    settings = RunSettings.model_validate_json(Path(settings_file).read_text())
    job = open_job(prepare_job(settings))

    def kill_when_due() -> None:
        curves = Path(settings.output) / "metrics.jsonl"
        if last_step is None or not curves.exists() or len(read_curve(curves, "train/loss")) < int(last_step):
            return
        if any(found.step >= OLDEST_GONE_ON_FROM for found in store.complete(checkpoints_of(settings))):
            os.kill(os.getpid(), signal.SIGKILL)

    def stream(loader: Loader, slots: Any, batch_size: int) -> Iterator[list[Sample]]:
        with Path(log).open("a") as file:
            for samples in load_ahead(loader, slots, batch_size):
                file.writelines(f"{sample.slot} {sample.sample_id}\n" for sample in samples)
                file.flush()
                kill_when_due()
                yield samples

    with job_status(job):
        train_rank(job, stream=stream, device=torch.device("cpu"))


if __name__ == "__main__":
    main(*sys.argv[1:])
