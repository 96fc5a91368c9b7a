"""A final error on one rank ends the whole group, without waiting for the other ranks' collectives."""

import time
from pathlib import Path

import pytest
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from valley.distributed.failures import end_together, read_failure
from valley.errors import ModelError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def rank_that_fails_alone(config: dict[str, str]) -> None:
    """Rank 1 has no model; rank 0 waits for it, for much longer than the test may take."""
    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()

    def work() -> None:
        if rank == 1:
            while not (folder / "waiting").exists():
                time.sleep(0.05)
            raise ModelError("no such tower")
        (folder / "waiting").touch()
        time.sleep(3600)

    end_together(work, folder, rank=rank, world_size=2, patience_s=0.5)


def test_a_final_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    trainer = DataParallelTrainer(
        rank_that_fails_alone,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=0)),
    )
    with pytest.raises(ray.train.TrainingFailedError):
        trainer.fit()

    assert str(read_failure(tmp_path)) == "no such tower"
