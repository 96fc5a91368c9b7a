"""Joining a cluster, and who gets which of its CPUs and GPUs.

Trainers, Tune functions and decode tasks compete for the same logical CPUs. Ray Data waits in silence, for ever, when
the trainers hold them all; so the split is computed here, before anything starts, and one that would starve the
decoders is refused with the numbers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import ray

from valley.errors import ClusterError
from valley.training.settings import ClusterSettings

logger = logging.getLogger(__name__)

DECODER_BYTES = 1 << 30
"""Memory of a decode actor and its child, about; decoders get half of the cluster's memory at most."""
FEW_CPUS = 4
"""With more than these and no GPU, half of all CPUs compute and the other half decode."""
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Split:
    """The cluster's share-out between training workers and decoders.

    Attributes:
        num_workers: training workers that there is room for now.
        min_workers: as few may go on when nodes are lost.
        max_workers: as many may go on when nodes join.
        gpu: whether each has a GPU.
        cpus_per_worker: logical CPUs of a training worker.
        num_decoders: decode actors over the whole cluster.
        cpus_per_decoder: logical CPUs of a decode actor.
        object_store_bytes: bytes of samples in flight over the whole cluster.
    """

    num_workers: int
    min_workers: int
    max_workers: int
    gpu: bool
    cpus_per_worker: float
    num_decoders: int
    cpus_per_decoder: float
    object_store_bytes: int

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers < self.max_workers

    @property
    def decoders_per_worker(self) -> int:
        """Decode actors that feed one training worker."""
        return self.num_decoders // self.num_workers

    @property
    def bytes_per_worker(self) -> int:
        """Bytes of samples in flight towards one training worker."""
        return self.object_store_bytes // self.num_workers

    def __str__(self) -> str:
        room = f" (of {self.min_workers} to {self.max_workers})" if self.is_elastic else ""
        trainers = (
            f"{self.num_workers} worker(s){room} with {self.cpus_per_worker:g} CPU{' + 1 GPU' if self.gpu else ''} each"
        )
        decoders = f"{self.num_decoders} decoder(s) with {self.cpus_per_decoder:g} CPU each"
        return f"{trainers}; {decoders}; {self.object_store_bytes >> 20} MiB of samples in flight"


def share_out(resources: Mapping[str, float], settings: ClusterSettings) -> Split:
    """Splits a cluster's resources between training workers and decoders.

    Args:
        resources: what the cluster has to give, by Ray's names.
        settings: numbers asked for; `auto` is filled in. Of a range of workers, as many as there is room for now, and
            later as many as find a GPU. Without GPUs the number does not grow: Ray Train would at once put so many
            workers on the CPUs that are there that none is left to decode with.

    Raises:
        ClusterError: too few GPUs or CPUs, with the numbers.
    """
    gpus = int(resources.get("GPU", 0))
    gpu = gpus > 0 if settings.gpu == "auto" else settings.gpu
    fewest, most = _asked_workers(settings, gpus if gpu else 1)
    if not 1 <= fewest <= most:
        raise ClusterError(f"cluster.num_workers: {settings.num_workers}: not a number of workers on a cluster")
    error: ClusterError | None = None
    for num_workers in range(most, fewest - 1, -1):
        try:
            split = _split(resources, settings, num_workers, fewest, gpu=gpu)
        except ClusterError as problem:
            error = problem
        else:
            return replace(split, max_workers=most) if gpu and num_workers == gpus else split
    raise error or AssertionError("a range of workers is never empty")


def _asked_workers(settings: ClusterSettings, usual: int) -> tuple[int, int]:
    """The fewest and the most training workers."""
    asked = settings.num_workers
    if isinstance(asked, tuple):
        return asked
    number = max(usual, 1) if asked == "auto" else asked
    return number, number


def _split(
    resources: Mapping[str, float], settings: ClusterSettings, num_workers: int, min_workers: int, *, gpu: bool
) -> Split:
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    if gpu and num_workers > gpus:
        raise ClusterError(f"cluster.num_workers: {num_workers} workers need a GPU each, the cluster has {gpus} free")
    half = int(cpus / 2 / num_workers) if cpus > FEW_CPUS else 0
    default_cpus = 1.0 if gpu else half or 0.5
    cpus_per_worker = default_cpus if settings.cpus_per_worker == "auto" else settings.cpus_per_worker
    num_decoders = int((cpus - num_workers * cpus_per_worker) / settings.cpus_per_decoder)
    if memory := resources.get("memory", 0):
        num_decoders = min(num_decoders, max(int(memory / 2 / DECODER_BYTES), num_workers))
    if settings.max_decoders is not None:
        num_decoders = min(num_decoders, settings.max_decoders)
    num_decoders -= num_decoders % num_workers
    if num_decoders < num_workers:
        raise ClusterError(
            f"nothing is left to decode with: the cluster has {cpus:g} free CPUs, {num_workers} training worker(s) "
            f"take {cpus_per_worker:g} each, and each needs a decoder of {settings.cpus_per_decoder:g} CPUs at least. "
            "Lower cluster.num_workers, cluster.cpus_per_worker or cluster.cpus_per_decoder, or add nodes."
        )
    return Split(
        num_workers=num_workers,
        min_workers=min_workers,
        max_workers=num_workers,
        gpu=gpu,
        cpus_per_worker=cpus_per_worker,
        num_decoders=num_decoders,
        cpus_per_decoder=settings.cpus_per_decoder,
        object_store_bytes=int(resources.get("object_store_memory", 0) * settings.memory_share),
    )


def connect(settings: ClusterSettings) -> None:
    """Joins the cluster that the settings, `$RAY_ADDRESS` or the surrounding job name, or starts a local one.

    Raises:
        ClusterError: the cluster named cannot be reached.
    """
    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        else:
            # It makes itself a token; the warning about that tells how to switch the protection off.
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            # With the dashboard: Ray Train watches its workers through it, and complains every second without.
            ray.init(address="local", log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address or 'local'}: {error}") from error
    logger.info("Ray %s with %s", ray.__version__, _describe(ray.cluster_resources()))


def free_resources() -> dict[str, float]:
    """Returns what the cluster has to give now.

    What a job that has just ended held is given back within seconds; that is waited for.
    """
    give_up_s = time.monotonic() + _PATIENCE_S
    while True:
        free, total = ray.available_resources(), ray.cluster_resources()
        cpus = free.get("CPU", 0.0)
        if cpus >= total.get("CPU", 0.0) or time.monotonic() > give_up_s:
            break
        time.sleep(0.5)
    if cpus < total.get("CPU", 0.0):
        logger.warning("the cluster is in use: %g of %g CPUs are free", cpus, total.get("CPU", 0.0))
    return {**free, "object_store_memory": total.get("object_store_memory", 0.0)}


def num_nodes() -> int:
    """Live nodes of the cluster."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def store_bytes_used() -> int:
    """Bytes of the cluster's object store that are in use, all nodes together."""
    # Ray has no public call for this figure; `ray memory` asks for it in this way.
    from ray._private import internal_api, state

    return int(internal_api.get_memory_info_reply(state.state).store_stats.object_store_bytes_used)


def _describe(resources: Mapping[str, float]) -> str:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    store_mib = int(resources.get("object_store_memory", 0)) >> 20
    return f"{num_nodes()} node(s), {cpus:g} CPUs, {gpus:g} GPUs, {store_mib} MiB of object store"
