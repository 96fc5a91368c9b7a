"""A training run on Ray: the cluster's share-out, Ray Train's workers, and the one summary that comes of them."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import ray
import ray.train
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from valley.distributed.cluster import Split, connect, free_resources, num_nodes, share_out, store_bytes_used
from valley.distributed.data import RayStream
from valley.distributed.failures import end_together, forget_failure, read_failure
from valley.errors import ValleyError
from valley.training.feed import load_ahead
from valley.training.job import Job, job_status, open_job, prepare_job
from valley.training.meter import process_gauges
from valley.training.progress import Bar, following
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.summary import format_summary, read_summary
from valley.training.tracking import METRICS_FILE

logger = logging.getLogger(__name__)


def run_on_ray(settings: RunSettings, resources: Mapping[str, float] | None = None) -> str:
    """Trains on the cluster that the settings name, or on a local one; returns the summary as text.

    Args:
        settings: of the run.
        resources: what it may take, by Ray's names; None: all that is free.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    job = prepare_job(settings)
    connect(settings.cluster)
    split = share_out(free_resources() if resources is None else resources, settings.cluster)
    if resources is not None:  # what is free besides is for others
        split = replace(split, max_workers=split.num_workers)
    logger.info("%s", split)
    job = open_job(job, num_nodes=num_nodes())
    logger.info("starting %d training worker(s); this takes a while", split.num_workers)
    with job_status(job), _shown(job) as followed:
        _fit(job, split, followed=followed)
    return format_summary(read_summary(job.folder))


@contextmanager
def _shown(job: Job) -> Iterator[bool]:
    """Within: this process shows the steps, if it has a terminal; workers have none. Yields whether it does."""
    if not sys.stderr.isatty():
        yield False
        return
    with following(job.folder / METRICS_FILE, job.total_steps, Bar(job.total_steps)):
        yield True


def _fit(job: Job, split: Split, *, followed: bool) -> None:
    # Typed as a whole number by mistake: a range makes the group elastic.
    num_workers: Any = (split.min_workers, split.max_workers) if split.is_elastic else split.num_workers
    trainer = TorchTrainer(
        _work,
        # In the object store once, not in every message that carries the worker's configuration.
        train_loop_config={"job": ray.put(job), "split": split, "followed": followed},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=split.gpu,
            resources_per_worker={"CPU": split.cpus_per_worker, **({"GPU": 1} if split.gpu else {})},
        ),
        run_config=RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=job.settings.cluster.max_failures),
        ),
        torch_config=TorchConfig(
            backend="nccl" if split.gpu else "gloo", timeout_s=math.ceil(job.settings.cluster.stuck_after_s or 1 << 30)
        ),
        dataset_config=DataConfig(),
    )
    forget_failure(job.folder)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_cause(read_failure(job.folder), error)
    if failure := read_failure(job.folder):
        raise failure


def _work(config: dict[str, Any]) -> None:
    """One rank, in its own process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Ray Data tells its plan, and warns while its first decoders are still starting. Whether they fit is known.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    job, split = ray.get(config["job"]), config["split"]
    if not split.gpu:
        torch.set_num_threads(max(1, int(split.cpus_per_worker)))
    # While the ranks validate, the training's decoders are held back but keep their CPUs: held-out samples are loaded
    # by threads of this process, on the cores of its node that those decoders leave idle.
    workers_here = ray.train.get_context().get_local_world_size()
    cores = max(1, (os.cpu_count() or 1) // workers_here)
    held_out = partial(load_ahead, num_threads=min(split.decoders_per_worker, cores))
    work = partial(
        train_rank,
        job,
        device=get_device(),
        stream=RayStream(split),
        validation_stream=held_out,
        gauges=_gauges,
        followed=config["followed"],
    )
    context = ray.train.get_context()
    end_together(work, job.folder, rank=context.get_world_rank(), world_size=context.get_world_size())


def _gauges() -> dict[str, float]:
    """This process's memory, and how full the cluster's object store is."""
    share = store_bytes_used() / max(ray.cluster_resources().get("object_store_memory", 0), 1)
    return {**process_gauges(), "memory/object_store_share": share}


def _raise_cause(final: ValleyError | None, error: ray.train.TrainingFailedError) -> NoReturn:
    """Raises the error of the worker that failed, when it is one of ours: its message is the one that helps."""
    if final:
        raise final from error
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, ValleyError):
                raise cause from error
            cause = cause.__cause__ or getattr(cause, "cause", None)
    raise error
