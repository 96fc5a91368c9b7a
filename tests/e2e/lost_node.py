"""Trains on two nodes and takes one away: `lost_node.py SETTINGS STEP`."""

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from valley.distributed.train import run_on_ray
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve


def main(settings_file: str, step: str) -> None:
    settings = RunSettings.model_validate_json(Path(settings_file).read_text())
    # Each has room for one worker and its decoder, and none for another worker.
    node = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    curves = Path(settings.output) / "metrics.jsonl"

    def take_away() -> None:
        while not curves.exists() or len(read_curve(curves, "train/loss")) < int(step):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    threading.Thread(target=take_away, daemon=True).start()
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"address": cluster.address})})
    run_on_ray(settings)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
