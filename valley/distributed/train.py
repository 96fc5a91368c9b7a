"""A training run on Ray: the cluster's share-out, Ray Train's workers, and the one summary that comes of them."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import Any, NoReturn

import ray
import ray.train
import torch
from ray.train import DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from valley.distributed.cluster import Split, connect, num_nodes, share_out, store_bytes_used
from valley.distributed.data import RayStream
from valley.errors import ValleyError
from valley.training.feed import load_ahead
from valley.training.job import Job, job_status, open_job, prepare_job
from valley.training.meter import process_gauges
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.summary import format_summary, read_summary

logger = logging.getLogger(__name__)


def run_on_ray(settings: RunSettings) -> str:
    """Trains on the cluster that the settings name, or on a local one; returns the summary as text.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    job = prepare_job(settings)
    connect(settings.cluster)
    split = share_out(ray.cluster_resources(), settings.cluster)
    logger.info("%s", split)
    job = open_job(job, num_nodes=num_nodes())
    with job_status(job):
        _fit(job, split)
    return format_summary(read_summary(job.folder))


def _fit(job: Job, split: Split) -> None:
    trainer = TorchTrainer(
        _work,
        # In the object store once, not in every message that carries the worker's configuration.
        train_loop_config={"job": ray.put(job), "split": split},
        scaling_config=ScalingConfig(
            num_workers=split.num_workers,
            use_gpu=split.gpu,
            resources_per_worker={"CPU": split.cpus_per_worker, **({"GPU": 1} if split.gpu else {})},
        ),
        run_config=RunConfig(name=time.strftime("%Y%m%d-%H%M%S"), storage_path=str(job.folder / "ray")),
        torch_config=TorchConfig(backend="nccl" if split.gpu else "gloo"),
        dataset_config=DataConfig(),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_cause(error)


def _work(config: dict[str, Any]) -> None:
    """One rank, in its own process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    job, split = ray.get(config["job"]), config["split"]
    if not split.gpu:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    # While the ranks validate, the training's decoders are held back but keep their CPUs: held-out samples are loaded
    # by threads of this process, on the cores that those decoders leave idle.
    held_out = partial(load_ahead, num_threads=split.decoders_per_worker)
    train_rank(job, stream=RayStream(split), validation_stream=held_out, device=get_device(), gauges=_gauges)


def _gauges() -> dict[str, float]:
    """This process's memory, and how full the cluster's object store is."""
    share = store_bytes_used() / max(ray.cluster_resources().get("object_store_memory", 0), 1)
    return {**process_gauges(), "memory/object_store_share": share}


def _raise_cause(error: ray.train.TrainingFailedError) -> NoReturn:
    """Raises the error of the worker that failed, when it is one of ours: its message is the one that helps."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, ValleyError):
                raise cause from error
            cause = cause.__cause__ or getattr(cause, "cause", None)
    raise error
