"""A run in a process of its own that writes down which samples it is given: `killable_run.py SETTINGS LOG`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from valley.data.collate import Sample
from valley.data.loading import Loader
from valley.training.feed import load_ahead
from valley.training.job import job_status, open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import RunSettings


def main(settings_file: str, log: str) -> None:
    torch.set_num_threads(1)
    job = open_job(prepare_job(RunSettings.model_validate_json(Path(settings_file).read_text())))

    def stream(loader: Loader, slots: Any, batch_size: int) -> Iterator[list[Sample]]:
        with Path(log).open("a") as file:
            for samples in load_ahead(loader, slots, batch_size):
                file.writelines(f"{sample.slot} {sample.sample_id}\n" for sample in samples)
                file.flush()
                yield samples

    with job_status(job):
        train_rank(job, stream=stream, device=torch.device("cpu"))


if __name__ == "__main__":
    main(*sys.argv[1:])
