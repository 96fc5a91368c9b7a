"""Filling a feature store on Ray: files are decoded on the cluster's CPUs, the tower runs on its GPUs, or on CPUs.

    files → actor pool of readers (find, hash, decode) → actor pool of encoders (tower, write a shard) → counts

What was written stays when the job is killed; the same command goes on with what is missing.
"""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pyarrow as pa
import ray
import ray.data
import torch

from valley.data.settings import DataSettings
from valley.distributed.cluster import Split, connect, free_resources, share_out
from valley.features.encode import Encoder, Reader
from valley.features.identity import StoreHeader
from valley.features.store import FeatureStore
from valley.model.vision import VisionTower
from valley.training.encoding import EncodeJob, EncodeSettings, Tally, finish_encoding, pick_device, prepare_encoding

TASKS_PER_BLOCK = 16


def encode_on_ray(settings: EncodeSettings) -> str:
    """Fills a store on the cluster that the settings name, or on a local one; returns the summary as text.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    started_s = time.perf_counter()
    job = prepare_encoding(settings, pick_device(settings))
    connect(settings.cluster)
    split = share_out(free_resources(), settings.cluster)
    tally = _encode(job, split)
    return finish_encoding(job, tally, time.perf_counter() - started_s)


def _encode(job: EncodeJob, split: Split) -> Tally:
    settings = job.settings
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=split.object_store_bytes
    )
    parts = [job.tasks[start : start + TASKS_PER_BLOCK] for start in range(0, len(job.tasks), TASKS_PER_BLOCK)]
    blocks = [_table([pickle.dumps(task) for task in part]) for part in parts]
    dataset = ray.data.from_blocks(blocks).map_batches(
        _ReaderActor,
        fn_constructor_args=(job.store.folder, settings.data),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=split.cpus_per_decoder,
        compute=ray.data.ActorPoolStrategy(size=split.num_decoders),
    )
    encoded = dataset.map_batches(
        _EncoderActor,
        fn_constructor_args=(ray.put(job.tower.cpu()), job.store.folder, job.store.header, split),
        batch_size=settings.store.clips_per_shard,
        batch_format="pyarrow",
        num_cpus=split.cpus_per_worker,
        num_gpus=1 if split.gpu else 0,
        compute=ray.data.ActorPoolStrategy(size=split.num_workers),
    )
    tally = Tally()
    for batch in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        for item in batch["item"]:
            part: Tally = pickle.loads(item.as_buffer())
            tally.files += part.files
            tally.frames += part.frames
            tally.rejects += part.rejects
    return tally


def _table(pickles: list[bytes]) -> pa.Table:
    return pa.table({"item": pa.array(pickles, type=pa.large_binary())})


class _ReaderActor:
    """An actor of the decoding pool."""

    def __init__(self, folder: Path, settings: DataSettings) -> None:
        self._reader = Reader(FeatureStore(folder), settings)

    def __call__(self, block: pa.Table) -> pa.Table:
        outcomes = [self._reader(pickle.loads(item.as_buffer())) for item in block["item"]]
        return _table([pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL) for outcome in outcomes])


class _EncoderActor:
    """An actor of the pool that runs the tower."""

    def __init__(self, tower: ray.ObjectRef[VisionTower], folder: Path, header: StoreHeader, split: Split) -> None:
        device = torch.device("cuda" if split.gpu else "cpu")
        if not split.gpu:
            torch.set_num_threads(max(1, int(split.cpus_per_worker)))
        self._encoder = Encoder(ray.get(tower).to(device), folder, header)

    def __call__(self, block: pa.Table) -> pa.Table:
        tally = Tally()
        pictures = tally.add(pickle.loads(item.as_buffer()) for item in block["item"])
        tally.frames += self._encoder(pictures)
        return _table([pickle.dumps(tally)])
