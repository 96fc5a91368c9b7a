"""Ray Data feeds: exact order, and no more decoding or memory in flight than was shared out."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray

from valley.distributed.cluster import Split, share_out, store_bytes_used
from valley.distributed.data import stream
from valley.training.settings import ClusterSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

MIB = 1 << 20


@dataclass
class LoggingLoader:
    """Hands out megabyte samples and leaves a line at the start and the end of each, whatever process it runs in."""

    log: Path
    num_bytes: int

    def load(self, slot: int) -> tuple[int, bytes]:
        with self.log.open("a", buffering=1) as log:
            log.write(f"+ {time.monotonic()}\n")
            time.sleep(0.01)
            log.write(f"- {time.monotonic()}\n")
        return slot, bytes(self.num_bytes)

    def most_at_once(self) -> int:
        lines = (line.split() for line in self.log.read_text().splitlines())
        running = most = 0
        for _, sign in sorted((float(moment), sign) for sign, moment in lines):
            running += 1 if sign == "+" else -1
            most = max(most, running)
        return most


def consume(loader: list[ray.ObjectRef], slots: np.ndarray, split: Split, pause_s: float) -> list[int]:
    seen = []
    for batch in stream(loader[0], slots, split, batch_size=4, sample_bytes=MIB):
        seen += [slot for slot, _ in batch]
        time.sleep(pause_s)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_ranks_get_their_slots_in_order_within_the_global_limits(tmp_path: Path) -> None:
    resources = ray.cluster_resources()
    split = share_out(resources, ClusterSettings(num_workers=8, cpus_per_worker=0.5, memory_share=0.3))
    assert split.num_decoders == 8
    loader = LoggingLoader(tmp_path / "log", num_bytes=MIB)
    reference = ray.put(loader)
    rank = ray.remote(num_cpus=split.cpus_per_worker)(consume)
    used_before = store_bytes_used()
    peaks = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks.append(store_bytes_used() - used_before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    shares = [np.arange(rank, 8 * 48, 8) for rank in range(8)]
    # A slow trainer: samples would pile up in the object store if nothing held the decoders back.
    seen = ray.get([rank.remote([reference], share, split, 0.2) for share in shares])
    done.set()
    watcher.join()

    assert seen == [share.tolist() for share in shares]
    assert 1 <= loader.most_at_once() <= split.num_decoders
    assert max(peaks) <= split.object_store_bytes < 8 * 48 * MIB


def test_a_decoder_that_dies_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    split = Split(1, 1, 1, False, 0.5, 1, 0.5, 100 * MIB)
    seen = consume([ray.put(DyingLoader(tmp_path / "died"))], np.arange(32), split, 0.0)
    assert seen == list(range(32))
    assert (tmp_path / "died").exists()


@dataclass
class DyingLoader:
    """Kills its process once, in the middle."""

    mark: Path

    def load(self, slot: int) -> tuple[int, bytes]:
        if slot == 13 and not self.mark.exists():
            self.mark.touch()
            import os

            os._exit(1)
        return slot, b""
