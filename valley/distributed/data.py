"""Samples streamed to a training rank by Ray Data: slots in, decoded on the cluster's CPUs, batches out, in order.

    slots of this rank → actor pool of decoders (read, decode, sample, transform, tokenise) → micro-batches → steps

Every rank runs a pipeline of its own over its own slots, so the order is exact and nothing shifts when a sample is
rejected. What the pipelines may use together is shared out beforehand (`valley.distributed.cluster.Split`): each has a
fixed number of decoders and a share of the object store, beyond which Ray Data holds the decoders back.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from jaxtyping import Int64

from valley.data.collate import Sample
from valley.data.estimate import most_frames
from valley.data.loading import Loader
from valley.distributed.cluster import Split
from valley.errors import ClusterError

logger = logging.getLogger(__name__)

MAX_SLOTS_PER_TASK = 8
# Ray Data limits what its operators hold. The batches on their way from there to the trainer (the one in its hands, the
# one behind it, the blocks these are cut from) come on top, and are taken off the limit.
BATCHES_AT_THE_TRAINER = 3

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SlotLoader(Protocol[T_co]):
    """What a decoder does with a slot; `valley.data.loading.Loader` in a run."""

    def load(self, slot: int) -> T_co:
        """Returns what the slot holds, ready for a batch."""


class Decoder:
    """An actor of the decoding pool: loads the slots of a block, one after the other."""

    def __init__(self, loader: ray.ObjectRef[SlotLoader[object]]) -> None:
        self._loader = ray.get(loader)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turns a column of slots into a column of pickled samples, in the same order."""
        loaded = [self._loader.load(slot) for slot in block["slot"].to_pylist()]
        pickles = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in loaded]
        return pa.table({"loaded": pa.array(pickles, type=pa.large_binary())})


def stream(
    loader: ray.ObjectRef[SlotLoader[T]],
    slots: Int64[np.ndarray, " N"],
    split: Split,
    *,
    batch_size: int,
    sample_bytes: int,
) -> Iterator[list[T]]:
    """Yields the samples of `slots` in their order, `batch_size` at a time, decoded ahead on the cluster.

    Args:
        loader: the loader, already in the object store; one copy a decoder.
        slots: slot numbers, in the order to be yielded.
        split: the cluster's share-out; this stream takes one worker's part of it.
        batch_size: samples in a yielded list; the last may be shorter.
        sample_bytes: size of a large sample; decides how many a decoder hands over at once.

    Raises:
        ClusterError: the worker's share of the object store is too small for such batches.
    """
    budget = split.bytes_per_worker - BATCHES_AT_THE_TRAINER * batch_size * sample_bytes
    if budget < 2 * sample_bytes:
        raise ClusterError(
            f"each of {split.num_workers} worker(s) may keep {split.bytes_per_worker >> 20} MiB in the object "
            f"store; batches of {batch_size} samples of {sample_bytes / 2**20:.1f} MiB need more. Lower "
            "train.micro_batch or the frames a clip, raise cluster.memory_share, or give Ray a larger object store."
        )
    slots_per_task = min(budget // (2 * sample_bytes), MAX_SLOTS_PER_TASK)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        cpu=split.decoders_per_worker * split.cpus_per_decoder, object_store_memory=budget
    )
    parts = [slots[start : start + slots_per_task] for start in range(0, len(slots), slots_per_task)]
    blocks = [pa.table({"slot": part}) for part in parts]
    # Not from_arrow, whose task of a whole CPU for each block waits for ever where no node has one to spare.
    dataset = ray.data.from_blocks(blocks).map_batches(
        Decoder,
        fn_constructor_args=(loader,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=split.cpus_per_decoder,
        compute=ray.data.ActorPoolStrategy(size=split.decoders_per_worker),
    )
    for batch in dataset.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=1):
        yield [pickle.loads(item.as_buffer()) for item in batch["loaded"]]


@dataclass(frozen=True)
class RayStream:
    """Loads a rank's slots on the cluster; `valley.training.feed.Stream` as Ray Data.

    Attributes:
        split: the cluster's share-out.
    """

    split: Split

    def __call__(self, loader: Loader, slots: Int64[np.ndarray, " N"], batch_size: int) -> Iterator[list[Sample]]:
        """See `valley.training.feed.Stream` and `stream`."""
        stills = int(loader.manifest.num_frames.max()) <= 1
        num_frames = 1 if stills else max(most_frames(source.sampling) for source in loader.manifest.sources)
        largest = num_frames * loader.frame_bytes
        return stream(ray.put(loader), slots, self.split, batch_size=batch_size, sample_bytes=largest)
